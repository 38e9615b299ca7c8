"""Every flag can be raised, is raised by what it says, and stays silent otherwise."""

import sys
from typing import ClassVar, final

import pytest

import unbatch
import unbatch.auditing.guard
from unbatch import Case, Defence, Knowledge
from unbatch.analysis import Bound
from unbatch.auditing import checks
from unbatch.auditing.checks import CHECKS, flags
from unbatch.benchmarks import unmix
from unbatch.defence import Step
from unbatch.reporting import html, results, thresholds
from unbatch.reporting.results import Audit, Example, Run


@pytest.fixture(scope="module")
def clean() -> Audit:
    return unbatch.audit(Case.parse("digits:width=16"), attacks=["bias-ratio"], analyses=())


def heuristic(**changes) -> Run:
    facts = {"client": 0, "attack": "guess", "family": "f", "guarantee": "heuristic", "threat_model": "t", "paper": "p"}
    return Run(**(facts | {"seed": 0, "status": "done"} | changes))


def spoilt(clean: Audit, name: str) -> Audit:
    audit = clean.model_copy(deep=True)
    run = audit.runs[0]
    if name == "exact-claim-fails":
        run.examples[0].error = 0.5
    elif name == "bound-violated":
        run.guarantee, run.examples[0].error = "bounded", 0.5
    elif name == "label-proof-fails":
        wrong = next(str(label) for label in range(10) if str(label) not in audit.clients[0].labels)
        audit.runs.append(heuristic(guarantee="bounded", examples=[Example(index=0, bound=0.0, label=wrong)]))
    elif name == "lower-bound-beaten":
        audit.bounds = [Bound(name="B", value=0.1, scope="any", assumptions="", source="")]
        run.examples[0].scores["psnr"] = 20.5
    elif name == "heuristic-beats-exact":
        run.examples[0].error, run.examples[0].bound = 0.3, None
        audit.runs.append(heuristic(examples=[Example(index=0, error=1e-6)]))
    elif name == "not-identifiable":
        audit.runs = [heuristic(residual=1e-6, examples=[Example(index=0, error=0.8)])]
    elif name == "near-chance":
        example = Example(index=0, scores={"psnr": 18.0}, chance={"psnr": 16.5})
        audit.runs = [heuristic(examples=[example])]
    elif name == "client-not-reproducible":
        audit.clients[0].reproducible = False
    elif name == "random-defence-not-averaged":
        audit.random_defences = ["noise:sigma=1.0"]
    elif name == "search-not-converged":
        audit.runs.append(heuristic(trace={"converged": False}))
    elif name == "skipped-for-labels":
        audit.runs.append(heuristic(status="not applicable", missing=["labels"]))
    elif name == "leak-of-the-union":
        audit.defences, audit.effects = ["a third party's sum"], {"a third party's sum": ["sums_clients"]}
    elif name == "defence-unknown-to-attacks":
        audit.defences = ["mixup:alpha=1.0"]
    elif name == "clip-without-noise":
        audit.defences, audit.effects = ["clip:norm=0.1"], {"clip:norm=0.1": ["clips"]}
    elif name == "noise-without-accounting":
        audit.defences, audit.effects = ["a third party's noise"], {"a third party's noise": ["adds_noise"]}
    return audit


def test_a_clean_audit_raises_none(clean: Audit) -> None:
    assert flags(clean) == []


@pytest.mark.parametrize("name", [check.name for check in CHECKS])
def test_a_flag_is_raised_by_what_it_says(clean: Audit, name: str) -> None:
    raised = {flag.name: flag for flag in flags(spoilt(clean, name))}
    assert name in raised
    assert raised[name].words
    assert raised[name].means
    assert raised[name].do


@pytest.mark.parametrize(
    "spared",
    [
        {"value": 0.09},
        {"scope": "unbiased"},
        {"covers": "training"},
        {"client": 1},
        {"guesses": 3},
        {"up_to": ["permutation", "scale"]},
        {"unmatched": None},
    ],
    ids=lambda spared: next(iter(spared)),
)
def test_a_lower_bound_is_held_against_whole_batches_on_its_own_update(clean: Audit, spared: dict) -> None:
    audit = clean.model_copy(deep=True)
    facts = {"name": "B", "value": 0.1, "scope": "any", "assumptions": "", "source": ""}
    examples = [Example(index=i, scores={"psnr": score}) for i, score in enumerate((16.0, 40.0))]
    audit.runs = [heuristic(examples=examples, guesses=2)]  # 0.112 over both; one of them alone is no evidence
    audit.bounds = [Bound.model_validate(facts | {"value": 0.12})]
    assert "lower-bound-beaten" in {flag.name for flag in flags(audit)}
    run, known = audit.runs[0], {k: v for k, v in spared.items() if k in Bound.model_fields}
    audit.bounds = [Bound.model_validate(facts | {"value": 0.12} | known)]
    run.guesses, run.up_to = spared.get("guesses", 2), spared.get("up_to", [])
    if "unmatched" in spared:
        run.examples[0].scores["psnr"] = None
    assert "lower-bound-beaten" not in {flag.name for flag in flags(audit)}


def test_real_audits_raise_the_flags_that_fit() -> None:
    noisy = unbatch.audit(Case.parse("digits:width=16"), attacks=["bias-ratio"], defences=["noise:sigma=0.1"])
    assert [f.name for f in noisy.flags] == ["random-defence-not-averaged", "noise-without-accounting"]
    summed = unbatch.audit(
        Case.parse("digits:batch=2,width=16"), attacks=["label-count"], defences=["secure-aggregation:clients=2"]
    )
    assert "leak-of-the-union" not in [f.name for f in summed.flags]  # labels alone identify nobody's picture
    near = unbatch.audit(
        Case.parse("digits:batch=2,width=32,activation=tanh"),
        attacks=["gradient-matching:iterations=150"],
        defences=["secure-aggregation:clients=2", "noise:sigma=0.01"],
        analyses=[],
    )
    assert not near.recovered()
    told = {f.name: f.words for f in near.flags}
    assert "nearer than chance; which client holds which is not told by the sum" in told["leak-of-the-union"]
    assert "defence-unknown-to-attacks" not in told  # the sum's noise is the law that the second run was told
    assert [run.adaptive for run in near.runs] == [False, True]


ABOUT_DEFENCES = {"defence-unknown-to-attacks", "clip-without-noise", "noise-without-accounting"}


@pytest.mark.parametrize(
    ("defences", "attack", "raised"),
    [
        (["clip:norm=0.1"], "bias-ratio", {"defence-unknown-to-attacks", "clip-without-noise"}),
        (["clip:norm=none"], "bias-ratio", {"defence-unknown-to-attacks"}),
        (["noise:sigma=0.1"], "label-count", {"noise-without-accounting"}),  # label-count is handed the noise
        (
            ["clip:norm=0.1", "noise:sigma=0.1"],
            "label-count",
            {"defence-unknown-to-attacks", "noise-without-accounting"},
        ),
        (["dp-sgd"], "label-count", set()),
        (["dp-sgd"], "bias-ratio", {"defence-unknown-to-attacks"}),
        (["dp-sgd:noise_multiplier=0"], "label-count", {"defence-unknown-to-attacks", "clip-without-noise"}),
        (["local-steps:steps=2"], "bias-ratio", set()),  # whose numbers the attack takes
        (["label-smoothing"], "bias-ratio", set()),  # the loss that is declared has it
        (["secure-aggregation:clients=2"], "label-count", set()),
    ],
)
def test_flags_about_defences(defences: list[str], attack: str, raised: set[str]) -> None:
    case = Case.parse("digits:batch=2,width=16" if "secure" in defences[0] else "digits:width=16")
    made = unbatch.audit(case, attacks=[attack], defences=defences, analyses=())
    done = any(run.status == "done" for run in made.runs)
    expected = raised if done else raised - {"defence-unknown-to-attacks"}
    assert {f.name for f in made.flags} & ABOUT_DEFENCES == expected


@final
class Telling(Defence):
    """A third party's, which makes known what it does, and declares nothing."""

    paper: ClassVar[str] = "none"
    does: str = "clip"

    def wrap(self, step: Step) -> Step:
        return step

    def public(self, known: Knowledge) -> Knowledge:
        return known | Knowledge(**{self.does: 2 if self.does == "clients" else 0.5})


@final
class Declaring(Defence):
    """A third party's, which makes nothing known, and declares what it does."""

    paper: ClassVar[str] = "none"
    does: str = "clip"
    adds_noise = property(lambda self: self.does == "noise")
    clips = property(lambda self: self.does == "clip")
    sums_clients = property(lambda self: self.does == "clients")

    def wrap(self, step: Step) -> Step:
        return step


@pytest.mark.parametrize("kind", [Telling, Declaring])
def test_a_third_partys_defence_counts_by_what_it_says_and_not_by_its_name(kind: type[Defence]) -> None:
    def raised(*does: str) -> set[str]:
        record = unbatch.audit(
            Case.parse("digits:width=16"), attacks=["bias-ratio"], defences=[kind(does=d) for d in does], analyses=()
        )
        return {flag.name for flag in record.flags} - {"defence-unknown-to-attacks"}

    assert raised("noise") == {"noise-without-accounting"}
    assert raised("clip") == {"clip-without-noise"}
    assert raised("clip", "noise") == {"noise-without-accounting"}
    assert "leak-of-the-union" in raised("clients")  # the update is the plain one, so its example is recovered


@pytest.mark.parametrize(
    ("spec", "effects"),
    [
        ("clip", ["clips"]),
        ("clip:norm=none", []),
        ("noise", ["adds_noise"]),
        ("noise:sigma=0.1,relative=true", ["adds_noise"]),
        ("noise:sigma=0", []),
        ("dp-sgd", ["adds_noise", "clips"]),
        ("dp-sgd:noise_multiplier=0", ["clips"]),
        ("dp-sgd:clip=none,noise_multiplier=0", []),
        ("secure-aggregation:clients=2", ["sums_clients"]),
        ("secure-aggregation:clients=1", []),
        ("quantise", []),
        ("prune", []),
        ("mixup", []),
        ("local-steps", []),
        ("label-smoothing", []),
    ],
)
def test_a_defence_says_what_it_does_at_its_strength(spec: str, effects: list[str]) -> None:
    assert Defence.parse(spec).effects() == effects


def test_what_counts_as_exact_and_as_chance_is_written_once() -> None:
    guarding = sys.modules["unbatch.auditing.guard"]  # of which the package shows the function
    assert all(vars(module)["EXACT"] is thresholds.EXACT for module in (checks, results, unmix))
    assert all(vars(module)["NEAR_CHANCE"] is thresholds.NEAR_CHANCE for module in (checks, guarding, html))
    said = {check.name: check.raised_if for check in CHECKS}
    assert f"less than {thresholds.NEAR_CHANCE:g} dB" in said["near-chance"]
    assert f"more than {thresholds.NEAR_CHANCE:g} dB" in said["leak-of-the-union"]
    assert said["exact-claim-fails"].endswith(f"{thresholds.EXACT:g}")
