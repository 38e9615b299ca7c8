"""Weights: an exchange in which whole models go out and come back, as what an audit takes: a difference, and what was told.

Frameworks of federated learning send weights and no gradients. No framework is imported here.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.knowledge import PROTOCOL_FIELDS, Knowledge
from unbatch.loss import Loss
from unbatch.network.unwrapped import unwrapped
from unbatch.observation import Observation
from unbatch.protocol import Protocol
from unbatch.update import named_values, some, state_difference

COUNT = "num_batches_tracked"  # batch norm's own count of the batches that it saw in train mode
STATISTICS = ("running_mean", "running_var", COUNT)
SPELLINGS = {  # how configurations and metrics spell what a client does, with - for _ as well and in any case
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "local_lr": "learning_rate",
    "client_lr": "learning_rate",
    "epochs": "epochs",
    "local_epochs": "epochs",
    "num_epochs": "epochs",
    "batch_size": "local_batch_size",
    "local_batch_size": "local_batch_size",
    "local_steps": "local_steps",
    "num_steps": "local_steps",
    "optimizer": "optimiser",
    "optimiser": "optimiser",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
}
PROXIMAL, CLIPPING = "proximal_mu", "clipping_norm"


@dataclass(frozen=True, kw_only=True)
class WeightsExchange:
    """One exchange of whole weights: the model that went out, how far it came back, and what that made known."""

    model: nn.Module  # with the parameters and buffers that went out
    update: Mapping[str, Tensor]
    after: Mapping[str, Tensor]  # what came back, in its order
    knowledge: Knowledge
    notes: Sequence[str] = field(default=())  # what was not told, and what does not agree

    @property
    def steps_told(self) -> bool:
        """Whether it is known for how long the client trained."""
        return bool(self.knowledge.get("local_steps") or self.knowledge.get("epochs"))

    @property
    def moved(self) -> bool:
        """Whether anything came back that had not gone out."""
        own = self.model.state_dict()
        return any(not torch.equal(tensor.to(own[name]), own[name]) for name, tensor in self.after.items())

    @property
    def protocol(self) -> Protocol:
        """The client's step as far as it was told, the rest at its defaults. Raises UnbatchError: not for how long."""
        if not self.steps_told:
            raise UnbatchError(UNTOLD)
        return Protocol(**{name: self.knowledge.get(name) for name in self.knowledge if name in PROTOCOL_FIELDS})

    def frozen(self, weights: Collection[str]) -> WeightsExchange:
        """The same exchange where these parameters were frozen, so that nothing was sent of them."""
        model = copy.deepcopy(self.model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(parameter.requires_grad and name not in weights)
        update = {name: tensor for name, tensor in self.update.items() if name not in weights}
        return replace(self, model=model, update=update)

    def observation(self, loss: Loss) -> Observation:
        """The exchange as the server sees it, for attacks, analyses and bundles."""
        return Observation(model=self.model, loss=loss, update=self.update, knowledge=self.knowledge)


UNTOLD = (
    "neither the exchange nor `protocol` tells for how long the client trained, so the difference of weights cannot be "
    "read. Give protocol=Protocol(epochs=..., local_batch_size=...) or Protocol(local_steps=...), or let the "
    "configuration that is sent to the client say so (local-epochs, batch-size, local-steps)."
)


def weights_exchange(
    model: nn.Module,
    went_out: Any,
    came_back: Any,
    *,
    told: Mapping[str, Any] | None = None,
    examples: int | None = None,
    protocol: Protocol | None = None,
    knowledge: Knowledge | None = None,
) -> WeightsExchange:
    """What an exchange of whole weights gives an attacker: the difference of parameters, the buffers, the client's step.

    `went_out` and `came_back` are states of `model` in any form that `state_dict()` or Flower's list of arrays has; what
    they lack was not exchanged. Of parameters that do not require a gradient and did not move nothing was sent.
    `told` is what else the two sides said (configuration, metrics), by its usual names (`SPELLINGS`), and `examples`
    how many examples the client trained on. Batch norm's buffers tell the mode, and its count the number of steps.
    What `protocol` sets goes before all of that, and `knowledge` before everything.

    Returns the model as it went out, the update, and `notes` in words on what is not known and what does not agree.
    Raises UnbatchError: names or shapes are not those of the model.

    >>> model = nn.Linear(2, 1)
    >>> after = [value.numpy() + 0.5 for value in model.state_dict().values()]
    >>> found = weights_exchange(model, model.state_dict(), after, told={"lr": 0.1, "local-steps": 1}, examples=4)
    >>> found.update["bias"], found.knowledge
    (tensor([0.5000]), Knowledge(learning_rate=0.1, local_steps=1, batch_size=4))
    """
    network = copy.deepcopy(unwrapped(model))
    state = named_values(network, went_out, "the model that went out", whole=True)
    own = network.state_dict()
    extra = [name for name in state if name not in own]
    if extra:
        raise UnbatchError(
            f"the model that went out has {some(extra)}, which this model has not; give its own factory."
        )
    _load(network, state)
    update, buffers = state_difference(network, came_back)
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    update = {name: tensor for name, tensor in update.items() if trained[name] or bool(tensor.any())}
    before = {name: b for name, b in network.named_buffers() if name in buffers and name.endswith(STATISTICS)}
    facts, notes = _facts(told or {})
    counted = _of_norms(before, buffers)
    layers = (counted, facts, _set(protocol))
    held = _merged(layers)
    known = Knowledge(**held)
    if examples:
        known |= Knowledge(batch_size=int(examples))
    if buffers and held.get("mode", "train") == "train":
        known |= Knowledge(buffers=buffers)
    known, more = _besides(known, told or {}, update, bool(buffers))
    known |= knowledge or Knowledge()
    after = named_values(network, came_back, "what came back", whole=True)
    notes = [*notes, *more, *_open(known, counted), *_coarse(network, after)]
    return WeightsExchange(model=network, update=update, after=after, knowledge=known, notes=notes)


def _load(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UnbatchError(
                f"the model that went out has {name!r} of shape {tuple(tensor.shape)}, this model of "
                f"{tuple(own[name].shape)}; give its own factory."
            )
    with torch.no_grad():
        network.load_state_dict(dict(state), strict=False)


def _facts(told: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of a protocol out of a configuration or metrics, by their usual spellings; and what could not be read."""
    found, notes = dict[str, Any](), list[str]()
    for key, value in told.items():
        name = SPELLINGS.get(_plain(key))
        if name is None or value is None:
            continue
        if isinstance(value, float) and name in ("epochs", "local_batch_size", "local_steps") and value == int(value):
            value = int(value)  # metrics are floats
        if name == "optimiser":
            value = str(value).lower()
        try:
            Protocol(**{name: value})
        except (UnbatchError, ValueError):
            notes.append(f"{key} = {value!r} was told, which is no {name} that can be simulated; it is left out.")
            continue
        found[name] = value
    return found, notes


def _plain(key: str) -> str:
    return str(key).strip().lower().replace("-", "_")


def _set(protocol: Protocol | None) -> dict[str, Any]:
    """What a caller set of a protocol, and not its defaults."""
    return {} if protocol is None else {name: getattr(protocol, name) for name in protocol.model_fields_set}


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts of several sources, the later ones before the earlier; steps and epochs say the same thing."""
    held = dict[str, Any]()
    for layer in layers:
        if layer.get("epochs") or layer.get("local_steps"):
            whole = held.get("local_steps") == 1 and layer.get("epochs") == 1 and not layer.get("local_batch_size")
            if whole:  # batch norm saw one batch, so the epoch was one step
                layer = {name: value for name, value in layer.items() if name != "epochs"}
            else:
                held = {name: value for name, value in held.items() if name not in ("epochs", "local_steps")}
        held |= {name: value for name, value in layer.items() if value is not None}
    return held


def _of_norms(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """The mode of the client's model and the number of its steps, as far as batch norm's buffers tell."""
    if not before:
        return {}
    counts = [int(after[name]) - int(tensor) for name, tensor in before.items() if name.endswith(COUNT)]
    moved = any(not torch.equal(after[name].to(tensor), tensor) for name, tensor in before.items())
    if not moved:
        return {"mode": "eval"}
    steps = {count for count in counts if count}
    return {"mode": "train"} | ({"local_steps": steps.pop()} if len(steps) == 1 and min(steps) > 0 else {})


def _besides(
    known: Knowledge, told: Mapping[str, Any], update: Mapping[str, Tensor], buffers: bool
) -> tuple[Knowledge, list[str]]:
    """What strategies tell that changes the update: a norm that it is clipped to, and a proximal term."""
    plain = {_plain(key): value for key, value in told.items()}
    notes, norm, pull = list[str](), plain.get(CLIPPING), plain.get(PROXIMAL)
    if isinstance(norm, int | float) and norm > 0:
        size = float(torch.stack([u.double().square().sum() for u in update.values()]).sum().sqrt())
        if size > norm * (1 + 1e-3):
            notes.append(f"the client was told to clip to the norm {norm:g}, and its difference is {size:.3g} long.")
        elif buffers:
            notes.append(f"the client clipped to the norm {norm:g} over parameters and buffers together.")
        else:
            known |= Knowledge(clip=float(norm))
    steps = known.get("local_steps") or known.get("epochs")
    if isinstance(pull, int | float) and pull > 0 and known.get("local_steps") != 1 and steps:
        known = known.after(f"proximal term, mu {pull:g}")  # of one step it is nothing: its gradient starts at zero
    return known, notes


def _open(known: Knowledge, counted: Mapping[str, Any]) -> list[str]:
    """What of the client's step was not told, and what batch norm counted otherwise."""
    notes, n = list[str](), known.get("batch_size")
    if not (known.get("local_steps") or known.get("epochs")):
        return [UNTOLD]
    if "learning_rate" not in known:
        notes.append("the learning rate was not told: the update is a multiple of the gradient.")
    if "optimiser" not in known:
        notes.append("the optimiser was not told: plain SGD is taken.")
    if n is None:
        notes.append("the number of examples was not told.")
    if "local_batch_size" not in known and n != 1:
        notes.append("the local batch size was not told: every step is taken to see all examples.")
    seen = counted.get("local_steps")
    if seen and n:
        rules = {name: known.get(name) for name in ("epochs", "local_steps", "local_batch_size") if name in known}
        steps = Protocol(**rules).steps(n)
        if steps != seen:
            notes.append(f"batch norm counted {seen} batches in train mode, and {steps} steps were told.")
    return notes


def _coarse(network: nn.Module, after: Mapping[str, Tensor]) -> list[str]:
    """That weights came back in a coarser type than the model's, whose rounding is in the difference."""
    own = dict(network.named_parameters(remove_duplicate=False))
    types = {
        str(tensor.dtype).removeprefix("torch.")
        for name, tensor in after.items()
        if name in own
        and tensor.is_floating_point()
        and torch.finfo(tensor.dtype).eps > torch.finfo(own[name].dtype).eps
    }
    if not types:
        return []
    return [
        f"the weights came back in {', '.join(sorted(types))}, coarser than the model's own: their difference is off by "
        "that rounding, which exact attacks do not follow."
    ]
