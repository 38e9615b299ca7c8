"""Plantings by published recipes, a few lines each: what a malicious server writes into parameters; no benchmark itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Planting = Callable[[nn.Module, Tensor, torch.Generator], nn.Module]


def _quantiles(values: Tensor, m: int) -> Tensor:
    """m of them, evenly apart."""
    return values.flatten().quantile(torch.arange(1, m + 1, dtype=values.dtype) / (m + 1))


def _dense(model: nn.Module) -> list[nn.Linear]:
    """The dense layers, from that on which has a hidden layer's name; a transformer's attention comes before it."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = list(found)
    begin = next((names.index(name) for name in names if name.endswith("dense1")), 0)
    return [found[name] for name in names[begin:]]


@torch.no_grad()
def _imprint(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """Fowl et al., ICLR 2022: equal rows, biases the quantiles of what they measure, one column after them."""
    first, second, *_ = _dense(model)
    features = _into(model, first, seen)
    first.weight.fill_(1 / first.in_features)
    first.bias.copy_(-_quantiles(features @ first.weight[0], len(first.bias)))
    second.weight.copy_(second.weight[:, :1].expand_as(second.weight))
    return model


@torch.no_grad()
def _imprint_random(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """The same along a direction that is drawn, each row at a scale of its own, and the layer after it left as it was."""
    first = _dense(model)[0]
    features = _into(model, first, seen)
    row = torch.randn(first.in_features, generator=rng) / first.in_features**0.5
    scale = 0.5 + torch.rand(len(first.bias), generator=rng)
    first.weight.copy_(scale[:, None] * row)
    first.bias.copy_(-scale * _quantiles(features @ row, len(first.bias)))
    return model


@torch.no_grad()
def _quantile_biases(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """QBI, arXiv 2406.18745: rows drawn, each bias such that its unit fires for one example of a batch of 64."""
    first = _dense(model)[0]
    features = _into(model, first, seen)
    first.weight.normal_(generator=rng)
    share = len(seen) / (64 * len(features))  # of all places of a batch
    first.bias.copy_(-(features @ first.weight.T).quantile(1 - share, dim=0))
    return model


@torch.no_grad()
def _trap_weights(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """Boenisch et al., EuroS&P 2023: half of each row negative, the other half the same, a little smaller."""
    first = _dense(model)[0]
    for row in first.weight:
        half = torch.randn(len(row) // 2, generator=rng).abs() / len(row) ** 0.5
        order = torch.randperm(len(row), generator=rng)
        row[order[: len(half)]] = -half
        row[order[len(half) : 2 * len(half)]] = 0.95 * half
    first.bias.zero_()
    return model


@torch.no_grad()
def _class_fishing(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """Wen et al., ICML 2022: the last layer hears one class alone, and the biases silence the others."""
    head = _dense(model)[-1]
    head.weight[1:] = 0
    head.weight[0] *= 5
    head.bias.fill_(20.0)
    head.bias[0] = 0
    return model


@torch.no_grad()
def _feature_fishing(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """The same for one feature of one class."""
    head = _dense(model)[-1]
    cut = float(_into(model, head, seen)[:, 0].quantile(0.9))
    head.weight.zero_()
    head.bias.zero_()
    head.weight[0, 0], head.bias[0] = 1e3, -1e3 * cut
    return model


@torch.no_grad()
def _hyperplane(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """Cutting through Privacy, UAI 2025: parallel hyperplanes, and a softmax that hardly moves."""
    first, *_, head = _dense(model)
    row = torch.randn(first.in_features, generator=rng)
    features = _into(model, first, seen)
    first.weight.copy_(row.expand_as(first.weight))
    first.bias.copy_(-_quantiles(features @ row, len(first.bias)))
    head.weight.mul_(1e-6)
    head.bias.normal_(std=5.0, generator=rng)
    return model


@torch.no_grad()
def _latch(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """Feng and Tramer, ICML 2024: a few units that one example sets off, and weights that shut them by its gradient."""
    first, second, *_ = _dense(model)
    features = _into(model, first, seen)
    for unit in range(4):
        bait = torch.randn(first.in_features, generator=rng)
        first.weight[unit] = bait
        first.bias[unit] = -(features @ bait).quantile(0.99)
        second.weight[:, unit] = 1e3 * torch.randn(second.out_features, generator=rng).sign()
    return model


@torch.no_grad()
def _conv_imprint(model: nn.Module, seen: Tensor, rng: torch.Generator) -> nn.Module:
    """Identity kernels in front, then the imprint in the first dense layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
            if module.bias is not None:
                module.bias.zero_()
    return _imprint(model, seen, rng)


PLANTINGS: dict[str, Planting] = {
    "imprint": _imprint,
    "imprint along a drawn row": _imprint_random,
    "quantile biases": _quantile_biases,
    "trap weights": _trap_weights,
    "class fishing": _class_fishing,
    "feature fishing": _feature_fishing,
    "hyperplane": _hyperplane,
    "latch": _latch,
    "conv imprint": _conv_imprint,
}


def planted(name: str, model: nn.Module, seen: Tensor, seed: int = 0) -> nn.Module:
    """A copy of the model, planted by the recipe of that name; `seen` are examples whose statistics the server knows.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> planted("imprint", model, torch.rand(20, 4))[0].weight.unique()
    tensor([0.2500], grad_fn=<Unique2Backward0>)
    """
    return PLANTINGS[name](copy.deepcopy(model), seen, torch.Generator().manual_seed(seed))


def _into(model: nn.Module, layer: nn.Linear, x: Tensor) -> Tensor:
    """What reaches a layer, [n, d]; over all places where there are several."""
    held: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    was = model.training
    model.eval()(x)
    model.train(was)
    hook.remove()
    return held[0].flatten(0, -2)
