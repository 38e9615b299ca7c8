"""Implicit: a layer's input where what came back to its output depends on that output itself, as behind a group norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.inversion.descent.places import WindowLayer
from unbatch.numerics.windows.weight_equations import weight_equations

Push = Callable[[Tensor], Tensor]
ROUNDS = 60  # of the fixed point
NEAR = 1e-3  # relative change of a round, below which Newton's steps begin
NEWTON_STEPS = 12
PRODUCTS = 60  # with the Jacobian, a step
FEWER = 1e-4  # by which the products of a step take its system's residual down
LARGEST_STEP = 0.5  # of an input's scale, relative
SMALLEST_STEP = 1e-3
ENDED = 0.9  # of the misfit, which a whole step leaves once only rounding is left
SEES = 1e-3  # of the largest entry of an open direction, above which it moves an entry
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
    """Entries of the tensor itself that are known."""

    where: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Found:
    """The tensor, the factors [n] by which each loose reader's cotangent is to be multiplied, and the misfit, relative."""

    x: Tensor
    factors: list[Tensor]
    misfit: float
    condition: float
    blur: float  # how far rounding may move an example's scale, relative


class _System:
    """The weight gradients of all readers as functions of the tensor, each in units of its own size."""

    def __init__(self, readers: Sequence[Reader], shape: tuple[int, ...], seen: Seen | None) -> None:
        self.readers, self.shape, self.seen = readers, shape, seen
        self.together = any(reader.mixes for reader in readers)  # the examples have one scale and no more
        self.unit = [float(reader.gradient.norm()) for reader in readers]
        self.size = 1.0 if seen is None else float(seen.values.norm())

    def misfit(self, x: Tensor) -> Tensor:
        parts = [
            (reader.weighed(x, reader.delta(reader.output(x))) - reader.gradient).flatten() / unit
            for reader, unit in zip(self.readers, self.unit, strict=True)
        ]
        if self.seen is not None:
            parts.append((x[self.seen.where] - self.seen.values) / self.size)
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
            for r, unit, z, delta in every:
                k = r.gradient.numel()
                weight, at = u[at : at + k].view_as(r.gradient) / unit, at + k
                total += r.back(x, delta, weight) + r.back(x, r.turned(z, r.apply(x, weight)))
            if self.seen is not None:
                total[self.seen.where] += u[at:] / self.size
            return total

        return push, pull

    def each(self, x: Tensor, k: int) -> Tensor:
        """The share of every example in one reader's gradient, as columns [e, n], or of all together [e, 1]."""
        reader = self.readers[k]
        delta = reader.delta(reader.output(x))
        before = sum(r.gradient.numel() for r in self.readers[:k])
        parts = [(x, delta)] if self.together else [(a[None], d[None]) for a, d in zip(x, delta, strict=True)]
        columns = [reader.weighed(*part).flatten() / self.unit[k] for part in parts]
        total = sum(r.gradient.numel() for r in self.readers) + (0 if self.seen is None else len(self.seen.values))
        found = x.new_zeros(total, len(columns))
        found[before : before + len(columns[0])] = torch.stack(columns, 1)
        return found

    def normal(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normal equations of all channels with the deltas held: matrix [n h w, n h w] and right side [n h w, c]."""
        n = self.shape[0]
        H = b = torch.zeros(())
        for reader, unit in zip(self.readers, self.unit, strict=True):
            z = torch.zeros_like(reader.cotangent[:, :1]) if x is None else reader.output(x)
            delta = _first(reader) if x is None else reader.delta(z)
            A = weight_equations(delta.reshape(n, len(reader.gradient), -1), reader.place.windows(1)) / unit
            G = reader.gradient
            B = G.reshape(len(G), G.shape[1], -1).transpose(1, 2).reshape(-1, G.shape[1]) / unit
            H, b = H + A.T @ A, b + A.T @ B
        return H, b


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
    zero.
    """
    system = _System(readers, shape, seen)
    x = None
    for _ in range(ROUNDS):
        H, b = system.normal(x)
        values, vectors = torch.linalg.eigh(H)
        open_ = vectors[:, values <= DETERMINED * values[-1]]
        if open_.shape[1] > (1 if rectified else 0):
            return None
        root = torch.linalg.cholesky(H + float(values[-1]) * open_ @ open_.T)
        flat = torch.cholesky_solve(b - open_ @ (open_.T @ b), root).T  # [c, n h w]
        new = _unflat(_lowered(flat, open_), shape)
        new = new * (size / float(new.square().mean().sqrt())) if x is None else new
        far = 1.0 if x is None else float((new - x).norm() / new.norm())
        x = new
        if far < NEAR:
            break
    if x is None or not bool(x.isfinite().all() and system.misfit(x).isfinite().all()):
        return None
    condition = float(values[-1] / values[open_.shape[1]]) ** 0.5
    found = _newton(system, x, root, condition)
    return replace(found, blur=found.blur * eps, x=_unflat(_lowered(_flat(found.x), open_), shape))


def _flat(x: Tensor) -> Tensor:
    """[n, c, ...] as [c, n h w]."""
    return x.transpose(0, 1).flatten(1)


def _unflat(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def _lowered(flat: Tensor, open_: Tensor) -> Tensor:
    """Channels [c, n h w] moved along the one open direction, if there is one, until the least entry in it is zero."""
    if not open_.shape[1]:
        return flat
    way = open_[:, 0] * torch.sign(open_[:, 0].sum())
    moved = way > SEES * way.max()
    least = (flat[:, moved] / way[moved]).amin(1)
    return flat - least[:, None] * torch.where(moved, way, 0.0)


def _newton(system: _System, x: Tensor, root: Tensor, condition: float) -> Found:
    loose = [k for k, reader in enumerate(system.readers) if reader.loose]
    given = [reader.cotangent for reader in system.readers]
    factors = x.new_ones(1 + len(loose), len(x))  # of the tensor itself, not kept, and of the loose cotangents
    r, blur = system.misfit(x), torch.inf
    for _ in range(NEWTON_STEPS):
        move = _step(system, x, r, root, loose)
        if move is None:
            break
        d, c, blur = move
        step, better = 1.0, False
        while step > SMALLEST_STEP and not better:
            turned = 1 - step * c
            new = (x - step * d) * turned[0].view(-1, *[1] * (x.ndim - 1))
            for k, factor in zip(loose, factors[1:] * turned[1:], strict=True):
                system.readers[k].cotangent = given[k] * factor.view(-1, *[1] * (given[k].ndim - 1))
            moved = system.misfit(new)
            better = float(moved.norm()) < float(r.norm())
            step = step if better else step / 4
        if not better:
            break
        ended = step == 1.0 and float(moved.norm()) > ENDED * float(r.norm())
        x, r, factors = new, moved, factors * turned
        if ended:
            break
    for k, factor in zip(loose, factors[1:], strict=True):
        system.readers[k].cotangent = given[k] * factor.view(-1, *[1] * (given[k].ndim - 1))
    return Found(x, list(factors[1:]), float(r.norm()), condition, blur)


def _step(system: _System, x: Tensor, r: Tensor, root: Tensor, loose: list[int]) -> tuple[Tensor, Tensor, float] | None:
    """Newton's step: of the tensor, of factors [1 + loose, n], and by how many roundings its scales may be off.

    None where the derivative there is no number.
    """
    n = len(x)
    push, pull = system.linear(x)
    own = [x] if system.together else [x * row.view(-1, *[1] * (x.ndim - 1)) for row in torch.eye(n).to(x)]
    dense = torch.cat([torch.stack([push(v) for v in own], 1), *[system.each(x, k) for k in loose]], 1)
    scale = dense.norm(dim=0).clamp_min(torch.finfo(dense.dtype).tiny)  # what the gradient does not feel stays zero
    Q, R = torch.linalg.qr(dense / scale)
    if not bool(R.isfinite().all()):
        return None
    d = _least(push, pull, r - Q @ (Q.T @ r), Q, root, x)
    inverse = torch.linalg.pinv(R) / scale[:, None]
    blur = float(inverse.norm(dim=1)[: len(own)].max())
    c = (inverse @ (Q.T @ (r - push(d)))).clamp(-LARGEST_STEP, LARGEST_STEP)
    return d, c.view(-1, len(own)).expand(-1, n), blur


def _least(push: Push, pull: Push, r: Tensor, Q: Tensor, root: Tensor, x: Tensor) -> Tensor:
    """The d with the least |P (J d - r)|, P away from the dense columns, by preconditioned conjugate gradients."""

    def smooth(v: Tensor) -> Tensor:
        return _unflat(torch.cholesky_solve(_flat(v).T, root).T, tuple(x.shape))

    d = torch.zeros_like(x)
    g = pull(r)
    y = smooth(g)
    p, size = y, float((g * y).sum())
    first = size
    for _ in range(PRODUCTS):
        if not size > FEWER**2 * first:
            break
        image = push(p)
        image = image - Q @ (Q.T @ image)
        curvature = float(image.square().sum())
        if not curvature > 0:
            break
        a = size / curvature
        d, r = d + a * p, r - a * image
        g = pull(r)
        y = smooth(g)
        new = float((g * y).sum())
        p, size = y + new / size * p, new
    return d
