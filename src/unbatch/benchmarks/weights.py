"""weights: what a released model gives away of its training, beside what others published.

Each system has problems of its own (`WEIGHT_PROBLEMS`) and one function that measures them (`MEASURES`): a further
system is one more of each. *linear model*: every problem trains a generalised linear model to a stationary point for each
of several held-out examples, and counts those that an informed adversary recovers to 1e-10. *noise*: one step of
differentially private descent at each noise multiplier, the same adversary's error beside the bound of
`dp-reconstruction`. *span*: members against ten times as many strangers by the distance from the span of the first layer's
change. *change of weights*: the examples of a linearised training out of theta_T - theta_0, by their normalised
correlation with the nearest answer; *silent units*: the same of a training of the network itself; *stationary margin*: the
same of the released weights alone, after a training on the margin. *published search*: the presets of `kkt`, several draws
of settings each; what their own loss chose, labelled chosen, beside what the truth would have, labelled oracle: no attack
sees that, it is computed here. *reconstructor*: the published network trained on shadow
models, in miniature; *trained again*: the same client's example by least squares on where training ends. *batch
statistics*: the terms of batch-norm-inversion one by one, and inverting-gradients for as long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import clock, resumed, sent_statistics
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.inversion.gradient_sum import SumGuess, chosen, gradient_sum_of, guesses
from unbatch.inversion.trained_span import trained_span
from unbatch.inversion.view import View
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.bounds.rate_distortion import distortion
from unbatch.numerics.bounds.subsampled_gaussian import information
from unbatch.observation import Observation
from unbatch.truth import Truth

Row = dict[str, Any]
EXACT_ERROR = 1e-10
MULTIPLIERS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the noise, in units of the clipping norm
DELTA = 1e-5  # of the epsilon beside them
DRAWS = 20
SURE_PICTURE = 0.99  # normalised correlation, above which a picture is taken for the same
CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class WeightsProblem:
    """One row: a client of the case `trained`, and what is asked of it.

    >>> WeightsProblem(system="span", case="trained:batch=10", name="digits").name
    'digits'
    """

    system: str
    name: str
    case: str = ""
    published: str = ""
    options: dict[str, float] = field(default_factory=dict)


GLM = "threat=informed,depth=0,start=1,weight_decay=0.01"
BALLE = "exact for every generalised linear model (Balle et al., S&P 2022)"
RECONN = "a network that 10,000 shadow models teach: loss .0583 on MNIST (released code of Balle et al.)"
STOPPED = "threat=informed,task=classes,width=10,activation=elu,biases=all,start=1,method=sgd,steps=100,momentum=0.9"
LAZY = "threat=start,task=regression,method=linearised,depth=2,start=1,steps=2000,centred=true"
LOO = "a curve of errors by search over pixels; linearised training makes the equations exact (Loo et al., ICLR 2024)"
SILENT = "threat=start,method=sgd,start=1,steps=200,centred=true"
LOO_TRAINED = "outliers best, a search over pixels (Loo et al., ICLR 2024)"
HATAMIZADEH = "pictures and curves alone, no table; one image a batch leaks clearly (Hatamizadeh et al., IEEE TMI 2023)"
HAIM = "pictures of the best of about 100 settings, chosen by the truth (Haim et al., NeurIPS 2022)"
BUZAGLO = "pictures of the best setting of a sweep, chosen by the truth (Buzaglo et al., NeurIPS 2023)"
MARGIN = "width=1000,centred=true"
SUMS = "batch=10,width=200,centred=true,public=10,data=mnist"
SWEEP = {"draws": 8.0, "steps": 1500.0}
SPANS = "threat=start,outsiders=100,width=200,steps=500"
WEIGHT_PROBLEMS: tuple[WeightsProblem, ...] = (
    WeightsProblem(
        system="linear model",
        name="digits, odd or even, 49 known",
        case=f"trained:{GLM},known=49",
        published=BALLE,
        options={"tries": 10},
    ),
    WeightsProblem(
        system="linear model",
        name="digits, ten classes, 49 known",
        case=f"trained:{GLM},known=49,task=classes",
        published=BALLE,
        options={"tries": 2},
    ),
    WeightsProblem(
        system="linear model",
        name="MNIST, odd or even, 49 known",
        case=f"trained:{GLM},known=49,data=mnist",
        published=BALLE,
        options={"tries": 3},
    ),
    WeightsProblem(
        system="noise",
        name="digits, odd or even, 49 known, one private step",
        case=f"trained:{GLM},known=49",
        published="no attacker below the bound",
    ),
    WeightsProblem(
        system="reconstructor",
        name="digits, 64-10-10 ELU, 100 known, 100 steps of SGD, 1,000 shadow models",
        case=(
            "trained:threat=informed,known=100,public=1500,task=classes,width=10,activation=elu,biases=all,start=1,"
            "method=sgd,steps=100,momentum=0.9,double=false"
        ),
        published="loss .0583 on MNIST with 10,000 shadow models of 784-10-10 (released code of Balle et al.)",
        options={"shadows": 1000, "hidden": 300, "epochs": 60},
    ),
    WeightsProblem(
        system="trained again",
        name="digits, 64-10-10 ELU, 100 known, 100 steps of SGD",
        case=f"trained:{STOPPED},known=100",
        published=RECONN,
        options={"tries": 3},
    ),
    WeightsProblem(
        system="trained again",
        name="MNIST, 784-10-10 ELU, 49 known, 100 steps of SGD",
        case=f"trained:{STOPPED},known=49,data=mnist",
        published=RECONN,
        options={"tries": 1},
    ),
    WeightsProblem(system="span", name="digits, 10 trained on, margin", case=f"trained:batch=10,{SPANS}"),
    WeightsProblem(
        system="span",
        name="digits, 20 trained on, SGD with momentum and weight decay",
        case=f"trained:batch=20,{SPANS},method=sgd,momentum=0.9,weight_decay=0.01,start=1,task=classes",
    ),
    WeightsProblem(
        system="span",
        name="MNIST, 10 trained on, margin, mean taken off",
        case=f"trained:batch=10,{SPANS},data=mnist,centred=true",
    ),
    WeightsProblem(
        system="change of weights",
        name="digits, 64-512-512-1, 20 trained on, linearised",
        case=f"trained:batch=20,width=512,{LAZY}",
        published=LOO,
    ),
    WeightsProblem(
        system="change of weights",
        name="MNIST, 784-2048-2048-1, 20 trained on, linearised",
        case=f"trained:batch=20,width=2048,{LAZY},data=mnist",
        published=LOO,
    ),
    WeightsProblem(
        system="silent units",
        name="MNIST, 784-400-1, 10 trained on, 200 steps of SGD",
        case=f"trained:batch=10,width=400,{SILENT},data=mnist",
        published=LOO_TRAINED,
    ),
    WeightsProblem(
        system="silent units",
        name="MNIST, 784-1000-1000-10, 20 trained on, 200 steps of SGD in batches of 5",
        case=f"trained:batch=20,width=1000,depth=2,part=5,momentum=0.5,task=classes,{SILENT},data=mnist",
        published=LOO_TRAINED,
    ),
    WeightsProblem(
        system="silent units",
        name="MNIST, 784-2048-2048-1, 20 trained on, 200 steps of SGD, squared error",
        case=f"trained:batch=20,width=2048,depth=2,task=regression,rate=0.01,{SILENT},data=mnist",
        published=LOO_TRAINED,
    ),
    WeightsProblem(
        system="stationary margin",
        name="MNIST, 784-1000-1, 10 trained on, the weights alone",
        case=f"trained:batch=10,steps=2000,{MARGIN},data=mnist",
        published=HAIM,
    ),
    WeightsProblem(
        system="stationary margin",
        name="MNIST, 784-1000-1, 20 trained on, the weights alone",
        case=f"trained:batch=20,steps=3700,{MARGIN},data=mnist",
        published=HAIM,
    ),
    WeightsProblem(
        system="silent units",
        name="MNIST, 784-1000-1, 10 trained on the margin from a start of 1e-4",
        case=f"trained:batch=10,steps=2000,threat=start,{MARGIN},data=mnist",
        published=HAIM,
    ),
    WeightsProblem(
        system="stationary margin",
        name="digits, 64-1000-1, 10 trained on, the weights alone",
        case=f"trained:batch=10,steps=2000,{MARGIN}",
        published=HAIM,
    ),
    WeightsProblem(
        system="published search",
        name="MNIST, 784-200-1, 10 trained on, preset haim",
        case=f"trained:steps=1500,{SUMS}",
        published=HAIM,
        options=SWEEP,
    ),
    WeightsProblem(
        system="published search",
        name="MNIST, 784-200-10, 10 trained on, preset buzaglo",
        case=f"trained:steps=2000,task=classes,{SUMS}",
        published=BUZAGLO,
        options=SWEEP,
    ),
    WeightsProblem(
        system="published search",
        name="MNIST, 784-200-1, 10 trained on by squared error and weight decay .02, preset buzaglo",
        case=f"trained:steps=5000,task=regression,method=sgd,start=1,weight_decay=0.02,{SUMS}",
        published=BUZAGLO,
        options=SWEEP,
    ),
    WeightsProblem(
        system="span", name="CIFAR-10, 10 trained on, SGD", case=f"trained:batch=10,{SPANS},data=cifar10,method=sgd"
    ),
    *(
        WeightsProblem(
            system="batch statistics",
            name=f"CIFAR-10, small ResNet, {n} in the batch, {seconds:g} s each",
            published=HATAMIZADEH,
            options={"batch": n, "seconds": seconds, "width": 8},
        )
        for n, seconds in ((1, 25.0), (2, 12.0), (4, 12.0), (8, 12.0))
    ),
)


def run(
    data: Path | None = None,
    seconds: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> list[Row]:
    """One row a problem, saved in `out` as they come; a run that was cut short goes on where it stopped.

    `data` is a folder with mnist_test500.npz and cifar10_test600.npz; without it the rows of MNIST and CIFAR-10 are left
    out. `seconds` is not used: everything ends by itself. `wanted` says by name which problems.
    """
    todo = [p for p in WEIGHT_PROBLEMS if wanted(p.name) and (data is not None or not _reads_files(p))]
    how: dict[str, Any] = {"seed": seed, "device": device, "data": data is not None}
    measure = partial(_measured_weights, data=data, seed=seed)
    rows = resumed("weights", todo, measure, out, whole=len(todo) == len(WEIGHT_PROBLEMS), **how)
    curves = [row["curve"] for row in rows if row["system"] == "noise"]
    if out is not None and curves:
        plot_noise(curves[0], out / "weights-noise.png")
    return rows


def plot_noise(curve: list[dict[str, float]], path: Path) -> None:
    """The informed adversary's error and the bound for every attacker against the noise; nothing without matplotlib.

    `curve` has at each noise multiplier the error, the bound, the epsilon and the error of the mean picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    noise = [point["noise multiplier"] for point in curve]
    axes.plot(noise, [point["error"] for point in curve], "o-", label="informed adversary")
    axes.plot(noise, [point["mean picture"] for point in curve], "--", label="mean of the known pictures")
    axes.plot(noise, [point["bound"] for point in curve], "s-", label="no attacker is below")
    axes.set(xscale="log", xlabel="noise multiplier", ylabel="root mean square error of a pixel")
    above = axes.secondary_xaxis("top")
    above.set_xticks(noise, [f"{point['epsilon']:.2g}" for point in curve], minor=False)
    above.tick_params(labelsize="small")
    above.set_xlabel(f"epsilon at delta {DELTA:g}")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def table(rows: list[Row]) -> Table:
    """What was measured beside what was published."""
    shown = Table(title="what trained weights give away")
    for column in ("system", "problem", "measured", "published", "seconds"):
        shown.add_column(column, justify="right" if column == "seconds" else "left")
    for row in rows:
        shown.add_row(row["system"], row["network"], row["words"], row["published"], f"{row['seconds']:.0f}")
    return shown


def _reads_files(problem: WeightsProblem) -> bool:
    return "data=" in problem.case or problem.system == "batch statistics"


def _measured_weights(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    begun = clock()
    found = MEASURES[problem.system](problem, data, seed)
    row = {
        "system": problem.system,
        "network": problem.name,
        "settings": asdict(problem),
        "published": problem.published,
    }
    return row | found | {"seconds": clock() - begun}


def _released(problem: WeightsProblem, data: Path | None, seed: int) -> tuple[Observation, Truth]:
    """The release of a problem's client, with what its attacker knows."""
    files = f",files={data}" if "data=" in problem.case else ""
    client = Case.parse(f"{problem.case}{files},seed={seed}").setting()
    known = client.domain.public() | client.knowledge
    return observe(client.model, client.loss, client.inputs, client.labels, knowledge=known, training=client.training)


def _linear_models(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """How many held-out examples come back exactly, and the worst error and bound."""
    errors, bounds = list[float](), list[float]()
    tries = int(problem.options["tries"])
    for k in range(tries):
        seen, truth = _released(problem, data, seed + k)
        try:
            found = Attack.parse("informed-adversary")(seen, seed=seed)
        except NotApplicable:
            errors.append(math.inf)
            continue
        if found.inputs is not None and found.bound is not None:
            errors.append(float((found.inputs - truth.inputs).norm() / truth.inputs.norm()))
            bounds.append(float(found.bound[0]))
    exact = sum(error <= EXACT_ERROR for error in errors)
    false = sum(error > bound for error, bound in zip(errors, bounds, strict=False)) if len(bounds) == tries else None
    words = f"{exact} of {tries} exact; worst error {max(errors):.1e}, certified to {max(bounds, default=math.inf):.1e}"
    return {"words": words, "errors": errors, "bounds": bounds, "false": false}


def _noise(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """Root mean square error of the adversary's ratio after one private step, beside the bound for every attacker."""
    client = Case.parse(f"{problem.case},seed={seed}").setting()
    model, loss, true = client.model, client.loss, client.inputs
    loss_of = loss(model(true), client.labels)
    names = ("head.weight", "head.bias")
    weight, bias = torch.autograd.grad(loss_of, [model.get_parameter(name) for name in names])
    own = torch.cat([weight, bias[:, None]], 1)
    own = own * min(1.0, CLIP / float(own.norm()))
    rng, prior = torch.Generator().manual_seed(seed), GaussianPrior(tuple(true.shape[1:]))
    mean = float((client.knowledge.known_inputs.mean(0) - true).square().mean().sqrt())
    curve = []
    for z in MULTIPLIERS:
        squares = list[float]()
        for _ in range(DRAWS):
            noisy = own + z * CLIP * torch.randn(own.shape, generator=rng, dtype=own.dtype)
            guess = _guess(noisy).view_as(true)
            squares.append(float((guess - true).square().mean()))
        bound = math.sqrt(distortion(prior.variances, information(z, 1.0, 1)) / prior.d)
        rho = 1 / (2 * z**2)  # of zero-concentrated privacy, in one step that holds the example
        epsilon = rho + 2 * math.sqrt(rho * math.log(1 / DELTA))
        error = math.sqrt(statistics.mean(squares))
        curve.append({"noise multiplier": z, "epsilon": epsilon, "error": error, "bound": bound, "mean picture": mean})
    below = sum(point["error"] < point["bound"] for point in curve)
    words = "; ".join(f"z={p['noise multiplier']:g}: {p['error']:.3f} (bound {p['bound']:.3f})" for p in curve)
    words += f"; the mean of the known pictures: {mean:.3f}"
    return {"words": words, "curve": curve, "below the bound": below}


def _guess(noisy: Tensor) -> Tensor:
    """The adversary's picture of a noisy gradient r (x, 1)^T [k, d + 1]: the ratio, within the range of pictures."""
    r = noisy[:, -1]
    ratio: Tensor = (r @ noisy[:, :-1] / r.square().sum()).clamp(0, 1)
    return ratio


def _spans(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """Members against strangers by their distance from the span, and what the attack claims."""
    seen, truth = _released(problem, data, seed)
    span = trained_span(View.of(seen))
    asked = seen.knowledge.candidates
    inside = (asked.flatten(1)[:, None] == truth.inputs.flatten(1)[None]).all(2).any(1)
    away = span.distances(asked)
    auc = float((away[inside][:, None] < away[~inside][None]).double().mean())
    found = Attack.parse("weight-span")(seen, seed=seed)
    right = 0
    if found.inputs is not None and found.bound is not None:
        sure = found.inputs[found.bound.isfinite()]
        right = int((sure.flatten(1)[:, None] == truth.inputs.flatten(1)[None]).all(2).any(1).sum())
    claimed = 0 if found.bound is None else int(found.bound.isfinite().sum())
    least = float(away[~inside].min())
    words = (
        f"AUC {auc:.3f}; members within {float(away[inside].max()):.0e}, others beyond {least:.2f}; {claimed} claimed, "
        f"{right} right of {len(truth)}"
    )
    facts = {"auc": auc, "members": float(away[inside].max()), "others": least, "claimed": claimed, "right": right}
    return {"words": words, **facts, "tolerance": span.tolerance}


def _change_of_weights(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """How many training examples the change of weights gives back, and how many of them are proven."""
    seen, truth = _released(problem, data, seed)
    try:
        found = Attack.parse({"change of weights": "ntk"}.get(problem.system, "silent-units"))(seen, seed=seed)
    except NotApplicable as why:
        return {"words": f"nothing was found: {why}"}
    if found.inputs is None:
        return {"words": "nothing was found"}
    true, got = truth.inputs.double().flatten(1), found.inputs.double().flatten(1)
    alike = _centred(true) @ _centred(got).T
    errors = torch.cdist(true, got).amin(1) / true.norm(dim=1)
    near, exact = int((alike.amax(1) > 0.9).sum()), int((errors <= EXACT_ERROR).sum())
    bounds = [] if found.bound is None else found.bound[found.bound.isfinite()].tolist()
    proven = f"{len(bounds)} certified to {max(bounds):.1e}" if bounds else "nothing claimed"
    words = f"{near} of {len(true)} above .9, {exact} exact; worst error {float(errors.max()):.1e}; {proven}"
    return {"words": words, "errors": errors.tolist(), "bounds": bounds, "above .9": near, "exact": exact}


def _stationary_margin(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """Normalised correlation of each training picture with the nearest answer of `kkt`, which no truth chose."""
    seen, truth = _released(problem, data, seed)
    found = Attack.parse("kkt")(seen, seed=seed)
    if found.inputs is None:
        return {"words": "nothing was found"}
    true, got = truth.inputs.double().flatten(1), found.inputs.double().flatten(1)
    alike = (_centred(true) @ _centred(got).T).amax(1)
    errors = torch.cdist(true, got).amin(1) / true.norm(dim=1)
    sure, agreeing = int((alike > SURE_PICTURE).sum()), found.trace.get("agreeing")
    way = f"by facets, units agree {agreeing:.4f}" if agreeing is not None else "by directions: a guess"
    words = (
        f"median correlation {float(alike.median()):.4f}, {sure} of {len(true)} above {SURE_PICTURE}, least "
        f"{float(alike.min()):.4f}; worst error {float(errors.max()):.1e}; {way}; {len(got)} answers"
    )
    return {"words": words, "correlations": alike.tolist(), "errors": errors.tolist(), "agreeing": agreeing}


def _published_search(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """Pictures of the draw that a published search chooses, and of the one that the truth would; beside chance.

    Only what is called oracle looks at the truth. Chance is as many pictures of the same data that were not trained on.
    """
    seen, truth = _released(problem, data, seed)
    view, rng = View.of(seen), torch.Generator().manual_seed(seed)
    true, n = _centred(truth.inputs.double().flatten(1)), len(truth)
    asked = {name: int(value) for name, value in problem.options.items()}
    found = list(guesses(gradient_sum_of(view, rng), n, rng, draws=asked["draws"], steps=asked["steps"]))
    if not found:
        return {"words": "nothing was found: every draw diverged"}

    def alike(inputs: Tensor) -> Tensor:
        best: Tensor = (true @ _centred(inputs.double().flatten(1)).T).amax(1)
        return best

    def told(guess: SumGuess) -> str:
        near = alike(guess.inputs)
        sure = int((near > SURE_PICTURE).sum())
        return f"median correlation {float(near.median()):.2f}, {int((near > 0.9).sum())} above .9, {sure} above .99"

    ours, best = chosen(found), max(found, key=lambda guess: float(alike(guess.inputs).median()))
    chance = float(alike(seen.knowledge.public).median())
    words = f"chosen of {len(found)} draws: {told(ours)}; oracle: {told(best)}; of {n}; other pictures: {chance:.2f}"
    medians = [float(alike(guess.inputs).median()) for guess in found]
    losses = {"losses": [guess.loss for guess in found], "medians": medians, "chance": chance}
    return {"words": words, "chosen": alike(ours.inputs).tolist(), "oracle": alike(best.inputs).tolist(), **losses}


def _centred(flat: Tensor) -> Tensor:
    found: Tensor = torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    return found


def _reconstructor(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """The error of the reconstructor's picture of the private example, and of held-out ones, beside the mean picture's."""
    seen, truth = _released(problem, data, seed)
    options = {"again": False} | {name: int(value) for name, value in problem.options.items()}
    found = Attack.find("informed-adversary").model_validate(options)(seen, seed=seed)
    if found.inputs is None:
        return {"words": "nothing was found"}
    told, off = found.trace, found.inputs - truth.inputs
    words = (
        f"held-out loss {told['held-out loss']:.4f} (the mean picture's {told['chance loss']:.4f}); the private example's "
        f"{float(off.abs().mean() + off.square().mean()):.4f}"
    )
    return {"words": words, "held-out loss": told["held-out loss"], "chance loss": told["chance loss"]}


def _batch_statistics(problem: WeightsProblem, data: Path | None, seed: int) -> Row:
    """What each term of batch-norm-inversion adds, beside inverting-gradients in the same seconds."""
    asked = problem.options
    found = sent_statistics.ablation(int(asked["batch"]), asked["seconds"], int(asked["width"]), data, seed)
    return {"words": sent_statistics.ablation_words(found), "ways": found}


MEASURES: dict[str, Callable[[WeightsProblem, Path | None, int], Row]] = {
    "linear model": _linear_models,
    "noise": _noise,
    "span": _spans,
    "change of weights": _change_of_weights,
    "silent units": _change_of_weights,
    "stationary margin": _stationary_margin,
    "published search": _published_search,
    "reconstructor": _reconstructor,
    "trained again": _linear_models,
    "batch statistics": _batch_statistics,
}
