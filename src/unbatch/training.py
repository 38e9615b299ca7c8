"""Training: how a model is trained to the end before it is released, and that training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from unbatch.errors import UnbatchError
from unbatch.loss import Loss
from unbatch.network.dense import in_mode
from unbatch.network.tangent import TangentMap
from unbatch.plugin import Options
from unbatch.progress import tick
from unbatch.protocol import Protocol, Update, local_update

Method = Literal["margin", "sgd", "adam", "stationary", "linearised"]
Gradient = Callable[[nn.Module], Update]  # of the loss over all examples, as the client computes it

MOST_PARAMETERS = 4000  # of which the Hessian of the objective is formed
NEWTON_STEPS = 20
NEAR = 1e-7  # of the largest entry of a gradient, from which Newton's method takes over
TICKS = 50  # steps between two looks at the progress bar


class Training(Options):
    """A training to the end, as data; the objective is the mean loss + weight_decay / 2 times all parameters squared.

    margin: descent on log sum exp(-margin), the gradient of the exponential loss over that loss, which does not vanish, in
    steps of learning_rate / (1 + least margin): in thousands of steps it reaches the direction that plain descent reaches
    after millions. Labels are classes.
    sgd, adam: steps on the loss itself, in batches of `batch_size` in the order of the examples, as was published.
    stationary: L-BFGS and then Newton's method on the objective, until its gradient is rounding; in float64.
    linearised: sgd on all examples at once, of the model that is linear in its parameters and has the same outputs and
    derivatives where training starts; exactly, in as many numbers as there are outputs. Without weight decay.

    >>> print(Training(steps=500))
    trained by 500 steps of margin descent, learning rate 0.1; the model is released, and nothing else is sent
    >>> Training(method="stationary", weight_decay=0.01).recipe()["weight_decay"]
    0.01
    """

    method: Annotated[Method, Field(description="how the objective is brought down")] = "margin"
    steps: Annotated[int, Field(gt=0, description="steps at most")] = 2000
    learning_rate: Annotated[float, Field(gt=0, description="of margin, sgd and adam")] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.0
    weight_decay: Annotated[
        float, Field(ge=0, description="of the objective; of all parameters, biases among them")
    ] = 0.0
    batch_size: Annotated[
        int | None, Field(ge=1, description="examples a step of sgd or adam takes; none takes all")
    ] = None

    def recipe(self) -> dict[str, Any]:
        """What an attacker is told who knows how the model was trained: the fields that are in use, by name.

        >>> Training(method="sgd", steps=9).recipe()
        {'method': 'sgd', 'steps': 9, 'learning_rate': 0.1, 'momentum': 0.0, 'weight_decay': 0.0}
        """
        idle = {"learning_rate", "momentum", "batch_size"} if self.method == "stationary" else set[str]()
        return {name: value for name, value in self if value is not None and name not in idle}

    def __str__(self) -> str:
        how = {
            "margin": "steps of margin descent",
            "stationary": "steps of L-BFGS at most, then of Newton's method",
            "linearised": "steps of descent on the linearised model",
        }
        extra = f", learning rate {self.learning_rate:g}" * (self.method != "stationary")
        extra += "".join(
            f", {k.replace('_', ' ')} {v:g}" for k in ("momentum", "weight_decay") if (v := getattr(self, k))
        )
        extra += f", batches of {self.batch_size}" if self.batch_size else ""
        steps = f"{self.steps:,} {how.get(self.method, f'steps of {self.method}')}"
        return f"trained by {steps}{extra}; the model is released, and nothing else is sent"


def trained(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    labels: Tensor,
    training: Training,
    *,
    gradient: Gradient | None = None,
) -> nn.Module:
    """A copy of `model` as that training leaves it, on `inputs` [n, ...] and `labels` [n, ...]; in the model's own mode.

    `gradient` replaces the gradient of the loss over all examples, as defences change it; of sgd alone.
    Raises UnbatchError: margins that there are none of, a training that diverges, a gradient that another method asks for.

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> half = lambda outputs, labels: (outputs[:, 0] - labels).square().mean() / 2
    >>> x, y = torch.tensor([[2.0]]).double(), torch.tensor([3.0]).double()
    >>> done = trained(model, half, x, y, Training(method="stationary", weight_decay=1.0))
    >>> round(done.weight.item(), 9)  # 4 w - 6 + w = 0
    1.2
    """
    model = copy.deepcopy(model)
    if gradient is not None and training.method != "sgd":
        raise UnbatchError(
            f"a defence changes the gradients of sgd, and this training is {training.method}; take method=sgd."
        )
    if gradient is not None:
        _descended(model, gradient, training)
    elif training.method == "margin":
        _to_a_margin(model, inputs, labels, training)
    elif training.method == "linearised":
        _linearised(model, loss, inputs, labels, training)
    elif training.method == "stationary":
        _to_a_stationary_point(model, loss, inputs, labels, training)
    else:
        _stepped(model, loss, inputs, labels, training)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise UnbatchError(f"the training diverged ({training}); take a smaller learning_rate.")
    return model


def _stepped(model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, training: Training) -> None:
    """The steps of sgd or adam that a client of local steps takes."""
    optimiser: Literal["sgd", "adam"] = "adam" if training.method == "adam" else "sgd"
    rules = Protocol(
        local_steps=training.steps,
        local_batch_size=training.batch_size,
        optimiser=optimiser,
        learning_rate=training.learning_rate,
        momentum=training.momentum if optimiser == "sgd" else 0.0,
        weight_decay=training.weight_decay,
        mode="train" if model.training else "eval",
    )
    _move(model, local_update(model, loss, inputs, labels, rules))


def _descended(model: nn.Module, gradient: Gradient, training: Training) -> None:
    """Steps of sgd by a gradient that the client computes at each model on the way."""
    held: dict[str, Tensor] = {}
    for step in range(training.steps):
        with torch.no_grad():
            parameters = dict(model.named_parameters())
            for name, g in gradient(model).items():
                full = g + training.weight_decay * parameters[name]
                held[name] = training.momentum * held[name] + full if name in held else full
        _move(model, {name: -training.learning_rate * move for name, move in held.items()})
        if step % TICKS == 0 and not tick(step / training.steps):
            return


@torch.no_grad()
def _move(model: nn.Module, difference: Update) -> None:
    for name, parameter in model.named_parameters():
        if name in difference:
            parameter.add_(difference[name].to(parameter))


def margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """By how much the right class is ahead of each other one [n, k - 1]; of one output a signed logit [n, 1].

    Raises UnbatchError: labels are no classes.

    >>> margins(torch.tensor([[2.0], [3.0]]), torch.tensor([1, 0])).flatten().tolist()
    [2.0, -3.0]
    >>> margins(torch.tensor([[2.0, 5.0, 1.0]]), torch.tensor([1])).tolist()
    [[3.0, 4.0]]
    """
    if labels.is_floating_point() or labels.ndim != 1 or outputs.ndim != 2:
        raise UnbatchError("margins are of classes, and these labels are none; train with method=sgd or stationary.")
    if outputs.shape[1] == 1:
        return outputs * (2 * labels[:, None] - 1)
    own = outputs.gather(1, labels[:, None])
    other = torch.ones_like(outputs, dtype=torch.bool).scatter(1, labels[:, None], False)
    return (own - outputs)[other].view(len(outputs), -1)


def _to_a_margin(model: nn.Module, inputs: Tensor, labels: Tensor, training: Training) -> None:
    """Descent on log sum exp(-margin) in steps that become shorter as margins grow: its terms part as they do."""
    names, velocity = [name for name, p in model.named_parameters() if p.requires_grad], dict[str, Tensor]()
    mode: Literal["train", "eval"] = "train" if model.training else "eval"
    with in_mode(model, mode):
        for step in range(training.steps):
            values = {name: model.get_parameter(name) for name in names}
            with torch.enable_grad():
                ahead = margins(model(inputs), labels)
                grads = torch.autograd.grad((-ahead).flatten().logsumexp(0), list(values.values()))
            rate = training.learning_rate / (1 + max(0.0, float(ahead.detach().min())))
            for name, g in zip(names, grads, strict=True):
                full = g + training.weight_decay * values[name].detach()
                velocity[name] = training.momentum * velocity[name] + full if name in velocity else full
            _move(model, {name: -rate * velocity[name] for name in names})
            if step % TICKS == 0 and not tick(step / training.steps):
                return


def _linearised(model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, training: Training) -> None:
    """Steps of theta0 + J^T a, in the numbers a alone: outputs are f0 + J J^T a."""
    if training.weight_decay or training.batch_size:
        raise UnbatchError(
            "a linearised training takes all examples at once and has no weight decay; leave batch_size and weight_decay "
            "out."
        )
    tangent = TangentMap.of(model, inputs)
    kernel, start = tangent.kernel(), tangent.outputs
    duals, velocity = torch.zeros_like(start), torch.zeros_like(start)
    for step in range(training.steps):
        outputs = (start + (kernel @ duals.flatten()).view_as(start)).requires_grad_()
        with torch.enable_grad():
            (pull,) = torch.autograd.grad(loss(outputs, labels), outputs)
        velocity = training.momentum * velocity + pull
        duals = duals - training.learning_rate * velocity
        if step % TICKS == 0 and not tick(step / training.steps):
            break
    _move(model, tangent.pulled(duals))


def objective(
    model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, weight_decay: float
) -> Callable[[Tensor], Tensor]:
    """The mean loss + weight_decay / 2 |theta|^2, as a function of all trained parameters in a row theta [p].

    >>> model = nn.Linear(1, 1, bias=False)
    >>> f = objective(model, lambda o, y: (o - y).square().mean(), torch.ones(2, 1), torch.zeros(2, 1), 2.0)
    >>> float(f(torch.tensor([3.0])))
    18.0
    """
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad} | dict(
        model.named_buffers()
    )

    def value(theta: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in shapes.values()])
        held: Mapping[str, Tensor] = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        found: Tensor = loss(functional_call(model, {**rest, **held}, (inputs,)), labels)
        return found + weight_decay / 2 * theta.square().sum()

    return value


def _to_a_stationary_point(model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, training: Training) -> None:
    """L-BFGS to where the gradient is small, then Newton's method, damped where the objective does not curve upwards."""
    value = objective(model, loss, inputs, labels, training.weight_decay)
    theta = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).requires_grad_()
    search = torch.optim.LBFGS(
        [theta],
        max_iter=training.steps,
        max_eval=2 * training.steps,
        history_size=50,
        tolerance_grad=NEAR if len(theta) <= MOST_PARAMETERS else 1e-13,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        with torch.enable_grad():
            score = value(theta)
            score.backward()  # type: ignore[no-untyped-call]
        return score

    search.step(closure)  # type: ignore[no-untyped-call]
    point = theta.detach()
    if len(point) <= MOST_PARAMETERS:
        point = _newton(value, point)
    parts = torch.split(point, [p.numel() for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        for parameter, part in zip((p for p in model.parameters() if p.requires_grad), parts, strict=True):
            parameter.copy_(part.view_as(parameter))


def _newton(value: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Newton's method from near a stationary point: the point with the least gradient on its way."""
    slope, curve = torch.func.grad(value), torch.func.hessian(value)
    best, least = point, float(slope(point).norm())
    for _ in range(NEWTON_STEPS):
        step = torch.linalg.lstsq(curve(best), slope(best)[:, None]).solution[:, 0]
        size = float("nan")
        for share in (1.0, 0.5, 0.1):
            moved = best - share * step
            size = float(slope(moved).norm())
            if size < least:
                break
        if not (math.isfinite(size) and size < least):
            break
        best, least = moved, size
    return best
