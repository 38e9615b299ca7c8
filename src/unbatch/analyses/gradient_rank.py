"""gradient-rank: what the rank of each layer's gradient says of the batch, before any attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from unbatch.analysis import TOKEN_TABLE, Analysis, LayerRisk
from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.network.chain import named_after
from unbatch.network.dense import forward
from unbatch.network.embedded import token_table
from unbatch.network.operations import layer_of
from unbatch.numerics.linear.span import numerical_rank
from unbatch.observation import Observation

Level = Literal["exact", "partial", "low", "unknown"]


@final
class GradientRank(Analysis):
    """How many equations each layer's gradient gives, beside the unknowns of its input.

    Numerical rank r of each layer's gradient [p, q] (weight and bias side by side), against its unknowns.

    A matrix of rank r has r (p + q - r) independent entries: so many equations on the layer's inputs. In a dense layer
    dL/dW = sum_i delta_i x_i^T, so a rank below min(p, q) counts the examples and the row space is their span; where
    each example sends it several vectors, as tokens of a text, the span of those. Of a table of embeddings the rows that
    are not zero name what was looked up.
    """

    paper: ClassVar[str] = "Wang, Lee, Lei, AISTATS 2023; Dimitrov et al. (SPEAR), NeurIPS 2024"

    def run(self, view: View, at: tuple[Tensor, Tensor] | None, rng: torch.Generator) -> Sequence[LayerRisk]:
        obs = view.obs
        if "input_shape" not in obs.knowledge:
            raise NotApplicable(
                "gradient-rank needs to know input_shape, to run the model once and see what feeds each layer."
            )
        sizes = _input_sizes(obs.model, view.stand_in(1, rng))
        try:
            fed = {layer.name for layer in view.layers if layer.feeds is not None}
        except NotApplicable:  # a model of token numbers: none of its layers reads the inputs themselves
            fed = set()
        eps = torch.finfo(obs.dtype).eps
        table = token_table(view.model, obs.knowledge.input_shape) if view.takes_tokens else None
        layers = list(_layers(view, sizes))
        if view.protocol.optimiser == "sgd":
            return [_looked_up(layer, table) or _risk(layer, eps, layer.name in fed, obs) for layer in layers]
        rows = [
            found for layer in layers if (found := _looked_up(layer, table))
        ]  # what was not looked up does not move
        if not rows:
            raise NotApplicable(
                f"{view.protocol.optimiser} rescales every entry of the update by itself, so that its rank is not that of "
                "a gradient and counts no examples."
            )
        return rows


@dataclass(frozen=True)
class _Layer:
    """Parameters that are of one layer, and what that is."""

    name: str
    module: nn.Module  # for its kind
    tensors: Sequence[Tensor]  # their gradients
    inputs: int | None  # numbers that enter it for one example, where that is seen


def _layers(view: View, sizes: Mapping[str, int]) -> Iterator[_Layer]:
    """The layers that sent gradients: modules, and functions that a forward passes parameters to."""
    functions = _functions(view)
    for name, module in view.model.named_modules():
        names = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        sent = {key: view.update[key] for key in names if key in view.update}
        taken = [each for each in functions if each[2] and set(each[2]) <= set(sent)]
        for own, layer, keys, inputs in taken:
            yield _Layer(own, layer, [sent.pop(key) for key in keys if key in sent], inputs)
        together = not taken and len({t.shape[:1] for t in sent.values()}) == 1
        if sent and together:
            yield _Layer(name, module, list(sent.values()), sizes.get(name))
        elif sent:
            yield from (_Layer(key, module, [tensor], None) for key, tensor in sent.items())


def _functions(view: View) -> list[tuple[str, nn.Module, list[str], int]]:
    """Calls of functions that take parameters: name, the layer that it is, which of them were sent, size of the input."""
    found = []
    try:
        calls = view.graph.calls
    except NotApplicable:  # tokens, or a forward that no graph shows
        return []
    for call in calls:
        fed = {value for value in call.given if value.fed}
        own = [value for value in call.given if isinstance(value.held, nn.Parameter)]
        keys = list(dict.fromkeys(value.name for value in own if value.name in view.update))
        if not isinstance(call.ran, nn.Module) and keys and len(fed) == 1:
            (given,) = fed
            name = named_after(own[0].name)
            found.append((name, layer_of(call, given), keys, int(torch.Size(given.shape[1:]).numel())))
    return found


def _risk(layer: _Layer, eps: float, first: bool, obs: Observation) -> LayerRisk:
    name, module, inputs = layer.name, layer.module, layer.inputs
    rows = [t.double().reshape(len(t), -1) if t.ndim else t.double().reshape(1, 1) for t in layer.tensors]
    matrix = torch.cat(rows, 1)
    p, q = matrix.shape
    r = numerical_rank(matrix, eps=eps)
    n = obs.knowledge.get("batch_size", max(r, 1))  # in a dense layer below full rank, the rank is the batch size
    equations, unknowns = r * (p + q - r), n * (inputs or 0)
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear) and inputs and inputs > module.in_features and r:
        of_weight = next((numerical_rank(t, eps=eps) for t in rows if t.shape[1] == module.in_features), r)
        words, level = _of_places(of_weight, min(p, module.in_features), n * (inputs // module.in_features))
    else:
        words, level = _words(module, r, min(p, q), n, first, has_bias, equations, unknowns)
    return LayerRisk(
        layer=name, kind=type(module).__name__, unknowns=unknowns, equations=equations, rank=r, words=words, level=level
    )


def _looked_up(layer: _Layer, tokens: str | None) -> LayerRisk | None:
    """What a table of embeddings tells by the rows that are not zero; None of another layer.

    `tokens` is the name of the parameter in which the model's own inputs are looked up.
    """
    if not isinstance(layer.module, nn.Embedding | nn.EmbeddingBag) or len(layer.tensors) != 1:
        return None
    (table,) = layer.tensors
    used, rows = int((table != 0).any(1).sum()), len(table)
    level: Level = "partial" if used < rows else "low"
    own = tokens is not None and tokens.rpartition(".")[0] == layer.name
    words = f"{used:,} of its {rows:,} rows are not zero"
    named = "are the tokens of the batch" if own else "name what was looked up in it"
    words += f": they {named}, in no order." if used < rows else ", so none is named by them."
    return LayerRisk(
        layer=layer.name,
        kind=TOKEN_TABLE if own else "Embedding",
        unknowns=0,
        equations=used * table.shape[1],
        rank=used,
        words=words,
        level=level,
    )


def _of_places(r: int, full: int, vectors: int) -> tuple[str, Level]:
    """What the rank of its weight's gradient says of a dense layer that each example enters by several vectors.

    Behind a layer norm they span one dimension less than the layer is wide, whatever they are.
    """
    if r >= full - 1:
        return (
            f"this layer's gradient has rank {r} of {full}: nearly everything is in its span, which does not tell what the "
            f"{vectors} vectors were that entered it."
        ), "low"
    return (
        f"this layer's gradient has rank {r} of {full}: it is the span of the vectors that entered the layer, {vectors} at "
        "most, and whether a guess of one of them lies in it can be tested."
    ), "partial"


def _words(
    module: nn.Module, r: int, full: int, n: int, first: bool, bias: bool, equations: int, unknowns: int
) -> tuple[str, Level]:
    what = "inputs" if first else "input features"
    if r == 0:
        return "the gradient is zero: nothing of the batch reaches this layer.", "low"
    if isinstance(module, nn.Linear):
        if r >= full and n > 1:
            return (
                f"this layer's gradient has full rank {r}: noise, or at least {full} examples; the span of its {what} "
                "no longer isolates them."
            ), "low"
        if r == n == 1:
            scale = "exactly" if bias else "exactly, up to scale"
            return f"this layer's gradient has rank 1: one example, and its {what} are known {scale}.", "exact"
        if r == n:
            return (
                f"this layer's gradient has rank {r}: the batch has {n} examples and the span of their {what} is known "
                "exactly."
            ), "partial"
        return f"this layer's gradient has rank {r} for {n} examples: it shows {r} mixtures of their {what}.", "partial"
    if unknowns == 0:
        return f"this layer's gradient gives {equations} equations; what feeds it is not known.", "unknown"
    left = 100 * (unknowns - equations) // unknowns  # never rounded up to all of it
    if equations >= unknowns:
        return (
            f"{equations:,} equations for {unknowns:,} unknowns: counting alone does not protect its {what}.",
            "partial",
        )
    return f"{equations:,} equations for {unknowns:,} unknowns: alone it leaves at least {left}% open.", "low"


def _input_sizes(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Numbers that enter each module for one example [1, *shape], by running the model once."""
    sizes: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                sizes[name] = args[0][0].numel()

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        forward(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
