"""Patches: the picture behind a vision transformer's gradient, window by window, by linear systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.network.patches import FirstDenseLayers, PatchEmbedding
from unbatch.numerics.linear.span import numerical_rank, rank_tolerance
from unbatch.observation import Observation

ROUNDINGS = 4.0  # times what independent errors of that size do to the windows
MISFIT_ROUNDINGS = 64.0  # by which the gradient of the embedding may be off where one example sent it
TELLS = 0.1  # of a window's size, below which the error of a direction must lie to count as determined


@dataclass(frozen=True, eq=False)
class PatchWindows:
    """PatchWindows of one picture, as its embedding was given them, and how far they may be off.

    `error` is the largest l2 error of all of them together; inf where some numbers are left open. `free` counts the
    dimensions of each window that nothing determines.
    """

    values: Tensor  # [T, p]
    error: float
    free: int = 0
    trace: dict[str, Any] = field(default_factory=dict)


def by_positions(obs: Observation, front: PatchEmbedding) -> PatchWindows:
    """The windows of one picture, where both the embedding and what is added to its tokens sent their gradients.

    dL/dW = D^T P with D = dL/d positions [T, width], which is what the tokens send back, and P [T, p] the windows. Every
    local step of SGD adds to both alike. P = (D^T)^+ dL/dW: exact where D has full rank T, so for at most width - 1 windows
    behind a layer norm. Its error is at most that of the two gradients over the least singular value of D.
    Raises NotApplicable: one of them was not sent, D has a lower rank, or no single picture sends these two.

    >>> import unbatch
    >>> from unbatch.models.vision_transformer import build_vision_transformer
    >>> from unbatch.network.patches import patch_embedding
    >>> net = build_vision_transformer((1, 8, 8), 3, depth=1, width=24, rng=torch.Generator().manual_seed(0)).double()
    >>> x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    >>> seen, _ = unbatch.observe(net, torch.nn.functional.cross_entropy, x, torch.tensor([2]))
    >>> front = patch_embedding(net, (1, 8, 8))
    >>> torch.allclose(front.picture(by_positions(seen, front).values, (1, 8, 8)), x[0])
    True
    """
    name, places = front.positions, front.places
    if name is None or places is None:
        raise NotApplicable("nothing that is trained is added to each patch's token.")
    if name not in obs.update or front.weight not in obs.update:
        missing = " and ".join(repr(each) for each in (front.weight, name) if each not in obs.update)
        raise NotApplicable(f"no gradient of {missing} was sent.")
    D = obs.update[name].double().flatten()[places.to(obs.device)]  # [T, width]
    G = obs.update[front.weight].double().flatten(1)  # [width, p]
    rank = numerical_rank(D, eps=torch.finfo(obs.update[name].dtype).eps)
    if rank < len(D):
        raise NotApplicable(
            f"what the {len(D)} patches send back has rank {rank}: they are told apart up to {D.shape[1] - 1} patches of "
            f"tokens of width {D.shape[1]}."
        )
    unit = _unit_errors(obs, D, G, name, front.weight)  # [width]
    U, S, V = torch.linalg.svd(D / unit, full_matrices=False)
    P = U @ ((V @ (G / unit[:, None])) / S[:, None])
    off = float(torch.linalg.matrix_norm((G - D.T @ P) / unit[:, None])) / G.numel() ** 0.5
    if not off <= MISFIT_ROUNDINGS:
        raise NotApplicable(
            f"the gradient of {front.weight!r} is not what one example's patches send (off by {off:.1e} roundings): more "
            "than one example, or an altered update."
        )
    error = ROUNDINGS * max(off, 1.0) * float((G.shape[1] / S.square()).sum().sqrt())
    trace = {"condition": float(S[0] / S[-1]), "misfit in roundings": off}
    return PatchWindows(P, error, 0, {"by": f"the gradients of {front.weight!r} and {name!r}"} | trace)


def _unit_errors(obs: Observation, D: Tensor, G: Tensor, positions: str, weight: str) -> Tensor:
    """The error [width] of an entry of each row of G = D^T P [width, p]: rounding of both and of sums, and noise."""
    size = float(torch.linalg.lstsq(D.T, G).solution.square().mean().sqrt())  # of an entry of P
    rows = dict(obs.model.named_parameters(remove_duplicate=False))[weight].detach().double().flatten(1).norm(dim=1)
    eps = max(torch.finfo(obs.update[each].dtype).eps for each in (positions, weight))
    fixed = obs.rounding(weight) + obs.rounding(positions) * size * len(D) ** 0.5
    fixed += float(obs.knowledge.get("noise", 0.0)) * (1 + size * len(D) ** 0.5)
    relative = G.norm(dim=1) / G.shape[1] ** 0.5 + D.norm(dim=0) * size
    if obs.protocol.steps(obs.knowledge.get("batch_size", 1)):  # a difference of parameters is as coarse as they are
        relative = relative + rows / G.shape[1] ** 0.5 + _parameter_size(obs, positions) * size * len(D) ** 0.5
    found: Tensor = eps * relative + fixed + torch.finfo(torch.float64).tiny
    return found


def _parameter_size(obs: Observation, name: str) -> float:
    """The root mean square of a parameter's entries."""
    own = dict(obs.model.named_parameters(remove_duplicate=False))[name]
    return float(own.detach().double().square().mean().sqrt())


def by_first_layers(obs: Observation, front: PatchEmbedding, first: FirstDenseLayers, W: Tensor) -> PatchWindows:
    """The windows of one picture by the first dense layers alone, whose gradient's rows span what they were given.

    Row space of [dL/dW | dL/db] = span of the (h_t, 1), h_t = gain (z_t - mean z_t) / s_t + offset, z_t = W p_t + c_t the
    token of the window p_t. With N a basis of its complement, N^T (h_t, 1) = 0, times s_t, is one linear system a window
    in (p_t, s_t), the same matrix for all of them. Where its rank is p + 1 the windows are exact; else `free` is what is
    missing, and the windows nearest to grey that solve it are returned.
    W [width, p]: of the embedding, in float64.
    Raises NotApplicable: the gradients were not sent, or their rank is not that of one picture.
    """
    H, errors = unit_rows(obs, first.weights)
    tokens = len(first.rows) + first.others
    _, S, V = torch.linalg.svd(H, full_matrices=True)
    tolerance = max(rank_tolerance(H, 0.0), 2 * errors)
    rank = int((S > tolerance).sum())
    if rank != tokens:
        raise NotApplicable(_rank_words(rank, first, H.shape[1], W.shape[1]))
    system = _System(first, V[rank:], W)
    middle = front.scale.to(W) * 0.5 + front.shift.to(W)
    weak = errors * amplified(system.tokens(middle), S[:rank], V[:rank])  # [T] by how much each equation may be off
    known = int((system.values > weak.max() / (TELLS * float(middle.norm(dim=1).mean()))).sum())
    p = system.nearest(middle, known)
    free = min(system.unknowns - known, W.shape[1])
    weak = errors * amplified(system.tokens(p), S[:rank], V[:rank])
    error = float("inf") if free else ROUNDINGS * float(weak.norm()) / float(system.values[known - 1])
    trace = {
        "by": f"the row space of {len(first.weights)} dense layers",
        "rank": rank,
        "complement": H.shape[1] - rank,
        "unknowns of a patch": system.unknowns,
        "determined of them": known,
        "rank gap": float(S[rank - 1]) / errors,
    }
    return PatchWindows(p, error, free, trace)


class _System:
    """N^T (h, 1) s = 0 as one linear system a window, M (p, s) = right, with the same M for all."""

    def __init__(self, first: FirstDenseLayers, N: Tensor, W: Tensor) -> None:
        width = W.shape[0]
        part, constant = N[:, :width], N[:, width:].sum(1)
        self.first, self.W, self.inner = first, W, first.added
        if first.gain is not None:
            offset = torch.zeros_like(first.gain) if first.offset is None else first.offset
            part, constant = part * first.gain, constant + part @ offset
            self.W, self.inner = W - W.mean(0), first.added - first.added.mean(1, keepdim=True)
        self.M, self.right = part @ self.W, -(self.inner @ part.T)  # [m, p], [T, m]
        if first.gain is not None:
            self.M = torch.cat([self.M, constant[:, None]], 1)
        else:
            self.right = self.right - constant
        self.U, self.values, self.Z = torch.linalg.svd(self.M, full_matrices=False)

    @property
    def unknowns(self) -> int:
        """Of each window: its numbers, and the spread s of its token where there is a norm."""
        return self.M.shape[1]

    def tokens(self, windows: Tensor) -> Tensor:
        """What the dense layers read of windows [T, p], times s: [T, width (+ 1)], a 1 beside it where they have a bias."""
        z = windows @ self.W.T + self.inner
        if self.first.gain is None:
            return torch.cat([z, torch.ones_like(z[:, :1])], 1)
        s = z.square().mean(1, keepdim=True).sqrt()
        h = z * self.first.gain + (0.0 if self.first.offset is None else s * self.first.offset)
        return torch.cat([h, s], 1)

    def nearest(self, middle: Tensor, known: int) -> Tensor:
        """The windows [T, p] nearest to those that solve what is known of the system."""
        start = middle
        if self.first.gain is not None:
            z = middle @ self.W.T + self.inner
            start = torch.cat([middle, z.square().mean(1, keepdim=True).sqrt()], 1)
        part = ((self.right - start @ self.M.T) @ self.U[:, :known]) / self.values[:known]
        found: Tensor = (start + part @ self.Z[:known])[:, : middle.shape[1]]
        return found


def amplified(tokens: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """How strongly an error of the rows' matrix U S V shows in N^T h [T]: |S^-1 V h|, h [T, width (+ 1)].

    >>> amplified(torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([2.0, 0.125]), torch.eye(3)[:2])
    tensor([24.])
    """
    strength: Tensor = ((tokens[:, : V.shape[1]] @ V.T) / S).norm(dim=1)
    return strength


def unit_rows(obs: Observation, layers: Sequence[tuple[str, str | None]]) -> tuple[Tensor, float]:
    """The gradients of dense layers, one row a neuron, each of unit size; and their error's spectral norm.

    A last column is the bias's, where all have one. `layers` are the names of weights and biases that read the same tokens.
    Raises NotApplicable: none was sent, or all are zero.

    >>> from unbatch.knowledge import Knowledge
    >>> model, update = torch.nn.Linear(2, 1), {"weight": torch.tensor([[3.0, 0.0]]), "bias": torch.tensor([4.0])}
    >>> seen = Observation(model=model, loss=torch.nn.functional.mse_loss, update=update, knowledge=Knowledge())
    >>> unit_rows(seen, [("weight", "bias")])[0].round(decimals=6)
    tensor([[0.6000, 0.0000, 0.8000]], dtype=torch.float64)
    """
    sent = [(w, b) for w, b in layers if w in obs.update and (b is None or b in obs.update)]
    if not sent:
        raise NotApplicable(
            f"no gradient was sent of {' or '.join(repr(w) for w, _ in layers)}, which read the tokens."
        )
    biased = all(b is not None for _, b in sent)
    parts, offs = list[Tensor](), list[Tensor]()
    for weight, bias in sent:
        G, off = obs.update[weight].double(), _entry_errors(obs, weight)
        if biased and bias is not None:
            G = torch.cat([G, obs.update[bias].double()[:, None]], 1)
            off = torch.hypot(off, _entry_errors(obs, bias))
        parts.append(G)
        offs.append(off)
    G, off = torch.cat(parts), torch.cat(offs)  # [rows, columns], [rows] of each entry
    size = G.norm(dim=1)
    live = size > off * G.shape[1] ** 0.5
    if not bool(live.any()):
        raise NotApplicable(f"the gradient of {sent[0][0]!r} is zero.")
    H, off = G[live] / size[live, None], off[live] / size[live]
    spread = len(H) ** 0.5 + H.shape[1] ** 0.5  # of a matrix of independent errors (Bai-Yin)
    return H, ROUNDINGS * float(off.square().mean().sqrt()) * spread


def _rank_words(rank: int, first: FirstDenseLayers, columns: int, numbers: int) -> str:
    T, others = len(first.rows), first.others
    if rank >= columns - 1:
        return f"the first dense layers' gradients have full rank {rank}: the patches leave no direction out."
    if rank >= T + others + numbers:  # the embedding's image, and the norm's offset, fill what more pictures could add
        one = f"tokens of {T} places and patches of {numbers} numbers reach no more"
        return f"the first dense layers' gradients have rank {rank}, and {one}: 2 pictures or more."
    if rank > T + others:
        n = -(-(rank - others) // T)
        one = f"one picture of {T} patches gives {T + others}"
        return f"the first dense layers' gradients have rank {rank}, and {one}: {n} pictures."
    return f"the first dense layers' gradients have rank {rank}, fewer than the {T + others} tokens of one picture."


def _entry_errors(obs: Observation, name: str) -> Tensor:
    """The rounding of the entries of each row of a tensor [rows, ...]: relative to the row, and what is not."""
    u = obs.update[name].double()
    u = u.flatten(1) if u.ndim > 1 else u[:, None]
    fixed = obs.rounding(name) + float(obs.knowledge.get("noise", 0.0))
    relative: Tensor = torch.finfo(obs.update[name].dtype).eps * u.norm(dim=1) / u.shape[1] ** 0.5
    return relative + fixed
