"""Reading: what is known of one tensor in a network, and what that tells of the tensors before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.inversion.backward.pullback import Pullback
from unbatch.network.chain import Link
from unbatch.numerics.linear.linsys import LinearSystem, Solution


class Unreadable(UnbatchError):  # noqa: N818 (a layer that has no way back, named for it)
    """A layer cannot be read backward, or what the reading starts from is not known; the message names it."""


@dataclass(frozen=True)
class KnownOutput:
    """What is known of a layer's output: its value, the loss's gradient there, and the update of the layers up to it."""

    output: Tensor  # [n, *shape]
    grad: Tensor  # [n, *shape] dL/d(output)
    update: Mapping[str, Tensor]  # by parameter name, NaN where an entry was not sent
    layers: Mapping[str, nn.Module] = field(default_factory=dict)  # by link's name, where it has another than the link


@dataclass(frozen=True)
class KnownEquations:
    """What is known of one example's tensor t that is not known entry by entry: equations A t = b, and dL/dt."""

    system: LinearSystem
    grad: Tensor  # of t's entries
    update: Mapping[str, Tensor]  # of the layers up to t, as in `KnownOutput`


@dataclass(frozen=True)
class Reading:
    """What one run of layers tells of its input.

    The run is affine or a lone activation, and the equations are linear; or it is not linear, and they are linear near x.

    >>> import torch
    >>> system = LinearSystem.of(torch.tensor([[1.0, 1.0]]), torch.tensor([4.0]))
    >>> link = Link("dense", nn.Linear(2, 1), (2,), (1,))
    >>> solution = system.solve()
    >>> reading = Reading((link,), solution.x[None], torch.zeros(1, 2), system, solution)
    >>> reading.layers, reading.deficit, [round(x, 9) for x in reading.x[0].tolist()]
    ('dense', 1, [2.0, 2.0])
    """

    links: tuple[Link, ...]  # the run, first to last
    x: Tensor  # [n, *shape] its input: the least-squares solution of least norm
    grad: Tensor  # [n, *shape] dL/dx, which the later layers give whether or not x is determined
    system: LinearSystem
    solution: Solution
    others: tuple[tuple[Tensor, Tensor], ...] = ()  # x and dL/dx of nearly the same updates, to first order
    pullback: Pullback | None = None  # the equations of a run that is not linear: `system` is theirs at x
    fits: bool = True  # x solves them, up to rounding

    @property
    def deficit(self) -> int | None:
        """Unknowns that the equations leave open; None where they were too many to count, or x solves none of them."""
        return None if self.solution.rank is None or not self.fits else self.system.unknowns - self.solution.rank

    @property
    def layers(self) -> str:
        """The names of the run's layers, first to last, with commas between them."""
        return ", ".join(link.name for link in self.links)
