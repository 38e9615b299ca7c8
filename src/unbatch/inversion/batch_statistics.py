"""Batch statistics: how far a guess is from what a client's running averages say of its batch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.network.batch_norm import BatchNormLayer, SentStatistics, sent_statistics, step_shares
from unbatch.network.dense import forward
from unbatch.observation import Observation

HeardSteps = Mapping[str, list[tuple[Tensor, Tensor]]]  # layer name -> mean and variance [c] of one step after another


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """What the running averages of batch norm that a client sent after its steps say of the batches of these steps.

    Of one step they give each layer's batch mean and variance, exactly but for rounding; of several the mixture of theirs
    that `step_shares` says. The statistics of a guess come from its simulation: `heard_statistics` hears them with their
    graph, and `misfit` says how far off they are.

    >>> import unbatch
    >>> from unbatch.knowledge import Knowledge
    >>> from unbatch.protocol import Protocol, buffers_after
    >>> rng = torch.Generator().manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    >>> x, y = torch.rand(2, 1, 8, 8, generator=rng), torch.tensor([0, 2])
    >>> loss, rules = nn.functional.cross_entropy, Protocol(mode="train")
    >>> told = Knowledge(buffers=buffers_after(model, loss, x, y, rules))
    >>> seen, _ = unbatch.observe(model, loss, x, y, protocol=rules, knowledge=told)
    >>> statistics = BatchStatistics.of(seen)
    >>> with heard_statistics(seen.model) as heard:
    ...     _ = seen.simulate(x, y)
    >>> bool(statistics.misfit(heard) < 1e-4), len(statistics.sent)
    (True, 1)
    """

    sent: dict[str, SentStatistics]  # by the layer's name
    shares: dict[str, list[float]]  # of the steps, first to last

    @classmethod
    def of(cls, obs: Observation) -> BatchStatistics:
        """What an exchange says of them.

        Raises NotApplicable: nothing; the message says why.
        """
        known, protocol = obs.knowledge, obs.protocol
        if not known.get("buffers"):
            raise NotApplicable("the client's running averages after its steps (buffers) are not known.")
        if protocol.mode != "train":
            raise NotApplicable(
                "the model was in eval mode, in which batch norm keeps no running averages of the batch."
            )
        if known.get("clients", 1) > 1 or len(obs.exchanges) > 1:
            raise NotApplicable("the running averages are of one client and round, and the update is not.")
        n, steps = known.batch_size, max(1, protocol.steps(known.batch_size))
        size = min(protocol.local_batch_size or n, n)
        if n % size:
            raise NotApplicable(f"the batch of {n} is taken in batches of {size}, the last of which is smaller.")
        sizes = _entries(obs, size)
        before, after = dict(obs.model.named_buffers()), known.buffers
        sent, shares, flaws = dict[str, SentStatistics](), dict[str, list[float]](), dict[str, None]()
        for name, layer in _norms(obs.model).items():
            names = [f"{name}.{kind}" for kind in ("running_mean", "running_var")]
            if name not in sizes or any(each not in before or each not in after for each in names):
                continue
            found = sent_statistics(layer, f"{name}.{{}}".format, before, after, sizes[name], steps)
            if found.flaw:
                flaws[found.flaw] = None
                continue
            sent[name] = found
            shares[name] = step_shares(layer.momentum, before.get(f"{name}.num_batches_tracked"), steps)[1]
        if not sent:
            raise NotApplicable(next(iter(flaws), "no batch norm in train mode sent its running averages."))
        return cls(sent, shares)

    def misfit(self, heard: HeardSteps) -> Tensor:
        """The sum over layers of |mean - mean*| + |var - var*|, l2 over channels, * as sent.

        Raises NotApplicable: a layer ran another number of times than there are steps.
        """
        return torch.stack([torch.linalg.vector_norm(off) for off in self.off(heard)]).sum()

    def off(self, heard: HeardSteps) -> list[Tensor]:
        """By how much means and variances are off [c], layer by layer. Raises NotApplicable as `misfit` does."""
        found = list[Tensor]()
        for name, sent in self.sent.items():
            steps, shares = heard.get(name, []), self.shares[name]
            if len(steps) != len(shares):
                raise NotApplicable(
                    f"{name!r} ran {len(steps)} times in {len(shares)} steps; its averages mix the runs."
                )
            for part, target in enumerate((sent.mean, sent.var)):
                mixed = torch.stack([share * step[part] for share, step in zip(shares, steps, strict=True)]).sum(0)
                found.append(mixed - target.to(mixed))
        return found


@contextmanager
def heard_statistics(model: nn.Module) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Hears the mean and variance [c], over examples and pixels, of what each batch norm is given while it lasts.

    >>> norm = nn.BatchNorm1d(1)
    >>> with heard_statistics(nn.Sequential(norm)) as heard:
    ...     _ = norm(torch.tensor([[1.0], [3.0]]))
    >>> heard["0"]
    [(tensor([2.]), tensor([1.]))]
    """
    heard: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def hook(name: str) -> object:
        def hear(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            sides = [0, *range(2, given[0].ndim)]
            heard[name].append((given[0].mean(sides), given[0].var(sides, unbiased=False)))

        return hear

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in _norms(model).items()]  # type: ignore[arg-type]
    try:
        yield heard
    finally:
        for each in hooks:
            each.remove()


def _norms(model: nn.Module) -> dict[str, BatchNormLayer]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds) and type(layer) in kinds}


def _entries(obs: Observation, size: int) -> dict[str, int]:
    """How many entries each batch norm takes its statistics over, in a batch of `size`."""
    counts = dict[str, int]()
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, name=name: counts.update({name: math.prod(given[0].shape) // given[0].shape[1]})
        )
        for name, layer in _norms(obs.model).items()
    ]
    low, high = obs.knowledge.get("input_range", (0.0, 0.0))
    first = next(obs.model.parameters())
    probe = torch.full((size, *obs.knowledge.input_shape), (low + high) / 2, dtype=first.dtype, device=obs.device)
    try:
        forward(obs.model, probe, "eval")
    finally:
        for each in hooks:
            each.remove()
    return counts
