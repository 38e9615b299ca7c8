"""Batch norm: one in train mode whose statistics are known, since the running ones were sent after the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unbatch.network.chain import Link

BatchNormLayer = nn.BatchNorm1d | nn.BatchNorm2d


class KnownBatchNorm(nn.Module):
    """Batch norm in train mode, with what is known of the batch's statistics beside it.

    z = w (x - mean) / sqrt(var + eps) + b per channel, mean and var those of x itself over examples and pixels.
    `forward` computes them from its input, as the network did, so that autograd goes through them; `mean` and `var` [c]
    are what is known of them, each up to its error [c]. `flaw` says in words why they are of no use, if they are not.

    >>> zero = torch.zeros(1)
    >>> known = KnownBatchNorm(nn.BatchNorm1d(1, eps=0.0), zero + 2, zero + 1, (zero, zero))
    >>> known(torch.tensor([[1.0], [3.0]])).tolist()
    [[-1.0], [1.0]]
    """

    mean: Tensor
    var: Tensor
    errors: tuple[Tensor, Tensor]

    def __init__(
        self, layer: BatchNormLayer, mean: Tensor, var: Tensor, errors: tuple[Tensor, Tensor], flaw: str = ""
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.errors, self.flaw = errors, flaw

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, ...] -> [n, c, ...]."""
        sides = [0, *range(2, x.ndim)]
        mean, var = x.mean(sides, keepdim=True), x.var(sides, keepdim=True, unbiased=False)
        z = (x - mean) / (var + self.eps).sqrt()
        side = (-1, *[1] * (x.ndim - 2))
        z = z if self.weight is None else z * self.weight.view(side)
        return z if self.bias is None else z + self.bias.view(side)

    def drawn(self, rng: torch.Generator) -> KnownBatchNorm:
        """The same layer, each statistic one error higher or lower."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        for name, error in zip(("mean", "var"), self.errors, strict=True):
            signs = 2.0 * torch.randint(2, error.shape, generator=rng).to(error) - 1
            other._buffers[name] = getattr(self, name) + signs * error
        return other


def known_batch_norms(
    links: Sequence[Link], before: Mapping[str, Tensor], after: Mapping[str, Tensor], examples: int
) -> list[Link]:
    """The links, with a known norm in place of every batch norm whose running statistics after one step were sent.

    before, after: running statistics by buffer name, before and after the step, of a batch of so many examples. With
    momentum m, mean = (after - (1 - m) before) / m; the variance likewise, times (N - 1) / N for the N entries of a
    channel, since running variances are unbiased. Their error is the rounding of what was sent, divided by m.

    >>> norm = nn.BatchNorm1d(1)
    >>> before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    >>> _ = norm(torch.tensor([[[1.0, 3.0]]]))
    >>> link = Link("", norm, (1, 2), (1, 2))
    >>> [known] = known_batch_norms([link], before, dict(norm.named_buffers()), 1)
    >>> round(float(known.module.mean), 5), round(float(known.module.var), 5)
    (2.0, 1.0)
    """
    found = []
    for link in links:
        names = [link.called(kind) for kind in ("running_mean", "running_var")]
        layer = link.module
        own = type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d)  # a subclass may compute something else
        if isinstance(layer, BatchNormLayer) and not own and all(name in after for name in names):
            link = replace(link, module=_known(layer, link, before, after, examples))
        found.append(link)
    return found


@dataclass(frozen=True, eq=False)
class SentStatistics:
    """What running statistics after one step say of the batch's own: mean and var [c], each up to its error [c].

    `flaw` says in words why they say nothing, if they do not.
    """

    mean: Tensor
    var: Tensor
    errors: tuple[Tensor, Tensor]
    flaw: str = ""


def sent_statistics(
    layer: BatchNormLayer,
    called: Callable[[str], str],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    N: int,
    steps: int = 1,
) -> SentStatistics:
    """The batch's statistics at a batch norm with momentum m: mean = (after - (1 - m) before) / m, var likewise.

    The variance times (N - 1) / N for the N entries of a channel, since running variances are unbiased. `called` gives the
    name in `before` and `after` of one of the layer's buffers. Their error is the rounding of what was sent, divided by m.
    After several `steps`, of N entries each, it is the mixture of theirs that `step_shares` says.

    >>> norm = nn.BatchNorm1d(1)
    >>> before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    >>> _ = norm(torch.tensor([[1.0], [3.0]]))
    >>> sent = sent_statistics(norm, str, before, dict(norm.named_buffers()), 2)
    >>> round(float(sent.mean), 5), round(float(sent.var), 5), sent.flaw
    (2.0, 1.0, '')
    """
    count, names = called("num_batches_tracked"), [called(kind) for kind in ("running_mean", "running_var")]
    start = before.get(count)
    m = step_shares(layer.momentum, start, steps)[0]
    flaw, statistics, errors = "", [], []
    for name, factor in zip(names, (1.0, (N - 1) / N), strict=True):
        old, new = before[name], after[name].to(before[name].device)
        eps = max(torch.finfo(t.dtype).eps for t in (old, new))
        parts = (1 - m) * old.double(), new.double()
        value = (parts[1] - parts[0]) / m if m else torch.full_like(parts[1], torch.nan)
        statistics.append(value * factor)
        errors.append(eps * (parts[0].abs() + parts[1].abs() + (m * value).abs()) / (m or 1.0))
    taken = int(after[count]) - int(start) if count in after and start is not None else steps
    if taken != steps or all(
        torch.equal(before[name].double(), after[name].to(before[name]).double()) for name in names
    ):
        expected = "one step" if steps == 1 else f"{steps} steps"
        flaw = f"the running statistics that were sent are not those after {expected}."
    elif not m:
        flaw = "its momentum is 0: what was sent says nothing of the batch."
    elif bool((statistics[1] <= errors[1]).any()):
        flaw = "the rounding of the running variance that was sent is no smaller than the batch's own variance."
    return SentStatistics(statistics[0], statistics[1], (errors[0], errors[1]), flaw)


def step_shares(momentum: float | None, tracked: Tensor | None, steps: int) -> tuple[float, list[float]]:
    """How much of a running average after `steps` steps is theirs, and how that is shared among them, first to last.

    With momentum m a running average keeps 1 - m of itself in a step, so of K steps the j-th counts m (1 - m)^(K - j), and
    all of them 1 - (1 - m)^K. Without one (None), m is 1 over the number of steps so far, `tracked` before the first.

    >>> step_shares(0.5, None, 2)
    (0.75, [0.3333333333333333, 0.6666666666666666])
    >>> step_shares(None, torch.tensor(2), 2)
    (0.5, [0.5, 0.5])
    """
    first = 1.0 + float(tracked if tracked is not None else 0)
    rates = [momentum if momentum is not None else 1 / (first + j) for j in range(steps)]
    parts, kept = [0.0] * steps, 1.0
    for j in range(steps - 1, -1, -1):
        parts[j], kept = kept * rates[j], kept * (1 - rates[j])
    whole = rates[0] if steps == 1 else 1 - kept
    return whole, [part / whole if whole else 1 / steps for part in parts]


def _known(
    layer: BatchNormLayer, link: Link, before: Mapping[str, Tensor], after: Mapping[str, Tensor], examples: int
) -> KnownBatchNorm:
    sent = sent_statistics(layer, link.called, before, after, examples * torch.Size(link.before[1:]).numel())
    flaw = sent.flaw
    if examples > 1 and "not those after one step" not in flaw:
        flaw = f"its statistics run over {examples} examples: what it passes back to one needs the gradients of all."
    return KnownBatchNorm(layer, sent.mean, sent.var, sent.errors, flaw)
