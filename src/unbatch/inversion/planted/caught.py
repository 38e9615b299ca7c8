"""Caught: single examples of a batch that planted last layers let send, each as an exchange of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.planted.quiet import dense_layers, golden_logit
from unbatch.inversion.planted.sums import refuse_changed
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.network.dense import Dense, layer_inputs
from unbatch.observation import Observation

SATURATED = 60.0  # logits from a threshold, beyond which a probability is 0 or 1 to all precision
COUNTED = 8.0  # times the rounding of a sum of n probabilities, within which it is taken for a whole number
TOGETHER = 1e-4  # relative change of an example's outputs, beside others, that rounding may make
ONE_EXAMPLE_AGAIN = 1e-3  # relative distance of features, below which two catches are taken for one example
BETWEEN = 1e-4  # of |row| |f|, by which rounding may move an example beyond a threshold
LEAST_CLASSES = 3  # below it sums of probabilities do not tell how many examples they are of
ONE_EXAMPLE = ("input_shape", "domain", "input_range", "mode")  # of what is known, what holds for one example alone


def plant_cut(model: nn.Module, shape: tuple[int, ...], output: int, row: Tensor, threshold: float) -> nn.Module:
    """A copy of `model` whose last layer hears nothing but row . f > threshold, for the output of that number.

    The other outputs are constants, of which the first has the golden share. With s_i = 1 where row . f_i > threshold and
    else 0, example i sends row (s_i - [y_i is `output`]) back to its features f_i, whatever else it is.
    Raises NotApplicable: the network does not end with a dense layer with a bias, or has fewer than three outputs.

    >>> made = plant_cut(nn.Sequential(nn.Linear(2, 4)), (2,), 1, torch.ones(2), 3.0)
    >>> made[0].weight[:, 0].tolist(), [round(b, 2) for b in made[0].bias.tolist()]
    ([0.0, 1.0, 0.0, 0.0], [1.17, -3.0, 0.0, 0.0])
    """
    made = copy.deepcopy(model)
    head = next((layer for layer in dense_layers(made, shape) if layer.head), None)
    if head is None or head.bias is None:
        raise NotApplicable(
            "the network does not end with a dense layer with a bias, in which one class is let through."
        )
    W, b = (made.get_parameter(name) for name in (head.weight, head.bias))
    if len(b) < LEAST_CLASSES or output >= len(b):
        raise NotApplicable(f"the network has {len(b)} outputs; {max(LEAST_CLASSES, output + 1)} are needed.")
    with torch.no_grad():
        W.zero_()
        b.zero_()
        W[output] = row.to(W)
        b[1 if output == 0 else 0] = golden_logit(len(b) - 1)
        b[output] = -threshold
    return made


@dataclass(frozen=True, eq=False)
class PlantedCut:
    """One round on a network with such a last layer: where it cut, and how many examples lie above."""

    view: View
    head: Dense
    output: int
    row: Tensor  # [d], float64
    threshold: float
    above: int | None  # examples with row . f beyond the threshold; None where one lies too near to it
    labels: tuple[int, ...] | None  # how many examples have each label


@dataclass(frozen=True, eq=False)
class Caught:
    """One example's own update, out of one round or the difference of two."""

    obs: Observation  # of the one example, as if its label were the output that was let through
    label: int | None  # the example's, where that is told


def cuts_of(view: View) -> list[PlantedCut]:
    """What each known round tells. Raises NotApplicable: one is not so planted, or something changed its update."""
    _refuse_together(view)
    return [_cut(view.like(each).gradient) for each in view.obs.exchanges]


def caught(cuts: Sequence[PlantedCut]) -> list[Caught]:
    """The single examples that rounds hold: the only one of its class, or the only one between two thresholds."""
    found = list[Caught]()
    sure = [cut for cut in cuts if cut.above is not None and cut.labels is not None]
    for cut in sure:
        if cut.above == 0 and cut.labels is not None and cut.labels[cut.output] == 1:
            found.append(_of(cut, cut, None, cut.output))
    for group in _alike(sure):
        nobody = (group[0].labels or (1,) * (group[0].output + 1))[group[0].output] == 0
        ends: list[PlantedCut | None] = [*group, None] if nobody and group[-1].above else [*group]
        for low, high in pairwise(ends):
            if low is not None and (low.above or 0) - ((high.above or 0) if high is not None else 0) == 1:
                one = _of(high or low, high, low, None)
                if _lies_between(one, low, high):
                    found.append(one)
    kept = list[Caught]()
    for one in found:
        if _clear(one, sure[0].head) and not any(_same_example(one, other, sure[0].head) for other in kept):
            kept.append(one)
    return kept


def _cut(view: View) -> PlantedCut:
    """What a round tells."""
    refuse_changed(view)
    form, head = view.form, view.head
    plain = form is not None and form.name == "cross-entropy" and form.classes and form.weights is None
    if form is None or not plain or form.smoothing or form.ignored in range(view.outputs[0]):
        raise NotApplicable("one class is let through under cross entropy on class labels, and this loss is another.")
    if head is None or head.bias is None or not {head.weight, head.bias} <= set(view.update):
        raise NotApplicable("the last layer is not dense, has no bias, or sent no gradient of both.")
    W, b = (view.model.get_parameter(name).detach().double().cpu() for name in (head.weight, head.bias))
    heard = W.any(1).nonzero().flatten().tolist()
    if len(heard) != 1 or len(b) < LEAST_CLASSES:
        raise NotApplicable("the last layer hears more than one class: it was not planted by this attack.")
    output = heard[0]
    counts = _counts(view, head.bias, b, output)
    above, labels = counts if counts is not None else (None, None)
    return PlantedCut(view, head, output, W[output], -float(b[output]), above, labels)


def _share(view: View) -> float:
    """By how much more than in this batch an example weighs in a batch of one."""
    n, clients = int(view.knowledge.batch_size), int(view.knowledge.get("clients", 1))
    if n % clients:
        raise NotApplicable(f"{n} examples are not dealt evenly to {clients} clients, so each weighs otherwise.")
    return n / clients if view.form is not None and view.form.reduction == "mean" else 1.0


def _counts(view: View, bias: str, b: Tensor, output: int) -> tuple[int, tuple[int, ...]] | None:
    """How many examples lie above the threshold, and have each label, by the gradient of the head's bias alone.

    sum_i p_j - n_j, with p the softmax of the constants where example i lies below and 0 where it lies above: with the
    golden share no other whole numbers give the same. None where none do.
    """
    n = int(view.knowledge.batch_size)
    scale = view.form.scale if view.form is not None else 1.0
    g = view.update[bias].double().cpu() * _share(view) / scale
    eps = max(torch.finfo(kind).eps for kind in (view.update[bias].dtype, next(view.model.parameters()).dtype))
    near = COUNTED * eps * n * max(1.0, n**0.5 / 8)
    others = torch.arange(len(b)) != output
    q = torch.zeros_like(b)
    q[others] = b[others].softmax(0)
    fitting = list[tuple[int, tuple[int, ...]]]()
    more = round(float(g[output]))
    for own in range(n + 1):
        above = own + more
        if not 0 <= above <= n:
            continue
        labels = (n - above) * q - g
        labels[output] = above - g[output]
        whole = labels.round()
        if bool(((labels - whole).abs() <= near).all()) and bool((whole >= 0).all()) and int(whole.sum()) == n:
            fitting.append((above, tuple(int(count) for count in whole)))
    return fitting[0] if len(fitting) == 1 else None


def _refuse_together(view: View) -> None:
    """Raises NotApplicable where what one example sends depends on the others, as with batch norm in train mode."""
    name = view.head.name if view.head is not None else ""
    x = view.stand_in(3, torch.Generator().manual_seed(0)).to(next(view.model.parameters()).dtype)
    with torch.random.fork_rng(
        devices=[]
    ):  # outputs of the planted head say next to nothing: what it is given is compared
        together, alone = (
            layer_inputs(view.model, name, torch.cat([x[:1], others]), view.protocol.mode)[0]
            for others in (x[1:], -x[1:])
        )
    if not torch.allclose(together, alone, rtol=TOGETHER, atol=TOGETHER * float(together.abs().max())):
        raise NotApplicable(
            "what one example sends depends on the others or on chance, as with batch norm or dropout in train mode, so "
            "that no example sends alone."
        )


def _alike(cuts: Sequence[PlantedCut]) -> list[list[PlantedCut]]:
    """The rounds by what was planted but for the threshold, from the lowest to the highest one."""
    groups = list[list[PlantedCut]]()
    for cut in cuts:
        group = next((held for held in groups if _same(held[0], cut)), None)
        if group is None:
            groups.append([cut])
        else:
            group.append(cut)
    return [sorted(group, key=lambda cut: cut.threshold) for group in groups]


def _same(one: PlantedCut, other: PlantedCut) -> bool:
    if one.output != other.output or one.labels != other.labels or not torch.equal(one.row, other.row):
        return False
    mine, theirs = (dict(cut.view.model.state_dict()) for cut in (one, other))
    return all(name == one.head.bias or torch.equal(mine[name], theirs[name]) for name in mine)


def _of(cut: PlantedCut, high: PlantedCut | None, low: PlantedCut | None, label: int | None) -> Caught:
    """The update of the one example that lies between two cuts, or that has the class of one in which none lies above.

    `cut` is one of them; above a missing high one nobody sends, and below a missing low one nothing is taken off.
    """
    view, head, output = cut.view, cut.head, cut.output
    share = _share(view)
    parts = {
        name: [other.view.update[name].double() for other in (high, low) if other is not None] for name in view.update
    }
    signs = [1.0] * (high is not None) + [-1.0] * (low is not None)
    update = {
        name: share * sum((sign * part for sign, part in zip(signs, held, strict=True)), torch.zeros_like(held[0]))
        for name, held in parts.items()
    }
    model = copy.deepcopy(view.model)
    b = model.get_parameter(head.bias or "")
    scale = view.form.scale if view.form is not None else 1.0
    f = -update[head.weight][output] / scale
    if high is None:
        with torch.no_grad():
            b[output] = -float(cut.row.to(f) @ f) - 4 * SATURATED + float(_others(b, output))
    if high is None or low is None:  # what other examples send of the other outputs is not of this one
        sent = b.detach().double().softmax(0)
        sent[output] -= 1.0
        update[head.weight] = scale * sent[:, None] * f
        update[head.bias or ""] = scale * sent
    kind = {name: tensor.dtype for name, tensor in view.update.items()}
    grain = {} if low is None or high is None else {name: _coarse(parts[name], kind[name], share) for name in parts}
    told = view.knowledge.only(*(set(ONE_EXAMPLE) & set(view.knowledge)))
    told |= Knowledge(batch_size=1, labels=torch.tensor([output], device=view.obs.device))
    held = {name: tensor.to(kind[name]) for name, tensor in update.items()}
    return Caught(replace(view.obs, model=model, update=held, knowledge=told, grain=grain), label)


def _coarse(parts: Sequence[Tensor], kind: torch.dtype, share: float) -> float:
    """The rounding that the difference of two sums keeps of them."""
    return share * torch.finfo(kind).eps * math.hypot(*(float(part.square().mean().sqrt()) for part in parts))


def _others(b: Tensor, output: int) -> Tensor:
    """The height of all other outputs together, over which an output must rise to be heard."""
    return torch.cat([b[:output], b[output + 1 :]]).detach().double().logsumexp(0)


def _lies_between(one: Caught, low: PlantedCut, high: PlantedCut | None) -> bool:
    """Whether the features that an example sent lie between the thresholds that it lies between; else rates differ."""
    scale = low.view.form.scale if low.view.form is not None else 1.0
    f = -one.obs.update[low.head.weight][low.output].double().cpu() / scale
    at, off = float(low.row @ f), BETWEEN * float(low.row.norm() * f.norm()) + SATURATED
    return low.threshold - off <= at <= (high.threshold + off if high is not None else math.inf)


def _clear(one: Caught, head: Dense) -> bool:
    """Whether the example is as far below the threshold of its own exchange as it must be to send by its label alone."""
    W, b = (one.obs.model.get_parameter(name).detach().double() for name in (head.weight, head.bias or ""))
    output = int(one.obs.knowledge.labels[0])
    f = -one.obs.update[head.weight][output].double()
    return bool(W[output] @ f + b[output] - _others(b, output) < -SATURATED / 2) and bool(f.any())


def _same_example(one: Caught, other: Caught, head: Dense) -> bool:
    f, g = (held.obs.update[head.weight][int(held.obs.knowledge.labels[0])].double() for held in (one, other))
    return bool((f - g).norm() <= ONE_EXAMPLE_AGAIN * f.norm())
