"""Likelihood: how the update as sent depends on the clean one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.knowledge import Knowledge
from unbatch.protocol import Update


@dataclass(frozen=True)
class Likelihood:
    """How probable the update that was sent is, if an undefended client had sent another: an attack's loss.

    log p(seen | clean) = log_prob(seen, expected(clean)), up to a constant. Of several defences it is the law of the
    outermost one that has a law: `expected` is what those within it make of a clean update without their draws, and
    `spread` the standard deviation that all draws give each entry of a tensor, by its name. A plain function of
    (seen, clean) serves as well: it expects the clean update itself, and says nothing of the spread.

    >>> law = Likelihood.gaussian(0.5)
    >>> float(law({"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([1.0, 1.0])}))
    -2.0
    """

    log_prob: Callable[[Update, Update], Tensor]
    expected: Callable[[Update], Update] = dict
    spread: Callable[[Update], Mapping[str, float]] = lambda seen: dict.fromkeys(seen, 0.0)

    def __call__(self, seen: Update, clean: Update) -> Tensor:
        """log p(seen | clean) [], differentiable with respect to `clean`."""
        return self.log_prob(seen, self.expected(clean))

    @classmethod
    def of(cls, knowledge: Knowledge) -> Likelihood | None:
        """The likelihood that an attacker knows: the defences' own (`log_prob`), else that of known `noise`.

        None where neither is known, and where each example's gradient is clipped before the noise (`privacy`): what is
        expected is then no function of the clean update.

        >>> Likelihood.of(Knowledge(noise=0.1)).spread({"weight": torch.zeros(2)})
        {'weight': 0.1}
        """
        known, sigma = knowledge.get("log_prob"), float(knowledge.get("noise", 0.0))
        if known is not None:
            return known if isinstance(known, cls) else cls(known)
        return cls.gaussian(sigma) if sigma > 0 and "privacy" not in knowledge else None

    @classmethod
    def gaussian(cls, sigma: float) -> Likelihood:
        """Of independent normal noise in every entry: -|seen - clean|^2 / (2 sigma^2), sigma > 0 in the update's unit."""

        def log_prob(seen: Update, clean: Update) -> Tensor:
            off = torch.stack([(seen[name] - u).double().square().sum() for name, u in clean.items()]).sum()
            return -off / (2 * sigma**2)

        return cls(log_prob, spread=lambda seen: dict.fromkeys(seen, sigma))

    def rescales(self, seen: Update) -> bool:
        """Whether a clean update may be any multiple of what was seen: it was clipped."""
        twice = self.expected({name: 2 * tensor for name, tensor in seen.items()})
        return any(not torch.allclose(twice[name], 2 * tensor, rtol=0.1) for name, tensor in seen.items())

    def slope(self, seen: Update, at: Update) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """How far an expected update is from the likeliest one, and which way is downhill: the law's second order.

        2 (log p(seen | seen) - log p(seen | at)) [], and the derivative and curvature of -log p(seen | .) at `at`, tensor
        by tensor. `at` is what is expected, not the clean update. The curvature is the diagonal alone, measured along
        random signs; what is concave up is taken as flat.
        """
        seen = {name: tensor.double() for name, tensor in seen.items()}
        names = list(seen)
        point = [at[name].detach().double().requires_grad_() for name in names]
        rng = torch.Generator().manual_seed(0)
        signs = [(torch.rand(t.shape, generator=rng) < 0.5).to(t) * 2 - 1 for t in point]
        with torch.enable_grad():
            value, best = self.log_prob(seen, dict(zip(names, point, strict=True))), self.log_prob(seen, seen)
            first = torch.autograd.grad(value, point, create_graph=True, materialize_grads=True)
            along = torch.stack([(g * s).sum() for g, s in zip(first, signs, strict=True)]).sum()
            second = (
                torch.autograd.grad(along, point, materialize_grads=True)
                if along.requires_grad
                else [torch.zeros_like(t) for t in point]
            )
        bend = [(-h * s).clamp_min(0) for h, s in zip(second, signs, strict=True)]
        gap = 2 * (best - value).detach()
        return gap, {k: -g.detach() for k, g in zip(names, first, strict=True)}, dict(zip(names, bend, strict=True))

    def weights(self, seen: Update) -> dict[str, Tensor]:
        """How much each entry of the update says of the clean one: the law's curvature there, its largest 1.

        0 where an entry says nothing, as one that was pruned.
        """
        found = self.slope(seen, seen)[2]
        most = max((float(w.max()) for w in found.values() if w.numel()), default=0.0)
        return {name: w / most if most else torch.ones_like(w) for name, w in found.items()}
