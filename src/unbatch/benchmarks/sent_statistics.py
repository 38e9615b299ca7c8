"""Sent statistics: how much each term of batch-norm-inversion adds, beside inverting-gradients; no benchmark itself.

One client of a small residual network in train mode sends its gradient and batch norm's running averages. Each way of
searching has the same seconds, as many steps as fit into them, and known labels. What it ends with is scored by the truth,
and nothing is chosen by it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unbatch.auditing.client import observe
from unbatch.benchmarks import clock, matched
from unbatch.benchmarks.pictures import pool
from unbatch.domain import Images
from unbatch.inversion.matching import InversionTerms, UpdateMatching
from unbatch.inversion.search_point import Candidate
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.loss import loss_named
from unbatch.metric import Metric
from unbatch.models.small import build
from unbatch.observation import Observation
from unbatch.protocol import Protocol, buffers_after
from unbatch.reconstruction import Reconstruction
from unbatch.truth import Truth

WHOLE = UpdateMatching(preset="batch-norm-inversion")
GEIPING = UpdateMatching(preset="inverting-gradients")
WAYS: dict[str, UpdateMatching] = {
    "all terms": WHOLE,
    "no statistics": replace(WHOLE, terms=InversionTerms(statistics=0.0)),
    "no update": replace(WHOLE, terms=InversionTerms(match=0.0)),
    "no variation": replace(WHOLE, terms=InversionTerms(variation=0.0)),
    "no norm": replace(WHOLE, terms=InversionTerms(size=0.0)),
    "inverting-gradients": GEIPING,
    "inverting-gradients with statistics": replace(GEIPING, statistics=0.1),
}
PROBED = 5  # steps whose time says how many fit
CHANCE = "as many draws of the prior"


def ablation(n: int, seconds: float, width: int, data: Path | None, seed: int) -> dict[str, Any]:
    """The mean and the worst PSNR (dB) of each way of searching for `n` pictures in so many seconds, and of chance.

    Pictures are those of CIFAR-10 in the folder `data`, drawn by `seed`; the network is `resnet-small` of that width.
    """
    seen, truth = _client(n, width, data, seed)
    found: dict[str, Any] = {name: _searched(way, seen, truth, seconds, seed) for name, way in WAYS.items()}
    domain = Images(shape=tuple(truth.inputs.shape[1:]))
    drawn = domain.prior(n, torch.Generator().manual_seed(seed + 1))
    return {**found, CHANCE: _scored(Reconstruction(inputs=drawn), truth)}


def ablation_words(found: dict[str, Any]) -> str:
    """The same in a line.

    >>> ablation_words({"all terms": {"mean": 17.25, "worst": 16.0}, "no update": {"mean": 12.0, "worst": 11.5}})
    'dB, mean (worst): all terms 17.2 (16.0); no update 12.0 (11.5)'
    """
    return "dB, mean (worst): " + "; ".join(f"{k} {v['mean']:.1f} ({v['worst']:.1f})" for k, v in found.items())


def _client(n: int, width: int, data: Path | None, seed: int) -> tuple[Observation, Truth]:
    pictures, labels = pool("cifar10", data)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:n]
    x, y = pictures[order], labels[order]
    rng = torch.Generator().manual_seed(seed + 1)
    model = build("resnet-small", tuple(x.shape[1:]), int(labels.max()) + 1, width=width, rng=rng)
    loss, protocol = loss_named("cross-entropy"), Protocol(mode="train")
    told = Knowledge(labels=y, input_range=(0.0, 1.0), domain="images")
    told |= Knowledge(buffers=buffers_after(model, loss, x, y, protocol))
    return observe(model, loss, x, y, protocol=protocol, knowledge=told)


def _searched(way: UpdateMatching, seen: Observation, truth: Truth, seconds: float, seed: int) -> dict[str, Any]:
    """One start, whose schedule of steps is laid out for the time that there is."""
    probe = replace(way, iterations=10**6).search(View.of(seen), torch.Generator().manual_seed(seed))
    next(probe)
    begun = clock()
    for _ in range(PROBED):
        next(probe)
    way = replace(way, iterations=max(PROBED, int(seconds * PROBED / (clock() - begun))))
    begun, last = clock(), None
    for candidate in way.search(View.of(seen), torch.Generator().manual_seed(seed)):
        last = _better(last, candidate)
        if clock() - begun > 1.2 * seconds:
            break
    if last is None:
        return {"mean": -math.inf, "worst": -math.inf}
    ended = {"steps": way.iterations, "seconds": round(clock() - begun, 1)}
    ended["residual"] = seen.residual(last.inputs, seen.knowledge.labels)
    return _scored(Reconstruction(inputs=last.inputs), truth) | ended


def _better(held: Candidate | None, new: Candidate) -> Candidate:
    """By the objective alone."""
    return new if held is None or new.loss < held.loss else held


def _scored(found: Reconstruction, truth: Truth) -> dict[str, Any]:
    domain = Images(shape=tuple(truth.inputs.shape[1:]))
    each = Metric.find("psnr").model_validate({"peak": 1.0}).score(*matched(found, truth, domain))
    return {"mean": float(each.mean()), "worst": float(each.min())}
