"""Lone rows: examples that are alone in a row of a dense layer's gradient, taken out of it one after the other.

A unit behind a relu sends back only the examples for which it fires. Where that is one, its row of the gradient is that
example's alone; taken out of all rows, others become lone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.above_layer import Tail
from unbatch.inversion.label_fit import possible_labels
from unbatch.inversion.view import View
from unbatch.network.dense import Dense
from unbatch.progress import tick

ROUNDINGS = 8.0  # of a quotient of two entries of the update, relative
AGREES = 64.0  # roundings of the update by which what the model sends back may differ from what was seen
LEAST_ENTRY = 1e-6  # of the largest entry of the bias gradient, below which a row is empty
LARGEST_BOUND = 1e-3  # of an example, relative: rows that are known less well are left alone
LARGEST_TURN = 1e-2  # of what is compared: beyond it a comparison says nothing
BESIDE = 4.0  # times what the layer's own row shows, for the next layer's column


@dataclass(frozen=True)
class LoneExamples:
    """Examples that were taken out of a dense layer's gradient, each with what shows that it was alone."""

    inputs: Tensor  # [k, d], as the layer receives them
    labels: Tensor  # [k, ...]
    bound: Tensor  # [k], relative
    rows: tuple[int, ...]  # the row each was read off
    rounds: tuple[int, ...]  # how often others were taken out before: 0 where the update itself shows it


@dataclass
class _Rows:
    """What is left of a layer's gradient, and by how much each of its rows may be off."""

    W: Tensor  # [m, d]
    b: Tensor  # [m]
    out: Tensor | None  # [p, m], the next layer's weight gradient
    off: Tensor  # [m], absolute, of [W, b] together, l2
    least: float  # of |b|, below which a row is empty
    dead: Tensor  # [m], bool: tried in vain since something was last taken out


@dataclass(frozen=True)
class _Lone:
    """An example that is alone in a row."""

    x: Tensor  # [d]
    label: Tensor  # [1, ...]
    bound: float  # relative
    row: int
    off: float  # by how much what the model sends back differs from what was seen, relative


def lone_examples(view: View, layer: Dense) -> LoneExamples:
    """The examples that are alone in some row of the gradient of a dense layer with a bias, by turns.

    A row with one example is delta (x, 1), so x = (dL/dW)_i / (dL/db)_i. That it holds one alone shows by what the model
    sends back for x and some label: delta_i to the rounding of the update, and, where another dense layer reads the unit,
    its column of that layer's gradient, delta' h_i. Of a mixture of examples neither agrees. What is found is taken out of
    all rows, with what it is seen to send back where it is alone, and others become lone. Bound: the rounding of the two
    entries, and of all that was taken out of the row before.

    `view` is that of one gradient. Raises NotApplicable: the layer has no bias, its gradient was not sent, the size of the
    batch is not known, or what an example sends back depends on others.
    """
    reader = _Reader(view, layer)
    left, found = reader.start(), list[tuple[_Lone, int]]()
    for turn in range(len(left.b)):
        fresh = reader.lone(left)
        if not fresh or not tick(min(1.0, len(found) / reader.n), None):
            break
        for one in fresh:
            found.append((one, turn))
            reader.take_out(left, one)
        left.dead[:] = False
        if len(found) >= reader.n:
            break
    if not found:
        raise NotApplicable(
            f"no row of the gradient of {layer.name!r} is that of one example: every unit fires for none or for several."
        )
    return LoneExamples(
        torch.stack([one.x for one, _ in found]),
        torch.cat([one.label for one, _ in found]),
        torch.tensor([one.bound for one, _ in found], dtype=torch.float64),
        tuple(one.row for one, _ in found),
        tuple(turn for _, turn in found),
    )


class _Reader:
    """The gradient of one dense layer, the model above it, and what one example of the batch sends back."""

    def __init__(self, view: View, layer: Dense) -> None:
        if layer.bias is None or not {layer.weight, layer.bias} <= set(view.update):
            raise NotApplicable(f"{layer.name!r} sent no gradient of a bias, by which its rows are divided.")
        if view.steps:
            raise NotApplicable("the client took local steps, and rows are read off one gradient.")
        if view.form is None:
            raise NotApplicable("the loss is of no known form, so what an example sends back is not known.")
        n, clients = view.knowledge.get("batch_size"), view.knowledge.get("clients", 1)
        if n is None or n % clients:
            raise NotApplicable(
                "batch_size must be known, and even over clients, for one example's part of the gradient."
            )
        self.view, self.layer, self.n = view, layer, int(n)
        self.tail = Tail(view.obs, layer, view.form, self.n // clients)
        self.tail.check_apart()
        parameters = dict(view.model.named_parameters(remove_duplicate=False))
        self.V, self.c = (parameters[name].detach().double() for name in (layer.weight, layer.bias))
        labels = possible_labels(view.only(*(set(view.knowledge) - {"labels"})))
        if not labels:
            raise NotApplicable("the labels are not one of a few, so that what an example sends back is not known.")
        self.labels = torch.cat(labels)
        wide = (each for each in view.layers if each.weight in view.update and each.name != layer.name)
        self.above = next((each for each in wide if view.update[each.weight].shape[1] == len(self.V)), None)
        if self.above is not None:
            self.tail.state[self.above.weight].requires_grad_()
        self.eps = torch.finfo(view.obs.dtype).eps

    def start(self) -> _Rows:
        update = self.view.update
        W, b = (update[name].double().clone() for name in (self.layer.weight, self.layer.bias or ""))
        out = update[self.above.weight].double().clone() if self.above is not None else None
        rows = torch.cat([W, b[:, None]], 1).norm(dim=1)
        dead = torch.zeros_like(b, dtype=torch.bool)
        return _Rows(W, b, out, self.eps * rows, LEAST_ENTRY * float(b.abs().max()), dead)

    def lone(self, left: _Rows) -> list[_Lone]:
        """What rows are now seen to hold one example alone, each example once."""
        size = torch.cat([left.W, left.b[:, None]], 1).norm(dim=1)
        bound = ROUNDINGS * left.off / size.clamp_min(1e-300)  # [m], relative
        open_ = (bound < LARGEST_BOUND) & (left.b.abs() > left.least) & ~left.dead
        rows = open_.nonzero().flatten()
        rows = rows[bound[rows].argsort(stable=True)]
        if not len(rows):
            return []
        x = left.W[rows] / left.b[rows, None]
        before = x @ self.V.T + self.c  # [r, m]
        fires = before[torch.arange(len(rows)), rows] > 0
        allowed = AGREES * (bound[rows] / ROUNDINGS + self.eps)
        sent = torch.stack([self._own(before, rows, y) for y in self.labels])  # [l, r]
        off = (sent - left.b[rows]).abs() / left.b[rows].abs()
        agrees = (off <= allowed) & fires & (allowed <= LARGEST_TURN)
        left.dead[rows[~agrees.any(0)]] = True
        return self._each_once(left, rows, x, bound[rows], agrees, off)

    def _each_once(
        self, left: _Rows, rows: Tensor, x: Tensor, bound: Tensor, agrees: Tensor, off: Tensor
    ) -> list[_Lone]:
        found, size = list[_Lone](), torch.cat([left.W, left.b[:, None]], 1).norm(dim=1)
        waiting = agrees.any(0)
        for at in range(len(rows)):
            if not bool(waiting[at]):
                continue
            i = int(rows[at])
            for which in off[:, at].argsort().tolist():
                y = self.labels[which : which + 1]
                one = _Lone(x[at], y, float(bound[at]), i, float(off[which, at]))
                if bool(agrees[which, at]) and self._column_agrees(left, one):
                    found.append(one)
                    beside = (left.W[rows] - left.b[rows, None] * x[at]).norm(dim=1)
                    waiting &= ~(beside <= (bound + bound[at]) * size[rows])
                    break
            else:
                left.dead[i] = True
        return found

    def _own(self, before: Tensor, rows: Tensor, y: Tensor) -> Tensor:
        """What examples with outputs `before` [r, m] of the layer send back to one unit each, `rows` [r], with label y."""
        deltas = self.tail(before, y.expand(len(before), *y.shape)).detach()
        return deltas[torch.arange(len(rows)), rows]

    def _column_agrees(self, left: _Rows, one: _Lone) -> bool:
        """Whether the unit's column of the next layer's gradient is that of the example alone as well."""
        if left.out is None:
            return True
        mine, seen = self.sent(one)[1], left.out[:, one.row]
        allowed = BESIDE * AGREES * (one.bound / ROUNDINGS + self.eps)
        return float((seen - mine[:, one.row]).norm()) <= allowed * float(mine[:, one.row].norm())

    def sent(self, one: _Lone) -> tuple[Tensor, Tensor]:
        """What an example sends back to all units [m], and to the next dense layer's weight [p, m]."""
        before = (one.x @ self.V.T + self.c)[None].detach().requires_grad_()
        weight = self.tail.state[self.above.weight] if self.above is not None else None
        with torch.enable_grad():
            delta = self.tail(before, one.label)
        if weight is None:
            return delta.detach()[0], torch.zeros(0, len(self.V), dtype=delta.dtype)
        with torch.enable_grad():
            value = self.tail.value(before.detach(), one.label)
            (column,) = torch.autograd.grad(value, weight)
        return delta.detach()[0], column

    def take_out(self, left: _Rows, one: _Lone) -> None:
        """Take an example out of all rows; what is left of them is less well known by what its own row shows."""
        delta, column = self.sent(one)
        turn = 2 * one.off + ROUNDINGS * self.eps + one.bound / ROUNDINGS
        left.W -= delta[:, None] * one.x
        left.b -= delta
        fires = delta != 0
        size = float(delta[fires].square().mean().sqrt()) if bool(fires.any()) else 0.0
        wide = float(torch.cat([one.x, one.x.new_ones(1)]).norm())
        left.off = torch.hypot(
            left.off, fires * turn * size * wide
        )  # of examples that have nothing to do with each other
        if left.out is not None:
            left.out -= column
