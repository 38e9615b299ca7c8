"""Protocol: what a round of training asks of a client, and the update that an honest client then sends.

The client runs it on private data; an attacker, who knows the protocol, runs the same function on guesses. There is one
implementation, differentiable through every local step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.loss import Loss
from unbatch.network.dense import in_mode
from unbatch.network.precision import loss_value, outputs_of
from unbatch.plugin import Options

ADAM_EPS = 1e-8  # beside the root of Adam's second moment
Update = Mapping[str, Tensor]  # parameter name -> tensor of that parameter's shape


class Protocol(Options):
    """The rounds, as data.

    With no local steps the client sends the gradient of the loss at the global model. With K local steps it sends the
    difference of parameters, after minus before. It may send an update u of the same batch in several rounds, between which
    the server moves the model: w -> w - server_rate u after a gradient, w + server_rate u after local steps.

    >>> print(Protocol(local_steps=4, learning_rate=0.1))
    4 local steps of sgd, learning rate 0.1, model in train mode; the difference of parameters is sent

    Raises UnbatchError: a field that there is not, or a number out of its range.
    """

    local_steps: Annotated[int, Field(ge=0, description="optimiser steps; 0 sends one gradient")] = 0
    epochs: Annotated[int | None, Field(ge=1, description="passes over the local data, instead of local_steps")] = None
    local_batch_size: Annotated[int | None, Field(ge=1, description="examples a local step takes; none takes all")] = (
        None
    )
    optimiser: Annotated[Literal["sgd", "adam", "adamw"], Field(description="local optimiser")] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, description="of the local optimiser")] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1, description="of SGD")] = 0.0
    weight_decay: Annotated[
        float, Field(ge=0, description="added to the gradient as in torch.optim; adamw shrinks the weights by it")
    ] = 0.0
    mode: Annotated[Literal["train", "eval"], Field(description="batch norm and dropout")] = "train"
    rounds: Annotated[int | None, Field(ge=1, description="of the same batch, all seen by the server; none is one")] = (
        None
    )
    server_rate: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="of the server between rounds; none is 0")
    ] = None

    sends_buffers: Annotated[
        bool | None, Field(description="the client sends its buffers after its steps, too: batch norm's averages")
    ] = None

    @model_validator(mode="after")
    def _one_count_of_steps(self) -> Self:
        if self.local_steps and self.epochs:
            raise UnbatchError("local_steps and epochs both say how long to train; give one of them")
        return self

    def steps(self, n: int) -> int:
        """Optimiser steps on a batch of n examples; 0 for a gradient."""
        per_epoch = -(-n // (self.local_batch_size or n))
        return self.epochs * per_epoch if self.epochs else self.local_steps

    @property
    def decays(self) -> tuple[float, float]:
        """The weight decay that is added to the gradient, and the one that shrinks the weights by themselves (AdamW).

        >>> Protocol(weight_decay=0.1).decays, Protocol(optimiser="adamw", weight_decay=0.1).decays
        ((0.1, 0.0), (0.0, 0.1))
        """
        return (0.0, self.weight_decay) if self.optimiser == "adamw" else (self.weight_decay, 0.0)

    def first_step_alone(self, n: int) -> bool:
        """Whether the update of n examples is that of one step of SGD, -learning_rate (gradient + weight_decay w).

        Momentum adds nothing to a first step. False of a plain gradient, too.

        >>> Protocol(local_steps=1).first_step_alone(4), Protocol(epochs=1, local_batch_size=2).first_step_alone(4)
        (True, False)
        """
        return self.optimiser == "sgd" and self.steps(n) == 1

    def __str__(self) -> str:
        again = f"; the same batch in {self.rounds} rounds" if (self.rounds or 1) > 1 else ""
        if again:
            again += f", server rate {self.server_rate:g}" if self.server_rate else " at the same parameters"
        again += "; batch norm's running averages are sent as well" if self.sends_buffers else ""
        if not (self.local_steps or self.epochs):
            return f"one gradient, model in {self.mode} mode{again}"
        count, what = (self.epochs, "local epoch") if self.epochs else (self.local_steps, "local step")
        length = f"{count} {what}" + "s" * (count != 1)
        batch = f" on batches of {self.local_batch_size}" if self.local_batch_size else ""
        extra = "".join(f", {k} {v:g}" for k in ("momentum", "weight_decay") if (v := getattr(self, k)))
        return (
            f"{length}{batch} of {self.optimiser}, learning rate {self.learning_rate:g}{extra}, "
            f"model in {self.mode} mode; the difference of parameters is sent{again}"
        )


def local_update(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    labels: Tensor,
    protocol: Protocol,
    *,
    trained: Sequence[str] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """The update that an honest client sends for `inputs` [n, ...] and `labels` [n, ...]; the model is left as it was.

    dL/dw of the loss of the whole batch, or the difference w_K - w_0 of parameters after K local steps.
    `trained` names the parameters that the update holds (default: those that require a gradient). `buffers` replaces the
    model's own, in its precision. With `create_graph` the update can be differentiated with respect to the inputs and real
    labels. Local batches are taken in the order of the batch, wrapping round. SGD, Adam and AdamW follow torch.optim
    (no Nesterov; betas .9 and .999, eps 1e-8).

    >>> model = nn.Linear(1, 1, bias=False)
    >>> half = lambda outputs, labels: (outputs - labels).square().sum() / 2
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(3.0)
    >>> local_update(model, half, torch.tensor([[2.0]]), torch.tensor([[0.0]]), Protocol())
    {'weight': tensor([[12.]])}
    """
    return _stepped(model, loss, inputs, labels, protocol, trained, _held(model, buffers), create_graph)


def buffers_after(
    model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, protocol: Protocol
) -> dict[str, Tensor]:
    """The buffers after an honest client's steps: what a client that sends its whole state sends besides its parameters.

    Those of batch norm in train mode are running averages of its batches' statistics. The model is left as it was.

    >>> model, x = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)), torch.tensor([[1.0], [3.0]])
    >>> buffers = buffers_after(model, nn.functional.mse_loss, x, x, Protocol(mode="train"))
    >>> buffers["0.running_mean"], model[0].running_mean
    (tensor([0.2000]), tensor([0.]))
    """
    held = _held(model, None)
    _stepped(model, loss, inputs, labels, protocol, None, held, False)
    return held


def _held(model: nn.Module, buffers: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Copies of the model's buffers, or of those that replace them."""
    own = dict(model.named_buffers())
    return {k: b.detach().clone().to(own.get(k, b)) for k, b in (own | dict(buffers or {})).items()}


def _stepped(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    labels: Tensor,
    protocol: Protocol,
    trained: Sequence[str] | None,
    state: dict[str, Tensor],
    create_graph: bool,
) -> dict[str, Tensor]:
    """What `local_update` says, with the buffers `state`, which the steps write to."""
    start = dict(model.named_parameters())
    names = _trained(start, trained)
    frozen = {k: p.detach() for k, p in start.items()}
    weights = [frozen[k].requires_grad_() for k in names]
    initial = weights

    def gradient(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        held = frozen | dict(zip(names, weights, strict=True)) | state
        value = loss_value(loss, outputs_of(model, x, held, twice=create_graph), y)
        return _dense(torch.autograd.grad(value, list(weights), create_graph=create_graph, materialize_grads=True))

    steps = protocol.steps(len(inputs))
    with torch.enable_grad(), in_mode(model, protocol.mode):
        if steps == 0:
            return dict(zip(names, gradient(weights, inputs, labels), strict=True))
        size = min(protocol.local_batch_size or len(inputs), len(inputs))
        per_epoch = -(-len(inputs) // size)
        optimiser = _Optimiser(protocol)
        for step in range(steps):
            part = slice((step % per_epoch) * size, (step % per_epoch + 1) * size)
            added, shrink = protocol.decays
            grads = [g + added * w for g, w in zip(gradient(weights, inputs[part], labels[part]), weights, strict=True)]
            moves = optimiser.moves(grads)
            kept = 1 - protocol.learning_rate * shrink
            weights = [kept * w - protocol.learning_rate * move for w, move in zip(weights, moves, strict=True)]
            if not create_graph:
                weights = [w.detach().requires_grad_() for w in weights]
        moved = {k: after - before for k, after, before in zip(names, weights, initial, strict=True)}
        return moved if create_graph else {k: tensor.detach() for k, tensor in moved.items()}


class _Optimiser:
    """What torch.optim makes of the gradients of one step after another; weight decay is not its matter."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol, self.steps = protocol, 0
        self.momentum: list[Tensor] = []
        self.square: list[Tensor] = []

    def moves(self, grads: list[Tensor]) -> list[Tensor]:
        """How far the parameters move in this step, in units of the learning rate."""
        self.steps += 1
        if self.protocol.optimiser == "sgd":
            if self.protocol.momentum:
                pairs = zip(self.momentum, grads, strict=True)
                grads = self.momentum = [self.protocol.momentum * v + g for v, g in pairs] if self.momentum else grads
            return grads
        momentum = self.momentum or [torch.zeros_like(g) for g in grads]
        square = self.square or [torch.zeros_like(g) for g in grads]
        self.momentum = [0.9 * v + 0.1 * g for v, g in zip(momentum, grads, strict=True)]
        self.square = [0.999 * v + 0.001 * g * g for v, g in zip(square, grads, strict=True)]
        grow, spread = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        pairs = zip(self.momentum, self.square, strict=True)
        return [(v / grow) / (_root(s / spread) + ADAM_EPS) for v, s in pairs]


def gradient_of_adam(
    update: Update, before: Mapping[str, Tensor], protocol: Protocol
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient behind the first step of Adam or AdamW, and by how much each of its entries may be off.

    From zero state the step is -lr u with u = g / (|g| + eps), less -lr weight_decay w for AdamW. So g = eps u / (1 - |u|)
    exactly (less weight_decay w for Adam, which adds that to the gradient). A step that is kept as a difference of
    parameters w is rounded as they are: u is off by du = 4 eps_w (|w| + |step|) / lr, and g by (|g| + eps)^2 / eps du,
    to first order. Entries with |u| + 2 du >= 1 give their sign alone: their error is inf, and the value given is the least
    that their size can be. So float64 gives the whole gradient; float32 at lr 1e-3 gives entries up to about 1e-5, and
    the signs of the others. `before` are the parameters before the step.
    Raises UnbatchError: the protocol is not that of one such step.

    >>> step = {"w": -0.1 * torch.tensor([0.5, -0.25, 0.0], dtype=torch.float64)}
    >>> told = Protocol(local_steps=1, optimiser="adam", learning_rate=0.1)
    >>> gradient, error = gradient_of_adam(step, {"w": torch.zeros(3, dtype=torch.float64)}, told)
    >>> [f"{float(g):.3g}" for g in gradient["w"]], bool((error["w"] < 1e-20).all())
    (['1e-08', '-3.33e-09', '0'], True)
    """
    if protocol.optimiser == "sgd" or protocol.local_steps != 1:
        raise UnbatchError(f"this is no first step of Adam or AdamW: {protocol}.")
    added, shrink = protocol.decays
    found, errors = dict[str, Tensor](), dict[str, Tensor]()
    for name, step in update.items():
        w, eps = before[name].detach().double(), torch.finfo(step.dtype).eps
        u = step.double() / -protocol.learning_rate - shrink * w
        off = 4 * max(eps, torch.finfo(before[name].dtype).eps) * (w.abs() + step.double().abs())
        off = off / protocol.learning_rate
        least = (u.abs() - off).clamp(0, 1)
        open_ = u.abs() + 2 * off >= 1
        size = torch.where(open_, least, u.abs())
        g = u.sign() * ADAM_EPS * size / (1 - size).clamp_min(torch.finfo(torch.float64).eps)
        found[name] = g - added * w
        errors[name] = torch.where(open_, torch.inf, 2 * (g.abs() + ADAM_EPS).square() / ADAM_EPS * off)
    return found, errors


def _trained(parameters: Mapping[str, Tensor], names: Sequence[str] | None) -> list[str]:
    """The names of the parameters that a client trains. Raises UnbatchError: there are none."""
    found = list(names) if names is not None else [k for k, p in parameters.items() if p.requires_grad]
    if not found:
        raise UnbatchError(
            "all parameters of the model are frozen (requires_grad is False), so a client trains and sends nothing; "
            "unfreeze those that it trains: parameter.requires_grad_()."
        )
    return found


def _dense(gradients: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Gradients as dense tensors: an embedding with sparse=True gives sparse ones."""
    return tuple(g if g.layout == torch.strided else g.to_dense() for g in gradients)


def flatten(update: Update, names: Iterable[str]) -> Tensor:
    """All entries of the named tensors in a row [e], in float64, without a graph.

    >>> flatten({"weight": torch.ones(2, 1), "bias": torch.zeros(1)}, ["bias", "weight"])
    tensor([0., 1., 1.], dtype=torch.float64)
    """
    return torch.cat([update[name].detach().double().flatten() for name in names])


def shortened(update: Update, norm: float, room: float = 0.0) -> dict[str, Tensor]:
    """The update at most `norm` long, its direction kept: clipping, differentiable.

    u min(1, norm / (|u| + room)), |u| the l2 norm over all entries of all tensors, summed in float64.

    >>> shortened({"weight": torch.tensor([3.0, 4.0])}, 1.0)
    {'weight': tensor([0.6000, 0.8000])}
    """
    size = _root(torch.stack([u.double().square().sum() for u in update.values()]).sum()) + room
    factor = norm / size.clamp_min(max(norm, torch.finfo(size.dtype).tiny))
    return {name: u * factor.to(u) for name, u in update.items()}


def fit(seen: Tensor, again: Tensor) -> tuple[float, float]:
    """How well one update is a multiple of another: the factor, and what it leaves, relative.

    c = <u, s> / <s, s> and |u - c s| / |u|, of the updates as seen and again [e]; c = 0 where s is, inf left where u is 0.

    >>> fit(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]))
    (2.0, 0.0)
    """
    size, whole = again @ again, float(seen.norm())
    c = float(seen @ again / size) if size > 0 else 0.0
    return c, float((seen - c * again).norm()) / whole if whole else float("inf")


def _root(square: Tensor) -> Tensor:
    """sqrt with a zero derivative at zero, where autograd's would be infinite."""
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)
