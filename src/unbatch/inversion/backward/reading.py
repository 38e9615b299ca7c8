"""Reading: what is known of one tensor in a network, and what that tells of the tensors before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.inversion.backward.pullback import Pullback
from unbatch.network.chain import Link
from unbatch.numerics.linear.linsys import LinearSystem, Solution

Known = tuple[LinearSystem, Tensor, Mapping[str, Tensor]]  # A t = b of a tensor t, dL/dt, and the update below it


class Unreadable(UnbatchError):  # noqa: N818 (a layer that has no way back, named for it)
    """A layer that cannot be read backward; the message names it."""


@dataclass(frozen=True)
class Start:
    """What is known of the last link: its output [n, *shape], dL/d(output) and the update below it, NaN where it is not."""

    output: Tensor
    grad: Tensor
    update: Mapping[str, Tensor]
    layers: Mapping[str, nn.Module] = field(default_factory=dict)  # by link's name, where it has another than the link


@dataclass(frozen=True)
class Reading:
    """What a run of affine layers, or a lone activation, tells of its input; or a run that is not linear, near a root."""

    links: tuple[Link, ...]  # the run, first to last
    x: Tensor  # [n, *shape] its input: the least-squares solution of least norm
    grad: Tensor  # [n, *shape] dL/dx, which the later layers give whether or not x is determined
    system: LinearSystem
    solution: Solution
    others: tuple[tuple[Tensor, Tensor], ...] = ()  # x and dL/dx of the other starts, to first order
    pullback: Pullback | None = None  # the equations of a run that is not linear: `system` is theirs at x
    fits: bool = True  # x solves them, up to rounding

    @property
    def deficit(self) -> int | None:
        """Unknowns that the equations leave open; None where they were too many to count, or x solves none of them."""
        return None if self.solution.rank is None or not self.fits else self.system.unknowns - self.solution.rank

    @property
    def layers(self) -> str:
        """The names of the run's layers."""
        return ", ".join(link.name for link in self.links)
