"""Implicit: a layer's input where what came back to its output depends on that output itself, as behind a group norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.inversion.descent.places import WindowLayer
from unbatch.numerics.linear.minimal_residual import minimal_residual
from unbatch.numerics.windows.weight_equations import weight_equations

Push = Callable[[Tensor], Tensor]
ROUNDS = 60  # of the fixed point
NEAR = 1e-3  # relative change of a round, below which Newton's steps begin
NEWTON_STEPS = 12
PRODUCTS = 120  # with the Jacobian, a step
FEWER = 1e-4  # by which the products of a step take its system's residual down
STEPS_OF_SCALE = -0.375, 1e4  # of an input's scale, relative, the most up and down
LARGEST_STEP = 0.5  # down, where the equations are linear in the scale itself
SMALLEST_STEP = 1e-3
ENDED = 0.9  # of the misfit, which a step leaves once only rounding is left: a whole one, or any of
ROUNDED = 1e-12  # a misfit
SEES = 1e-3  # of the largest entry of an open direction, above which it moves an entry
WORST = 3e4  # condition of a tensor's equations
DETERMINED = 1e-9  # least eigenvalue of the normal equations over the largest, below which they leave something open


@dataclass(eq=False)
class Reader:
    """A layer that reads the tensor in question, with what came back to the output of what lies behind it.

    `behind` is the module from the layer's output to where `cotangent` is known, None where that is the output itself.
    `loose`: the cotangent of every example is known up to a factor near 1. `gradient` is that of the layer's weight.
    """

    place: WindowLayer
    gradient: Tensor
    cotangent: Tensor
    behind: nn.Module | None
    loose: bool

    @property
    def mixes(self) -> bool:
        """Whether what lies behind mixes the examples."""
        modules = () if self.behind is None else self.behind.modules()
        return any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.training for m in modules)

    def delta(self, output: Tensor) -> Tensor:
        """What came back to the layer's output, if that is `output`."""
        if self.behind is None:
            return self.cotangent
        at = output.detach().requires_grad_()
        with torch.enable_grad():
            (back,) = torch.autograd.grad(self.behind(at), at, self.cotangent)
        return back

    def turned(self, output: Tensor, move: Tensor) -> Tensor:
        """The derivative of `delta` in the direction `move`; being a Hessian it is its own transpose."""
        if self.behind is None:
            return torch.zeros_like(move)
        at = output.detach().requires_grad_()
        with torch.enable_grad():
            (back,) = torch.autograd.grad(self.behind(at), at, self.cotangent, create_graph=True)
            (found,) = torch.autograd.grad(back, at, move)
        return found

    def apply(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The layer without its bias, with another weight if one is given."""
        own = self.place.layer
        weight = own.weight if weight is None else weight
        if isinstance(own, nn.Linear):
            return F.linear(x, weight)
        found: Tensor = own._conv_forward(x, weight, None)
        return found

    def output(self, x: Tensor) -> Tensor:
        """The layer."""
        found: Tensor = self.place.layer(x)
        return found

    def weighed(self, x: Tensor, delta: Tensor) -> Tensor:
        """The weight's gradient for an input and what came back to the output."""
        weight = torch.zeros_like(self.place.layer.weight).requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.apply(x, weight), weight, delta)
        return found

    def back(self, x: Tensor, delta: Tensor, weight: Tensor | None = None) -> Tensor:
        """What goes on to the input."""
        at = torch.zeros_like(x).requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.apply(at, weight), at, delta)
        return found


@dataclass(frozen=True, eq=False)
class Seen:
    """Entries of the tensor itself that are known: a sum, whose scale may be a little off, less what was added."""

    where: Tensor  # [n, c, ...]
    total: Tensor  # [n, c, ...], the sum
    added: Tensor  # [n, c, ...]


@dataclass(frozen=True, eq=False)
class Found:
    """The tensor, the factors [n] by which loose cotangents are to be multiplied, and the misfit, relative.

    Where a sum was seen, the last of the factors is that by which it is to be divided. `blurs` says how far rounding may
    move an example's scale, relative: that of the tensor, and those of the factors.
    """

    x: Tensor
    factors: list[Tensor]
    misfit: float
    condition: float
    blurs: list[float]
    moved: Tensor | None = None  # [n h w], the entries in which a constant a channel is open, if one is


class _System:
    """The weight gradients of all readers as functions of the tensor, each in units of its own size."""

    def __init__(self, readers: Sequence[Reader], shape: tuple[int, ...], seen: Seen | None) -> None:
        self.readers, self.shape, self.seen = readers, shape, seen
        self.together = any(reader.mixes for reader in readers)  # the examples have one scale and no more
        self.unit = [float(reader.gradient.norm()) for reader in readers]
        self.loose = [k for k, reader in enumerate(readers) if reader.loose]
        self.given = [reader.cotangent for reader in readers]
        if seen is not None:
            self.size = float((seen.total - seen.added)[seen.where].norm())
            self.scaled([readers[0].cotangent.new_ones(shape[0])] * (len(self.loose) + 1))

    def scaled(self, factors: Sequence[Tensor]) -> None:
        """Loose cotangents times their factors [n], and the sum that was seen divided by the last."""
        for k, factor in zip(self.loose, factors, strict=False):
            self.readers[k].cotangent = self.given[k] * sides(factor, self.given[k])
        if self.seen is not None:
            self.total = self.seen.total / sides(factors[-1], self.seen.total)
            self.values = (self.total - self.seen.added)[self.seen.where]

    @property
    def equations(self) -> int:
        """How many there are for the entries of one channel."""
        return sum(len(r.gradient) * r.gradient[0, 0].numel() for r in self.readers)

    def misfit(self, x: Tensor) -> Tensor:
        parts = [
            (reader.weighed(x, reader.delta(reader.output(x))) - reader.gradient).flatten() / unit
            for reader, unit in zip(self.readers, self.unit, strict=True)
        ]
        if self.seen is not None:
            parts.append((x[self.seen.where] - self.values) / self.size)
        return torch.cat(parts)

    def linear(self, x: Tensor) -> tuple[Push, Push]:
        outputs = [reader.output(x) for reader in self.readers]
        deltas = [reader.delta(z) for reader, z in zip(self.readers, outputs, strict=True)]
        every = list(zip(self.readers, self.unit, outputs, deltas, strict=True))

        def push(v: Tensor) -> Tensor:
            parts = [
                (r.weighed(v, delta) + r.weighed(x, r.turned(z, r.apply(v)))).flatten() / unit
                for r, unit, z, delta in every
            ]
            if self.seen is not None:
                parts.append(v[self.seen.where] / self.size)
            return torch.cat(parts)

        def pull(u: Tensor) -> Tensor:
            total, at = torch.zeros_like(x), 0
            for r, unit, _, delta in every:
                k = r.gradient.numel()
                weight, at = u[at : at + k].view_as(r.gradient) / unit, at + k
                total += r.back(x, delta, weight)
            return total

        return push, pull

    def scales(self, x: Tensor) -> list[Tensor]:
        """By how much the misfit falls as the factors of loose cotangents and of the sum fall, as columns [e, n].

        One column for all examples where they have one scale.
        """
        found = []
        for k in self.loose:
            reader, before = self.readers[k], sum(r.gradient.numel() for r in self.readers[:k])
            delta = reader.delta(reader.output(x))
            found.append(
                self._columns(before, [reader.weighed(*part) / self.unit[k] for part in self._parts(x, delta)])
            )
        if self.seen is not None:
            before, where = sum(r.gradient.numel() for r in self.readers), self.seen.where
            own = [self.total] if self.together else [self.total * _unit(i, self.total) for i in range(len(x))]
            found.append(self._columns(before, [part[where] / self.size for part in own]))
        return found

    def _parts(self, x: Tensor, delta: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x, delta)] if self.together else [(a[None], d[None]) for a, d in zip(x, delta, strict=True)]

    def _columns(self, before: int, parts: list[Tensor]) -> Tensor:
        total = sum(r.gradient.numel() for r in self.readers) + (0 if self.seen is None else len(self.values))
        found = parts[0].new_zeros(total, len(parts))
        found[before : before + parts[0].numel()] = torch.stack([part.flatten() for part in parts], 1)
        return found

    def held(self, x: Tensor | None, open_: Tensor | None = None) -> tuple[_Fixed | None, Tensor]:
        """The equations with the deltas held for a tensor, and their right side [n h w, c]; None where they are singular.

        Which directions are open is found unless it is given. They depend on the layers, not on the tensor.
        """
        n = self.shape[0]
        H = b = torch.zeros(())
        for reader, unit in zip(self.readers, self.unit, strict=True):
            delta = _first(reader) if x is None else reader.delta(reader.output(x))
            A = weight_equations(delta.reshape(n, len(reader.gradient), -1), reader.place.windows(1)) / unit
            G = reader.gradient
            B = G.reshape(len(G), G.shape[1], -1).transpose(1, 2).reshape(-1, G.shape[1]) / unit
            H, b = H + A.T @ A, b + A.T @ B
        if open_ is None:
            values, vectors = torch.linalg.eigh(H)
            open_ = vectors[:, values <= DETERMINED * values[-1]]
        root, failed = torch.linalg.cholesky_ex(H + H.diagonal().mean() * open_ @ open_.T)
        return (None if bool(failed) else _Fixed(root, open_)), b


@dataclass(frozen=True, eq=False)
class _Fixed:
    """The equations of a tensor with its deltas held, the same for all channels, ready to be solved."""

    root: Tensor  # [n h w, n h w], lower triangular, of the normal equations
    open_: Tensor  # [n h w, 0 or more], the directions that they leave open

    @property
    def condition(self) -> float:
        """The largest singular value over the smallest that is not open."""
        values = torch.linalg.svdvals(self.root)
        return float(values[0] / values[-1])

    def solved(self, b: Tensor) -> Tensor:
        """Channels [c, n h w] for a right side [n h w, c], nothing of the open directions in them."""
        found: Tensor = torch.cholesky_solve(b - self.open_ @ (self.open_.T @ b), self.root).T
        return found


def _first(reader: Reader) -> Tensor:
    """What came back for outputs that nobody knows: the mean over random ones, in which what depends on them drowns."""
    if reader.behind is None:
        return reader.cotangent
    rng = torch.Generator().manual_seed(0)
    shape = (len(reader.cotangent), *reader.place.gave.shape[1:])
    return torch.stack([reader.delta(torch.randn(shape, generator=rng).to(reader.cotangent)) for _ in range(16)]).mean(
        0
    )


def solved_around(
    readers: Sequence[Reader],
    shape: tuple[int, ...],
    seen: Seen | None,
    size: float,
    eps: float,
    *,
    rectified: bool,
) -> Found | None:
    """The tensor [n, c, ...] that all readers' weight gradients are of; None where they leave it open or nothing converges.

    First as a fixed point: the deltas for the last tensor, then the tensor by its linear equations. Then by Newton,
    with the same equations as preconditioner. What lies behind may be blind to an example's scale but for its eps:
    these directions, and the factors of loose cotangents, are solved for densely. `size` is where the scales begin
    (root mean square), `eps` the gradients' rounding. Batch norm in train mode is blind to a constant that only the
    middle weight of a strided layer sees: one open direction a channel, in which a `rectified` tensor is taken to reach
    zero (`hidden`).
    """
    system = _System(readers, shape, seen)
    begun = _fixed_point(system, size, 1 if rectified else 0)
    found = None if begun is None else _newton(system, *begun)
    if begun is None or found is None:
        return None
    open_ = begun[1].open_
    return replace(
        found,
        blurs=[eps * blur for blur in found.blurs],
        x=_unflat(_lowered(_flat(found.x), open_), shape),
        moved=_moved(open_[:, 0]) > 0 if open_.shape[1] else None,
    )


def _fixed_point(system: _System, size: float, most_open: int) -> tuple[Tensor, _Fixed] | None:
    """Where the deltas for the last tensor tell nearly the same tensor, and the equations there.

    Scales are held: norms are blind to them, so that they would drift.
    """
    shape = system.shape
    if system.equations < int(torch.Size((shape[0], *shape[2:])).numel()) - most_open:
        return None
    fixed, b = system.held(None)
    if fixed is None or fixed.open_.shape[1] > most_open:
        return None

    def answer(fixed: _Fixed, b: Tensor) -> Tensor:
        x = _unflat(_lowered(fixed.solved(b), fixed.open_), shape)
        squares = x.square().mean() if system.together else x.square().flatten(1).mean(1)
        return x * sides((size / squares.sqrt()).expand(len(x)), x)

    x = answer(fixed, b)
    for _ in range(ROUNDS):
        fixed, b = system.held(x, fixed.open_)
        if fixed is None:
            return None
        before, x = x, answer(fixed, b)
        if float((x - before).norm()) < NEAR * float(x.norm()):
            break
    return (x, fixed) if bool(system.misfit(x).isfinite().all()) else None


def sides(factors: Tensor, like: Tensor) -> Tensor:
    """Factors [n] to multiply a tensor [n, ...] with."""
    return factors.view(-1, *[1] * (like.ndim - 1))


def _unit(i: int, like: Tensor) -> Tensor:
    """One for one example, zero for the others, to multiply a tensor [n, ...] with."""
    return sides(torch.eye(len(like)).to(like)[i], like)


def _flat(x: Tensor) -> Tensor:
    """[n, c, ...] as [c, n h w]."""
    return x.transpose(0, 1).flatten(1)


def _unflat(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def _lowered(flat: Tensor, open_: Tensor) -> Tensor:
    """Channels [c, n h w] moved along the one open direction, if there is one, until the least entry in it is zero."""
    if not open_.shape[1]:
        return flat
    way = _moved(open_[:, 0])
    least = (flat[:, way > 0] / way[way > 0]).amin(1)
    return flat - least[:, None] * way


def _moved(way: Tensor) -> Tensor:
    """The open direction [n h w], upwards, without what is zero of it but for rounding."""
    way = way * torch.sign(way.sum())
    return torch.where(way > SEES * way.max(), way, 0.0)


def _newton(system: _System, x: Tensor, fixed: _Fixed) -> Found | None:
    """Newton's steps to where rounding is left; None where the equations leave something open there."""
    rows = len(system.loose) + (system.seen is not None)
    factors, blurs = x.new_ones(1 + rows, len(x)), [torch.inf] * (1 + rows)  # of the tensor itself, not kept, and those
    r = system.misfit(x)
    for _ in range(NEWTON_STEPS):
        move = _step(system, x, r, fixed)
        if move is None:
            break
        d, c, blurs = move
        step, better = 1.0, False
        while step > SMALLEST_STEP and not better:
            turned = _turned(step * c, by_eps=system.seen is None)
            new = (x - step * d) * sides(turned[0], x)
            system.scaled([*(factors * turned)[1:]])
            moved = system.misfit(new)
            better = float(moved.norm()) < float(r.norm())
            step = step if better else step / 4
        if not better:
            break
        ended = (step == 1.0 or float(r.norm()) < ROUNDED) and float(moved.norm()) > ENDED * float(r.norm())
        x, r, factors = new, moved, factors * turned
        fixed = system.held(x, fixed.open_)[0] or fixed
        if ended:
            break
    system.scaled([*factors[1:]])
    condition = fixed.condition
    return Found(x, list(factors[1:]), float(r.norm()), condition, blurs) if condition < WORST else None


def _turned(c: Tensor, *, by_eps: bool) -> Tensor:
    """The factors [1 + rows, n] for steps c of scales: of a tensor's own, and of what is loose.

    `by_eps`: norms are blind to the tensor's scale s but for their eps, so that what they show is linear in 1 / s^2.
    """
    own = (1 + 2 * c[:1]).rsqrt() if by_eps else 1 - c[:1].clamp(max=LARGEST_STEP)
    return torch.cat([own, 1 - c[1:]])


def _step(system: _System, x: Tensor, r: Tensor, fixed: _Fixed) -> tuple[Tensor, Tensor, list[float]] | None:
    """Newton's step: of the tensor, of factors [1 + rows, n], and by how many roundings these scales may be off.

    None where the derivative there is no number.
    """
    push, pull = system.linear(x)
    own = [x] if system.together else [x * _unit(i, x) for i in range(len(x))]
    dense = torch.cat([torch.stack([push(v) for v in own], 1), *system.scales(x)], 1)
    scale = dense.norm(dim=0).clamp_min(torch.finfo(dense.dtype).tiny)  # what the gradient does not feel stays zero
    Q, R = torch.linalg.qr(dense / scale)
    if not bool(R.isfinite().all()):
        return None
    d = _least(push, pull, r - Q @ (Q.T @ r), Q, own, fixed, x)
    inverse = torch.linalg.pinv(R) / scale[:, None]
    blurs = inverse.norm(dim=1).view(-1, len(own)).amax(1).tolist()
    rest = r - push(d)
    c = inverse @ (Q.T @ rest)
    c[: len(own)] = c[: len(own)].clamp(*STEPS_OF_SCALE)
    if len(c) > len(own):  # what is loose hardly differs from the tensor's own scales
        rest -= dense[:, : len(own)] @ c[: len(own)]
        c[len(own) :] = torch.linalg.lstsq(dense[:, len(own) :], rest[:, None]).solution[:, 0]
    return d, c.view(-1, len(own)).expand(-1, len(x)), blurs


def _least(push: Push, pull: Push, r: Tensor, Q: Tensor, own: Sequence[Tensor], fixed: _Fixed, x: Tensor) -> Tensor:
    """The d with P J d = P r, P away from the dense columns, by GMRES on what the fixed point would make of both sides.

    The fixed point with its deltas held takes the error down by a third or more a round, so that in its units J is not far
    from the identity; in those of J^T J it is. In the directions that P J does not see, an example itself (`own`) and what
    the fixed point leaves open, d stays nearly zero.
    """
    blind = torch.linalg.qr(torch.stack([v.flatten() for v in own], 1)).Q

    def answered(u: Tensor) -> Tensor:
        return _unflat(fixed.solved(_flat(pull(u - Q @ (Q.T @ u))).T), tuple(x.shape))

    def product(v: Tensor) -> Tensor:
        still = _unflat(_flat(v) @ fixed.open_ @ fixed.open_.T, tuple(x.shape))
        along: Tensor = blind @ (blind.T @ v.flatten())
        return answered(push(v)) + still + along.view_as(x)

    return minimal_residual(product, answered(r), products=PRODUCTS, tolerance=FEWER)
