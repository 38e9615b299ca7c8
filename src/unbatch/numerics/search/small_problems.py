"""Many small least-squares problems at once, by damped Gauss-Newton steps from their normal equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.numerics.search.damped_gauss_newton import (
    Damping,
    Residuals,
    Steps,
    Stop,
    damped_gauss_newton,
    end_of,
)

Pull = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [q, p] of problems i [q], u [q, e] -> J^T u [q, p]
Normal = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # x [q, p] of problems i [q] -> J^T J [q, p, p], J^T r [q, p]

LARGEST_TURN = 0.75  # of a step's length, at most twice that of its second order
CURVATURE_SHARE = 0.1  # share of a step over which its curvature is measured
CURVATURE_ROUNDINGS = 100  # roundings of the residual above which a curvature is one


@dataclass(frozen=True)
class NormalEquations:
    """Steps of many small problems at once, by factoring their normal equations.

    The linear solver of small problems: (J^T J + damping s I) d = -J^T r by LU, s the mean diagonal of J^T J.

    With `pull` the step follows the geodesic to second order (Transtrum and Sethna, arXiv:1201.5885): d + d' with
    (J^T J + damping s I) d' = -J^T r''(d, d) / 2, refused where 2 |d'| > LARGEST_TURN |d|.

    >>> solver = NormalEquations(lambda x, i: x - 4, lambda x, i: (torch.ones(len(x), 1, 1).double(), x - 4))
    >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> next(solver(x, x - 4, torch.arange(2))(torch.zeros(2), torch.arange(2))).flatten()
    tensor([3., 2.], dtype=torch.float64)
    """

    residual: Residuals
    normal: Normal
    pull: Pull | None = None

    def __call__(self, x: Tensor, r: Tensor, which: Tensor) -> Steps:
        """Steps [s, p] from x [q, p] of the problems numbered [q], whose residuals are r [q, e]."""
        gram, downhill = self.normal(x, which)
        scale = gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-300
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

        def steps(damping: Tensor, rows: Tensor) -> Iterator[Tensor]:
            factors = torch.linalg.lu_factor_ex(gram[rows] + (damping * scale[rows])[:, None, None] * eye)[:2]
            step = -torch.linalg.lu_solve(*factors, downhill[rows][:, :, None])[..., 0]
            if self.pull is None:
                yield step
                return
            bend = _second(self.residual, x[rows], r[rows], step, which[rows])
            turn = -torch.linalg.lu_solve(*factors, self.pull(x[rows], which[rows], bend)[:, :, None])[..., 0] / 2
            straight = 2 * turn.norm(dim=1) <= LARGEST_TURN * step.norm(dim=1)
            yield torch.where(straight[:, None], step + turn, torch.nan)

        return steps


def minimise_each(
    residual: Residuals,
    normal: Normal,
    start: Tensor,
    *,
    pull: Pull | None = None,
    steps: int = 20,
    damping: float = 1e-2,
    target: float = 0.0,
    gain: float = 0.0,
    tries: int = 5,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Minimise |r_i(x_i)|^2 for every problem i from start [g, p]: x [g, p] and the costs reached [g].

    A problem takes the step of `NormalEquations` where that lowers its cost; its damping falls tenfold then, and rises
    eightfold otherwise, at most `tries` times a step. It leaves the batch once its cost is at most `target`, when no
    step helps, or when one takes away less than the share `gain`. `chunk` problems are linearised at a time, which bounds
    memory. With `pull`, long curved valleys, such as those of examples of one class that look alike, take a few steps
    instead of hundreds.

    x^2 = 2 from two starts:

    >>> def residual(x, which):
    ...     return x.square() - 2
    >>> def normal(x, which):
    ...     return 4 * x.square()[:, :, None], 2 * x * residual(x, which)
    >>> x, costs = minimise_each(residual, normal, torch.tensor([[1.0], [-3.0]], dtype=torch.float64))
    >>> x
    tensor([[ 1.4142],
            [-1.4142]], dtype=torch.float64)
    """
    rule = Damping(first=damping, rise=8.0, fall=10.0, least=1e-15)
    stop = Stop(steps=steps, tries=tries, target=target, gain=gain)
    solver = NormalEquations(residual, normal, pull)
    x, costs = [start[:0]], [start.new_zeros(0)]
    for part in torch.split(torch.arange(len(start), device=start.device), chunk):
        last = end_of(damped_gauss_newton(residual, solver, start[part], damping=rule, stop=stop, numbers=part))
        x.append(last.x)
        costs.append(last.cost)
    return torch.cat(x), torch.cat(costs)


def _second(residual: Residuals, x: Tensor, r: Tensor, step: Tensor, which: Tensor) -> Tensor:
    """The second derivative of the residuals r along `step`, by a central difference; 0 where it is lost in rounding."""
    ahead, behind = residual(x + CURVATURE_SHARE * step, which), residual(x - CURVATURE_SHARE * step, which)
    change = (ahead - 2 * r + behind).nan_to_num()
    seen = change.norm(dim=1) > CURVATURE_ROUNDINGS * torch.finfo(x.dtype).eps * r.shape[1] ** 0.5
    return torch.where(seen[:, None], change / CURVATURE_SHARE**2, 0.0)
