"""Closed units: units of a dense layer that one example of a whole training shut, and that hold it ever since."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.network.dense import Dense
from unbatch.protocol import Protocol, local_update
from unbatch.reconstruction import Reconstruction

ROUNDINGS = 2.0  # of a parameter, before and after
AGREES = 4.0  # times what rounding and the claimed bound do, by which what one example sends may differ
LARGEST_TURN = 1e-2  # of what is compared: beyond it a comparison says nothing


@dataclass(frozen=True)
class Closed:
    """Which examples shut a unit by themselves, and why in words."""

    kept: Tensor  # [k], bool
    words: str
    condition: str = ""  # what kept ones rest on, beside the exchange


def step_sizes(view: View) -> list[float]:
    """What one example's gradient is multiplied by in a local step, for each size of its batches, largest first.

    A size that goes into the largest one is left out: one example in it moves as much as several in that one.
    Raises NotApplicable: the steps are not those of plain SGD, or the size of the batch is not known.
    """
    protocol, n = view.protocol, view.knowledge.get("batch_size")
    if protocol.optimiser != "sgd" or protocol.momentum or protocol.weight_decay:
        raise NotApplicable("only steps of plain SGD, without momentum and weight decay, leave an example as it was.")
    if n is None or view.knowledge.get("clients", 1) > 1:
        raise NotApplicable("how many examples one client has must be known, for what one of them does to a unit.")
    if view.form is None or view.form.weights is not None:
        raise NotApplicable("the loss is of no known form, or weighs its classes.")
    rate = protocol.learning_rate if view.steps else 1.0
    if view.form.reduction != "mean":
        return [rate]
    whole = min(protocol.local_batch_size or n, n) if view.steps else n
    rest = n % whole if view.steps else 0
    sizes = [whole] + ([rest] if rest and whole % rest else [])
    return [rate / size for size in sizes]


def closed_by(view: View, layer: Dense, found: Reconstruction, sure: Tensor, far: Tensor) -> Closed:
    """Which of the claimed examples shut some unit of a dense layer by themselves, in one of the client's local steps.

    A step of the model as it was sent out is computed on the example alone. Some unit's weights, its bias and the head's
    weights of that number must have moved by as much in the whole training, to their rounding and what the claimed bound
    `far` [k] (l2) does to it; and the unit must be shut for the example afterwards. Several examples that moved a unit
    together give another bias or another output than their mean does.
    """
    nothing = torch.zeros_like(sure)
    if found.inputs is None or found.labels is None or found.layer or layer.bias is None:
        return Closed(nothing, "examples that one unit alone holds are the network's inputs, with their labels.")
    try:
        steps = step_sizes(view)
    except NotApplicable as why:
        return Closed(nothing, str(why))
    above = view.head
    if above is None or above.name == layer.name or not {layer.weight, layer.bias, above.weight} <= set(view.update):
        return Closed(nothing, "a unit's row and the head's weight must both have been sent.")
    kept, sized = nothing.clone(), nothing.clone()
    for i in sure.nonzero().flatten().tolist():
        claim = _Claim(view, layer, above, found.inputs[i : i + 1], found.labels[i : i + 1], float(far[i]))
        for unit in claim.candidates():
            if any(claim.held_by(unit, size) for size in steps):
                kept[i], sized[i] = True, claim.tells_size(unit)
            if sized[i]:
                break
    count = int(kept.sum())
    if not count:
        return Closed(kept, "no unit moved as one of these examples alone would have moved it.")
    noun = "example is" if count == 1 else "examples are"
    words = f"{count} {noun} each what one unit of {layer.name!r} moved by, as a step on it alone would."
    condition = (
        f"units of {layer.name!r} that have no threshold hold some of them alone, so that their size rests on the client's "
        "having sent all parameters at one rate: with all weights at half of it, half the example explains the same."
    )
    return Closed(kept, words, condition if bool((kept & ~sized).any()) else "")


class _Claim:
    """One example, and what training did to the units that it sets off."""

    def __init__(self, view: View, layer: Dense, above: Dense, inputs: Tensor, label: Tensor, far: float) -> None:
        self.view, self.layer, self.above = view, layer, above
        self.kind = next(view.model.parameters()).dtype
        self.eps = torch.finfo(self.kind).eps
        self.inputs, self.label = inputs.to(view.obs.device, self.kind), label.to(view.obs.device)
        self.x = self.inputs.double().flatten()
        self.reach = far / float(self.x.norm())
        self.names = [name for name in (layer.weight, layer.bias, above.weight) if name is not None]
        self.before = {name: view.model.get_parameter(name).detach().double() for name in self.names}
        self.seen = {name: view.update[name].double() for name in self.names}
        self.off = {name: unsure(view, self.before[name], self.seen[name]) for name in self.names}
        W, b = (self.before[name] for name in self.names[:2])
        dW, db = (self.seen[name] for name in self.names[:2])
        self.height = W @ self.x + b  # [m]
        after = (W + dW) @ self.x + b + db if view.steps else -torch.ones_like(b)
        self.shut = (self.height > 0) & (after < 0)  # by training, of those that it set off

    def candidates(self) -> list[int]:
        """The units that it set off, that are shut for it now, and that moved along it."""
        dW, db = (self.seen[name] for name in self.names[:2])
        along = (dW - db[:, None] * self.x).norm(dim=1) <= LARGEST_TURN * dW.norm(dim=1)
        found: list[int] = (self.shut & along & (db != 0)).nonzero().flatten().tolist()
        return found

    def held_by(self, unit: int, size: float) -> bool:
        """Whether the unit moved as a step of that size on the example alone moves it, where others are shut already."""
        made = self._step(unit, size)
        weight, bias, out = self.names
        row, there = (torch.cat([t[weight][unit], t[bias][unit : unit + 1]]) for t in (made, self.seen))
        open_ = float(torch.cat([self.off[weight][unit], self.off[bias][unit : unit + 1]]).norm())
        length = float(row.norm())
        allowed = AGREES * (open_ + (self.reach + self.eps) * length)
        if float((row - there).norm()) > allowed or allowed > LARGEST_TURN * length:
            return False
        if made[out].shape[1] != len(self.height):
            return False
        # what the unit puts out is off by what moves the example, and by the rounding of its own terms
        terms = float(self.before[weight][unit].norm() * self.x.norm() + self.before[bias][unit].abs())
        turn = terms * (self.reach + self.eps) / float(self.height[unit])
        column, sent, off = made[out][:, unit], self.seen[out][:, unit], self.off[out][:, unit]
        clear = off <= LARGEST_TURN * column.abs().max()  # entries that the rounding of parameters does not drown
        if not bool(column[clear].any()):  # rounding drowns all that the head would show
            return False
        gap = float((column - sent)[clear].norm())
        wide = AGREES * (turn * float(column[clear].norm()) + float(off[clear].norm()))
        return gap <= wide <= LARGEST_TURN * float(column[clear].norm())

    def tells_size(self, unit: int) -> bool:
        """Whether the unit has a threshold, by which what it puts out is no multiple of the example."""
        weight, bias = (self.before[name] for name in self.names[:2])
        return float(bias[unit].abs()) > LARGEST_TURN * float(weight[unit].norm() * self.x.norm())

    def _step(self, unit: int, size: float) -> dict[str, Tensor]:
        """How a step of that size on the example alone moves the layer and the head, the other shut units silenced."""
        others = self.shut.clone()
        others[unit] = False
        model = copy.deepcopy(self.view.model)
        with torch.no_grad():
            for name in self.names[:2]:
                model.get_parameter(name)[others] = 0.0
        protocol = Protocol(mode=self.view.protocol.mode)
        one = local_update(model, self.view.loss, self.inputs, self.label, protocol, trained=self.names)
        sign = -1.0 if self.view.steps else 1.0
        return {name: sign * size * g.detach().double() for name, g in one.items()}


def unsure(view: View, before: Tensor, moved: Tensor) -> Tensor:
    """By how much each entry of a difference of parameters may be off through their rounding; of a gradient, of itself."""
    eps = torch.finfo(view.obs.dtype).eps
    if not view.steps:
        return ROUNDINGS * eps * moved.abs()
    return ROUNDINGS * eps * (before.abs() + (before + moved).abs())
