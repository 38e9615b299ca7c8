"""Small networks of convolutions, and what tests ask of a picture that was read through one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.attacks.layer_by_layer import LayerByLayer
from unbatch.errors import NotApplicable
from unbatch.observation import Observation
from unbatch.reconstruction import Reconstruction

SMALL = (3, 8, 8)


def conv(before: int, after: int, kernel: int = 3, *, bias: bool = False, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, bias=bias, **more)


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def drawn(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """In double: weights uniform in +-gain / sqrt(fan in); batch norms with statistics of their own."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name in ("weight", "running_var"):
                    getattr(module, name).copy_(0.5 + torch.rand(module.num_features, generator=rng))
                for name in ("bias", "running_mean"):
                    getattr(module, name).copy_(0.3 * torch.randn(module.num_features, generator=rng))
            elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                for p in module.parameters(recurse=False):
                    p.copy_(gain * (2 * torch.rand(p.shape, generator=rng) - 1) / module.weight[0].numel() ** 0.5)
    return model.double()


def network(
    trunk: Sequence[nn.Module],
    shape: tuple[int, ...] = SMALL,
    *,
    classes: int = 5,
    hidden: Sequence[int] = (),
    act: type[nn.Module] = nn.Tanh,
    bias: bool = True,
    seed: int = 0,
    gain: float = 1.0,
) -> nn.Sequential:
    """The trunk and dense layers on it; `bias` is of the dense layers."""
    layers = [*(copy.deepcopy(layer) for layer in trunk), nn.Flatten()]
    size = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).numel()
    for width in hidden:
        layers += [nn.Linear(size, width, bias=bias), act()]
        size = width
    model = nn.Sequential(*layers, nn.Linear(size, classes, bias=bias))
    drawn(model, seed, gain)
    return model


def errors(found: Reconstruction, x: Tensor) -> tuple[Tensor, Tensor]:
    """|returned - nearest true| / |returned| [k], and which is the nearest."""
    assert found.inputs is not None
    flat = found.inputs.double().flatten(1)
    gap, near = torch.cdist(flat, x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return gap / flat.norm(dim=1), near


def psnr(found: Reconstruction, x: Tensor) -> float:
    """Of the worst example."""
    assert found.inputs is not None
    near = errors(found, x)[1]
    mse = (found.inputs.double() - x[near]).square().flatten(1).mean(1)
    return float((-10 * mse.clamp_min(1e-30).log10()).min())


def sound(obs: Observation, found: Reconstruction, x: Tensor) -> None:
    """No finite bound lies below the true error."""
    assert found.bound is not None
    error = errors(found, x)[0]
    floor = torch.finfo(obs.dtype).eps / 2  # what `certify` raises every bound to
    broken = [f"{e:.1e} > {b:.1e}" for e, b in zip(error, found.bound.clamp_min(floor), strict=True) if e > b]
    assert not broken


def exact(obs: Observation, x: Tensor, y: Tensor, floor: float, **options: Any) -> Reconstruction:
    """Found above the floor in dB, with the right labels and a bound that is finite and holds."""
    found = LayerByLayer(**options)(obs)
    assert len(found) == len(x)
    near = errors(found, x)[1]
    assert sorted(near.tolist()) == list(range(len(x)))
    assert psnr(found, x) > floor
    assert found.labels is not None
    assert torch.equal(found.labels, y[near])
    assert bool(found.bound.isfinite().all())
    sound(obs, found, x)
    assert found.trace["residual"] < 100 * torch.finfo(obs.dtype).eps
    return found


def refused(obs: Observation, words: str, **options: Any) -> None:
    """Declined before it runs, or stopped on its way with nothing returned; the words say so."""
    try:
        found = LayerByLayer(**options)(obs)
    except NotApplicable as obstacle:
        said = str(obstacle)
    else:
        assert len(found) == 0
        assert found.inputs.shape == (0, *obs.knowledge.input_shape)
        said = found.trace["stopped"]
    assert words in said
