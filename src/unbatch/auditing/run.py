"""Audit: run everything that applies, judge it against the truth and against chance, record."""

from __future__ import annotations

import copy
import hashlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import torch
from torch import Tensor

import unbatch
from unbatch.analysis import Analysis
from unbatch.attack import ActiveAttack, Attack
from unbatch.auditing.allowance import DEFAULT_SECONDS, SEARCH_SECONDS, Allowance
from unbatch.auditing.certify import certify
from unbatch.auditing.cheating import planted_exchange
from unbatch.auditing.checks import flags
from unbatch.auditing.client import declared, observe
from unbatch.auditing.diagnosis import UNREAD, diagnose, unexplained, unreadable
from unbatch.auditing.explained import explains, freedom
from unbatch.auditing.findings import Analyst
from unbatch.auditing.judge import Judge, failure, pieces_by, shown_by
from unbatch.auditing.suites import passive
from unbatch.bundle import raw_bytes, state_hash
from unbatch.case import Case, Setting
from unbatch.defence import Defence
from unbatch.domain import Domain
from unbatch.errors import MissingExtra, NotApplicable, UnbatchError
from unbatch.inversion.view import View
from unbatch.knowledge import Earlier
from unbatch.label_form import REFUSALS
from unbatch.metric import Metric
from unbatch.observation import Observation
from unbatch.plugin import OneOrMore
from unbatch.progress import Watch, watching
from unbatch.reconstruction import Reconstruction
from unbatch.reporting.results import Audit, Client, MetricInfo, Remedy, Run, Status
from unbatch.reporting.tiers import Outcome, Tier
from unbatch.threat_model import Sees, of_a_release
from unbatch.truth import Truth

Sink = Callable[[Audit], None]
ADAPTIVE = {"log_prob", "earlier"}  # knowledge without which an attack is run as well

Target = Setting | Case | Observation | Sequence[Setting]


def audit(
    setting: Target,
    *,
    truth: Truth | None = None,
    attacks: OneOrMore[Attack] | None = None,
    defences: OneOrMore[Defence] = (),
    metrics: OneOrMore[Metric] | None = None,
    analyses: OneOrMore[Analysis] | None = None,
    remedies: OneOrMore[Defence] = (),
    seeds: Sequence[int] = (0,),
    budget: float | None = None,
    total_budget: float | None = None,
    analysis_budget: float | None = None,
    sink: Sink | None = None,
    resume: Audit | None = None,
    device: str | None = None,
    watch: Watch | None = None,
    announce: Callable[[str], None] | None = None,
) -> Audit:
    """Run every attack on every client with every seed, judge each run, and say what the whole means.

    `setting` is a client, several, a case, or a captured Observation (without its `truth` there are no scores), of which
    `defences` declares what its client did. `attacks`
    default to all that are installed and only look, cheapest first, `metrics` and `analyses` to all that apply. Each of
    `remedies` is tried in a second audit with that defence outermost, and summed up beside the first.

    `budget` is seconds for each run of an attack and for each analysis; without one, attacks and `analyses` given by name
    take what they need (`math.inf`: all do). Default attacks share five minutes a client, of which searches have ten
    seconds (`total_budget`: as many, all of them for searches where need be, and for named attacks as well), and end once
    everything is recovered exactly and certified; default analyses share three seconds. `analysis_budget` is another one
    for analyses. What is cut short gives what it has until then, and the audit says so, and what it left out.

    `sink` is called with the audit after each analysis and each run; `resume` is an earlier audit of the same setting
    whose finished runs are kept. An attack that takes a defence's likelihood, or earlier rounds, runs twice where they are
    known, without and with. `watch` hears the progress of each run and can stop it; `announce` hears its name.
    Raises UnbatchError: unknown plugin or option, or `resume` is of something else.
    """
    plan = _Plan(setting, truth, attacks, defences, metrics, analyses, remedies, device)
    record, watch = plan.record(list(seeds), budget), watch or Watch()
    runs = _Runs(plan, record, resume, plan.allowance(seeds, budget, total_budget), budgeted=budget is not None)
    record.clients = [plan.client(index) for index in range(len(plan.exchanges))]
    patience = budget if analysis_budget is None else analysis_budget
    analyst = Analyst(plan.analyses, plan.named, patience, watch, announce, sink, plan.domain)
    for index, (obs, private) in enumerate(plan.exchanges):
        analyst.read(record, View.of(obs), private, index)
    runs.go(watch, announce, sink)
    plan.look_again(record, watch)
    record.notes += [*plan.flaws, *_unscored(record), *plan.notes(), *_untold(record), *_of_adam(plan.exchanges[0][0])]
    record.notes += [f"{run.title}, client {run.client}: {run.words}" for run in record.runs if run.ran and run.words]
    for remedy in _untried(plan, record, resume):
        with _noted(record, remedy):
            record.remedies += _remedy(setting, plan, remedy, seeds, budget, total_budget, device, watch, announce)
    record.complete = not watch.stop
    record.flags = flags(record)
    if sink:
        sink(record)
    return record


class _Plan:
    """What is audited, with everything parsed and every client's exchange observed."""

    def __init__(
        self,
        target: Target,
        truth: Truth | None,
        attacks: OneOrMore[Attack] | None,
        defences: OneOrMore[Defence],
        metrics: OneOrMore[Metric] | None,
        analyses: OneOrMore[Analysis] | None,
        remedies: OneOrMore[Defence],
        device: str | None,
    ) -> None:
        self.settings = _settings(target)
        released = target.released if isinstance(target, Observation) else self.settings[0].training is not None
        seen: Sees = "release" if released else "update"
        self.chosen = attacks is not None
        self.attacks = Attack.several(passive(seen) if attacks is None else attacks)
        self.defences = Defence.several(defences)
        self.remedies = Defence.several(remedies)
        self.named = analyses is not None
        fitting = [name for name, analysis in Analysis.find().items() if seen in analysis.sees]
        self.analyses = Analysis.several(fitting if analyses is None else analyses)
        self.name = str(target) if isinstance(target, Case) else self.settings[0].name if self.settings else "captured"
        self.captured = isinstance(target, Observation)
        self.exchanges: list[tuple[Observation, Truth | None]]
        self.reproducible: list[bool] = []
        self.explained: tuple[Tensor, Tensor] | None = None  # what an exact attack found
        self.nearest: tuple[Run, Tensor, Tensor] | None = None  # what leaves least of a captured update unexplained
        if isinstance(target, Observation):
            if self.remedies:
                raise UnbatchError(
                    "a captured update already has its defences in it, and no other can be tried; leave `remedies` out."
                )
            target = (declared(target, self.defences) if self.defences else target).as_rounded()
            self.domain = (truth.domain if truth is not None else None) or View.of(target).domain
            self.exchanges = [(_moved(target, device) if device else target, truth)]
            if truth is not None:
                self.settings = [_known(target, truth, self.domain)]
        else:
            self.domain = self.settings[0].domain
            self.exchanges = [self._exchange(s, i, device) for i, s in enumerate(self.settings)]
        self.flaws = list[str]()  # what of the audit's own parts failed, in words
        self.metrics = self._fitted(Metric.several(Metric.find() if metrics is None else metrics))
        self.judge = Judge(self.domain, self.metrics)

    def _fitted(self, metrics: Sequence[Metric]) -> dict[str, Metric]:
        """The metrics that mean something here, by name. One that fails is said and left out."""
        found = dict[str, Metric]()
        for metric in metrics:
            try:
                fitted = metric.on(self.domain)
            except Exception as error:
                self.flaws.append(f"the metric {metric.name} was left out, since it failed: {failure(error)}")
                continue
            if fitted is not None:
                found[metric.name] = fitted
        return found

    def _exchange(self, setting: Setting, index: int, device: str | None) -> tuple[Observation, Truth | None]:
        model = copy.deepcopy(setting.model).to(device) if device else setting.model

        def once() -> tuple[Observation, Truth]:
            return observe(
                model,
                setting.loss,
                setting.inputs,
                setting.labels,
                knowledge=setting.domain.public() | setting.knowledge,
                protocol=setting.protocol,
                training=setting.training,
                defences=self.defences,
                seed=index,
            )

        first = once()
        second = once() if setting.training is None else first  # a whole training is not done twice
        same = all(torch.equal(first[0].update[k], second[0].update[k]) for k in first[0].update)
        self.reproducible.append(same)
        return first

    def notes(self) -> list[str]:
        """For a captured update: what is off with it, as far as an exact find can tell."""
        obs, truth = self.exchanges[0]
        if truth is not None or obs.released:
            return []
        try:
            return diagnose(obs, *(self.explained or (None, None)), certified=self.explained is not None)
        except Exception as error:  # the attacks' results stand without it
            return [f"what may be off with this update was not looked at, since that failed: {failure(error)}"]

    def record(self, seeds: list[int], budget: float | None) -> Audit:
        obs, truth = self.exchanges[0]
        return Audit(
            version=unbatch.__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            case=self.name,
            domain=self.domain.name,
            shape=list(self.domain.shape),
            truth=truth is not None,
            attacks=[str(a) for a in self.attacks],
            defences=[str(d) for d in self.defences],
            effects={str(d): d.effects() for d in self.defences},
            random_defences=[str(d) for d in self.defences if d.random],
            published={str(d): d.tells(obs.knowledge, obs.loss) for d in self.defences},
            privacy=obs.knowledge.get("privacy"),
            seeds=seeds,
            budget=budget,
            model=shown_by(str, obs.model),
            parameters=sum(p.numel() for p in obs.model.parameters()),
            model_hash=state_hash(obs.model.state_dict()),
            loss=_loss(obs),
            protocol=self._protocol(obs),
            threat_model=_holder(obs) if obs.released else "",
            knowledge={name: _words(obs.knowledge.get(name)) for name in obs.knowledge},
            metrics={
                name: MetricInfo(unit=m.unit, higher_is_better=m.higher_is_better, best=m.best)
                for name, m in self.metrics.items()
                if truth is not None
            },
            data_notes=self._data_notes(),
            environment={
                "unbatch": unbatch.__version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "device": str(obs.device),
                "threads": str(torch.get_num_threads()),
                "platform": platform.platform(),
            },
            fingerprint=self.fingerprint(),
        )

    def _data_notes(self) -> list[str]:
        """How data were read, updates captured, and models trained."""
        captured, trained = self.exchanges[0]
        own = trained.notes if trained is not None and captured.released else ()
        return list(dict.fromkeys([*captured.notes, *(note for s in self.settings for note in s.notes), *own]))

    def _protocol(self, obs: Observation) -> str:
        """What the client did, in words."""
        if not obs.released:
            return str(obs.protocol)
        training = self.settings[0].training if self.settings else None
        return str(training) if training is not None else "the trained model is released, and nothing else is sent"

    def fingerprint(self) -> str:
        """Of everything that a run depends on besides its attack and seed."""
        digest = hashlib.sha256()
        for obs, truth in self.exchanges:
            held = [*obs.update.values(), *obs.model.state_dict().values()]
            for past in obs.knowledge.get("earlier", ()):
                held += [*past.update.values(), *past.state.values()]
            held += [truth.inputs, truth.labels] if truth is not None else []
            held += [*obs.knowledge.get("initial", {}).values()]
            for tensor in held:
                digest.update(raw_bytes(tensor))
            digest.update(repr(sorted((k, _words(obs.knowledge.get(k))) for k in obs.knowledge)).encode())
        digest.update(repr([str(d) for d in self.defences]).encode())
        return digest.hexdigest()

    def client(self, index: int) -> Client:
        obs, truth = self.exchanges[index]
        if truth is None:
            return Client(index=index, name="captured", size=0, update_hash=_sent_hash(obs))
        setting = self.settings[index]
        try:
            residual = obs.residual(truth.inputs, truth.labels)
        except (RuntimeError, ValueError):  # a defence may make the truth unusable as a guess (mixed labels)
            residual = None
        except Exception as error:
            residual = None
            self.flaws.append(f"client {index}'s update was not computed again, since that failed: {failure(error)}")
        return Client(
            index=index,
            name=f"client {index}",
            size=len(truth),
            pictures=[shown_by(self.domain.render, x) for x in truth.inputs],
            pieces=pieces_by(self.domain, truth.inputs),
            labels=[setting.label_name(y) for y in truth.labels],
            reproducible=all(self.reproducible[index : index + 1]),
            residual=residual,
            update_hash=_sent_hash(obs),
        )

    def ways(self, index: int, attack: Attack) -> tuple[bool, ...]:
        """Without the defence's likelihood and earlier rounds, and with them, where the attack takes what there is."""
        known = self.exchanges[index][0].knowledge
        if ADAPTIVE & set(known) & attack.needs:  # it cannot do without
            return (True,)
        return (False, True) if ADAPTIVE & set(known) & (attack.needs | attack.uses) else (False,)

    def blanks(self, seeds: Sequence[int]) -> Iterator[tuple[Attack, Run]]:
        """Every run of the audit, in order, to be filled."""
        for index in range(len(self.exchanges)):
            for attack in self.attacks:
                for seed, adaptive in itertools.product(seeds, self.ways(index, attack)):
                    yield attack, self.blank(index, attack, seed, adaptive)

    def allowance(self, seeds: Sequence[int], budget: float | None, total: float | None) -> Allowance:
        """How long each run may take; where no attack was chosen, all share their time and end when all is known."""
        searching = SEARCH_SECONDS if total is None else total
        total = DEFAULT_SECONDS if total is None and not self.chosen else total
        queue = list(self.blanks(seeds))
        return Allowance(queue=queue, budget=budget, total=total, searching=searching, stops=not self.chosen)

    def look_again(self, record: Audit, watch: Watch) -> None:
        """At a captured update: whether others explain it as well as what was found, or no reading of it fits the model."""
        if not self.captured or watch.stop or self.exchanges[0][0].released:
            return
        try:
            self._look_again(record, watch)
        except Exception as error:  # what was found stands without it
            self.flaws.append(
                f"whether the update was read right was not looked at, since that failed: {failure(error)}"
            )

    def _look_again(self, record: Audit, watch: Watch) -> None:
        obs, truth = self.exchanges[0]
        run, inputs, labels = self.nearest or (None, None, None)
        if inputs is not None and labels is not None and run is not None and record.explaining() is run:
            run.freedom = freedom(obs, inputs, labels, run.residual or 0.0, watch)
        if record.outcome in (Outcome.EXACT, Outcome.COPY, Outcome.RECOGNISABLE, Outcome.EXPLAINED):
            return
        batch = (truth.inputs, truth.labels) if truth is not None else (None, None)
        record.not_audited = unreadable(obs, *batch)
        residuals = [one.residual for one in record.tried() if one.residual is not None]
        if truth is None and not record.not_audited and residuals and min(residuals) > UNREAD:
            record.not_audited = unexplained(obs, min(residuals), inputs, labels)

    def blank(self, index: int, attack: Attack, seed: int, adaptive: bool) -> Run:
        """A run to be filled."""
        known, taken = set(self.exchanges[index][0].knowledge), attack.needs | attack.uses
        known -= set() if adaptive else ADAPTIVE
        return Run(
            client=index,
            attack=str(attack),
            family=attack.family,
            guarantee=attack.guarantee.value,
            threat_model=attack.threat_model,
            paper=attack.paper,
            seed=seed,
            status=Status.DONE,
            knowledge=sorted(taken & known),
            missing=sorted(attack.needs - known),
            adaptive=adaptive,
        )

    def run(self, run: Run, attack: Attack, watch: Watch) -> Run:
        """One attack on one client, judged. An attack that fails is recorded with its words and stops nothing else."""
        index, seed = run.client, run.seed
        obs, truth = self.exchanges[index]
        start = time.monotonic()
        try:
            if isinstance(attack, ActiveAttack):
                obs, truth = self._planted(index, attack, seed)
            with watching(watch):
                obs = obs if run.adaptive else obs.only(*(set(obs.knowledge) - ADAPTIVE))
                found = certify(obs, attack(obs, seed=seed))
            if found.inputs is not None and found.labels is not None and not found.layer and _certain(found):
                self.explained = found.inputs, found.labels
            run.status = Status.CUT_SHORT if watch.cut_short else Status.DONE
            run.words = _said_of(found)
            self.judge.fill(run, found, obs, truth, self.settings[index] if self.settings else None)
            self._keep(run, found, obs, truth)
        except NotApplicable as why:
            run.status, run.words = Status.NOT_APPLICABLE, str(why)
        except Exception as error:  # one attack's defect must not cost the others their results
            run.status, run.words = Status.FAILED, failure(error)
        run.seconds = time.monotonic() - start
        return run

    def _keep(self, run: Run, found: Reconstruction, obs: Observation, truth: Truth | None) -> None:
        """Note whether what was found explains the update, and what explains a captured one best."""
        if found.layer or found.inputs is None or found.labels is None or not len(found):
            return
        run.explains = not obs.released and explains(obs, run.residual, len(found))
        if truth is not None or run.residual is None:
            return
        if self.nearest is None or run.residual < (self.nearest[0].residual or 0.0):
            self.nearest = run, found.inputs, found.labels

    def _planted(self, index: int, attack: ActiveAttack, seed: int) -> tuple[Observation, Truth]:
        if not self.reproducible:
            raise NotApplicable("an active server chooses the model before the client's step; this update is captured.")
        s = self.settings[index]
        if s.training is not None:
            raise NotApplicable("an active server chooses the model of a round, and this client releases its own.")
        told = s.domain.public() | s.knowledge
        return planted_exchange(attack, s, knowledge=told, defences=self.defences, seed=index, server_seed=seed)


class _Runs:
    """The runs of an audit: those that an earlier one has finished, and those that are still to do."""

    def __init__(
        self, plan: _Plan, record: Audit, resume: Audit | None, allowance: Allowance, *, budgeted: bool
    ) -> None:
        self.plan, self.record, self.allowance = plan, record, allowance
        self.kept = _kept(record, resume)
        record.allowance = allowance.total if allowance.stops and not budgeted else None
        record.runs = self._in_order()  # whatever ends this, they stand in it
        self.besides = _besides(record, resume, allowance)
        record.asked = len(allowance.queue) + len(self.besides)

    def _in_order(self) -> list[Run]:
        return [self.kept[blank.key] for _, blank in self.allowance.queue if blank.key in self.kept]

    def go(self, watch: Watch, announce: Callable[[str], None] | None, sink: Sink | None) -> None:
        """Do what is still to do, one after the other, and keep each in the record."""
        for attack, blank in self.allowance.queue:
            if blank.key in self.kept or watch.stop:
                continue
            self.kept[blank.key] = self._done(attack, blank, watch, announce)
            self.record.runs = self.besides + self._in_order()
            self.record.flags = flags(self.record)
            if sink:
                sink(self.record)

    def _done(self, attack: Attack, blank: Run, watch: Watch, announce: Callable[[str], None] | None) -> Run:
        """One run, or its refusal where the allowance has no time for it or no need of it."""
        refused = self.allowance.refused(self.record, attack, blank)
        if refused is not None:
            return refused
        if announce:
            announce(f"{blank.title}, client {blank.client}, seed {blank.seed}")
        watch.begin(self.allowance.seconds(attack, blank))
        done = self.plan.run(blank, attack, watch)
        self.allowance.spend(attack, done)
        return done


def _holder(obs: Observation) -> str:
    """Whose threat model an audit of a released model is, in words."""
    who = of_a_release(set(obs.knowledge))
    return f"{who}. {who.means}"


def _sent_hash(obs: Observation) -> str:
    return "" if obs.released else state_hash(obs.update)


def _loss(obs: Observation) -> str:
    """The loss in words, where its form can be told: not of a model that takes token numbers."""
    try:
        form = View.of(obs).form
    except (NotApplicable, *REFUSALS):  # by a loss of outputs that it was not written for
        form = None
    return str(form) if form else "a custom loss"


def _unscored(record: Audit) -> list[str]:
    return [
        f"{run.title}, client {run.client}: {name} failed: {why}"
        for run in record.runs
        for name, why in run.unscored.items()
    ]


def _untold(record: Audit) -> list[str]:
    """What was not told of the examples behind a captured update, and which attacks cannot do without it."""
    if record.truth:
        return []
    words = list[str]()
    for name, what, how in (
        ("input_shape", "the shape of one example", "--shape 3,32,32 (Knowledge(input_shape=(3, 32, 32)))"),
        ("batch_size", "how many examples are behind it", "--batch 8 (Knowledge(batch_size=8))"),
    ):
        waiting = list(dict.fromkeys(run.attack for run in record.runs if name in run.missing))
        if waiting:
            words.append(f"{what} was not told, and {', '.join(waiting)} cannot do without: give it by {how}.")
    return words


def _of_adam(obs: Observation) -> list[str]:
    """What a first step of Adam or AdamW hides, and that it does so by rounding alone."""
    signs = obs.signs_alone
    if not signs:
        return []
    name = {"adam": "Adam", "adamw": "AdamW"}[obs.protocol.optimiser]
    kind = str(next(iter(obs.update.values())).dtype).removeprefix("torch.")
    return [
        f"{name}'s first step, kept in {kind} at learning rate {obs.protocol.learning_rate:g}, tells of {signs:.0%} of the "
        "entries the sign of the gradient and not its size, so attacks that read gradients cannot run; a search can. This "
        "is rounding and no defence: the same step kept in float64, or the optimiser's state, holds the whole gradient."
    ]


def _moved(obs: Observation, device: str) -> Observation:
    update = {name: tensor.to(device) for name, tensor in obs.update.items()}
    return replace(obs, model=copy.deepcopy(obs.model).to(device), update=update)


def _known(obs: Observation, truth: Truth, domain: Domain) -> Setting:
    held = {"inputs": truth.inputs, "labels": truth.labels, "domain": domain, "protocol": obs.protocol}
    return Setting(model=obs.model, loss=obs.loss, notes=truth.notes, classes=truth.classes, **held)  # type: ignore[arg-type]


def _settings(target: Target) -> list[Setting]:
    if isinstance(target, Observation):
        return []
    if isinstance(target, Case):
        return [target.setting(client) for client in range(target.clients)]
    settings = [target] if isinstance(target, Setting) else list(target)
    if not settings:
        raise UnbatchError("there is no client to audit; give at least one Setting.")
    return settings


@contextmanager
def _noted(record: Audit, remedy: Defence) -> Iterator[None]:
    """A remedy that fails, or that an extra is missing for, is a note: it must not cost the others their results."""
    try:
        yield
    except MissingExtra as error:
        record.notes.append(f"{remedy} was not tried: {error}")
    except Exception as error:
        record.notes.append(f"{remedy} was not tried, since it failed: {failure(error)}")


def _remedy(
    target: Target,
    plan: _Plan,
    remedy: Defence,
    seeds: Sequence[int],
    budget: float | None,
    total_budget: float | None,
    device: str | None,
    watch: Watch,
    announce: Callable[[str], None] | None,
) -> list[Remedy]:
    """The same attacks behind one more defence; nothing if the audit was stopped."""
    if watch.stop:
        return []
    defences = [remedy, *plan.defences]
    again = audit(
        target,
        attacks=plan.attacks if plan.chosen else None,
        defences=defences,
        metrics=list(plan.metrics.values()),
        analyses=(),
        seeds=seeds,
        budget=budget,
        total_budget=total_budget,
        device=device,
        watch=watch,
        announce=(lambda words: announce(f"with {remedy}: {words}")) if announce else None,
    )
    if watch.stop:
        return []
    best = [hit for hit in again.worst("psnr").values() if hit] if "psnr" in again.metrics else []
    score, chance = None, None
    if best:
        score, run = max(best, key=lambda hit: hit[0])
        chance = next(e.chance.get("psnr") for e in run.examples if e.scores.get("psnr") == score)
    name = str(defences[0])
    exact, copies = again.counts[Tier.EXACT], again.counts[Tier.COPY]
    return [Remedy(defence=name, recovered=exact, copies=copies, size=again.size, psnr=score, chance=chance)]


def _said_of(found: Reconstruction) -> str:
    """What a run says of what it found: which claims were withdrawn, on what the others rest, or why nothing came of it."""
    if not len(found):
        return str(found.trace.get("withdrawn", found.trace.get("stopped", "")))
    return " ".join(str(found.trace[key]) for key in ("withdrawn", "condition") if key in found.trace)


def _certain(found: Reconstruction) -> bool:
    return found.bound is not None and len(found) > 0 and bool(found.bound.isfinite().all())


def _kept(record: Audit, resume: Audit | None) -> dict[tuple[int, str, int], Run]:
    if resume is None:
        return {}
    if resume.fingerprint != record.fingerprint:
        raise UnbatchError(
            "the audit to resume is of another model, batch, protocol or defence; give its own settings or start anew."
        )
    return {run.key: run for run in resume.runs if run.finished}


def _besides(record: Audit, resume: Audit | None, allowance: Allowance) -> list[Run]:
    """Runs of the audit that is resumed by attacks or seeds that are not asked for again: they stay in the record."""
    asked = {blank.key for _, blank in allowance.queue}
    besides = [run for run in (resume.runs if resume else ()) if run.key not in asked]
    record.attacks = list(dict.fromkeys([*record.attacks, *(run.attack for run in besides)]))
    record.seeds = list(dict.fromkeys([*record.seeds, *(run.seed for run in besides)]))
    record.runs = besides + record.runs
    return besides


def _untried(plan: _Plan, record: Audit, resume: Audit | None) -> list[Defence]:
    """The remedies still to try; those of the audit that is resumed stay in the record.

    One that is asked for again with other attacks or seeds is tried again.
    """
    if resume is not None:
        same = resume.attacks == [str(attack) for attack in plan.attacks] and resume.seeds == record.seeds
        asked = {str(remedy) for remedy in plan.remedies}
        record.remedies = [each for each in resume.remedies if same or each.defence not in asked]
    measured = {each.defence for each in record.remedies}
    return [remedy for remedy in plan.remedies if str(remedy) not in measured]


def _words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.tolist()}" if value.numel() <= 64 else f"{tuple(value.shape)} numbers"
    if callable(value):
        return "a function"
    if isinstance(value, tuple) and value and isinstance(value[0], Earlier):
        return f"{len(value)} earlier round{'s' * (len(value) > 1)}"
    tensors = isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())
    return f"{len(value)} tensors" if tensors else str(value)  # type: ignore[arg-type]  # a dict
