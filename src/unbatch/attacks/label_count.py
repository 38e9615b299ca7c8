"""label-count: how often each class occurs in the batch, from the head's gradient, with what of it is proven."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, cast, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.loss import LossForm
from unbatch.network.dense import Dense, forward, layer_inputs
from unbatch.numerics import label_counts
from unbatch.observation import Observation
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction

CONFIDENCE_WEIGHT = 20.0
PROOF_SIGMAS = 7.0  # a Gaussian entry lies further out with probability 3e-12
ONE_HOT_TO = 1e-3  # how near a label that was computed back must come to a class, in float32
MOST_TOLERANCE = 0.05  # the same at most, for updates in less precision
RANK_ONE_ROUNDINGS = 64.0  # relative rest of one example's head gradient beside its leading product, in roundings


@dataclass(frozen=True, kw_only=True)
class HeadGradient:
    """What one exchange says of the labels in its head: the gradient that was sent, and how it came about.

    `shares` is how much each example counts in it [n]; `slack` the error of an entry beyond its rounding.
    """

    form: LossForm
    n: int
    weight: Tensor | None  # dL/dV [k, m]
    bias: Tensor | None  # dL/db [k]
    shares: Tensor  # [n]
    slack: float
    steps: int
    nonnegative: bool  # the head's features are
    signs_only: bool  # Adam keeps little else

    @property
    def only_classes(self) -> bool:
        """Whether the loss takes class numbers and nothing else, no rows of probabilities and no bits in between."""
        return self.form.labels.whole and self.form.labels.rows is None

    def occurring(self) -> Tensor | None:
        """Which classes certainly occur [k], at any positive factor and whatever rows are ignored; None: no class is sure.

        Where the loss takes class numbers alone, an entry of the gradient of a class is negative only through that class.
        The opposite sign is ruled out by more positive entries than there are examples.
        """
        if not self.only_classes or self.form.smoothing or self.form.name == "squared-error":
            return None
        held = [self.bias] if self.bias is not None else []
        held += [self.weight] if self.weight is not None and self.nonnegative else []
        factor, sums = float(self.shares.mean()), not self.signs_only
        found = [label_counts.occurring(g, self.n, factor=factor, slack=self.slack, sums=sums) for g in held]
        if self.n == 1 and self.weight is not None and sums:
            found.append(label_counts.present(self.weight, 1, slack=self.slack))
        sure = torch.stack(found).any(0) if found else torch.zeros(0, dtype=torch.bool)
        return sure if 0 < int(sure.sum()) <= self.n else None

    def recomputed(self, V: Tensor, c: Tensor | None) -> Tensor | None:
        """The label's row [k] of a batch of one, with which head [k, m] and update fit at the protocol's own factor.

        dL/db = a (p - t) and dL/dV = dL/db h^T give h, so p and then t = p - dL/db / a. None: it is no such gradient.
        """
        if self.n != 1 or self.steps > 1 or self.signs_only:
            return None
        if self.weight is None or self.bias is None or not bool(self.bias.any()):
            return None
        pull, dV = self.bias.double(), self.weight.double()
        h = dV.T @ pull / (pull @ pull)
        rest = float((dV - torch.outer(pull, h)).norm() / dV.norm().clamp_min(1e-300))
        if rest > RANK_ONE_ROUNDINGS * torch.finfo(self.weight.dtype).eps + self.slack / float(dV.abs().max()):
            return None
        o = V.double() @ h + (c.double() if c is not None else 0.0)
        pull = pull / float(self.shares[0])
        if self.form.name == "squared-error":
            return o - pull / 2
        t: Tensor = (o.softmax(0) if self.form.name == "cross-entropy" else o.sigmoid()) - pull
        return (t - self.form.smoothing / len(t)) / (1 - self.form.smoothing)

    def factor_of_class(self, row: Tensor) -> float | None:
        """By what the update of one class was multiplied, where that explains the row computed back; else None."""
        if self.bias is None or self.form.name != "cross-entropy":
            return None
        return label_counts.factor_of_class(row, self.bias.double() / float(self.shares[0]))

    def is_row(self, row: Tensor) -> bool:
        """Whether a row computed back is one of probabilities that the loss takes, and no class at another factor."""
        taken = self.form.labels.rows is not None and self.form.name == "cross-entropy"
        return taken and bool((row > -ONE_HOT_TO).all()) and self.factor_of_class(row) is None


@final
class LabelCount(Attack):
    """Counts how often each class occurs in the batch, from the last layer's bias gradient.

    With features h_i, probabilities p_i and label rows t_i, dL/db = sum_i a_i (p_i - t_i) and dL/dV = sum_i a_i (p_i - t_i)
    h_i^T, a_i = 1 / n for the mean. Labels with bound 0 are proven, whatever the inputs and the layers below:

    - One example whose head sent weight and bias: h = dL/dV^T dL/db / |dL/db|^2, so p and t = p - dL/db / a. Where t is a
      class, factor and label fit to rounding; another factor shows itself, since t is then no class.
    - More examples, under a loss that takes class numbers alone: a class with a negative entry occurs, at any positive
      factor, under class weights and ignored rows alike, since all p_ij > 0. Where n classes do, that is every label.
      The opposite sign of the update is excluded where more entries are positive than there are examples.

    Nothing else is proven. The counts c_j >= -dL/db_j / a that follow from n class numbers, none ignored, at the
    protocol's factor a stand in the trace (lower, upper) under just these assumptions: with fewer rows, or another factor,
    other counts give the same gradient, and rows of probabilities (which cross entropy takes) with the same sum give the
    same dL/db. Where the counts leave room, sum_i p_ij is estimated from the model's outputs on stand-in inputs, or as
    equal classes where it is confident. All labels that are not proven have an infinite bound, and the words say what else
    would explain the update. SGD's local steps add up gradients with known weights; Adam keeps little but signs.
    """

    family: ClassVar[str] = "labels"
    guarantee: ClassVar[Guarantee] = Guarantee.BOUNDED
    cost: ClassVar[Cost] = Cost.READS
    paper: ClassVar[str] = "Zhao et al., iDLG, 2020; Wainakh et al., PoPETs 2022; Geng et al., 2021"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = frozenset({"clients", "noise"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(case="digits:batch=4", floors={"label-accuracy": 1.0})

    formerly: ClassVar[dict[str, str]] = {"probes": "stand_ins"}

    stand_ins: Annotated[int, Field(gt=0, description="stand-in inputs behind the estimate")] = 256

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view = view if view.protocol.optimiser == "sgd" else view.gradient
        head, form = _head(view), _form(view)
        obs, n = view.obs, view.knowledge.batch_size
        inputs = view.stand_in(self.stand_ins, rng)
        expected = n * _mean_answer(form, forward(obs.model, inputs).double().cpu().reshape(len(inputs), -1))
        features = layer_inputs(obs.model, head.name, inputs).cpu()
        reach = torch.tensor([0.1, 1.0, 10.0]).repeat(len(inputs))[: len(inputs)]
        wild = inputs  # tokens have no other size
        if inputs.is_floating_point():
            wild = torch.randn(inputs.shape, generator=rng) * reach.view(-1, *[1] * (inputs.ndim - 1))
        nonnegative = bool((torch.cat([features, layer_inputs(obs.model, head.name, wild).cpu()]) >= 0).all())
        gradient = _head_gradient(obs, head, form, nonnegative)
        lower, upper, estimate = self._counts(obs, gradient, expected, features.mean(0))
        parameters = {name: p.detach().cpu() for name, p in obs.model.named_parameters(remove_duplicate=False)}
        row = gradient.recomputed(parameters[head.weight], parameters.get(head.bias or ""))
        sure, why = _proven(gradient, row, len(estimate))
        if sure is not None:
            lower = torch.maximum(lower, sure)
            lower, upper = (lower, upper) if int(lower.sum()) <= n else (sure, torch.full_like(sure, n))
            upper = torch.minimum(torch.maximum(upper, lower), n - (lower.sum() - lower))
            estimate = label_counts.apportion(estimate.double(), lower, upper, n)
        proven = torch.zeros_like(estimate) if sure is None else sure
        words = _words(gradient, head, lower, proven, why, row, float(obs.knowledge.get("noise", 0.0)))
        found = self._report(n, lower, upper, estimate, proven, words)
        if row is not None and sure is None and gradient.is_row(row):
            return replace(found, labels=row.clamp_min(0)[None])
        return found

    def _counts(
        self, obs: Observation, gradient: HeadGradient, expected: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Least, greatest and estimated counts [k] of n class numbers, none ignored, at the protocol's own factor."""
        form, n, shares = gradient.form, gradient.n, gradient.shares
        if gradient.signs_only:
            grown = [-g if g is not None else None for g in (gradient.weight, gradient.bias)]
            weight = grown[0] if gradient.nonnegative else None
            return label_counts.counts_by_sign(weight, grown[1], max(len(expected), 2), n, slack=gradient.slack)
        if form.weights is not None:
            return label_counts.weighted_counts(
                gradient.bias, n, torch.tensor(form.weights), expected / n, form.scale, total=form.reduction == "sum"
            )
        return label_counts.label_counts(
            gradient.weight,
            gradient.bias,
            n,
            factor=float(shares.mean()),
            expected=expected,
            loss=cast(label_counts.CountedLoss, form.name),  # others are refused before
            smoothing=form.smoothing,
            features=features,
            nonnegative=gradient.nonnegative,
            most=float(shares.max()),
            slack=gradient.slack,
        )

    def _report(
        self, n: int, lower: Tensor, upper: Tensor, estimate: Tensor, proven: Tensor, words: str
    ) -> Reconstruction:
        classes, sure = torch.arange(len(estimate)), int(proven.sum())
        assumed = int(lower.sum()) or int(upper.min()) < n
        return Reconstruction(
            inputs=None,
            labels=torch.cat([classes.repeat_interleave(proven), classes.repeat_interleave(estimate - proven)]),
            bound=torch.cat([torch.zeros(sure), torch.full((n - sure,), torch.inf)]).double(),
            trace={
                "proven": proven.tolist(),
                "lower": lower.tolist(),
                "upper": upper.tolist(),
                "estimate": estimate.tolist(),
                "proof": "exact" if sure == n else "bounded" if sure else "conditional" if assumed else "estimate",
                "words": words,
            },
        )


def _head_gradient(obs: Observation, head: Dense, form: LossForm, nonnegative: bool) -> HeadGradient:
    """The head's part of the update, after local steps as the sum of gradients that they add up."""
    n, steps = obs.knowledge.batch_size, obs.protocol.steps(obs.knowledge.batch_size)
    sent = {name: obs.update[name].cpu() for name in (head.weight, head.bias) if name and name in obs.update}
    weight, bias = sent.get(head.weight), sent.get(head.bias or "")
    slack = PROOF_SIGMAS * obs.knowledge.get("noise", 0.0)
    slack += max(
        2 * obs.grain.get(name, 0.0) * u.numel() ** 0.5 for name, u in sent.items()
    )  # one entry may hold it all
    shares, signs_only = torch.ones(n, dtype=torch.float64), bool(steps) and obs.protocol.optimiser != "sgd"
    if signs_only:
        weight, bias = (-g if g is not None else None for g in (weight, bias))
    else:
        shares, decay = example_weights(obs, form)
        if steps:
            before = {name: p.detach().cpu() for name, p in obs.model.named_parameters() if name in sent}
            size = max(float(before[k].abs().max() + u.abs().max()) for k, u in sent.items())
            slack += 4 * steps * obs.knowledge.get("clients", 1) * torch.finfo(obs.dtype).eps * size
            grown = {k: (decay * before[k].double() - u.double()).to(u.dtype) for k, u in sent.items()}
            weight, bias = grown.get(head.weight), grown.get(head.bias or "")
    return HeadGradient(
        form=form,
        n=n,
        weight=weight,
        bias=bias,
        shares=shares,
        slack=slack,
        steps=steps,
        nonnegative=nonnegative,
        signs_only=signs_only,
    )


def _proven(gradient: HeadGradient, row: Tensor | None, k: int) -> tuple[Tensor | None, str]:
    """How often each class certainly occurs [k], and by what: "recomputed" or "signs"; None: no class is sure."""
    if row is not None and gradient.weight is not None:
        tolerance = max(ONE_HOT_TO, RANK_ONE_ROUNDINGS * torch.finfo(gradient.weight.dtype).eps)
        tolerance += 2 * gradient.slack / float(gradient.shares[0])
        label = label_counts.class_of(row, tolerance)
        if label is not None and tolerance < MOST_TOLERANCE:
            return torch.nn.functional.one_hot(torch.tensor(label), max(k, 2)), "recomputed"
    occurring = gradient.occurring()
    return (None, "") if occurring is None else (occurring.long(), "signs")


def _words(
    gradient: HeadGradient, head: Dense, lower: Tensor, proven: Tensor, why: str, row: Tensor | None, noise: float
) -> str:
    """What is proven and what is not, and what else would explain the update."""
    n, sure, counted = gradient.n, int(proven.sum()), int(lower.sum())
    others = [] if gradient.only_classes else ["rows of probabilities" if gradient.form.classes else "soft labels"]
    others += ["ignored rows"] if n > 1 and (gradient.form.ignored is not None or gradient.form.weights) else []
    others += ["another factor of the update"]
    rest = (
        f"{' or '.join([', '.join(others[:-1]), others[-1]] if len(others) > 1 else others)} would explain it as well"
    )
    name = repr(head.name)
    if why == "recomputed":
        words = f"The gradient of {name} proves the label: computed back from it, label and factor fit to rounding"
    elif sure == n:
        occur = f"{n} classes occur" if n > 1 else "its class occurs"
        words = f"The gradient of {name} proves every label of the batch of {n}: {occur}, at any factor"
    elif sure:
        words = (
            f"The gradient of {name} proves that {sure} class{'es' * (sure > 1)} occur{'s' * (sure == 1)}, at any factor; "
            f"the other {n - sure} of {n} labels are estimates"
        )
    elif counted:
        left = f", and the other {n - counted} are estimates" if n > counted else ""
        held = "label is a class that" if n == 1 else f"labels are {n} classes, each of which"
        words = (
            f"If the {held} counts, and the update has its protocol's factor, the gradient "
            f"of {name} fixes {'it' if n == 1 else f'{counted} of them'}{left}. It proves none: {rest}"
        )
    else:
        rest = "the label is an estimate" if n == 1 else f"all {n} labels are estimates"
        words = f"The gradient of {name} proves nothing about the classes; {rest}"
    times = gradient.factor_of_class(row) if row is not None and not sure else None
    if times is not None and gradient.bias is not None:
        words += f". It is that of class {int(gradient.bias.argmin())} at {times:.4g} times that factor"
    elif row is not None and not sure and gradient.is_row(row):
        said = [
            f"{float(row[j]):.3g} of class {j}" for j in row.topk(min(3, len(row))).indices.tolist() if row[j] > 5e-3
        ]
        words += f". At that factor the label is the row with {', '.join(said)}"
    if gradient.nonnegative and gradient.weight is not None and why == "signs":
        words += ", taking the head's features for nonnegative as they were on every probe"
    if noise and (sure or counted):
        words += f", at {PROOF_SIGMAS:g} standard deviations of the known noise"
    return words + "."


def example_weights(obs: Observation, form: LossForm) -> tuple[Tensor, float]:
    """How much each example of the union weighs in the update [n], and the sum of the clients' parameter decays.

    update = decay * parameters - sum_i weight_i grad_i (after local steps), or sum_i weight_i grad_i.
    """
    n, clients, protocol = obs.knowledge.batch_size, obs.knowledge.get("clients", 1), obs.protocol
    parts, decay = [], 0.0
    for share in torch.arange(n).tensor_split(clients):
        weights = torch.zeros(len(share), dtype=torch.float64)
        size, steps = len(share), protocol.steps(len(share))
        if not steps:
            weights += form.scale / (size if form.reduction == "mean" else 1)
        keep, kicks = _impulse(protocol, steps)
        batch = min(protocol.local_batch_size or size, size)
        for step, kick in enumerate(kicks.tolist()):
            start = (step % -(-size // batch)) * batch
            taken = weights[start : start + batch]
            taken += kick * form.scale / (len(taken) if form.reduction == "mean" else 1)
        parts.append(weights)
        decay += keep - 1
    return torch.cat(parts), decay


def _impulse(protocol: Protocol, steps: int) -> tuple[float, Tensor]:
    rate, momentum, decay = protocol.learning_rate, protocol.momentum, protocol.weight_decay
    return label_counts.impulse(steps, learning_rate=rate, momentum=momentum, weight_decay=decay)


def _head(view: View) -> Dense:
    """The layer whose gradient counts the labels. Raises NotApplicable: there is none, or it was not sent."""
    head = view.head
    if head is None:
        raise NotApplicable("the network's output is not that of a dense layer, whose gradient would count the labels.")
    if not {head.weight, head.bias} & set(view.update):
        raise NotApplicable(
            f"the head {head.name!r} sent no gradient; it is frozen, and only the head's gradient counts labels."
        )
    return head


def _form(view: View) -> LossForm:
    """The form of a loss on class labels. Raises NotApplicable: it is another, or the protocol leaves nothing to count."""
    form, protocol, outputs = view.form, view.protocol, math.prod(view.outputs)
    n, clients = view.knowledge.batch_size, view.knowledge.get("clients", 1)
    if form is None or form.name == "additive" or form.scale <= 0:
        raise NotApplicable(
            "the loss is neither cross entropy, nor binary cross entropy, nor squared error (weights beside smoothing?)."
        )
    if form.weights is not None and (
        view.steps or clients > 1 or view.head is None or view.head.bias not in view.update
    ):
        raise NotApplicable(
            "the loss weights or ignores classes, which is read from one step's gradient of the head's bias alone."
        )
    if not form.classes and not (form.name == "binary-cross-entropy" and outputs == 1):
        raise NotApplicable(
            f"the labels of this {form.name} are vectors or real numbers, not classes: nothing to count."
        )
    if clients > n:
        raise NotApplicable(f"{clients} clients cannot share a batch of {n}.")
    if view.steps and protocol.optimiser != "sgd":
        if protocol.weight_decay or form.smoothing or form.name == "squared-error":
            raise NotApplicable(
                f"Adam keeps only signs, which under {form} and weight decay {protocol.weight_decay:g} say nothing."
            )
    elif bool((_impulse(protocol, protocol.steps(-(-n // clients)))[1] < 0).any()):
        raise NotApplicable(
            "the local steps overshoot: learning rate times weight decay turns the sign of a gradient's share."
        )
    return form


def _mean_answer(form: LossForm, outputs: Tensor) -> Tensor:
    """What an example adds to the head's gradient besides its label, on average [k], from outputs [p, k] on stand-ins.

    A confident model says little of strange inputs, but follows the labels of real ones: from a confidence of 1 / 20 on
    (0 for equal probabilities, 1 for certainty) all classes are taken to be equally frequent.
    """
    k = outputs.shape[1]
    if form.name == "squared-error":
        return outputs.mean(0)
    if form.name == "cross-entropy":
        p = outputs.softmax(1)
        confidence = (p.square().sum(1).mean() - 1 / k) / (1 - 1 / k)
    else:
        p = outputs.sigmoid()
        confidence = (2 * p - 1).square().mean()
    trust = (1 - CONFIDENCE_WEIGHT * confidence).clamp_min(0)
    return trust * p.mean(0) + (1 - trust) / max(k, 2)
