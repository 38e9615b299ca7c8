"""Received: a model as a client got it, looked at once: its matrices, and what a batch makes of each layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.loss import Loss
from unbatch.network.dense import in_mode

_LINEAR = {nn.functional.linear}
_CONVOLUTIONS = {nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d}

ALONE = 0.99  # share of what comes back to a unit, by which one example holds it alone
SAME = 1e-3  # relative difference up to which factors are one
FAINT = 1e-9  # of the largest gradient at the outputs, below which an example says nothing
AT_ONCE = 8  # examples that are passed at a time, so that a large model has room


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight of a model, a row for each unit: what the unit weighs, and its threshold."""

    layer: str  # the module's name
    weight: str  # the parameter's
    rows: Tensor  # [m, d], float64
    columns: Tensor  # [d', m'], float64: what is weighed, a row for each unit or channel before it
    bias: Tensor | None  # [m]


@dataclass(frozen=True, eq=False)
class Running:
    """What a batch makes of one layer: what reaches its units, and what comes back to them."""

    matrix: Matrix
    given: Tensor  # [n] the length of what reaches it
    weighed: Tensor  # [m] mean square of w . x, over examples and places
    energy: Tensor  # [n, m] how strongly each example comes back to each unit, squared and summed over places
    back: Tensor | None  # [n, m] the same with its sign, where an example has one place
    head: bool  # what it gives are the model's outputs


@dataclass(frozen=True, eq=False)
class Received:
    """A model that a client received, with the one before it and a batch where there are such.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> seen = Received.of(model, inputs=torch.rand(5, 4), labels=torch.tensor([0, 1, 0, 1, 0]))
    >>> [matrix.layer for matrix in seen.matrices], [layer.energy.shape for layer in seen.running]
    (['0', '2'], [torch.Size([5, 3]), torch.Size([5, 2])])
    """

    model: nn.Module
    before: Mapping[str, Tensor] | None  # the state before
    inputs: Tensor | None  # [n, ...]
    labels: Tensor | None
    loss: Loss

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        before: Mapping[str, Tensor] | None = None,
        inputs: Tensor | None = None,
        labels: Tensor | None = None,
        loss: Loss = nn.functional.cross_entropy,
    ) -> Received:
        """Looks at a copy: the model itself is not touched."""
        return cls(copy.deepcopy(model), before, inputs, labels, loss)

    @cached_property
    def matrices(self) -> list[Matrix]:
        """Its weights that are matrices, kernels flattened, in the model's own order; embeddings are left out."""
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                continue
            for key, weight in module.named_parameters(recurse=False):
                if weight.ndim < 2 or not weight.is_floating_point() or weight.shape[0] < 2:
                    continue
                bias = getattr(module, key.replace("weight", "bias"), None) if "weight" in key else None
                found.append(_matrix(name, f"{name}.{key}" if name else key, weight, bias, _turned(module)))
        return found

    @cached_property
    def running(self) -> list[Running]:
        """Its dense and convolutional layers in their order, by passes of the batch and back in eval mode.

        What comes back of an example is taken over its size at the model's outputs; examples of which nothing comes back
        are left out. Raises NotApplicable: there is no batch, or the model does not run on it.
        """
        return self._passed[0]

    @property
    def outputs(self) -> Tensor:
        """What the model makes of the batch, [n, ...], float64. Raises NotApplicable as `running` does."""
        return self._passed[1]

    @cached_property
    def _passed(self) -> tuple[list[Running], Tensor]:
        if self.inputs is None or self.labels is None:
            raise NotApplicable("there is no batch to run the model on.")
        by_weight = {matrix.weight: matrix for matrix in self.matrices}
        names = {id(p): name for name, p in self.model.named_parameters() if name in by_weight}
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        self._settle(self.inputs)
        self.model.requires_grad_(True)
        parts, outputs, sizes = list[list[_Pass]](), list[Tensor](), list[Tensor]()
        for x, y in zip(torch.split(self.inputs, AT_ONCE), torch.split(self.labels, AT_ONCE), strict=True):
            try:
                found, out, size = _pass(self.model, self.loss, x, y, names)
            except Exception as error:  # the model and the loss are the user's: anything may go wrong in them
                words = f"the model does not run on this batch: {type(error).__name__}: {error}"
                raise NotApplicable(words) from error
            parts.append(found)
            outputs.append(out)
            sizes.append(size)
        for p in self.model.parameters():
            p.requires_grad_(id(p) in trained)
        size = torch.cat(sizes)
        kept = size > FAINT * size.max()
        whole = [_joined(by_weight, calls, kept) for calls in zip(*parts, strict=False)]
        return whole, torch.cat(outputs)

    @torch.no_grad()
    def _settle(self, inputs: Tensor) -> None:
        """Give batch norms the statistics of this batch, which they have while a client trains: those sent may be stale."""
        norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        norms = [module for module in norms if module.track_running_stats]
        if not norms:
            return
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the mean over all parts
        first = next(self.model.parameters())
        with in_mode(self.model, "train"), torch.random.fork_rng(devices=[]):
            for x in torch.split(inputs, AT_ONCE):
                if len(x) > 1:
                    self.model(x.to(first.device, first.dtype) if x.is_floating_point() else x.to(first.device))

    def each_running(self) -> Iterator[Running]:
        """The layers that run; none where nothing could be run."""
        try:
            yield from self.running
        except NotApplicable:
            return


@dataclass(eq=False)
class _Call:
    """A layer that ran."""

    weight: str
    bias: Tensor | None
    given: Tensor
    gave: Tensor
    convolution: bool


@dataclass(frozen=True, eq=False)
class _Pass:
    """The same in numbers, for a part of the batch; as in `Running`."""

    weight: str
    given: Tensor
    weighed: Tensor
    energy: Tensor
    back: Tensor | None
    head: bool


class _Layers(TorchFunctionMode):
    """Hears every dense layer and convolution that computes with a parameter of these names, by identity."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.calls = names, list[_Call]()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _LINEAR or func in _CONVOLUTIONS:
            held = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
            if (name := self.names.get(id(held["weight"]))) and out.requires_grad:
                call = _Call(name, held.get("bias"), held["input"], out, func in _CONVOLUTIONS)
                self.calls.append(call)
                return out.clone()  # what comes next may write into it
        return out


def _pass(
    model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, names: Mapping[int, str]
) -> tuple[list[_Pass], Tensor, Tensor]:
    """The layers that run on a part of the batch, the outputs, and the size [n] of each example's gradient there.

    In eval mode no example reaches another, so the sum of the losses has the gradient of each.
    """
    first = next(model.parameters())
    x = inputs.to(first.device, first.dtype) if inputs.is_floating_point() else inputs.to(first.device)
    with in_mode(model, "eval"), torch.enable_grad(), _Layers(names) as heard:
        outputs = model(x)
    if not isinstance(outputs, Tensor):
        raise UnbatchError(f"it returns {type(outputs).__name__}, and no tensor.")
    y = labels.to(outputs.device)
    total = torch.stack([loss(outputs[i : i + 1], y[i : i + 1]) for i in range(len(outputs))]).sum()
    end, *backs = torch.autograd.grad(total, [outputs, *(call.gave for call in heard.calls)], allow_unused=True)
    size = end.detach().flatten(1).double().norm(dim=1).cpu()
    found = [_in_numbers(call, back, size, outputs) for call, back in zip(heard.calls, backs, strict=True)]
    return [each for each in found if each is not None], outputs.detach().double().cpu(), size


def _in_numbers(call: _Call, back: Tensor | None, size: Tensor, outputs: Tensor) -> _Pass | None:
    n = len(outputs)
    if back is None or len(back) != n:  # examples are folded into places
        return None
    gave, axis = call.gave.detach(), 1 if call.convolution else -1
    head = gave.shape == outputs.shape and torch.equal(gave, outputs.detach())
    back, gave = (t.double().cpu().movedim(axis, -1).reshape(n, -1, t.shape[axis]) for t in (back, gave))
    back = back / size.clamp_min(1e-300)[:, None, None]
    weighed = gave if call.bias is None else gave - call.bias.detach().double().cpu()
    energy, lone = back.square().sum(1), back[:, 0] if back.shape[1] == 1 else None
    given = call.given.detach().flatten(1).double().norm(dim=1).cpu()
    return _Pass(call.weight, given, weighed.square().mean((0, 1)), energy, lone, head)


def _joined(matrices: Mapping[str, Matrix], parts: Sequence[_Pass], kept: Tensor) -> Running:
    """A layer's numbers on the whole batch, of the examples that are kept."""
    counts = torch.tensor([len(part.given) for part in parts], dtype=torch.float64)
    weighed = (torch.stack([part.weighed for part in parts]) * counts[:, None]).sum(0) / counts.sum()
    lone = [part.back for part in parts if part.back is not None]
    return Running(
        matrices[parts[0].weight],
        torch.cat([part.given for part in parts])[kept],
        weighed,
        torch.cat([part.energy for part in parts])[kept],
        torch.cat(lone)[kept] if len(lone) == len(parts) else None,
        all(part.head for part in parts),
    )


def _turned(module: nn.Module) -> bool:
    """Whether a module keeps its weight as [inputs, units]."""
    return type(module).__name__ == "Conv1D" or isinstance(
        module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    )


def _matrix(layer: str, name: str, weight: Tensor, bias: object, turned: bool) -> Matrix:
    held = weight.detach().double().cpu()
    held = held.transpose(0, 1) if turned else held
    own = bias.detach().double().cpu() if isinstance(bias, Tensor) and len(bias) == len(held) else None
    return Matrix(layer, name, held.flatten(1), held.transpose(0, 1).flatten(1), own)


def exposed(running: Running) -> dict[int, int]:
    """Which examples of a batch stand alone in a unit, or between two units that ask the same with other thresholds.

    Such an example is read off the layer's gradient by a division. A unit holds one example alone where nothing of another
    comes back to it. Two units do where one has the examples of the other and one more, and what comes back of the shared
    ones is the same up to a factor. By number in the batch, with the unit.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    ...     _ = model[0].bias.copy_(torch.tensor([-0.5, -0.5, 0.0]))
    >>> seen = Received.of(model, inputs=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels=torch.tensor([0, 1]))
    >>> exposed(seen.running[0])
    {0: 0, 1: 1}
    """
    back, found, energy = running.back, dict[int, int](), running.energy
    if back is None:
        best, who = (energy / energy.sum(0).clamp_min(1e-300)).max(0)
        return {int(i): j for j, (share, i) in enumerate(zip(best, who, strict=True)) if share > ALONE}
    fires = back.abs() > 1e-9 * back.abs().max()
    count = fires.sum(0)
    for j in (count == 1).nonzero().flatten().tolist():
        found.setdefault(int(fires[:, j].nonzero()[0]), j)
    order = count.argsort(stable=True).tolist()
    for j, other in pairwise(order):
        more, shared = fires[:, other] & ~fires[:, j], fires[:, j]
        if count[other] == count[j] + 1 and int(more.sum()) == 1 and bool((fires[:, other] | ~shared).all()):
            ratio = back[shared, other] / back[shared, j]
            if not len(ratio) or float((ratio / ratio[0] - 1).abs().max()) < SAME:
                found.setdefault(int(more.nonzero()[0]), other)
    return dict(sorted(found.items()))
