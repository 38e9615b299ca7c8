"""safer-design: which single changes to a convolution make a network keep more of an image to itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.analysis import Analysis, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.backward.c_metric import Kind, solvability
from unbatch.inversion.backward.rank_count import EACH_LAYER, RANKED_UNKNOWNS, Constraints, Unread, constraints
from unbatch.inversion.backward.variants import Variant, first_dense, parameters, variants
from unbatch.inversion.descent.forecast import prospects
from unbatch.inversion.descent.redesign import redesigns
from unbatch.inversion.determined_share import SHARE_NAME, share, work
from unbatch.inversion.probe import probe
from unbatch.inversion.view import View
from unbatch.network.chain import Chained, Link
from unbatch.progress import tick_or_leave

CHANGED_UNKNOWNS = 1024  # up to which the ranks of a changed layer are measured; of layers as they are RANKED_UNKNOWNS


@dataclass
class _Place:
    """Where metrics look, up to what size they may measure, and what was found: layers of one kind have the same ranks."""

    view: View
    x: Tensor
    y: Tensor
    networks: int  # the one as it is, and the changed ones
    work: float
    found: dict[Kind, Constraints | Unread] = field(default_factory=dict)


def _published(links: Sequence[Link], at: _Place, exact: int) -> float:
    """c(M). Raises NotApplicable."""
    view, place = at.view, (at.x, at.y)

    def read() -> Sequence[Constraints | Unread]:
        return view.once(EACH_LAYER, place, lambda: constraints(links, *place, view.loss))

    own = read if links is view.links else None
    return solvability(links, *place, view.loss, most=exact, read=own, found=at.found).value


def _share(links: Sequence[Link], at: _Place, exact: int) -> float:
    """The determined share. Raises NotApplicable."""
    if at.networks == 1:
        raise NotApplicable("there is no change to compare it with")
    model, obs = Chained(links), at.view.obs
    if (needed := at.networks * work(model, obs.loss, at.x, at.y)) > at.work:
        raise NotApplicable(
            f"the determined shares of {at.networks} networks take about {needed:.1e} operations, more than "
            f"work={at.work:.1e}"
        )
    if links is at.view.links:
        return at.view.once(SHARE_NAME, (at.x, at.y), lambda: share(obs, at.x, at.y)).share
    return share(obs, at.x, at.y, model).share


METRICS: dict[str, Callable[[Sequence[Link], _Place, int], float]] = {  # the lower, the safer; the first one orders
    "determined share": _share,
    "c(M)": _published,
}
LEAST_GAIN = 0.01  # by which a change lowers a metric: other weights alone move a share by less


@final
class SaferDesign(Analysis):
    """Which change of a single convolution would leave an attacker more to guess.

    The determined share and c(M) of the network with one convolution changed, where that lowers one, the safest first.

    Each change alone: the stride doubled, the channels halved, average pooling after it; the layers that must change with
    it have fresh weights, drawn by PyTorch's default law. Ranks by the rank law, else measured. It is said of one example
    alone, and nothing of how well the changed network learns.

    Where an inner layer tells a batch apart (`separable-layer`), also what would break that, of the whole network: a smooth
    activation, padding without zeros, half the channels, one stride less; counted on its shapes, by the largest batch that
    any layer still tells apart. That defends against the attack `descend`, and is no proof against others.
    """

    paper: ClassVar[str] = "Chen, Campbell, 2021 (c(M))"

    most: Annotated[int, Field(gt=0, description="changes to propose")] = 5
    formerly: ClassVar[dict[str, str]] = {"largest": "exact", "own": "exact"}

    exact: Annotated[
        int | None,
        Field(
            ge=0,
            description="unknowns up to which a matrix is formed, to measure ranks where counting fails; none: 4,096 for "
            "layers as they are, 1,024 for changed ones",
        ),
    ] = None
    work: Annotated[float, Field(ge=0, description="operations up to which the shares are computed, all together")] = (
        1e12
    )

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Verdict]:
        view.refuse_tokens()
        try:
            found, why = list(self._of_one_layer(view, at, rng)), ""
        except NotApplicable as error:
            found, why = [], str(error)
        apart = _apart(view, at, rng)
        if why and not apart:
            raise NotApplicable(why)
        if why:
            apart[-1] = apart[-1].model_copy(update={"words": f"{apart[-1].words} Of single layers: {why}"})
        return [*found, *apart]

    def _of_one_layer(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[Verdict]:
        links = view.links
        x, y, _ = probe(view, at, rng)
        changes = list(variants(links, rng))
        place = _Place(view, x, y, 1 + len(changes), self.work)
        skipped: dict[str, list[str]] = {}  # by the reason
        own = self._own(links, place, skipped)
        counted = self._counted(changes, own, place, skipped)
        left = _left(skipped)
        if changes and skipped and not counted:
            raise NotApplicable(f"no change could be counted. {left}")
        better = [each for each in counted if any(value < own[name] - LEAST_GAIN for name, value in each[0].items())]
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
            found.append(last.model_copy(update={"words": f"{last.words} {left}"}))
        return found

    def _own(self, links: Sequence[Link], place: _Place, skipped: dict[str, list[str]]) -> dict[str, float]:
        """Each metric of the network as it is. Raises NotApplicable: none can be counted."""
        own: dict[str, float] = {}
        for name, metric in METRICS.items():
            try:
                own[name] = metric(links, place, RANKED_UNKNOWNS if self.exact is None else self.exact)
            except NotApplicable as why:
                skipped.setdefault(str(why).rstrip("."), []).append(f"{name} of the network as it is")
        if not own:
            raise NotApplicable(_left(skipped))
        return own

    def _counted(
        self, changes: Sequence[Variant], own: dict[str, float], place: _Place, skipped: dict[str, list[str]]
    ) -> list[tuple[dict[str, float], Variant]]:
        """The metrics that can be counted of each changed network; those that there is time for."""
        counted: list[tuple[dict[str, float], Variant]] = []
        for k, variant in enumerate(changes):
            values: dict[str, float] = {}
            for name in own:
                try:
                    tick_or_leave((k + 1) / (len(changes) + 1), "it was looked at")
                    values[name] = METRICS[name](
                        variant.links, place, CHANGED_UNKNOWNS if self.exact is None else self.exact
                    )
                except NotApplicable as why:
                    skipped.setdefault(str(why).rstrip("."), []).append(variant.words)
            counted += [(values, variant)] if values else []
        return counted


def _apart(view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> list[Verdict]:
    """What would keep a batch's examples together, where an inner layer tells them apart."""
    try:
        found = prospects(view, at, rng)
    except NotApplicable:
        return []
    if found.mixing:
        return []
    return [
        Verdict(
            name=f"examples told apart: {change.words}",
            value=float(change.up_to),
            words=f"examples told apart is {found.up_to:,} now. By counting: {change.breaks}",
        )
        for change in redesigns(found)
    ]


def _left(skipped: dict[str, list[str]]) -> str:
    """What was not counted, and why."""
    return "; ".join(f"{', '.join(names)}: not counted, since {why}" for why, names in skipped.items()) + "."


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
