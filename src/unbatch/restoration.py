"""Restoration: what attacks that read an update directly take in place of one that a defence touched."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unbatch.likelihood import Likelihood, radius, refine
from unbatch.network import dense_layers
from unbatch.numerics.completion import complete
from unbatch.observation import Knowledge, Observation, Reconstruction
from unbatch.progress import tick

RANKS = 16  # looked through where the batch size is not known


def averaged(obs: Observation) -> Observation:
    """One exchange of the mean over all rounds, where they are at the same parameters; `obs` as it is otherwise.

    An entry's mean is over the rounds that show it. The draws' spread s, of which v^2 / s^2 is seen to vary from round to
    round, becomes s sqrt(1 - v^2 / s^2 + v^2 / (T s^2)): rounding that errs in the same way every time stays.
    """
    rounds, law, sigma = obs.exchanges, Likelihood.of(obs.knowledge), float(obs.knowledge.get("noise", 0.0))
    T = len(rounds)
    if T == 1 or any(one.model is not obs.model for one in rounds):
        return obs
    weighed = law or (Likelihood.gaussian(sigma) if sigma else None)
    update, varied, declared = dict[str, Tensor](), 0.0, 0.0
    weights = [weighed.weights(one.update) if weighed else {} for one in rounds]
    for name, last in obs.update.items():
        seen = torch.stack([one.update[name].double() for one in rounds])
        w = torch.stack([each[name].double() for each in weights]) if weighed else torch.ones_like(seen)
        mean = (w * seen).sum(0) / w.sum(0).clamp_min(1e-300)
        update[name] = mean.to(last)
        whole = (w > 0).all(0)
        varied += float(((seen - mean).square().sum(0) / (T - 1))[whole].sum())
        declared += weighed.spread(obs.update)[name] ** 2 * int(whole.sum()) if weighed else 0.0
    part = min(varied / declared, 1.0) if declared else 0.0
    shrunk = (1 - part + part / T) ** 0.5
    known = obs.knowledge.only(*(set(obs.knowledge) - {"earlier"}))
    known |= Knowledge(noise=shrunk * sigma) if sigma else Knowledge()
    if law is not None:
        spread = law.spread
        known |= Knowledge(log_prob=replace(law, spread=lambda u: {k: shrunk * s for k, s in spread(u).items()}))
    return replace(obs, update=update, knowledge=known)


def restored(obs: Observation, *, lowest: bool = False) -> Observation:
    """`obs`, `averaged`, with the first dense layer's unseen entries filled, and what is drawn told as noise.

    Without a law nothing is known of either.

    [dL/dW, dL/db] has the rank of the batch size n: n (m + d) numbers, fewer than are seen where n is small. With `lowest`
    entries that carry noise, too, become those of the nearest matrix of that rank.
    """
    obs = averaged(obs)
    law = Likelihood.of(obs.knowledge)
    if law is None:
        return obs
    spread = max(law.spread(obs.update).values(), default=0.0)
    noise = {"noise": max(spread, float(obs.knowledge.get("noise", 0.0)))}
    known = obs.knowledge.only(*(set(obs.knowledge) - {"log_prob"})) | Knowledge(**(noise if spread else {}))
    return replace(obs, update=_filled(obs, law, lowest), knowledge=known)


def unseen(obs: Observation) -> dict[str, Tensor]:
    """Which entries of the update, `averaged`, say nothing, under the law that is known; none without one."""
    obs = averaged(obs)
    law = Likelihood.of(obs.knowledge)
    if law is None:
        return {name: torch.zeros_like(t, dtype=torch.bool) for name, t in obs.update.items()}
    return {name: w == 0 for name, w in law.weights(obs.update).items()}


def _filled(obs: Observation, law: Likelihood, lowest: bool) -> dict[str, Tensor]:
    update, hidden = dict(obs.update), unseen(obs)
    layer = next((d for d in dense_layers(obs.model, obs.knowledge.input_shape) if d.weight in update), None)
    noisy = any(law.spread(update).values())
    if layer is None or not ((lowest and noisy) or bool(hidden[layer.weight].any())):
        return update
    names = [name for name in (layer.weight, layer.bias) if name in update]
    A = torch.cat([update[name].double().view(len(update[layer.weight]), -1) for name in names], 1)
    seen = ~torch.cat([hidden[name].view(len(A), -1) for name in names], 1)
    n = obs.knowledge.get("batch_size")
    target = 2 * torch.finfo(obs.dtype).eps
    for rank in range(1, min(RANKS, *A.shape) + 1) if n is None else [min(n, *A.shape)]:
        found, misfit = complete(A, seen, rank, target=target, tick=tick)
        if misfit < 10 * target:
            break
    whole = found if lowest else torch.where(seen, A, found)
    parts = zip(names, torch.split(whole, [update[name][0].numel() for name in names], 1), strict=True)
    return update | {name: part.reshape(update[name].shape) for name, part in parts}


def sharpened(obs: Observation, found: Reconstruction, rng: torch.Generator) -> Reconstruction:
    """`found` moved to where the update is likeliest, with the bounds that it has there; as it is, where no law is known.

    It takes all inputs of a batch, with labels. An example that had a bound and gets none by the move stays as it was.
    """
    law, n, x, y = Likelihood.of(obs.knowledge), obs.knowledge.get("batch_size"), found.inputs, found.labels
    if law is None or x is None or y is None or found.layer or not len(x) or len(x) != (n or len(x)):
        return found
    if y.is_floating_point() and "labels" not in obs.knowledge and not bool(((y == 0) | (y == 1)).all()):
        return found  # real targets that were solved for are unknowns as well
    if not tick(0.0):
        return found
    moved = refine(obs, x, y, rng)
    reach = radius(obs, moved, y, rng)
    held = found.bound.double() if found.bound is not None else torch.full_like(reach, torch.inf)
    stay = held.isfinite() & ~reach.isfinite()
    inputs = torch.where(stay.to(x.device).view(-1, *[1] * (x.ndim - 1)), x.double(), moved)
    return replace(found, inputs=inputs, bound=torch.where(stay, held, reach))
