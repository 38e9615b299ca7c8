"""Checks: flags about the audit itself. Each is a function of the finished runs; docs/flags.md is written from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from unbatch.analysis import TOKENS_PROVEN
from unbatch.reporting.results import Audit, Example, Flag, Run, Status
from unbatch.reporting.thresholds import EXACT, NEAR_CHANCE

SMALL_RESIDUAL = 1e-3  # relative
LARGE_ERROR = 0.1  # relative


@dataclass(frozen=True)
class Check:
    """One flag: when it is raised, what it means and what to do."""

    name: str
    raised_if: str
    means: str
    do: str
    find: Callable[[Audit], Iterable[str]]  # one sentence for each time it applies

    def __call__(self, audit: Audit) -> list[Flag]:
        words = list(dict.fromkeys(self.find(audit)))
        return [Flag(name=self.name, words=" ".join(words), means=self.means, do=self.do)] if words else []


def flags(audit: Audit) -> list[Flag]:
    """Everything about an audit that its reader must know before quoting it: every check that is raised."""
    return [flag for check in CHECKS for flag in check(audit)]


def _pairs(audit: Audit) -> Iterable[tuple[Run, Example]]:
    return ((run, example) for run in audit.runs for example in run.examples)


def _exact_claim(audit: Audit) -> Iterable[str]:
    for run, e in _pairs(audit):
        if run.guarantee == "exact" and e.error is not None and e.bound is not None and e.error > max(e.bound, EXACT):
            yield f"{run.title} claims example {e.index} of client {run.client} exactly; its error is {e.error:.1e}."
    said = {verdict.name: verdict for verdict in audit.verdicts if verdict.analysis == "token-bag"}
    if TOKENS_PROVEN in said and "bag precision" in said and said["bag precision"].value < 1:
        yield f"token-bag names tokens that are not in the batch: {said['bag precision'].words}"


def _bound_violated(audit: Audit) -> Iterable[str]:
    for run, e in _pairs(audit):
        if e.error is not None and e.bound is not None and e.error > e.bound:
            yield f"{run.title}, example {e.index} of client {run.client}: error {e.error:.1e} above bound {e.bound:.1e}."


def _label_proof(audit: Audit) -> Iterable[str]:
    held = {client.index: Counter(client.labels) for client in audit.clients}
    for run in audit.runs:
        proven = Counter(
            e.label for e in run.examples if e.bound is not None and e.error is None and e.label is not None
        )
        for label, count in proven.items():
            true = held.get(run.client, Counter())[label]
            if audit.truth and count > true:
                yield f"{run.title} proves that client {run.client} holds {count} of class {label}; it holds {true}."


def _lower_bound_beaten(audit: Audit) -> Iterable[str]:
    if "psnr" not in audit.metrics:
        return
    held = [b for b in audit.bounds if b.scope == "any" and b.covers == "update"]
    for run in audit.runs:
        scores = [e.scores.get("psnr") for e in run.examples]
        squares = [10 ** (-score / 10) for score in scores if score is not None]
        if len(squares) < len(scores) or not scores or run.guesses > len(scores) or {"sign", "scale"} & set(run.up_to):
            continue
        error = (sum(squares) / len(squares)) ** 0.5
        for b in held:
            if b.client == run.client and error < b.value:
                yield (
                    f"{run.title} on client {run.client}: root mean squared error {error:.2e} over the batch, where "
                    f"{b.name} allows none below {b.value:.2e}."
                )


def _heuristic_beats_exact(audit: Audit) -> Iterable[str]:
    best: dict[tuple[int, int], dict[str, float]] = {}
    for run, e in _pairs(audit):
        if e.error is not None:
            kind = "heuristic" if run.guarantee == "heuristic" else "exact"
            held = best.setdefault((run.client, e.index), {})
            held[kind] = min(held.get(kind, float("inf")), e.error)
    for (client, index), errors in best.items():
        if errors.get("heuristic", float("inf")) <= EXACT < errors.get("exact", 0.0):
            yield f"example {index} of client {client}: {errors['heuristic']:.1e} against {errors['exact']:.1e}."


def _not_identifiable(audit: Audit) -> Iterable[str]:
    for run in audit.runs:
        worst = max((e.error for e in run.examples if e.error is not None), default=0.0)
        if run.residual is not None and run.residual < SMALL_RESIDUAL and worst > LARGE_ERROR:
            yield f"{run.title} on client {run.client} explains the update to {run.residual:.1e} and is {worst:.0%} off."


def _near_chance(audit: Audit) -> Iterable[str]:
    if "psnr" not in audit.metrics:
        return
    for run in audit.runs:
        gaps = [
            score - chance
            for e in run.examples
            if (score := e.scores.get("psnr")) is not None and (chance := e.chance.get("psnr")) is not None
        ]
        if gaps and max(gaps) < NEAR_CHANCE:
            yield f"{run.title} on client {run.client} is at best {max(gaps):+.1f} dB from chance."


def _not_reproducible(audit: Audit) -> Iterable[str]:
    for client in audit.clients:
        if not client.reproducible:
            yield f"client {client.index} sent two different updates for the same seed."


def _not_averaged(audit: Audit) -> Iterable[str]:
    ran = [run for run in audit.runs if run.ran or run.status == Status.FAILED]
    if audit.random_defences and not any("earlier" in run.knowledge for run in ran):
        yield f"{', '.join(audit.random_defences)} is random, and no attack here averages over it."


def _not_converged(audit: Audit) -> Iterable[str]:
    for run in audit.runs:
        if run.status == Status.CUT_SHORT or run.trace.get("converged") is False:
            why = "was cut short" if run.status == Status.CUT_SHORT else "had not converged"
            yield f"{run.title} on client {run.client} {why}."


def _want_of_labels(audit: Audit) -> Iterable[str]:
    for run in audit.runs:
        if run.status == Status.NOT_APPLICABLE and run.missing == ["labels"]:
            yield f"{run.title} was skipped only because the labels are not known."


def _union(audit: Audit) -> Iterable[str]:
    if not _those_that("sums_clients", audit):
        return
    if exact := len(audit.recovered()):
        yield f"{exact} examples leak from the sum; which client holds which is not told by it."
    gains = {
        (run.client, e.index)
        for run, e in _pairs(audit)
        if (score := e.scores.get("psnr")) is not None
        and (chance := e.chance.get("psnr")) is not None
        and score > chance + NEAR_CHANCE
    } - audit.recovered()
    if gains:
        yield f"{len(gains)} come out nearer than chance; which client holds which is not told by the sum."


def _those_that(effect: str, audit: Audit) -> list[str]:
    """The defences that say of themselves that they do this, whatever they are called."""
    return [spec for spec in audit.defences if effect in audit.effects.get(spec, ())]


def _unaware(audit: Audit) -> Iterable[str]:
    handed = [set(run.knowledge) for run in audit.runs if run.ran]
    for spec in audit.defences:
        telling = {*audit.published.get(spec, ()), "log_prob"}
        if handed and "loss" not in telling and not any(known & telling for known in handed):
            yield f"no attack that ran was told of {spec}."


def _clip_without_noise(audit: Audit) -> Iterable[str]:
    if not _those_that("adds_noise", audit):
        for spec in _those_that("clips", audit):
            yield f"{spec} stands without any noise."


def _noise_without_accounting(audit: Audit) -> Iterable[str]:
    noisy = _those_that("adds_noise", audit)
    if noisy and (audit.privacy is None or audit.privacy.epsilon is None):
        yield f"nobody accounts for {', '.join(noisy)}: there is no epsilon."


CHECKS: tuple[Check, ...] = (
    Check(
        "exact-claim-fails",
        "`token-bag` proves a token to be in a batch that has it not, or "
        "an attack that declares itself exact returned a certified example whose true error is above its bound and "
        f"{EXACT:g}",
        "The attack is wrong here. Its other exact claims deserve no trust either.",
        "Do not quote this run. Report the case: an exact claim that fails is a defect of unbatch.",
        _exact_claim,
    ),
    Check(
        "bound-violated",
        "the true error of an example is above the bound that came with it",
        "The assumption behind the bound does not hold, or the bound is wrong.",
        "Look at what changed the update (a defence, half precision), and do not quote the bound.",
        _bound_violated,
    ),
    Check(
        "label-proof-fails",
        "labels that an attack proves are not among those of the private batch",
        "The assumption behind the proof does not hold (the loss, the scale of the update, what a defence did to it), or "
        "the proof is wrong.",
        "Do not quote the labels. Look at what changed the update; where nothing did, report the case.",
        _label_proof,
    ),
    Check(
        "lower-bound-beaten",
        "an attack's mean squared error over the whole batch, one answer an example matched to the truth, is below a lower "
        "bound for any attacker on that update",
        "Bounds are averages over noise and a prior: this batch is luckier or plainer than those, or the bound is wrong.",
        "Repeat with other seeds and batches. If it stays, quote no bound here, and report the case.",
        _lower_bound_beaten,
    ),
    Check(
        "heuristic-beats-exact",
        "a heuristic attack recovered an example exactly that every exact or bounded attack missed",
        "The exact attack stops short of what the update gives away: absence of a certificate is not safety.",
        "Quote the worst case, as the verdict does. Report the case, since the exact attack should be improved.",
        _heuristic_beats_exact,
    ),
    Check(
        "not-identifiable",
        f"returned examples explain the update to within {100 * SMALL_RESIDUAL:g} % while one of them is over "
        f"{100 * LARGE_ERROR:g} % off",
        "Different batches share this update: the gradient does not determine the data, whoever attacks.",
        "Read the risk per layer to see which part is open. A small residual proves nothing here.",
        _not_identifiable,
    ),
    Check(
        "near-chance",
        f"an attack's best example is less than {NEAR_CHANCE:g} dB above what as many prior draws score",
        "The pictures owe their score to looking like pictures, not to the update.",
        "Do not count them as leaked. Compare with the chance column, never with a fixed PSNR.",
        _near_chance,
    ),
    Check(
        "client-not-reproducible",
        "the same client with the same seed sent two different updates",
        "Something in the client reads a random generator of its own (dropout, augmentation, a nondeterministic kernel).",
        "Fix the seed inside the model's forward or audit in eval mode; else errors mix attack and client noise.",
        _not_reproducible,
    ),
    Check(
        "random-defence-not-averaged",
        "a defence draws random numbers and no attack in the audit was handed earlier rounds, to average over its draws",
        "An attacker who sees several rounds of the same batch could average the noise away; this audit did not try.",
        "Treat the result as valid for a single round, or audit several (--protocol rounds=16). Account for all of them.",
        _not_averaged,
    ),
    Check(
        "search-not-converged",
        "an attack was stopped by the budget or by Ctrl-C, or its own trace says that it had not converged",
        "A longer run may recover more.",
        "Raise --budget, or quote the result as a lower bound on the leak.",
        _not_converged,
    ),
    Check(
        "skipped-for-labels",
        "an attack did not run for want of labels alone",
        "Labels are often known or easily counted; the attack might succeed with them.",
        "Run again with --knows labels, or add label-count.",
        _want_of_labels,
    ),
    Check(
        "leak-of-the-union",
        f"examples were recovered, or came out more than {NEAR_CHANCE:g} dB nearer than chance, from an update that was "
        "summed over clients",
        "The server learns the examples but not whose they are; a sum hides the owner, not the data.",
        "State the leak as one of the union of the clients.",
        _union,
    ),
    Check(
        "defence-unknown-to-attacks",
        "a defence was in place and none of the attacks that ran was handed anything of it (its numbers or likelihood)",
        "An attacker knows the protocol. These attacks did not, so their failure may be their own and not the defence's.",
        "Add an attack that takes the defence into account, or rest the claim on a bound for any attacker.",
        _unaware,
    ),
    Check(
        "clip-without-noise",
        "the update or its examples are clipped and nothing adds noise",
        "Clipping only rescales: the examples stand behind the update as before, and there is no epsilon.",
        "Add noise in proportion to the clip and account for it (dp-sgd), or do not call it a defence.",
        _clip_without_noise,
    ),
    Check(
        "noise-without-accounting",
        "noise is added and the audit has no epsilon for it",
        "Noise whose privacy loss nobody adds up promises nothing: what it hides depends on what one example can change.",
        "Clip each example and account over all steps: dp-sgd does both, and its epsilon then stands in the report.",
        _noise_without_accounting,
    ),
)
