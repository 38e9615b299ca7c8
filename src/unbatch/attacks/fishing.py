"""fishing: a server whose last layer lets one example of a batch through, whatever the network below."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.domain import domain_told
from unbatch.errors import NotApplicable
from unbatch.inversion.descent.descent import descended
from unbatch.inversion.division import divided
from unbatch.inversion.planted.caught import Caught, PlantedCut, caught, cuts_of, plant_cut
from unbatch.inversion.planted.quiet import GOLDEN, dense_layers, shape_known
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS, Knowledge
from unbatch.network.dense import layer_inputs
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction

SEARCH_STEPS, SEARCHES = 400, 3  # of `descend`, its own defaults
READERS: dict[str, Callable[[View, torch.Generator], Reconstruction]] = {  # of one example's update, the quickest first
    "bias-ratio": lambda view, rng: divided(view),
    "descend": lambda view, rng: descended(view, rng, steps=SEARCH_STEPS, attempts=SEARCHES, partial=False),
}
SHARP = 1e5  # logits to the spread of a feature
FAR = 1e3  # spreads of the feature beyond which no example lies
STAND_INS = 64  # inputs by which the spread of a feature is guessed


@final
class Fishing(ActiveAttack):
    """Lets one example of a batch of any size through the last layer, and reads its update as that of a batch of one.

    The last layer hears one row, W_c = k u, with the bias -k t, and constants for all other classes. Example i then sends
    k u (s_i - [y_i = c]) back to its features f_i, s_i = 1 where u . f_i > t and else 0, all to the last digit.

    Class: with t beyond all features only the examples of class c send. Where one class has one example, that is it.
    Feature: two rounds at thresholds t < t' differ by the examples with t < u . f_i <= t', whatever their labels.
    Thresholds are bisected over rounds until one lies there alone; c is the class with the fewest examples, whose part
    cancels. (No last layer lets one example out of several of a class through in one round: what labels and what features
    send add up.)

    How many examples lie above t, and how many have each label, follows from the gradient of the bias: the constants give
    one class the golden share, so that no other whole numbers add up to it.

    The rest is an exchange of a batch of one, and is read as `bias-ratio` or `descend` would. Batch norm must be in eval
    mode, or an example does not send alone.

    Bound: that of the attack that reads.

    >>> import torch, unbatch
    >>> from unbatch.auditing.cheating import planted_exchange
    >>> client = unbatch.Case.parse("digits:batch=16,width=32,depth=2").setting()
    >>> object.__setattr__(client, "protocol", unbatch.Protocol(rounds=16))
    >>> attack = unbatch.attacks.Fishing()
    >>> seen, truth = planted_exchange(attack, client, knowledge=client.domain.public())
    >>> found = attack(seen)
    >>> len(found), float((found.inputs - truth.inputs).flatten(1).norm(dim=1).min()) < 1e-4
    (1, True)
    """

    family: ClassVar[str] = "planted last layer"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.SOLVES
    threat_model: ClassVar[str] = "malicious server (chooses the parameters; features: anew in every round)"
    paper: ClassVar[str] = (
        "Wen, Geiping, Fowl, Goldblum, Goldstein, Fishing for User Data in Large-Batch FL, ICML 2022; counts and the "
        "difference of two cuts: this library"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = (
        frozenset({"earlier", "public", "clients", "noise", "clip", "altered", "mixup"})
        | DOMAIN_FIELDS
        | PROTOCOL_FIELDS
    )
    demo: ClassVar[Demo] = Demo(case="digits:batch=16,width=32,depth=2", options="target=0")

    target: Annotated[
        int | None, Field(ge=0, description="class that is let through; none takes one with one example, or the fewest")
    ] = None
    examples: Annotated[int, Field(gt=0, description="after which no further round is asked for")] = 1

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` whose last layer hears one class, and no feature yet.

        Raises NotApplicable: the network does not end with a dense layer with a bias and three outputs or more.
        """
        shape = shape_known(known)
        head = next((layer for layer in dense_layers(model, shape) if layer.head), None)
        if head is None:
            raise NotApplicable("the network does not end with a dense layer, in which one class is let through.")
        d = model.get_parameter(head.weight).shape[1]
        u = torch.randn(d, generator=rng, dtype=torch.float64)
        row = u * (SHARP / _spread(model, head.name, u, known)[1])
        centre, spread = _spread(model, head.name, row, known)
        return plant_cut(model, shape, self.target or 0, row, centre + FAR * spread)

    def replant(self, seen: Observation, rng: torch.Generator) -> nn.Module | None:
        """The next class or threshold; None where enough examples have sent alone, or nothing can be read."""
        view = View.of(seen)
        try:
            cuts = cuts_of(view)
            if len(caught(cuts)) >= self.examples:
                return None
        except NotApplicable:  # `run` says why
            return None
        head, row = cuts[-1].head, cuts[-1].row
        centre, spread = _spread(seen.model, head.name, row, seen.knowledge)
        labels = next((cut.labels for cut in cuts if cut.labels is not None), None)
        output = self.target if self.target is not None else 0 if labels is None else _rarest(labels, cuts)
        mine = [cut for cut in cuts if cut.output == output and cut.above is not None]
        if labels is None or (labels[output] and not any(cut.above == 0 for cut in mine)):
            at = centre + FAR * spread * (1 + len(cuts))
        else:
            at = _between(mine, int(seen.knowledge.batch_size), centre, spread, len(cuts))
        return plant_cut(seen.model, seen.knowledge.input_shape, output, row, at)

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        view.refuse_tokens()
        cuts = cuts_of(view)
        held = caught(cuts)
        if not held:
            counts = [cut.above for cut in cuts]
            raise NotApplicable(
                f"after {len(cuts)} rounds no example sent alone: the class let through has several, and above the "
                f"thresholds lay {counts}. More rounds cut finer."
            )
        order = sorted(range(len(held)), key=lambda i: held[i].label is None)[: self.examples]
        read = [_read(held[i], rng) for i in order]
        labels = [held[i].label for i in order]
        told = [label for label in labels if label is not None]
        bounds = [one.bound for one in read if one.bound is not None]
        trace: dict[str, Any] = {
            "caught": order,
            "of": int(view.knowledge.batch_size),
            "above": [cut.above for cut in cuts],
            "read by": [one.trace["read by"] for one in read],
        }
        return Reconstruction(
            inputs=torch.cat([one.inputs for one in read if one.inputs is not None]),
            labels=torch.tensor(told, device=view.obs.device) if len(told) == len(labels) else None,
            bound=torch.cat(bounds),
            trace=trace,
        )


def _read(one: Caught, rng: torch.Generator) -> Reconstruction:
    """The example behind its own update. Raises NotApplicable: nothing gives it, and what each reader said."""
    said, view = list[str](), View.of(one.obs)
    for name, reader in READERS.items():
        try:
            found = reader(view, rng)
        except NotApplicable as why:
            said.append(f"{name}: {why}")
            continue
        whole = found.inputs is not None and len(found) == 1 and not found.layer
        if whole and found.bound is not None and bool(found.bound.isfinite().all()):
            return Reconstruction(inputs=found.inputs, bound=found.bound, trace={**found.trace, "read by": name})
        said.append(f"{name}: no whole example with a bound")
    raise NotApplicable("one example sent alone, and nothing reads its update. " + " ".join(said))


def _spread(model: nn.Module, head: str, row: Tensor, known: Knowledge) -> tuple[float, float]:
    """Mean and standard deviation of row . f over public examples, or over inputs that look like examples."""
    kind = next(model.parameters())
    x = known.public[:STAND_INS] if "public" in known else None
    if x is None:
        x = domain_told(known).prior(STAND_INS, torch.Generator().manual_seed(0))
    h = layer_inputs(model, head, x.to(kind)).double().cpu() @ row
    return float(h.mean()), max(float(h.std()), 1e-6 * float(h.abs().max()), 1e-12)


def _rarest(labels: Sequence[int], cuts: Sequence[PlantedCut]) -> int:
    """A class with one example that was not let through yet, or else the one with the fewest."""
    done = {cut.output for cut in cuts if cut.above == 0}
    alone = [label for label, count in enumerate(labels) if count == 1 and label not in done]
    return alone[0] if alone else min(range(len(labels)), key=lambda label: labels[label])


def _between(cuts: Sequence[PlantedCut], n: int, centre: float, spread: float, tried: int) -> float:
    """A threshold that cuts the highest slab with several examples; where it has no end, beyond the last one."""
    near = sorted((cut for cut in cuts if cut.threshold < centre + FAR * spread / 2), key=lambda cut: cut.threshold)
    step = spread * (1 + len(near))
    if not near:
        return centre + spread
    ends = [(cut.threshold, cut.above or 0) for cut in near]
    if ends[-1][1] > 1:
        return ends[-1][0] + step
    for (low, more), (high, less) in reversed(list(itertools.pairwise(ends))):
        if more - less > 1:
            return low + (high - low) * (0.4 + 0.2 * (tried * GOLDEN % 1))  # another one where an example was too near
    return ends[0][0] - step
