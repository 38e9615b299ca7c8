"""Retraining: the one unknown example with which the same training ends at the released parameters.

Who knows the start, the recipe and all other examples can train again with any example in the unknown one's place. Where
training ends is then a function of that example, smooth for smooth networks, with more parameters than the example has
entries: least squares, whatever the training was stopped at.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.numerics.search.least_squares import minimise_by_products
from unbatch.progress import tick
from unbatch.protocol import Protocol, local_update
from unbatch.reconstruction import Reconstruction
from unbatch.training import Training, trained

GAUSS_NEWTON_STEPS = 40  # for each label that is tried
INNER = 40  # products a step
LEAST_GAIN = 0.2  # of the squared misfit, that a step is to take off
ROUNDED = 16.0  # roundings of a step, each as far from the end as one of the start is carried
SHAKEN = 2.0**12  # roundings by which the start is moved, to see how far they are carried
SURE = 2.0  # times what the linear equations at the answer say of its error
LARGEST_ROUNDING = 1e-2  # of the way that training went: another label leaves some hundredths
SEPARATION = 1e-7  # of the largest singular value: below, some direction of the example moves no parameter


def retrained(view: View, rng: torch.Generator) -> Reconstruction:
    """The unknown example, by least squares on the end of training, tried with each label a class may have.

    The bound is 2 (|misfit| + rounding) / (s |x|), s the least singular value of the derivative of training's end by the
    example. Rounding is what a step leaves, carried to the end as far as a rounding of the start is.
    Raises NotApplicable: start, recipe or known examples are not known, or no example explains the parameters.

    >>> import unbatch
    >>> spec = "trained:known=3,threat=informed,width=3,activation=elu,start=1,method=sgd,steps=3"
    >>> client = unbatch.Case.parse(spec).setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> found = retrained(View.of(seen), torch.Generator().manual_seed(0))
    >>> bool((found.inputs - truth.inputs).norm() / truth.inputs.norm() < found.bound), found.labels == truth.labels
    (True, tensor([True]))
    """
    again = Retraining.of(view)
    start = again.known_inputs.mean(0, keepdim=True)
    rounding = again.rounding(start, again.candidates()[0])
    if rounding > LARGEST_ROUNDING * again.travelled():
        raise NotApplicable("training moved the parameters too little beside its rounding, to tell by it what it saw.")
    order = sorted(again.candidates(), key=lambda label: float(again.misfit(start, label).norm()))
    nearest = float("inf")
    for label in order:
        x, misfit = start.flatten()[None], float("inf")
        for cost, point in again.search(start, label, rng):
            x, misfit = point, cost**0.5
            if misfit <= again.least_misfit(rounding) or not tick(0.5):
                break
        nearest = min(nearest, misfit)
        if misfit <= rounding:
            return again.certified(x, label, misfit, rounding)
        if not tick(0.5):
            break
    raise NotApplicable(
        f"trained again as the recipe says, no example ends at these parameters: {nearest / again.travelled():.1e} of the "
        "way that training went is left at best. The recipe or the other examples may be others, or the search was lost."
    )


@dataclass(frozen=True, eq=False)
class Retraining:
    """The training of a released model as a function of its one unknown example, in float64."""

    model: nn.Module  # at the start
    rules: Protocol
    end: Tensor  # [p]: the released parameters
    eps: float  # of the precision in which the model was trained
    known_inputs: Tensor
    known_labels: Tensor
    view: View

    @classmethod
    def of(cls, view: View) -> Retraining:
        """What is known of the training. Raises NotApplicable: too little, or it cannot be stepped through."""
        known = view.knowledge
        missing = [n for n in ("initial", "recipe", "known_inputs", "known_labels") if n not in known]
        if missing:
            raise NotApplicable(f"{', '.join(missing)} must be known, to train again.")
        if known.get("privacy") is not None:
            raise NotApplicable("the training was private, and its noise would be another: it is not trained again.")
        if known.get("batch_size", 1) != 1:
            raise NotApplicable(f"{known.batch_size} examples are unknown, and this is for one.")
        rules = _rules(known.recipe, view.protocol.mode)
        released = dict(view.model.named_parameters())
        eps = max(torch.finfo(p.dtype).eps for p in released.values())
        end = torch.cat([p.detach().double().flatten() for p in released.values()])
        inputs = known.known_inputs.to(view.obs.device).double()
        labels = known.known_labels.to(view.obs.device)
        labels = labels.double() if labels.is_floating_point() else labels
        if not len(inputs):
            raise NotApplicable("no other example is known, at whose mean the search would start.")
        return cls(at_the_start(view.model, known.initial).double(), rules, end, eps, inputs, labels, view)

    def reached(self, one: Tensor, label: Tensor, *, create_graph: bool = False) -> Tensor:
        """The parameters [p] at the end of training with the example [1, ...]."""
        x, y = torch.cat([self.known_inputs, one.view(1, *self.known_inputs.shape[1:])]), self.labelled(label)
        moved = local_update(self.model, self.view.loss, x, y, self.rules, create_graph=create_graph)
        start = dict(self.model.named_parameters())
        return torch.cat([(start[name].detach() + moved[name]).flatten() for name in start])

    def labelled(self, label: Tensor) -> Tensor:
        """The labels of all examples, the unknown one's last, as the training takes them."""
        return torch.cat([self.known_labels, label])

    def misfit(self, one: Tensor, label: Tensor) -> Tensor:
        """By how much the training would end elsewhere [p]."""
        return self.reached(one, label) - self.end

    def travelled(self) -> float:
        """How far training went."""
        return float((self.end - _flat(self.model)).norm())

    def candidates(self) -> list[Tensor]:
        """The labels [1] to be tried. Raises NotApplicable: they are no classes."""
        form = self.view.labels
        if form.shape != () or form.kind not in ("class", "binary"):
            raise NotApplicable(f"labels of the form {form.words()} are not tried one by one.")
        kind, device = self.known_labels.dtype, self.known_labels.device
        return [torch.tensor([k], device=device).to(kind) for k in range(form.count or 2)]

    def search(self, start: Tensor, label: Tensor, rng: torch.Generator) -> Any:
        """Least squares from `start`; yields (|misfit|^2, example [1, d])."""

        def residual(point: Tensor, /, *, create_graph: bool = False) -> Tensor:
            return self.reached(point, label, create_graph=create_graph) - self.end

        return minimise_by_products(
            residual,
            start.flatten()[None],
            rng,
            steps=GAUSS_NEWTON_STEPS,
            inner=INNER,
            damping=1e-3,
            tolerance=1e-3,
            gain=LEAST_GAIN,
        )

    def rounding(self, one: Tensor, label: Tensor) -> float:
        """How far from the released parameters the true example may end, by the rounding of its training."""
        rng = torch.Generator().manual_seed(0)
        theta = _flat(self.model)
        way = torch.randn(len(theta), generator=rng, dtype=torch.float64).to(theta)
        move = SHAKEN * torch.finfo(torch.float64).eps * theta.norm() * way / way.norm()
        shaken = at_the_start(self.model, _unflat(self.model, theta + move))
        other = Retraining(shaken, self.rules, self.end, self.eps, self.known_inputs, self.known_labels, self.view)
        carried = float((other.misfit(one, label) - self.misfit(one, label)).norm() / move.norm())
        size = float(self.end.norm()) * max(1.0, carried)
        steps: float = max(1, self.rules.local_steps) ** 0.5
        return ROUNDED * self.eps * steps * size

    def least_misfit(self, rounding: float) -> float:
        """What float64 leaves of a search, where the training itself may have been rounded to `rounding`."""
        return rounding * torch.finfo(torch.float64).eps / self.eps

    def certified(self, x: Tensor, label: Tensor, misfit: float, rounding: float) -> Reconstruction:
        """The answer with its bound, infinite where a direction of the example moves no parameter."""
        columns, here = list[Tensor](), self.reached(x, label)
        step = torch.finfo(torch.float64).eps ** 0.5 * float(x.norm() + 1)
        for j in range(x.numel()):
            moved = x.clone()
            moved[0, j] += step
            columns.append((self.reached(moved, label) - here) / step)
        values = torch.linalg.svdvals(torch.stack(columns, 1))
        least = float(values[-1]) if len(columns) <= len(here) else 0.0
        sure = least > SEPARATION * float(values[0])
        bound = SURE * (misfit + rounding) / least / float(x.norm()) if sure else torch.inf
        return Reconstruction(
            inputs=x.view(1, *self.known_inputs.shape[1:]),
            labels=label,
            bound=torch.tensor([bound], dtype=torch.float64),
            trace={
                "known": len(self.known_inputs),
                "trained again to": misfit / self.travelled(),
                "singular values": [float(values[0]), least],
            },
        )


def at_the_start(model: nn.Module, initial: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with its parameters before training.

    >>> layer = nn.Linear(1, 1)
    >>> at_the_start(layer, {"weight": torch.zeros(1, 1)}).weight.item()
    0.0
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in initial:
                parameter.copy_(initial[name])
    return model


def trained_with(view: View, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The released parameters had the unknown example been this one [1, ...], trained in the model's own precision.

    Raises NotApplicable: the start or the recipe is not known, or is none to train by.
    """
    known = view.knowledge
    if "initial" not in known or "steps" not in known.get("recipe", {}):
        raise NotApplicable("without start and recipe nothing is trained again.")
    _ = _rules(known.recipe, view.protocol.mode)
    start = at_the_start(view.model, known.initial)
    kind = next(start.parameters())
    x = torch.cat([known.known_inputs.to(kind), inputs.to(kind)])
    y = torch.cat([known.known_labels.to(kind.device), labels.to(kind.device, known.known_labels.dtype)])
    done = trained(start, view.loss, x, y, Training(**dict(known.recipe)))
    return {name: p.detach() for name, p in done.named_parameters()}


def _rules(recipe: Mapping[str, Any], mode: str) -> Protocol:
    """The training's steps as those of a client."""
    method = recipe.get("method")
    if method != "sgd":
        raise NotApplicable(f"the recipe is {method or 'not told'}, and only steps of sgd are trained again.")
    return Protocol(
        local_steps=int(recipe["steps"]),
        local_batch_size=recipe.get("batch_size"),
        learning_rate=float(recipe["learning_rate"]),
        momentum=float(recipe.get("momentum", 0.0)),
        weight_decay=float(recipe.get("weight_decay", 0.0)),
        mode="eval" if mode == "eval" else "train",
    )


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def _unflat(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    parts = torch.split(theta, [p.numel() for p in model.parameters()])
    return {name: part.view(p.shape) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}
