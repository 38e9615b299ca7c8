"""Reconstructor: a network that reads the one unknown training example off a model's weights, and what it learns from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from unbatch.bundle import raw_bytes
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.files import write_atomically
from unbatch.inversion.view import View
from unbatch.models.small import build
from unbatch.network.dense import in_mode
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction

CHUNK = 100  # shadow models that train at once
HELD_OUT = 0.1  # of the public examples, by which the network is judged
RATE, BATCH = 3e-4, 32  # of RMSprop, as published
STILL = 32.0  # roundings of the largest weight, below which a weight's spread over shadow models is rounding alone


def learned(
    view: View, rng: torch.Generator, shadows: int, hidden: int, epochs: int, keep: Path | None
) -> Reconstruction:
    """The network's picture of the unknown example: a guess, which claims nothing.

    Each shadow model trains by the recipe, from the known start, on the known examples and one public one; the network maps
    its parameters, standardised, to that example, by the sum of the mean absolute and the mean square error. Parameters
    that are the same in all shadow models are left out: standardised, their rounding would be as large as what others say.
    A tenth of the public examples is held out; the trace has their loss beside the mean picture's, which is chance.
    Raises NotApplicable: the start, the recipe of a full-batch SGD, or public examples with labels are not known.
    """
    known = view.knowledge
    missing = [name for name in ("initial", "public", "public_labels") if name not in known]
    if missing:
        raise NotApplicable(f"{', '.join(missing)} must be known, to train shadow models.")
    inputs, labels = known.public.to(view.obs.device), known.public_labels.to(view.obs.device)
    order = torch.randperm(len(inputs), generator=rng)[:shadows]
    held = max(1, int(HELD_OUT * len(order)))
    if len(order) < 2 * BATCH:
        raise NotApplicable(f"{len(order)} shadow models are too few to learn from; more public examples are needed.")
    inputs, labels = inputs[order], labels[order]
    weights = shadow_models(view, inputs, labels, keep)
    spread, centre = weights[held:].std(0), weights[held:].mean(0)
    moving = spread > STILL * torch.finfo(weights.dtype).eps * float(weights.abs().max())
    if not bool(moving.any()):
        raise NotApplicable("every shadow model has the same weights, so that they say nothing of the example.")
    own = torch.cat([p.detach().flatten() for p in view.model.parameters()]).to(weights)
    features, target = _standardised(weights, centre, spread, moving), inputs.to(weights).flatten(1)
    low, high = known.get("input_range", (0.0, 1.0))
    picture = _fitted(features[held:], target[held:], (low, high), hidden, epochs, rng)
    with torch.no_grad():
        loss = float(_loss(picture(features[:held]), target[:held]))
        chance = float(_loss(target[held:].mean(0).expand_as(target[:held]), target[:held]))
        found = picture(_standardised(own[None], centre, spread, moving)).view(1, *known.input_shape)
    trace = {
        "shadows": len(order),
        "weights that differ": int(moving.sum()),
        "held-out loss": loss,
        "chance loss": chance,
    }
    return Reconstruction(inputs=found, bound=torch.tensor([math.inf], dtype=torch.float64), trace=trace)


def shadow_models(view: View, inputs: Tensor, labels: Tensor, keep: Path | None = None) -> Tensor:
    """The parameters [s, p] of models trained on the known examples and one of `inputs` [s, ...] each, many at once.

    Those that a run cut short left in the folder `keep` are read there, and the others put there as they come.
    Raises NotApplicable: the recipe is not that of SGD over all examples at once. UnbatchError: the time was up.
    """
    recipe = view.knowledge.recipe
    if recipe.get("method") != "sgd" or recipe.get("batch_size") is not None:
        raise NotApplicable("shadow models train by SGD over all examples at once, and the recipe is another.")
    found = list[Tensor]()
    chunks = range(0, len(inputs), CHUNK)
    for number, first in enumerate(chunks):
        part = slice(first, first + CHUNK)
        path = None if keep is None else keep / f"shadows-{_mark(view, inputs[part], labels[part])}.safetensors"
        if path is not None and path.exists():
            found.append(load_file(path)["weights"].to(view.obs.device))
            continue
        found.append(_trained_together(view, inputs[part], labels[part]))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"weights": found[-1].cpu().contiguous()}))
        if not tick(0.7 * (number + 1) / len(chunks)) and number + 1 < len(chunks):
            raise NotApplicable(f"the time was up after {CHUNK * (number + 1)} of {len(inputs)} shadow models.")
    return torch.cat(found)


def _mark(view: View, inputs: Tensor, labels: Tensor) -> str:
    """What tells shadow models apart from others: start, recipe and examples."""
    known, digest = view.knowledge, hashlib.sha256()
    for tensor in (*known.initial.values(), known.known_inputs, known.known_labels, inputs, labels):
        digest.update(raw_bytes(tensor))
    digest.update(repr(sorted(known.recipe.items())).encode())
    return digest.hexdigest()[:16]


def _trained_together(view: View, inputs: Tensor, labels: Tensor) -> Tensor:
    """The parameters [c, p] of c models, each trained with one of the inputs [c, ...]."""
    known, model = view.knowledge, view.model
    recipe, own = known.recipe, dict(model.named_parameters())
    sizes = [p.numel() for p in own.values()]
    kind = next(model.parameters()).dtype
    start = torch.cat([known.initial[name].to(view.obs.device, kind).flatten() for name in own])
    x, y = known.known_inputs.to(start), known.known_labels.to(view.obs.device)

    def objective(theta: Tensor, one: Tensor, label: Tensor) -> Tensor:
        parts = zip(own.items(), torch.split(theta, sizes), strict=True)
        held = {name: part.view(p.shape) for (name, p), part in parts}
        outputs = functional_call(model, held, (torch.cat([x, one[None]]),))
        return view.loss(outputs, torch.cat([y, label[None]]))

    slope: Callable[..., Tensor] = vmap(grad(objective))
    theta, velocity = start.repeat(len(inputs), 1), torch.zeros(len(inputs), len(start)).to(start)
    decay, momentum = float(recipe.get("weight_decay", 0.0)), float(recipe.get("momentum", 0.0))
    with in_mode(model, view.protocol.mode):
        for _ in range(int(recipe["steps"])):
            velocity = momentum * velocity + slope(theta, inputs.to(start), labels) + decay * theta
            theta = theta - float(recipe["learning_rate"]) * velocity
    if not bool(theta.isfinite().all()):
        raise UnbatchError(
            "shadow models diverge by this recipe, though the released model is finite; look at the recipe."
        )
    return theta.detach()


def _standardised(weights: Tensor, centre: Tensor, spread: Tensor, moving: Tensor) -> Tensor:
    """Those weights [s, p] that differ between shadow models, at zero mean and unit variance."""
    found: Tensor = ((weights - centre) / spread)[:, moving]
    return found


def _loss(found: Tensor, target: Tensor) -> Tensor:
    """The sum of the mean absolute and the mean square error."""
    loss: Tensor = (found - target).abs().mean() + (found - target).square().mean()
    return loss


def _fitted(
    features: Tensor, target: Tensor, ends: tuple[float, float], hidden: int, epochs: int, rng: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The network that was fitted to map features [s, p] to pictures [s, d]."""
    model = build("mlp", (features.shape[1],), target.shape[1], depth=2, width=hidden, rng=rng).to(features)
    search = torch.optim.RMSprop(model.parameters(), lr=RATE)

    def picture(rows: Tensor) -> Tensor:
        found: Tensor = ends[0] + (ends[1] - ends[0]) * nn.functional.sigmoid(model(rows))
        return found

    for epoch in range(epochs):
        with torch.enable_grad():
            for part in torch.split(torch.randperm(len(features), generator=rng), BATCH):
                search.zero_grad()
                _loss(picture(features[part]), target[part]).backward()  # type: ignore[no-untyped-call]
                search.step()
        if not tick(0.7 + 0.3 * (epoch + 1) / epochs):
            break
    return picture
