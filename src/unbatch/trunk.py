"""Trunk: the layers below a network's first dense layer, read backward by the linear equations that each one obeys."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbatch.chain import Link
from unbatch.layer import LayerRule, rule_for
from unbatch.numerics.linsys import LinearSystem, Solution

RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # the last in eval mode
ELEMENTWISE = "activation"  # the rule before which a run ends: what follows it is no linear function of what precedes


class Unreadable(ValueError):  # noqa: N818 (a layer that has no way back, named for it)
    """A layer that cannot be read backward; the message names it."""


@dataclass(frozen=True)
class Reading:
    """What a run of affine layers tells of its input."""

    links: tuple[Link, ...]  # the run, first to last
    x: Tensor  # [n, *shape] its input: the least-squares solution of least norm
    grad: Tensor  # [n, *shape] dL/dx, which the later layers give whether or not x is determined
    system: LinearSystem
    solution: Solution

    @property
    def deficit(self) -> int | None:
        """Unknowns that the equations leave open; None where they were too many to count."""
        return None if self.solution.rank is None else self.system.unknowns - self.solution.rank

    @property
    def layers(self) -> str:
        """The names of the run's layers."""
        return ", ".join(link.name for link in self.links)


def read(
    links: Sequence[Link],
    output: Tensor,
    grad_output: Tensor,
    update: Mapping[str, Tensor],
    *,
    forward: bool = True,
    near: Sequence[Reading] = (),
) -> Generator[Reading, Tensor | None, None]:
    """From the last link's output [n, *shape] and its gradient to the network's input, a reading before each activation.

    A run of affine layers between two activations is one linear system: what is known of the run's output, through all of
    them, and for each layer with a weight its gradient equations sum_i K_i x_i = dL/dW; without `forward` those alone
    where there are any (R-CONV). The caller may send a better x than a deficient system's: the layers before are read
    from it. With `near`, the readings of nearly the same update, systems are not solved anew but corrected from there.

    Raises Unreadable.
    """
    n, x, grad = len(output), output.double(), grad_output.double()
    known, run, count = [_all(part) for part in x], list[Link](), 0
    extra: list[LinearSystem] = []
    for link in reversed(links):
        rule = rule_for(link.module)
        if rule is None:
            raise Unreadable(f"layer {link.name!r} ({type(link.module).__name__}) has no rule to read it backward by.")
        if isinstance(link.module, RESHAPES) and not run:
            x, grad = x.reshape(n, *link.before), grad.reshape(n, *link.before)
            continue
        if rule.name == ELEMENTWISE and run:
            reading = _solved(run, grad, known, extra, near[count] if near else None)
            better = yield reading
            x, run, extra, count = reading.x if better is None else better, [], [], count + 1
        try:
            if rule.name == ELEMENTWISE:
                known = [rule.forward_equations(link.module, link.before, part) for part in x]
            else:
                known = [system.through(_held(rule, link, system)) for system in known]
                extra = [system.through(_held(rule, link, system, n)) for system in extra]
                weight = update.get(f"{link.name}.weight" if link.name else "weight")
                if weight is not None:
                    own = [rule.gradient_equations(link.module, link.before, part, weight) for part in grad]
                    b = torch.stack([system.b for system in own]).sum(0) - (n - 1) * weight.double().flatten()
                    extra.append(LinearSystem.summed(own, b))
                    if not forward and own[0].equations:
                        known = [LinearSystem.none(system.unknowns, weight) for system in known]
                run.insert(0, link)
            pairs = zip(x, grad, strict=True)
            grad = torch.stack([rule.grad_input(link.module, link.before, z, dz) for z, dz in pairs])
        except ValueError as error:
            kind = type(link.module).__name__
            raise Unreadable(f"layer {link.name!r} ({kind}) cannot be read backward: {error}") from error
    if run or known:
        yield _solved(run or [links[0]], grad, known, extra, near[count] if near else None)


def _all(x: Tensor) -> LinearSystem:
    return LinearSystem.some(torch.arange(x.numel(), device=x.device), x.flatten(), x.numel())


def _held(rule: LayerRule, link: Link, system: LinearSystem, n: int = 1) -> LinearSystem:
    """The layer's own map of its input, of n inputs one after the other, as equations that hold its output to 0."""
    zero = torch.zeros(link.after, dtype=torch.float64, device=system.b.device)
    one = rule.forward_equations(link.module, link.before, zero)
    return LinearSystem.beside([one] * n)


def _solved(
    run: Sequence[Link],
    grad: Tensor,
    known: Sequence[LinearSystem],
    extra: Sequence[LinearSystem],
    near: Reading | None,
) -> Reading:
    system, solution = LinearSystem.beside(known), None
    if len(known) > 1 and (near is None or near.system.equations == system.equations):
        solution = _apart(known) if near is None else near.solution
    if solution is None:
        weight = system.size
        for own in extra:
            size = own.size
            system = system + own * (weight / size if weight > 0 and size > 0 else 1.0)  # all equally heavy
    if near is None:
        solution = solution or system.solve()
        x = solution.x
    else:
        solution = near.solution
        x = near.x.flatten() + solution.inverse(system.residual(near.x.flatten()))
    return Reading(tuple(run), x.view(len(grad), *run[0].before), grad, system, solution)


def _apart(systems: Sequence[LinearSystem]) -> Solution | None:
    """The solution of several examples' own equations, one by one; None unless they determine every example."""
    found = []
    for system in systems:
        if system.equations < system.unknowns:
            return None
        found.append(system.solve())
        if found[-1].rank != system.unknowns:
            return None

    def inverse(r: Tensor) -> Tensor:
        parts = torch.split(r, [system.equations for system in systems])
        return torch.cat([each.inverse(part) for each, part in zip(found, parts, strict=True)])

    ranks = sum(system.unknowns for system in systems)
    return Solution(torch.cat([each.x for each in found]), ranks, None, None, inverse)
