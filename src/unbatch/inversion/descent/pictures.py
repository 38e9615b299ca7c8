"""Pictures: the inputs of a batch whose inner tensors obey known equations, by a search and then Gauss and Newton."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from unbatch.inversion.descent.back import Back
from unbatch.inversion.descent.tangent import Tangent
from unbatch.inversion.descent.walk import Told
from unbatch.numerics.search.damped_gauss_newton import Damping, Steps, Stop, damped_gauss_newton
from unbatch.numerics.search.least_squares import conjugate_gradients

Push = Callable[[Tensor], Tensor]
STEPS = 400  # of Adam, in float32
RATE = 0.2  # of Adam at its highest, in units of the inputs' spread
ROUGH = 0.1  # of the mean difference of neighbouring pixels, in units of the inputs' spread, beside the relative misfit
SMOOTHED = 0.7  # share of the steps after which it counts no more
CORNER = 1e-4  # of the mean value, within which the absolute value is rounded off
BACK = 0.3  # of the misfit of the gradients beside that of the features
PRODUCTS = 40, 160  # with the Jacobian, in the first step of Gauss and Newton and at most
NEWTON_STEPS = 12
COARSE = 4  # pixels of a picture to a number that is drawn to begin at
BLURRED = 0.3  # spread of such a picture
MOST_BROAD = 64  # directions that are solved for densely
DAMPING = Damping(first=1.0, rise=4.0, fall=8.0, most=1e8)  # in mean squares of the Jacobian's columns
SKETCHED = 3  # damped steps to a sketch
STOP = Stop(steps=30, tries=6, gain=0.02, patience=3)
NUDGE = 1e-6  # of the inputs, relative, along which differences are taken in float64
MOST_SKETCHED = 2048  # numbers of all inputs whose Jacobian is sketched
SKETCH, SUMS, AT_ONCE = 4, 4, 32  # rows of a sketch a number, sums that each equation is in, columns at a time


class Misfit:
    """How far inputs [n, *shape] are from what is told of an inner tensor, as one vector, in units of all that is told.

    Where the tensor's scale is known worse than its entries (`Told.blur`), no inputs meet all of what is told: unless
    `scale_counts`, the misfit along the tensor itself counts by as much less, so that the other equations tell the scale.
    With `back` the gradients of the parameters below are equations, too.
    """

    def __init__(self, below: nn.Module, told: Told, *, scale_counts: bool = False, back: Back | None = None) -> None:
        self.below, self.told, self.back = below, told, back
        self.size = float(told.seen.norm())
        self.surely = 1.0  # the share of the misfit along the tensor that counts
        if told.blur and told.rows is None and not scale_counts:
            noise = float(told.noise.norm()) / self.size / told.noise.numel() ** 0.5
            self.surely = noise / math.hypot(noise, told.blur)

    def __call__(self, x: Tensor) -> Tensor:
        """[e], differentiable."""
        off = self.weighed(self._off(x))
        return off if self.back is None else torch.cat([off, self.back.off(x)])

    @property
    def noise(self) -> float:
        """The size of what the equations' noise leaves over where the inputs are right."""
        sizes = [self.told.noise.norm() / self.size]
        return float(torch.stack([*sizes, *([] if self.back is None else [self._gradients().norm()])]).norm())

    def drawn(self, off: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """A draw of that noise [e], `off` the tensor's part of it, `draw` a standard normal one of a tensor's shape."""
        off = self.weighed(off.flatten()) / self.size
        if self.back is None:
            return off
        sigmas = self._gradients()
        return torch.cat([off, draw(sigmas) * sigmas])

    def _gradients(self) -> Tensor:
        """The standard deviations of the gradients' entries."""
        if self.back is None:
            return self.told.noise.new_zeros(0)
        return self.back.noise(float(self.told.noise.norm()) / self.size)

    def weighed(self, off: Tensor) -> Tensor:
        """A vector of the tensor's misfits, as much of it as counts; linear."""
        if self.surely == 1.0:
            return off
        along = self.told.seen.to(off).flatten() / self.size
        return off - (1 - self.surely) * (along @ off) * along

    def _off(self, x: Tensor) -> Tensor:
        made = self._asked(self.below(x))
        return made - self.told.seen.to(made).flatten() / self.size

    def _asked(self, made: Tensor) -> Tensor:
        """What the equations ask of a tensor [n, c, h, w], as one vector [e]; linear."""
        rows = self.told.rows
        if rows is not None:
            made = made.reshape(self.told.shape).transpose(0, 1).flatten(1) @ rows.to(made).T
        return made.flatten() / self.size

    def absolute(self, x: Tensor) -> Tensor:
        """The sums of the absolute values, in units of those of what is told; smooth within CORNER of their mean.

        One for each example [n] where its tensor is known, one for all [1] where equations mix the examples.
        """
        alone = len(x) if self.told.rows is None else 1
        told = (self.told.seen.abs() / self.size).reshape(alone, -1)
        corner = CORNER * told.mean(1, keepdim=True)
        off = self._off(x).view(alone, -1)
        return (off.square() + corner.to(off).square()).sqrt().sum(1) / told.sum(1).to(off)

    def linear(self, x: Tensor) -> tuple[Push, Push]:
        """The products with the Jacobian at inputs x, and with its transpose."""
        pull: Push = torch.func.vjp(self, x)[1]
        if self.back is not None:  # forward mode through backward passes takes ten times as long
            return lambda v: self._difference(x, v), lambda u: pull(u)[0]
        if isinstance(self.below, fx.GraphModule) and Tangent.reads(self.below):
            tangent = Tangent(self.below, x)
            return lambda v: self.weighed(self._asked(tangent.run(v))), lambda u: pull(u)[0]
        return lambda v: torch.func.jvp(self, (x,), (v,))[1], lambda u: pull(u)[0]

    def _difference(self, x: Tensor, v: Tensor) -> Tensor:
        """The derivative at inputs x along v, by a central difference."""
        step = NUDGE * x.norm() / v.norm().clamp_min(1e-300)
        found: Tensor = (self(x + step * v).detach() - self(x - step * v).detach()) / (2 * step)
        return found

    def single(self) -> Misfit:
        """The same in float32."""
        found = copy.copy(self)
        found.below = copy.deepcopy(self.below).float()
        found.back = None if self.back is None else self.back.single()
        return found


def searched(
    misfit: Misfit, start: Tensor, scale: float, *, steps: int = STEPS, back: Back | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Adam from `start`, its rate rising and falling over the steps; yields misfits of features and the inputs.

    A misfit is a sum of absolute values, relative (`Misfit.absolute`); examples with one of their own are searched for as
    each would be alone. Squares end in a valley where a part of the maxima of a pooling are
    taken from the wrong pixel: all equations are then a little off. The least sum of absolute values holds those that are
    right exactly, however far off the rest are, and so finds the way on. Rough inputs count against themselves at first.
    """
    x = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=RATE * scale)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE * scale, total_steps=steps)
    for step in range(steps):
        optimiser.zero_grad()
        with torch.enable_grad():
            features = misfit.absolute(x)
            smooth = ROUGH * max(0.0, 1 - step / (SMOOTHED * steps))
            loss = features.mean() + (smooth / scale * roughness(x) if smooth else 0.0)
            loss = loss if back is None else loss + BACK * back(x)
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        yield features.detach(), x.detach()


def roughness(x: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, down and across; 0 for inputs that are no pictures.

    >>> float(roughness(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])))
    1.0
    """
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        return x.new_zeros(())
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()


def normed(below: nn.Module) -> bool:
    """Whether a part of a network normalises by what it is given, so that its branches weigh as much as its shortcuts.

    >>> normed(nn.Sequential(nn.GroupNorm(1, 2))), normed(nn.Sequential(nn.BatchNorm2d(2)).eval())
    (True, False)
    """
    norms = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
    return any(
        isinstance(m, norms) or (isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training) for m in below.modules()
    )


def noisy(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Inputs to begin at, nearly nothing: independent numbers of spread 0.1."""
    return 0.1 * torch.randn(shape, generator=rng)


def blurred(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Inputs to begin at behind norms, which blow up whatever is small: pictures drawn at a quarter of their size.

    >>> blurred((2, 3, 8, 8), torch.Generator().manual_seed(0)).shape, blurred((2, 5), torch.Generator()).shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 5]))
    """
    if len(shape) != 4:
        return noisy(shape, rng)
    coarse = torch.randn(*shape[:2], *(-(-side // COARSE) for side in shape[2:]), generator=rng)
    return BLURRED * F.interpolate(coarse, size=shape[2:], mode="bilinear", align_corners=False)


def newton(misfit: Misfit, x: Tensor, *, steps: int = NEWTON_STEPS) -> Iterator[tuple[float, Tensor]]:
    """Gauss and Newton: misfits in float64, the linear systems by conjugate gradients in float32; yields |misfit| and x.

    A step that is good to a few digits takes the error down by as many, so that few products in double are needed.
    """
    r = misfit(x).detach()
    for k in range(steps):
        size = float(r.norm())
        move = size * Answers(misfit, x)(r / size, products=min(PRODUCTS[0] * 2**k, PRODUCTS[1]))
        step, better = 1.0, False
        while step > 1e-3 and not better:
            moved = x - step * move
            other = misfit(moved).detach()
            better = float(other.norm()) < size
            step = step if better else step / 2
        if not better:
            return
        x, r = moved, other
        yield float(r.norm()), x


def damped(misfit: Misfit, x: Tensor) -> Iterator[tuple[float, Tensor]]:
    """The same with damped steps (Levenberg, Marquardt), from further away, where gradients are among the equations."""

    sketches = list[Tensor]()

    def solver(at: Tensor, r: Tensor, _: Tensor) -> Steps:
        sketches.append(_sketched(misfit, at[0]) if len(sketches) % SKETCHED == 0 else sketches[-1])
        answers = Answers(misfit, at[0], sketches[-1])

        def steps(damping: Tensor, rows: Tensor) -> Iterator[Tensor]:
            size = r.norm()
            yield -size[None] * answers(r[0] / size, damping=float(damping))[None]

        return steps

    search = damped_gauss_newton(
        lambda at, _: misfit(at[0]).detach()[None], solver, x[None], damping=DAMPING, stop=STOP
    )
    for reached in search:
        if reached.x[0] is not x:
            x = reached.x[0]
            yield float(reached.cost) ** 0.5, x


class Answers:
    """The inputs' least-squares move for a misfit, at inputs x [n, *shape].

    Norms hardly see how large a picture is, nor the mean of a colour: these broad directions of every example are
    solved for densely in float64, all others by conjugate gradients in float32. Where gradients are among the equations,
    and the inputs have few numbers, conjugate gradients in float64 go by a sketch of the Jacobian.
    """

    def __init__(self, misfit: Misfit, x: Tensor, sketch: Tensor | None = None) -> None:
        self.exact, self.exact_pull = misfit.linear(x)
        own = sketch is None and misfit.back is not None and x.numel() <= MOST_SKETCHED
        self.sketch = _sketched(misfit, x) if own else sketch
        self.broad = _broad(x)[: 0 if self.sketch is not None else None]
        if self.sketch is None:
            self.push, self.pull = misfit.single().linear(x.float())
        if len(self.broad):
            dense = torch.stack([self.exact(v) for v in self.broad], 1)  # [e, b]
            self.sizes = dense.norm(dim=0).clamp_min(torch.finfo(dense.dtype).tiny)
            self.Q, self.R = torch.linalg.qr(dense / self.sizes)
            self.single_Q = self.Q.float()

    def __call__(
        self, r: Tensor, *, products: int = PRODUCTS[1], tolerance: float = 1e-4, damping: float = 0.0
    ) -> Tensor:
        """[n, *shape] for r [e]; `damping`, in mean squares of the Jacobian's columns, where there is a sketch of it."""
        if self.sketch is not None:
            return self._sketched(r, self.sketch, products, tolerance, damping)
        if not len(self.broad):
            return least_squares(self.push, self.pull, r.float(), products=products, tolerance=tolerance).to(r)
        Q = self.single_Q

        def away(u: Tensor) -> Tensor:
            rest: Tensor = u - Q @ (Q.T @ u)
            return rest

        def push(v: Tensor) -> Tensor:
            return away(self.push(v))

        def pull(u: Tensor) -> Tensor:
            return self.pull(away(u))

        rest = (r - self.Q @ (self.Q.T @ r)).float()
        move = least_squares(push, pull, rest, products=products, tolerance=tolerance).to(r)
        side = self.Q.T @ (r - self.exact(move))
        along: Tensor = torch.linalg.solve_triangular(self.R, side[:, None], upper=True)[:, 0] / self.sizes
        return move + (along.view(-1, *[1] * move.ndim) * self.broad).sum(0)

    def _sketched(self, r: Tensor, sketch: Tensor, products: int, tolerance: float, damping: float) -> Tensor:
        d = len(sketch)
        shift = damping * float(sketch.square().sum()) / d
        least = torch.finfo(torch.float32).eps ** 2 * float(sketch.square().sum())
        eye = torch.eye(d).to(sketch)
        root = torch.linalg.qr(torch.cat([sketch, max(shift, least) ** 0.5 * eye]), mode="r").R
        b, found = self.exact_pull(r), torch.zeros_like(r)
        for found in conjugate_gradients(  # noqa: B007
            lambda v: self.exact_pull(self.exact(v)) + shift * v,
            b,
            lambda v: torch.cholesky_solve(v.reshape(-1, 1), root, upper=True).view_as(v),
            products,
            tolerance,
        ):
            pass
        return found


def _broad(x: Tensor) -> Tensor:
    """Every example itself, and a constant in each of its channels, as unit vectors [b, *x.shape]; none if they were many.

    >>> _broad(torch.ones(2, 3, 4, 4)).shape
    torch.Size([8, 2, 3, 4, 4])
    """
    n, channels = x.shape[:2]
    if x.dim() != 4 or n * (channels + 1) > MOST_BROAD:
        return x.new_zeros(0, *x.shape)
    found = x.new_zeros(n, channels + 1, *x.shape)
    for i in range(n):
        found[i, 0, i] = x[i] - x[i].mean((1, 2), keepdim=True)
        for c in range(channels):
            found[i, 1 + c, i, c] = 1.0
    units: Tensor = found.flatten(0, 1)
    sizes = units.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return units.div(sizes.view(-1, *[1] * x.ndim))


def _sketched(misfit: Misfit, x: Tensor) -> Tensor:
    """A triangular R [d, d] with R^T R near J^T J, J the Jacobian at inputs x: of random signed sums of its rows."""
    single, at, d = misfit.single(), x.float(), x.numel()
    e = len(single(at))
    rng = torch.Generator().manual_seed(0)
    where = torch.randint(SKETCH * d, (SUMS, e), generator=rng).to(at.device)
    signs = (2.0 * torch.randint(2, (SUMS, e), generator=rng) - 1).to(at) / SUMS**0.5

    def column(v: Tensor) -> Tensor:
        made = torch.func.jvp(single, (at,), (v,))[1]
        found: Tensor = made.new_zeros(SKETCH * d)
        return found.index_add(0, where.flatten(), (signs * made).flatten())

    ways = torch.eye(d, dtype=at.dtype, device=at.device).view(d, *x.shape)
    rows: Tensor = torch.func.vmap(column, chunk_size=AT_ONCE)(ways).T.to(x)
    R: Tensor = torch.linalg.qr(rows, mode="r").R
    return R


def least_squares(push: Push, pull: Push, r: Tensor, *, products: int = PRODUCTS[1], tolerance: float = 1e-4) -> Tensor:
    """The least-squares d of J d = r, by conjugate gradients on J^T J d = J^T r."""
    b = pull(r)
    found = torch.zeros_like(b)
    for found in conjugate_gradients(lambda v: pull(push(v)), b, lambda v: v, products, tolerance):  # noqa: B007
        pass
    return found
