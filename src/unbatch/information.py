"""Information: what the update as sent says of the batch's inputs to first order, behind Gaussian noise."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from unbatch.loss import draw_labels, identify
from unbatch.network import forward, in_mode
from unbatch.numerics.prior import GaussianPrior
from unbatch.numerics.softening import kinked
from unbatch.observation import Observation

SIGMAS = 6.0  # of the noise's length, by which an update may be off
ENTRIES = 2**22  # of a batch of products
REACH, FALL = 0.1, 5.0  # of a line on which jumps are looked for; what a bend's second difference falls by, at least
JUMPING = re.compile(
    r"Relu|Hardtanh|MaxPool|Threshold|Clamp|Abs|shrink|L1Loss|Hardsigmoid|Hardswish|^(Max|Min|Amax|Amin|Prelu|Sgn)"
)


class Information:
    """J, the Jacobian [e, n d] of the update as sent (without its noise) with respect to all inputs of a batch.

    F = J^T J / sigma^2 is the Fisher information of inputs [n, d] whose labels are known. In float64; J is known by its
    products, two backward passes each way.
    """

    def __init__(self, obs: Observation, x: Tensor, y: Tensor) -> None:
        self.obs = doubled(obs)
        y = y.double() if y.is_floating_point() else y
        self.x = x.detach().double().requires_grad_()
        self.sent = sent(self.obs, self.x, y, create_graph=True)  # [e]
        self.free = torch.zeros_like(self.sent).requires_grad_()
        (self.back,) = torch.autograd.grad(self.sent, self.x, self.free, create_graph=True, materialize_grads=True)

    def push(self, v: Tensor) -> Tensor:
        """J v [e] of v [n, d]."""
        if not self.back.requires_grad:
            return torch.zeros_like(self.sent)
        direction = v.view_as(self.x)
        return torch.autograd.grad(self.back, self.free, direction, retain_graph=True, materialize_grads=True)[0]

    def pull(self, u: Tensor) -> Tensor:
        """J^T u [n, d] of u [e]."""
        found = torch.autograd.grad(self.sent, self.x, u, retain_graph=True, materialize_grads=True)[0]
        return found.flatten(1)

    def fisher(self, v: Tensor) -> Tensor:
        """J^T J v [n, d]."""
        return self.pull(self.push(v))

    def matrix(self) -> Tensor:
        """J^T J [n d, n d]."""
        p, e = self.x.numel(), len(self.sent)
        if not self.back.requires_grad:
            return torch.zeros(p, p).to(self.sent)
        rows = []
        for part in torch.split(torch.eye(p).to(self.sent), max(1, ENTRIES // e)):
            u = _batched(self.back, self.free, part.view(-1, *self.x.shape))
            rows.append(_batched(self.sent, self.x, u).flatten(1))
        F = torch.cat(rows)
        return (F + F.T) / 2


def sent(obs: Observation, x: Tensor, y: Tensor, *, create_graph: bool = False) -> Tensor:
    """The update [e] without its noise; each example's gradient clipped first, where the protocol is private."""
    privacy = obs.knowledge.get("privacy")
    if privacy is None or obs.protocol.steps(len(x)):
        return _flat(obs, x, y, create_graph)
    outputs = forward(obs.model, x.detach())
    form = identify(obs.loss, tuple(outputs.shape), device=outputs.device)
    each = [_flat(obs, x[i : i + 1], y[i : i + 1], create_graph) for i in range(len(x))]
    whole = torch.stack([g * (privacy.clip / g.norm()).clamp(max=1.0) for g in each]).sum(0)
    return whole if form is not None and form.reduction == "sum" else whole / len(x)


def deviation(obs: Observation) -> float:
    """Standard deviation of the noise in every entry of the update; 0: none that is known."""
    return float(obs.knowledge.get("noise", 0.0))


def obstacle(obs: Observation) -> str | None:
    """Why nothing is known of the inputs' Fisher information, in words."""
    if not deviation(obs) > 0:
        return "the update carries no Gaussian noise of known size, and without noise nothing bounds an attacker."
    missing = [name for name in ("input_shape", "batch_size") if name not in obs.knowledge]
    if missing:
        return f"{' and '.join(missing)} must be known, to simulate the client."
    return None


def fitted(obs: Observation, x: Tensor, y: Tensor) -> None:
    """Raises ValueError: the inputs do not explain the update but for its noise and a factor of at most 1 (clipping).

    What else changes an update may tell more of the inputs than its Fisher information knows. Clipping as a whole tells
    less: the bound without it holds.
    """
    seen = torch.cat([obs.update[k].detach().double().flatten() for k in obs.update])
    double = doubled(obs)
    clean = sent(double, x.double(), y.double() if y.is_floating_point() else y).detach()
    sigma, size = deviation(obs), float(clean.norm())
    factor = float(seen @ clean) / size**2 if size else 0.0
    slack = SIGMAS * sigma / size if size else math.inf
    factor = 1.0 if abs(factor - 1) < slack else factor
    rounding = 4 * torch.finfo(obs.dtype).eps * float(seen.norm())
    most = sigma * (len(seen) + SIGMAS * (2 * len(seen)) ** 0.5) ** 0.5 + rounding
    off = float((seen - factor * clean).norm())
    if factor > 1 or off > most:
        raise ValueError(
            f"the batch explains the update to {off:.2g}, and its noise to {most:.2g}: another defence changed it, and "
            "the bound is one for noise alone."
        )


def imagined(
    obs: Observation, at: tuple[Tensor, Tensor] | None, rng: torch.Generator, draws: int
) -> tuple[GaussianPrior, list[Tensor], Tensor]:
    """A Gaussian prior, batches [n, *shape] drawn from it, and their labels: the truth's or the known ones, else drawn.

    Raises ValueError: as `fitted`, of the truth `at`.
    """
    known = obs.knowledge
    prior = GaussianPrior(known.input_shape, known.get("input_range", (0.0, 1.0)))
    if at is not None:
        fitted(obs, at[0].to(obs.device), at[1].to(obs.device))
    inputs = [prior.draw(known.batch_size, rng).to(obs.device) for _ in range(draws)]
    y = known.get("labels") if at is None else at[1]
    y = draw_labels(obs.loss, forward(obs.model, inputs[0]), rng) if y is None else y
    return prior, inputs, y.to(obs.device)


def jumps(obs: Observation, x: Tensor, y: Tensor, rng: torch.Generator) -> str | None:
    """Where the update jumps as inputs move, which Fisher information does not see; in words."""
    double = doubled(obs)
    with in_mode(double.model, double.protocol.mode), torch.enable_grad():
        state = {k: b.clone() for k, b in double.model.named_buffers()}
        outputs = torch.func.functional_call(double.model, state, (x.double(),))
        value = double.loss(outputs, y.double() if y.is_floating_point() else y)
    seen, todo, found = set(), [value.grad_fn], set[str]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = re.sub(r"(With\w+)?Backward\d*$", "", node.name().rpartition("::")[2])
        slopes = [float(getattr(node, f"_saved_{of}", 1.0)) for of in ("alpha", "input_scale")]
        bent = name == "Elu" and slopes[0] * slopes[1] != 1
        found |= {name} if bent or JUMPING.search(name) else set()
        todo += [after for after, _ in node.next_functions]
    if not found:
        low, high = obs.knowledge.get("input_range", (0.0, 1.0))
        at = x.detach().double()

        def update(v: Tensor) -> list[Tensor]:
            return [sent(double, v, y.double() if y.is_floating_point() else y).detach()]

        if kinked(update, at, rng, reach=REACH * (high - low), fall=FALL):
            found = {"the network"}
    if not found:
        return None
    return (
        f"the update jumps where inputs cross a kink ({', '.join(sorted(found))}); Fisher information does not see jumps, "
        "which tell more. See noise-information, or use a smooth activation."
    )


def _batched(of: Tensor, at: Tensor, v: Tensor) -> Tensor:
    """Gradients [k, *at] for each of v [k, *of], all at once where every operation allows it."""
    try:
        return torch.autograd.grad(of, at, v, retain_graph=True, materialize_grads=True, is_grads_batched=True)[0]
    except RuntimeError:
        each = [torch.autograd.grad(of, at, row, retain_graph=True, materialize_grads=True)[0] for row in v]
        return torch.stack(each)


def doubled(obs: Observation) -> Observation:
    """The same exchange in float64."""
    if next(obs.model.parameters()).dtype == torch.float64:
        return obs
    return replace(obs, model=copy.deepcopy(obs.model).double(), update={k: u.double() for k, u in obs.update.items()})


def _flat(obs: Observation, x: Tensor, y: Tensor, create_graph: bool) -> Tensor:
    found = obs.simulate(x, y, create_graph=create_graph)
    return torch.cat([found[name].flatten() for name in obs.update])
