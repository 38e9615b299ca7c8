"""Sent norms: batch norms in train mode as fixed maps, by the statistics that a client's running averages give away."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from unbatch.network.batch_norm import SentStatistics, sent_statistics
from unbatch.network.graph import Graph, Value
from unbatch.network.sections import between, section


@dataclass(frozen=True, eq=False)
class FixedNorms:
    """The part of a network between its input and a tensor, each batch norm with the statistics of the very batch.

    It gives what the network gave in train mode, and no example depends on another.
    """

    below: nn.Module
    statistics: dict[str, SentStatistics]  # by the layer's name

    def shaken(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """How far the tensor moves, for inputs x, if each statistic is one error higher or lower."""
        other = copy.deepcopy(self.below)
        for name, sent in self.statistics.items():
            norm = other.get_submodule(name)
            for buffer, error in zip((norm.running_mean, norm.running_var), sent.errors, strict=True):
                signs = 2.0 * torch.randint(2, error.shape, generator=rng).to(error) - 1
                buffer.add_(signs * error)  # type: ignore[operator]
        with torch.no_grad():
            moved: Tensor = other(x) - self.below(x)
        return moved


def fixed_norms(
    graph: Graph, gave: Value, before: Mapping[str, Tensor], after: Mapping[str, Tensor], examples: int
) -> FixedNorms | None:
    """The network up to a tensor, with the statistics that running averages `before` and `after` the step give away.

    None where there is no batch norm in train mode, or one whose statistics were not sent or say nothing.

    >>> from unbatch.network.tracing import trace
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).double().train()
    >>> graph, x = trace(net, (1, 4, 4), "train"), torch.randn(3, 1, 4, 4).double()
    >>> before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    >>> made = net(x)
    >>> fixed = fixed_norms(graph, graph.output, before, dict(net.named_buffers()), 3)
    >>> torch.allclose(fixed.below(x[:1]), made[:1])
    True
    """
    found: dict[str, SentStatistics] = {}
    calls = between(graph, graph.input, gave)
    own = section(graph, graph.input, gave)
    for call in calls:
        norm = call.ran
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        if not norm.training:
            continue
        buffers = [f"{call.name}.{kind}" for kind in ("running_mean", "running_var")]
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d) or call.name in found:
            return None
        if any(name not in before or name not in after for name in buffers):
            return None
        N = examples * torch.Size(call.given[0].shape[2:]).numel()
        sent = sent_statistics(norm, f"{call.name}.{{}}".format, before, after, N)  # type: ignore[arg-type]
        if sent.flaw:
            return None
        found[call.name] = sent
    mixing = [m for m in own.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if not found or len(mixing) != len(found):  # one that a function is, whose averages have no name here
        return None
    return FixedNorms(_fixed(own, found), found)


def _fixed(own: fx.GraphModule, found: Mapping[str, SentStatistics]) -> nn.Module:
    whole = copy.deepcopy(own)
    for name, sent in found.items():
        norm = whole.get_submodule(name)
        norm.running_mean, norm.running_var = sent.mean.clone(), sent.var.clone()
        norm.num_batches_tracked = None  # type: ignore[assignment]
        norm.track_running_stats = True  # type: ignore[assignment]
        norm.eval()
    return whole
