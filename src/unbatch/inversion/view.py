"""One exchange as an attack or an analysis looks at it, each fact found once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from unbatch.domain import Domain, Tokens, domain_told
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.label_form import LabelForm
from unbatch.loss import Loss, LossForm, identify
from unbatch.network.chain import Link, chain
from unbatch.network.dense import Anatomy, Dense, anatomy
from unbatch.network.embedded import token_table
from unbatch.network.graph import Graph
from unbatch.network.precision import loss_value
from unbatch.network.tracing import trace
from unbatch.observation import Observation
from unbatch.protocol import Protocol, Update

T = TypeVar("T")

WHOLE_NUMBERS = "the inputs are tokens, which are whole numbers, and this reads inputs that are real numbers."


@dataclass(frozen=True, eq=False)
class _Network:
    """What running one model on inputs of one shape tells, found when it is first asked for; its views share it."""

    model: nn.Module
    loss: Loss
    input_shape: tuple[int, ...] | None

    @property
    def anatomy(self) -> Anatomy:
        if self.input_shape is None:
            raise NotApplicable("input_shape must be known, to run the model once.")
        found, why = self._looked_at
        if found is None:
            raise NotApplicable(f"it is looked at with real numbers as inputs, and {why}")
        return found

    @property
    def takes_whole_numbers(self) -> bool:
        """Whether the model runs on whole numbers, such as tokens, and not on real ones."""
        found, why = self._looked_at
        return found is not None and bool(why)

    @cached_property
    def _looked_at(self) -> tuple[Anatomy | None, str]:
        """What a run on real numbers tells, else one on whole numbers, and why real numbers do not go."""
        if self.input_shape is None:
            return None, ""
        try:
            return anatomy(self.model, self.input_shape), ""
        except ValueError as error:
            why = str(error)
        try:
            return anatomy(self.model, self.input_shape, whole=True), why
        except ValueError:
            return None, why

    @cached_property
    def vocabulary(self) -> int | None:
        """How many tokens the model looks up; None where it looks none up."""
        if self.input_shape is None:
            return None
        table = token_table(self.model, self.input_shape)
        return None if table is None else len(self.model.get_parameter(table))

    @cached_property
    def form(self) -> LossForm | None:
        shape, loss = (2, *self.anatomy.outputs), partial(loss_value, self.loss)
        return identify(loss, shape, device=next(self.model.parameters()).device) if len(shape) <= 2 else None

    @cached_property
    def labels(self) -> LabelForm:
        if self.form is not None:
            return self.form.labels
        try:
            return LabelForm.of(self.loss, self.anatomy.outputs, device=next(self.model.parameters()).device)
        except UnbatchError as error:
            raise NotApplicable(str(error)) from error


@dataclass(frozen=True, eq=False)
class View:
    """One exchange, restricted to what its reader declared to know, with what running its model tells.

    Dense layers, the head, the first layer that sent its gradient, the form of the loss and the shape of the outputs are
    found when they are first asked for and kept; views of the same model share them.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    >>> seen = Observation(
    ...     model=model, loss=nn.functional.cross_entropy, update=update, knowledge=Knowledge(input_shape=(4,))
    ... )
    >>> view = View.of(seen)
    >>> view.first.name, view.head.name, view.outputs, str(view.form)
    ('0', '2', (2,), 'cross-entropy (mean)')
    """

    obs: Observation
    network: _Network
    found: dict[str, list[tuple[tuple[Tensor, ...], object]]] = field(default_factory=dict, repr=False)  # by `once`

    @classmethod
    def of(cls, obs: Observation) -> View:
        """The view of an exchange that nobody has looked at yet."""
        return cls(obs, _Network(obs.model, obs.loss, obs.knowledge.get("input_shape")))

    def on(self, obs: Observation) -> View:
        """The view of another exchange; what is known of the model is kept where the model is the same one.

        The loss and the shape of an input must be the same as well.
        """
        same = obs.model is self.obs.model and obs.loss is self.obs.loss
        kept = same and obs.knowledge.get("input_shape") == self.network.input_shape
        return View(obs, self.network) if kept else View.of(obs)

    def like(self, obs: Observation) -> View:
        """The view of an exchange of the same network in another precision, or at other parameters.

        Layers, outputs and the loss's form are taken over and not looked at again.
        """
        return View(obs, self.network)

    def only(self, *names: str) -> View:
        """The same exchange for a reader who knows only the named fields."""
        return self.on(self.obs.only(*names))

    @cached_property
    def gradient(self) -> View:
        """The exchange as one of a gradient, where the client took one step that tells it; else itself.

        By `Observation.as_gradient`, for an attack that reads gradients: what it finds in one it finds in such a step.
        """
        obs = self.obs.as_gradient()
        return self if obs is self.obs else self.on(obs)

    @property
    def no_gradient(self) -> str:
        """Why an update that is no gradient cannot be read as one, in words."""
        if self.protocol.optimiser == "sgd":
            return "the update is of local steps, which mix the gradients of several weights."
        words, signs = f"{self.protocol.optimiser} rescales every entry of the update by itself", self.obs.signs_alone
        if not signs:  # after several steps, or behind noise
            return f"{words}, and no gradient is told by what is known of it."
        return (
            f"{words}, and of {signs:.0%} of the entries it tells a sign alone, so coarsely were its numbers kept; a first "
            "step that is kept in float64 tells the gradient."
        )

    @property
    def knowledge(self) -> Knowledge:
        """What the reader may know besides the update."""
        return self.obs.knowledge

    @property
    def update(self) -> Update:
        """The update as sent, by parameter name."""
        return self.obs.update

    @property
    def model(self) -> nn.Module:
        """The global model before the client's step."""
        return self.obs.model

    @property
    def loss(self) -> Loss:
        """The loss (outputs, labels) -> scalar."""
        return self.obs.loss

    @property
    def protocol(self) -> Protocol:
        """The client's protocol as far as it is known."""
        return self.obs.protocol

    @property
    def steps(self) -> int:
        """How many optimiser steps the client took; 0 where it sent one gradient.

        Where the size of the batch is not known and steps are counted by epochs, those of a batch of one.
        """
        return self.protocol.steps(self.knowledge.get("batch_size", 1))

    @property
    def layers(self) -> tuple[Dense, ...]:
        """The dense layers in the order in which they run. Raises NotApplicable: the model takes tokens, or fails."""
        self.refuse_tokens()
        return self.network.anatomy.layers

    def refuse_tokens(self) -> None:
        """Raises NotApplicable where the inputs are tokens, for a reader of real inputs."""
        if self.takes_tokens:
            raise NotApplicable(WHOLE_NUMBERS)

    @property
    def takes_tokens(self) -> bool:
        """Whether the inputs are tokens, as told or by what the model runs on."""
        return self.knowledge.get("domain") == "tokens" or self.network.takes_whole_numbers

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of one example's outputs, of a model of tokens as well. Raises NotApplicable: the model fails."""
        return self.network.anatomy.outputs

    @property
    def head(self) -> Dense | None:
        """The dense layer whose output is the network's, of a model of tokens as well; None where it ends otherwise."""
        return next((layer for layer in self.network.anatomy.layers if layer.head), None)

    @property
    def first(self) -> Dense | None:
        """The first dense layer that sent its weight's gradient; None where none did."""
        return next((layer for layer in self.layers if layer.weight in self.update), None)

    @property
    def form(self) -> LossForm | None:
        """What the loss computes, on outputs [n, k] or [n]; None where it is none of the known ones."""
        return self.network.form

    @property
    def labels(self) -> LabelForm:
        """The form in which the loss takes labels. Raises NotApplicable: it takes none that is known, or as `outputs`."""
        return self.network.labels

    @property
    def known_labels(self) -> Tensor | None:
        """The labels [n, ...] that the reader knows, in the form that the loss takes; None where they are not known.

        Raises NotApplicable: they cannot be brought into that form; the message says which it is.
        """
        known = self.knowledge.get("labels")
        if known is None:
            return None
        try:
            return self.labels.taken(known.to(self.obs.device), next(self.model.parameters()).dtype)
        except UnbatchError as error:
            raise NotApplicable(f"what is known of the labels is of no use: {error}") from error

    @cached_property
    def domain(self) -> Domain:
        """The kind of the inputs and their range, as far as they are known; of tokens as many as the model looks up."""
        told = domain_told(self.knowledge)
        if not self.takes_tokens:
            return told
        size = self.network.vocabulary
        told = told if isinstance(told, Tokens) else Tokens(shape=told.shape, padding=self.knowledge.get("padding"))
        if size is None:
            return told
        told_high = told.high if "input_range" in self.knowledge else size - 1.0
        return replace(told, high=min(told_high, size - 1.0))  # a token beyond the table would have stopped the client

    def stand_in(self, n: int, rng: torch.Generator) -> Tensor:
        """Inputs [n, *input_shape] that look like examples but know nothing of the private ones: the domain's prior."""
        return self.domain.prior(n, rng).to(self.obs.device)

    @cached_property
    def graph(self) -> Graph:
        """What the network runs, modules and functions alike, with the tensors between them (`trace`), of a copy.

        Raises NotApplicable: its forward depends on its data in a way that no graph shows; or input_shape is not known.
        """
        if "input_shape" not in self.knowledge:
            raise NotApplicable("input_shape must be known, to run the model once.")
        try:
            return trace(copy.deepcopy(self.model), self.knowledge.input_shape, self.protocol.mode)
        except ValueError as error:
            raise NotApplicable(str(error)) from error

    @cached_property
    def links(self) -> list[Link]:
        """The layers in the order in which they run, one feeding the next (`chain`), of a copy of the model.

        Raises NotApplicable: the network is no chain, and where it breaks; or input_shape is not known.
        """
        if "input_shape" not in self.knowledge:
            raise NotApplicable("input_shape must be known, to run the model once.")
        try:
            return chain(self.model, self.knowledge.input_shape, self.protocol.mode)
        except NotApplicable:
            raise
        except ValueError as error:
            raise NotApplicable(WHOLE_NUMBERS if self.network.takes_whole_numbers else str(error)) from error

    def once(self, name: str, at: tuple[Tensor, ...], find: Callable[[], T]) -> T:
        """What `find` gives at these tensors; asked by the same name at equal ones, it is not computed again.

        >>> model, loss = nn.Linear(2, 2, bias=False), nn.functional.mse_loss
        >>> told = {"update": {"weight": torch.ones(2, 2)}, "knowledge": Knowledge()}
        >>> view = View.of(Observation(model=model, loss=loss, **told))
        >>> view.once("sum", (torch.ones(2),), lambda: 2.0), view.once("sum", (torch.ones(2),), lambda: 3.0)
        (2.0, 2.0)
        """
        held = self.found.setdefault(name, [])
        for place, value in held:
            if len(place) == len(at) and all(torch.equal(a, b) for a, b in zip(place, at, strict=True)):
                return cast("T", value)
        value = find()
        held.append((at, value))
        return value

    def undo(self, layer: Dense, received: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, str]:
        """The network's inputs [n, *input_shape] behind what a dense layer received [n, d], with their relative bounds [n].

        Where nothing but a normalisation z = scale x + shift lies before the layer it is undone; relative errors then
        stretch by |z| / (|x| min |scale|) at most, and are never taken to shrink; the rounding of z itself comes to
        them. Otherwise what the layer received is returned. The third value is the layer's name then, and empty where these
        are the network's own inputs.
        """
        if layer.feeds is None:
            return received, bound, layer.name
        x = layer.feeds.invert(received)
        least = layer.feeds.scale.abs().min().to(x)
        stretch = received.norm(dim=1) / x.norm(dim=1).clamp_min(1e-300) / least
        if not torch.equal(x.reshape_as(received), received):  # what the layer received was rounded on its way there
            bound = bound + torch.finfo(self.obs.dtype).eps
        shaped = x.reshape(-1, *self.knowledge.input_shape)
        return shaped, bound * stretch.clamp_min(1.0).to(bound.device), ""
