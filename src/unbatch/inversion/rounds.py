"""Rounds: what attacks that read an update directly take in place of several, or of one that a defence touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from unbatch.inversion.mean_round import mean_round, still
from unbatch.inversion.refine import batch_radius, refine
from unbatch.inversion.view import View
from unbatch.knowledge import Earlier, Knowledge
from unbatch.likelihood import Likelihood
from unbatch.numerics.linear.completion import complete
from unbatch.observation import Observation
from unbatch.progress import tick
from unbatch.protocol import Update
from unbatch.reconstruction import Reconstruction

TRIED_RANKS = 16  # looked through where the batch size is not known


def averaged(obs: Observation) -> Observation:
    """All rounds of the batch as one exchange of their mean update, which carries less noise than each of them.

    Where they are at the same parameters; `obs` as it is otherwise. An entry's mean is over the rounds that show it, and
    Gaussian about what is expected. The draws' spread s, of which a variance v is seen to differ from round to round,
    becomes sqrt(s^2 - v + v / T) of T rounds: rounding that errs in the same way every time stays, and updates that are
    all the same tell what one does.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> twice = unbatch.Protocol(rounds=2)  # of the same batch, at the same parameters
    >>> seen, truth = unbatch.observe(model, loss, x, y, protocol=twice, defences="noise:sigma=0.1")
    >>> len(seen.exchanges), len(averaged(seen).exchanges)
    (2, 1)
    >>> averaged(seen).knowledge.noise < seen.knowledge.noise
    True
    """
    rounds, law, known = obs.exchanges, Likelihood.of(obs.knowledge), obs.knowledge
    T, last = len(rounds), rounds[-1]
    if T == 1 or not still(obs):
        return obs
    if all(torch.equal(one.update[name], u) for one in rounds for name, u in last.update.items()):
        return last
    sigma = float(known.get("noise", 0.0))
    weights = [(law or Likelihood.gaussian(1.0)).weights(one.update) for one in rounds]
    mean = mean_round(obs, weights)
    shown, varied, count = dict[str, Tensor](), dict[str, float](), dict[str, int]()
    for name in last.update:
        seen = torch.stack([one.update[name] for one in rounds]).double()  # [T, *shape]
        shown[name] = torch.stack([each[name] > 0 for each in weights]).double().mean(0)
        always = shown[name] == 1
        varied[name] = float((seen - mean[name]).square().sum(0)[always].sum()) / (T - 1)
        count[name] = int(always.sum())
    declared = law.spread(last.update) if law else dict.fromkeys(mean, sigma)
    total = sum(declared[name] ** 2 * entries for name, entries in count.items())
    part = min(sum(varied.values()) / total, 1.0) if total else 1.0
    shrunk = (1 - part + part / T) ** 0.5
    told = last.knowledge | (Knowledge(noise=shrunk * sigma) if sigma else Knowledge())
    if law is not None and total:
        told |= Knowledge(log_prob=_about(shown, {k: shrunk * s for k, s in declared.items()}, law))
    update = {name: m.to(last.update[name]) for name, m in mean.items()}
    return replace(last, update=update, knowledge=told)


def _about(shown: Update, spread: Mapping[str, float], law: Likelihood) -> Likelihood:
    """Gaussian of a variance spread^2 / shown about what `law` expects, shown [entries] the share of rounds with an entry.

    The one spread of a tensor is its entries' as they weigh: spread^2 sum(shown) / sum(shown^2).
    """
    most = max(spread.values())

    def log_prob(seen: Update, clean: Update) -> Tensor:
        off = [
            (shown[name] * (seen[name] - u).double().square()).sum() / (spread[name] or most) ** 2  # or it has no draws
            for name, u in clean.items()
        ]
        return -torch.stack(off).sum() / 2

    single = {
        name: s * float((shown[name].sum() / shown[name].square().sum().clamp_min(1e-300)).sqrt())
        for name, s in spread.items()
    }
    return Likelihood(log_prob, law.expected, lambda seen: single)


def clearest(obs: Observation) -> Observation:
    """The one exchange that is best read directly: the rounds `averaged`, or the one that stands out of its noise most.

    The latter where parameters moved between them: of the largest |update|^2 over the sum of its entries' variances.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> twice = unbatch.Protocol(rounds=2)  # of the same batch, at the same parameters
    >>> seen, truth = unbatch.observe(model, loss, x, y, protocol=twice, defences="noise:sigma=0.1")
    >>> clearest(seen).knowledge.get("earlier", ())
    ()
    """
    law = Likelihood.of(obs.knowledge)

    def above(one: Observation) -> float:
        spread = law.spread(one.update) if law else {}
        noise = sum(s**2 * one.update[name].numel() for name, s in spread.items())
        return sum(float(u.double().square().sum()) for u in one.update.values()) / (noise or 1.0)

    return max(reversed(averaged(obs).exchanges), key=above)


def restored(view: View, *, lowest: bool = False) -> View:
    """The `clearest` exchange with the entries filled that a defence took out of the first dense layer's gradient.

    What the defences draw is told as `noise`. Without a law nothing is known of either, and it is as it was.

    [dL/dW, dL/db] has the rank of the batch size n: n (m + d) numbers, fewer than are seen where n is small. With `lowest`
    entries that carry noise, too, become those of the nearest matrix of that rank.

    >>> import torch, unbatch
    >>> from unbatch.inversion.view import View
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.tensor([[1.0, 0.01]]), torch.tensor([0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="prune:share=0.3")
    >>> whole, _ = unbatch.observe(model, loss, x, y)
    >>> torch.allclose(restored(View.of(seen)).update["weight"].float(), whole.update["weight"], atol=1e-6)
    True
    """
    obs = clearest(view.obs)
    law = Likelihood.of(obs.knowledge)
    if law is None:
        return view.on(obs)
    spread = max(law.spread(obs.update).values(), default=0.0)
    noise = {"noise": max(spread, float(obs.knowledge.get("noise", 0.0)))}
    known = obs.knowledge.only(*(set(obs.knowledge) - {"log_prob"})) | Knowledge(**(noise if spread else {}))
    return view.on(replace(obs, update=_filled(view.on(obs), law, lowest), knowledge=known))


def each_restored(view: View) -> View:
    """The exchange with every round of it `restored`.

    >>> import torch, unbatch
    >>> from unbatch.inversion.view import View
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.tensor([[1.0, 0.01]]), torch.tensor([0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="prune:share=0.3")
    >>> each_restored(View.of(seen)).update["weight"].shape
    torch.Size([2, 2])
    """
    *past, last = [restored(view.like(one)).obs for one in view.obs.exchanges]
    earlier = [Earlier(state=one.model.state_dict(), update=one.update) for one in past]
    told = replace(last, knowledge=last.knowledge | Knowledge(earlier=earlier)) if earlier else last
    return view.like(told)


def unseen(obs: Observation) -> dict[str, Tensor]:
    """Which entries of the `clearest` update say nothing (True), by tensor, under the law that is known; none without.

    >>> import torch, unbatch
    >>> from unbatch.inversion.view import View
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.tensor([[1.0, 0.01]]), torch.tensor([0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="prune:share=0.3")
    >>> int(unseen(seen)["weight"].sum())
    1
    """
    obs = clearest(obs)
    law = Likelihood.of(obs.knowledge)
    if law is None:
        return {name: torch.zeros_like(t, dtype=torch.bool) for name, t in obs.update.items()}
    return {name: w == 0 for name, w in law.weights(obs.update).items()}


def _filled(view: View, law: Likelihood, lowest: bool) -> dict[str, Tensor]:
    obs, update, hidden, layer = view.obs, dict(view.update), unseen(view.obs), view.first
    noisy = any(law.spread(update).values())
    if layer is None or not ((lowest and noisy) or bool(hidden[layer.weight].any())):
        return update
    names = [name for name in (layer.weight, layer.bias) if name in update]
    A = torch.cat([update[name].double().reshape(len(update[layer.weight]), -1) for name in names], 1)
    seen = ~torch.cat([hidden[name].reshape(len(A), -1) for name in names], 1)
    n = obs.knowledge.get("batch_size")
    target = 2 * torch.finfo(obs.dtype).eps
    for rank in range(1, min(TRIED_RANKS, *A.shape) + 1) if n is None else [min(n, *A.shape)]:
        found, misfit = complete(A, seen, rank, target=target, tick=tick)
        if misfit < 10 * target:
            break
    whole = found if lowest else torch.where(seen, A, found)
    parts = zip(names, torch.split(whole, [update[name][0].numel() for name in names], 1), strict=True)
    return update | {name: part.reshape(update[name].shape) for name, part in parts}


def sharpened(obs: Observation, found: Reconstruction, rng: torch.Generator) -> Reconstruction:
    """What an attack read, improved by all entries of all rounds: moved to where the updates are likeliest, with bounds.

    As it is where no law is known. It takes all inputs of a batch, with labels. An example that had a bound and gets none
    by the move stays as it was.
    """
    law, n, x, y = Likelihood.of(obs.knowledge), obs.knowledge.get("batch_size"), found.inputs, found.labels
    if law is None or x is None or y is None or found.layer or not len(x) or len(x) != (n or len(x)):
        return found
    if y.is_floating_point() and "labels" not in obs.knowledge and not bool(((y == 0) | (y == 1)).all()):
        return found  # real targets that were solved for are unknowns as well
    if not tick(0.0):
        return found
    joint = averaged(obs)
    moved = refine(joint, x, y, rng)
    reach = batch_radius(joint, moved, y, rng)
    held = found.bound.double() if found.bound is not None else torch.full_like(reach, torch.inf)
    stay = held.isfinite() & ~reach.isfinite()
    inputs = torch.where(stay.to(x.device).view(-1, *[1] * (x.ndim - 1)), x.double(), moved)
    return replace(found, inputs=inputs, bound=torch.where(stay, held, reach))
