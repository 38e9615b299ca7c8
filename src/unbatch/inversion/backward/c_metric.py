"""C metric: c(M), the published number of what a network's convolutions leave open of one image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.backward.rank_count import Constraints, Unread, c_of, constraints, elementwise
from unbatch.inversion.backward.variants import first_dense
from unbatch.layer import rule_for
from unbatch.layers.activation import Activation
from unbatch.loss import Loss
from unbatch.network.chain import Link
from unbatch.progress import afford_or_leave

Kind = tuple[tuple[int, ...], tuple[str, ...]]  # the shape of a layer's input, and the layers up to the next activation


class Solvability(NamedTuple):
    """The number c(M) of a network, and what it means in words; the more negative, the more of an image stays open."""

    value: int
    words: str


def solvability(
    links: Sequence[Link],
    x: Tensor,
    y: Tensor,
    loss: Loss,
    *,
    most: int,
    read: Callable[[], Sequence[Constraints | Unread]] | None = None,
    found: dict[Kind, Constraints | Unread] | None = None,
) -> Solvability:
    """How much of one image a network's convolutions leave open, as the published number c(M): 0 is nothing.

    c(M) = sum over convolutions i of round[(D - 1 - i) / (D - 1) (rank [W_i; K_i] - n_i)]: D layers with the dense one, n_i
    unknowns. Every layer with parameters before the first dense one must be a convolution or elementwise.
    x [1, *shape], y [1]: the example at which ranks are measured, up to `most` unknowns.
    Layers of one kind have the same; those in `found` are not looked at again, and what is found is written into it.
    `read` gives the constraints of all layers, where they are kept.
    Raises NotApplicable: c(M) does not know the network, ranks are too many to measure, or there is no time for it.
    Source: Chen and Campbell, 2021.

    >>> import torch
    >>> from unbatch.network.chain import chain
    >>> model = nn.Sequential(nn.Conv2d(1, 1, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)).double()
    >>> x, y = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0])
    >>> solvability(chain(model, (1, 4, 4)), x, y, nn.functional.cross_entropy, most=100)
    Solvability(value=-9, words='9 unknowns in all are left open, weighed by their depth')
    """
    trunk, found = links[: first_dense(links)], {} if found is None else found
    kinds = _kinds(trunk)
    unknown = [link for link in trunk if link.name not in kinds and any(True for _ in link.module.parameters())]
    names = [f"{link.name!r} ({type(link.module).__name__})" for link in unknown if not elementwise(link)]
    if names:
        raise NotApplicable(
            f"c(M) knows convolutions and elementwise layers before the first dense one, not {', '.join(names)}."
        )
    missing = {name: kind for name, kind in kinds.items() if kind not in found}
    if missing:
        for each in read() if read else constraints(links, x, y, loss, only=missing):
            if each.link.name in missing:
                found[missing[each.link.name]] = each
    known = dict[str, Constraints]()
    for name, kind in kinds.items():
        own = found[kind]
        if isinstance(own, Unread) or own.curved:
            why = own.why if isinstance(own, Unread) else own.curved
            raise NotApplicable(f"c(M): what is known of the output of {name} cannot be counted: {why}.")
        known[name] = own
    large = [name for name, own in known.items() if own.counted is None and own.unknowns > most]
    if large:
        raise NotApplicable(
            f"c(M): the ranks of {', '.join(large)} cannot be counted, and their unknowns are more than exact={most} to "
            "measure."
        )
    afford_or_leave(sum(own.effort for own in known.values()), "c(M): ranks were measured")
    value = c_of([(own.unknowns, own.both) for own in known.values()])
    return Solvability(value, _said(value, trunk, known))


def _said(value: int, trunk: Sequence[Link], known: Mapping[str, Constraints]) -> str:
    """c(M) in words."""
    other, counted = list[str](), False  # what no convolution's equations go through
    for link in trunk:
        counted = (counted or link.name in known) and not isinstance(rule_for(link.module), Activation)
        if not counted and not elementwise(link):
            other.append(link.name)
    if not known:
        words = "no convolution lies before the first dense layer, which gives one example away"
    elif value:
        words = f"{sum(own.deficit for own in known.values()):,} unknowns in all are left open, weighed by their depth"
    else:
        words = "every convolution is uniquely solvable" + ("" if other else ": none protects one image")
    return words + (f"; what {', '.join(other)} may hide is not counted" if other else "")


def _kinds(trunk: Sequence[Link]) -> dict[str, Kind]:
    """By name, the convolutions."""
    found = {}
    for i, link in enumerate(trunk):
        if isinstance(link.module, nn.Conv1d | nn.Conv2d):
            words: list[str] = []
            for other in trunk[i:]:
                words.append(str(other.module))
                if isinstance(rule_for(other.module), Activation):
                    break
            found[link.name] = (link.before, tuple(words))
    return found
