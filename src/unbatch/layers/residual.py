"""residual: a block a(x) + f(x) of two branches that are affine in x, read as one layer."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

from unbatch.errors import UnbatchError
from unbatch.layer import LayerRule, rule_for, shaped
from unbatch.network.chain import Link
from unbatch.numerics.linear.linsys import COLUMN_ENTRIES, LinearSystem, affine

ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


@final
class Residual(LayerRule):
    """Residual blocks of two branches that are both affine in the input.

    z = a(x) + f(x), both affine in x: the identity or a convolution beside convolutions and norms without an activation.

    Forward: (A + F) x = z - a(0) - f(0). Gradient: h(x, W_l) = <z, dz> is affine in x and in every weight W_l by itself, so
    all dL/dW_l, one after the other as `weights` names them, are affine in x. Backward: dL/dx = (A + F)^T dz.
    A branch with an activation is not affine: which side its units are on depends on x, and z, a sum, does not tell. Such a
    block has no rule (`bend` says why), and is read by Gauss and Newton together with the layers before it.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)  # of that form, whatever the class

    def accepts(self, layer: nn.Module) -> bool:
        """A block of two branches of layers with the rule `affine`, their sum its output."""
        block = parsed(layer)
        return block is not None and not block.bend and block.after is None

    def weights(self, layer: nn.Module) -> tuple[str, ...]:
        """Those of its layers, by name, in the order of the module's parameters."""
        return tuple(name for name, _ in layer.named_parameters() if name.split(".")[-1] == "weight")

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """(A + F) x = z - c for `output` z. Raises UnbatchError: z, or `shape`, is not the block's."""
        f = _Function(layer, shape, output)
        return affine(lambda x: f(x, {}), shape, shaped(output, f.shape, "output"))

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """d/dW_l <z, dz> = dL/dW_l, `grad_weight` [entries of all weights], one after the other. Raises as above."""
        f = _Function(layer, shape, grad_output)
        dz = shaped(grad_output, f.shape, "grad_output")
        W = {name: f.state[name] for name in self.weights(layer)}
        sizes = [w.numel() for w in W.values()]
        dW = shaped(grad_weight, (sum(sizes),), "grad_weight", batch=False)
        if not W:
            return LinearSystem.none(f.zero.numel(), dz)

        def by_weights(x: Tensor) -> Tensor:
            parts = grad(lambda w: (f(x.view(1, *shape), w) * dz).sum())(W)
            return torch.cat([parts[name].flatten() for name in W])

        offset = by_weights(f.zero).detach()
        chunk = max(1, COLUMN_ENTRIES // max(f.zero.numel(), dz.numel(), sum(sizes)))

        def push(v: Tensor) -> Tensor:
            moved: Tensor = vmap(by_weights, chunk_size=chunk)(v) - offset
            return moved.detach()

        def pull(u: Tensor) -> Tensor:
            back = grad(lambda x, each: (by_weights(x) * each).sum())
            moved: Tensor = vmap(back, in_dims=(None, 0), chunk_size=chunk)(f.zero.flatten(), u)
            return moved.detach()

        return LinearSystem(push, pull, dW - offset, f.zero.numel())

    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """(A + F)^T dz. Raises UnbatchError: `grad_output` is not the block's."""
        return self.forward_equations(layer, shape, grad_output).pull(grad_output.double().reshape(1, -1)).view(shape)


@dataclass(frozen=True)
class Block:
    """A block of layers as the sum of two branches of layers in a row, with an activation behind it or none."""

    branches: tuple[tuple[tuple[str, nn.Module], ...], ...]  # by name, first to last; none for the identity
    after: str | None  # name of that activation
    graph: fx.GraphModule

    @property
    def bend(self) -> str:
        """The first layer that is not affine in its input, in words; empty where there is none."""
        for name, layer in (each for branch in self.branches for each in branch):
            if not _ruled(layer, "affine"):
                kind = type(layer).__name__
                return f"its branch is not affine in x at {name!r} ({kind}), and a sum does not tell its sides."
        return ""

    def summed(self) -> nn.Module:
        """The sum alone, with the parameters under their names."""
        graph = copy.deepcopy(self.graph.graph)
        (last,) = (node for node in graph.nodes if node.op == "output")
        if self.after is not None:
            (bent,) = last.args
            last.args = (bent.args[0],)
            graph.erase_node(bent)
        return fx.GraphModule(self.graph, graph, type(self.graph).__name__).train(self.graph.training)


def parsed(module: nn.Module) -> Block | None:
    """The block of two branches that a module is, by tracing it; None where it is none, or cannot be traced.

    >>> from unbatch.models.residual import ResidualBlock
    >>> block = parsed(ResidualBlock(3, 3, 1, nn.Tanh))
    >>> len(block.branches), block.after
    (2, 'act2')
    >>> parsed(nn.Conv2d(3, 3, 3)) is None
    True
    """
    if not any(True for _ in module.children()) or isinstance(module, nn.Sequential | nn.ModuleList):
        return None
    if any(parametrize.is_parametrized(each) for each in module.modules()):
        return None
    try:
        graph = fx.GraphModule(module, fx.Tracer().trace(module), type(module).__name__)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        NotImplementedError,
        NameError,
        IndexError,
    ):  # by what it computes
        return None
    (node,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
    if not isinstance(node, fx.Node):
        return None
    after, layers = None, dict(module.named_modules())
    if node.op == "call_module" and _ruled(layers.get(str(node.target)), "activation"):
        after, node = str(node.target), node.args[0]
    if not (isinstance(node, fx.Node) and node.target in ADDS and len(node.args) == 2 and not node.kwargs):
        return None
    sides = [_branch(side, layers) for side in node.args]
    branches = tuple(side for side in sides if side is not None)
    used = {name for side in branches for name, _ in side} | {after}
    rest = any(True for name, layer in layers.items() for _ in layer.parameters(recurse=False) if name not in used)
    return None if len(branches) < 2 or rest else Block(branches, after, graph)


def bend(module: nn.Module) -> str:
    """Why a block of two branches has no rule, in words; empty for what is none.

    >>> from unbatch.models.residual import ResidualBlock
    >>> bend(ResidualBlock(3, 3, 1, nn.Tanh).eval())
    "its branch is not affine in x at 'act1' (Tanh), and a sum does not tell its sides."
    """
    block = parsed(module)
    return "" if block is None else block.bend


def split(links: Sequence[Link]) -> list[Link]:
    """The links of a chain, where blocks of affine branches with an activation behind their sum are two: sum, activation.

    >>> class Block(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.side, self.act = nn.Linear(4, 4), nn.Tanh()
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return self.act(self.side(x) + x)
    >>> [link.name for link in split([Link("block", Block(), (4,), (4,))])]
    ['block', 'block.act']
    """
    found: list[Link] = []
    for link in links:
        block = parsed(link.module)
        if block is None or block.after is None or block.bend:
            found.append(link)
            continue
        last = link.module.get_submodule(block.after)
        name = f"{link.name}.{block.after}" if link.name else block.after
        tensors = {own: link.called(f"{block.after}.{own}") for own, _ in last.named_parameters()}
        found += [replace(link, module=block.summed()), Link(name, last, link.after, link.after, tensors)]
    return found


def _ruled(layer: nn.Module | None, name: str) -> bool:
    """Whether the rule of that name is for a layer."""
    rule = None if layer is None else rule_for(layer)
    return rule is not None and rule.name == name


def _branch(node: Any, layers: dict[str, nn.Module]) -> tuple[tuple[str, nn.Module], ...] | None:
    """The layers from the module's input to a node, each fed by the last alone; None if there is more to it."""
    found: list[tuple[str, nn.Module]] = []
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        found.insert(0, (str(node.target), layers[str(node.target)]))
        node = node.args[0]
    whole = isinstance(node, fx.Node) and node.op == "placeholder"
    return tuple(found) if whole else None


class _Function:
    """The block in float64, with some of its weights replaced."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], like: Tensor) -> None:
        self.layer = layer
        self.zero = torch.zeros(1, *shape, dtype=torch.float64, device=like.device)
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        self.state = {k: t.detach().to(self.zero) if t.is_floating_point() else t.detach() for k, t in tensors.items()}
        try:
            self.shape = tuple(self(self.zero, {}).shape[1:])
        except (RuntimeError, ValueError, IndexError) as error:
            raise UnbatchError(f"an input of shape {tuple(shape)} does not fit this block: {error}") from error

    def __call__(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(self.layer, {**self.state, **weights}, (x,))
        return found
