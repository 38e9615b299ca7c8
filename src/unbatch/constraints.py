"""Constraints: how many independent equations each layer's output and gradient give on its input, at one example."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from unbatch.chain import Link
from unbatch.layer import LayerRule, rule_for
from unbatch.loss import Loss
from unbatch.numerics.linsys import LinearSystem
from unbatch.numerics.rank_law import ConvRanks, conv_ranks


@dataclass(frozen=True)
class Constraints:
    """What W x = z (weight constraint) and K x = dL/dW (gradient constraint) say of a layer's input x, of one example.

    Ranks are counted by the rank law where it answers, else measured from the systems when they are asked for.
    """

    link: Link
    weights: LinearSystem  # W x = z, for the outputs that the activation after the layer lets through
    gradients: LinearSystem  # K x = dL/dW
    counted: ConvRanks | None

    @property
    def unknowns(self) -> int:
        """Numbers in the layer's input."""
        return self.weights.unknowns

    @cached_property
    def weight(self) -> int:
        """rank W."""
        return self.weights.rank() if self.counted is None else self.counted.weight

    @cached_property
    def gradient(self) -> int:
        """rank K."""
        return self.gradients.rank() if self.counted is None else self.counted.gradient

    @cached_property
    def both(self) -> int:
        """rank [W; K]."""
        return self._both.rank() if self.counted is None else self.counted.both

    @cached_property
    def condition(self) -> float:
        """Largest over least singular value of [W; K], both blocks equally heavy; those at rounding are left out."""
        S = self._both.singular_values()
        return float(S[0] / S[-1]) if len(S) else float("inf")

    @property
    def deficit(self) -> int:
        """Unknowns that both leave open."""
        return self.unknowns - self.both

    @property
    def _both(self) -> LinearSystem:
        heavy, light = self.weights.size, self.gradients.size
        return self.weights + self.gradients * (heavy / light if heavy > 0 and light > 0 else 1.0)


def constraints(
    links: Sequence[Link], x: Tensor, y: Tensor, loss: Loss, *, only: Container[str] | None = None
) -> list[Constraints]:
    """For every layer of a chain that has a weight and a rule, or those named, at the example x [1, *shape], y [1].

    A dense layer's gradient is dL/dz x^T: with dL/dz known, as behind a bias, it gives x whatever W is.
    """
    inputs: list[Tensor] = []
    with torch.enable_grad():
        z = x.double().requires_grad_()
        for link in links:
            z = z.reshape(len(z), *link.before)
            inputs.append(z)
            z = link.module.double()(z.clone())  # the chain's modules are copies; an activation may write in place
        outputs = [*inputs[1:], z]
        grads = torch.autograd.grad(loss(z, y), outputs)
    found = []
    for i, link in enumerate(links):
        rule = rule_for(link.module) if only is None or link.name in only else None
        if rule is not None and rule.name != "activation" and isinstance(getattr(link.module, "weight", None), Tensor):
            output, grad = (t.detach().reshape(link.after) for t in (outputs[i], grads[i]))
            found.append(_of(link, rule, output, grad, _known(links[i + 1 :], outputs[i + 1 :])))
    return found


def c_of(layers: Sequence[tuple[int, int]]) -> int:
    """c(M) of convolutions (unknowns, rank), first to last, before one dense layer: see the analysis security-metric."""
    D = len(layers) + 1
    return sum(round((D - 1 - i) / (D - 1) * (rank - unknowns)) for i, (unknowns, rank) in enumerate(layers))


def _known(after: Sequence[Link], outputs: Sequence[Tensor]) -> Tensor | None:
    """Numbers of the outputs that the next activation lets through; None: all of them."""
    for link, output in zip(after, outputs, strict=True):
        rule = rule_for(link.module)
        if rule is not None and rule.name == "activation":
            seen = rule.forward_equations(link.module, link.before, output.detach()[0])
            which = seen.push(torch.arange(seen.unknowns).to(seen.b)[None])[0].long()
            return which if len(which) < seen.unknowns else None
        if link.before != link.after:
            return None
    return None


def _of(link: Link, rule: LayerRule, output: Tensor, grad: Tensor, known: Tensor | None) -> Constraints:
    weight: Tensor = link.module.weight  # type: ignore[assignment]  # constraints() has looked
    W = rule.forward_equations(link.module, link.before, output)
    K = rule.gradient_equations(link.module, link.before, grad, torch.zeros_like(weight))
    if known is not None:
        W = LinearSystem.some(known, output.flatten()[known], W.equations).through(W)
    return Constraints(link, W, K, _dense(link, W) or (_counted(link) if known is None else None))


def _dense(link: Link, weights: LinearSystem) -> ConvRanks | None:
    n = link.unknowns
    return ConvRanks(n, n, min(n, weights.equations), n, n) if isinstance(link.module, nn.Linear) else None


def _counted(link: Link) -> ConvRanks | None:
    layer = link.module
    if not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return conv_ranks(
        layer.in_channels,
        layer.out_channels,
        link.before[1:],
        layer.kernel_size,
        stride=layer.stride,
        dilation=layer.dilation,
        padding=layer.padding,
        groups=layer.groups,
    )
