"""safer-design: which single changes to a convolution make a network keep more of an image to itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.analysis import Analysis, Verdict
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.backward.c_metric import Kind, solvability
from unbatch.inversion.backward.rank_count import Constraints, Unread
from unbatch.inversion.backward.variants import Variant, first_dense, parameters, variants
from unbatch.inversion.determined_share import share, work
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.network.chain import Chained, Link, chain
from unbatch.observation import Observation


@dataclass
class _Place:
    """Where metrics look, up to what size they may measure, and what was found: layers of one kind have the same ranks."""

    obs: Observation
    x: Tensor
    y: Tensor
    networks: int  # the one as it is, and the changed ones
    work: float
    limit: str = "own"  # the option that says up to what size ranks are measured
    found: dict[Kind, Constraints | Unread] = field(default_factory=dict)


def _published(links: Sequence[Link], at: _Place, largest: int) -> float:
    """c(M). Raises ValueError."""
    return solvability(links, at.x, at.y, at.obs.loss, most=largest, limit=at.limit, found=at.found).value


def _share(links: Sequence[Link], at: _Place, largest: int) -> float:
    """The determined share. Raises ValueError."""
    if at.networks == 1:
        raise UnbatchError("there is no change to compare it with")
    model = Chained(links)
    if (needed := at.networks * work(model, at.obs.loss, at.x, at.y)) > at.work:
        raise UnbatchError(
            f"the determined shares of {at.networks} networks take about {needed:.1e} operations, more than "
            f"work={at.work:.1e}"
        )
    return share(at.obs, at.x, at.y, model).share


METRICS: dict[str, Callable[[Sequence[Link], _Place, int], float]] = {  # the lower, the safer; the first one orders
    "determined share": _share,
    "c(M)": _published,
}
LEAST = 0.01  # by which a change lowers a metric: other weights alone move a share by less


@final
class SaferDesign(Analysis):
    """Which change of a single convolution would leave an attacker more to guess.

    The determined share and c(M) of the network with one convolution changed, where that lowers one, the safest first.

    Each change alone: the stride doubled, the channels halved, average pooling after it; the layers that must change with
    it have fresh weights, drawn by PyTorch's default law. Ranks by the rank law, else measured. It is said of one example
    alone, and nothing of how well the changed network learns.
    """

    paper: ClassVar[str] = "Chen, Campbell, 2021 (c(M))"

    most: Annotated[int, Field(gt=0, description="changes to propose")] = 5
    largest: Annotated[
        int,
        Field(ge=0, description="unknowns up to which the ranks of changed layers are measured where counting fails"),
    ] = 1024
    own: Annotated[int, Field(ge=0, description="the same for the layers as they are")] = 4096
    work: Annotated[float, Field(ge=0, description="operations up to which the shares are computed, all together")] = (
        1e12
    )

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Verdict]:
        obs = view.obs
        if "input_shape" not in obs.knowledge:
            raise NotApplicable("input_shape must be known, to run the model once.")
        links = chain(obs.model, obs.knowledge.input_shape, obs.protocol.mode)
        x, y, _ = probe(obs, at, rng)
        changes = list(variants(links, rng))
        place = _Place(obs, x, y, 1 + len(changes), self.work)
        own: dict[str, float] = {}
        skipped: dict[str, list[str]] = {}
        for name, metric in METRICS.items():
            try:
                own[name] = metric(links, place, self.own)
            except ValueError as why:
                skipped.setdefault(str(why).rstrip("."), []).append(f"{name} of the network as it is")
        if not own:
            raise UnbatchError(
                "; ".join(f"{', '.join(names)}: not counted, since {why}" for why, names in skipped.items()) + "."
            )
        counted: list[tuple[dict[str, float], Variant]] = []
        place.limit = "largest"
        for variant in changes:
            values: dict[str, float] = {}
            for name in own:
                try:
                    values[name] = METRICS[name](variant.links, place, self.largest)
                except ValueError as why:
                    skipped.setdefault(str(why).rstrip("."), []).append(variant.words)
            counted += [(values, variant)] if values else []
        left = "; ".join(f"{', '.join(names)}: not counted, since {why}" for why, names in skipped.items())
        if changes and skipped and not counted:
            raise UnbatchError(f"no change could be counted. {left}.")
        better = [each for each in counted if any(value < own[name] - LEAST for name, value in each[0].items())]
        better.sort(key=lambda each: ([each[0].get(name, own[name]) for name in own], each[1].words))
        found = [
            Verdict(name=f"{name}: {variant.words}", value=values[name], words=_price(links, variant.links, name, own))
            for values, variant in better[: self.most]
            for name in values
        ]
        if not found:
            words = _none(links, len(counted))
            found = [Verdict(name=f"{name}: no change", value=value, words=words) for name, value in own.items()]
        if skipped:
            last = found.pop()
            found.append(last.model_copy(update={"words": f"{last.words} {left}."}))
        return found


def _price(links: Sequence[Link], changed: Sequence[Link], name: str, own: dict[str, float]) -> str:
    """What a change costs, as far as shapes tell."""
    words = f"{name} is {own[name]:,.6g} now. Parameters {parameters(links):,} -> {parameters(changed):,}"
    i, k = first_dense(links), first_dense(changed)
    if i < len(links):
        size, left = links[i].unknowns, changed[k].unknowns
        words += f"; numbers that reach {links[i].name or 'the dense layer'} {size:,} -> {left:,}"
    return f"{words}."


def _none(links: Sequence[Link], tried: int) -> str:
    if not any(isinstance(link.module, nn.Conv1d | nn.Conv2d) for link in links[: first_dense(links)]):
        return "no convolution lies before the first dense layer, so there is none to change."
    if not tried:
        return "no change to a convolution leaves a network that runs."
    return f"none of {tried} changes to a convolution makes it safer."
