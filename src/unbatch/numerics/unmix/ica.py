"""Independent component analysis of a span: which combinations of its rows look like single examples.

Mixing acts across examples and a derivative filter along pixels, so the two commute: the edges of mixed pictures are
mixed edges. Edges are sparse, and the entries of one pixel (both directions, all channels) are large or small together,
which makes a likelihood of whole groups far more telling than one of single entries.

Source: Hyvärinen, Fast and Robust Fixed-Point Algorithms for ICA, IEEE TNN 1999 (FastICA, here scikit-learn's); relative
Newton steps as in Ablin, Cardoso, Gramfort, Faster ICA under Orthogonal Constraint, ICASSP 2018; groups as in Hyvärinen,
Hoyer, Emergence of Phase- and Shift-Invariant Features by Decomposition into Independent Feature Subspaces, 2000.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def edges(rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The edges of pictures.

    Differences along both axes of pictures rows [n, c h w]: [n, 2 c, h w], one group of 2 c entries a pixel.

    >>> edges(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), (1, 2, 2))  # across, then down
    tensor([[[1., 0., 0., 0.],
             [1., 0., 0., 0.]]])
    """
    pictures = rows.reshape(len(rows), *shape)
    across, down = torch.zeros_like(pictures), torch.zeros_like(pictures)
    across[..., :-1] = pictures[..., 1:] - pictures[..., :-1]
    down[..., :-1, :] = pictures[..., 1:, :] - pictures[..., :-1, :]
    return torch.cat([across, down], 1).flatten(2)


def whiten(signals: Tensor) -> tuple[Tensor, Tensor]:
    """Signals made uncorrelated and of one size.

    White signals [n, g, p], mean square 1 and uncorrelated, and T [n, n] with white = T signals.

    Directions that carry less than 1e-12 of the largest power are left as they are found: they hold no signal.

    >>> white, T = whiten(torch.tensor([[3.0, -3.0, 1.0, -1.0], [1.0, -1.0, 1.0, -1.0]]))
    >>> torch.allclose(white @ white.T / 4, torch.eye(2), atol=1e-5)
    True
    """
    flat = signals.flatten(1)  # [n, g p]
    values, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
    T = vectors.T / values.clamp_min(1e-12 * float(values[-1]) + 1e-300).sqrt()[:, None]
    return (T @ flat).view_as(signals), T


def fast_ica(signals: Tensor, rng: torch.Generator, *, steps: int = 200, tolerance: float = 1e-3) -> Tensor:
    """The combinations of signals that are as independent as FastICA makes them.

    W [n, n]: rows of W signals are as independent as FastICA (log cosh) makes them; signals [n, g, p] or [n, p].

    >>> rng = torch.Generator().manual_seed(0)
    >>> fast_ica(torch.rand(2, 500, generator=rng, dtype=torch.float64), rng).shape
    torch.Size([2, 2])
    """
    from sklearn.decomposition import FastICA

    flat = signals.flatten(1)
    seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
    search = FastICA(
        len(flat), whiten="unit-variance", max_iter=steps, tol=tolerance, random_state=seed, algorithm="parallel"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a start need not converge
        found = search.fit(flat.T.cpu().numpy()).components_
    return torch.as_tensor(found).to(signals)


def group_ica(
    white: Tensor, start: Tensor, *, steps: int = 100, smoothing: float = 0.1, tolerance: float = 1e-3
) -> Tensor:
    """The combinations of signals whose groups of entries are as sparse as possible.

    W [n, n] that minimises sum_i mean_p |(W s)_{i:p}| - log |det W| for white signals s [n, g, p].

    |.| is the norm over the group of g entries, rounded off at `smoothing`: maximum likelihood for sources whose groups
    are sparse (for edges of pictures: total variation), without FastICA's constraint that sources be uncorrelated in
    the sample. Newton steps W <- (I + E) W with the Hessian's 2 x 2 blocks at independence, halved until they help.

    >>> signals = torch.randn(2, 2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    >>> white, T = whiten(signals)
    >>> W = group_ica(white, torch.eye(2)) @ T
    >>> bool((W.abs().amin(1) < 0.1 * W.abs().amax(1)).all())  # they were apart before
    True
    """
    n, g, p = white.shape
    flat = white.flatten(1)  # [n, g p]
    eye = torch.eye(n, dtype=white.dtype, device=white.device)
    s = start.to(flat) @ flat
    W: Tensor = start.to(flat) / s.view(n, g, p).norm(dim=1).mean(1, keepdim=True)

    def cost(W: Tensor) -> tuple[float, Tensor, Tensor]:
        s = (W @ flat).view(n, g, p)
        size = (s.square().sum(1) + smoothing**2).sqrt()  # [n, p]
        return float(size.mean(1).sum() - torch.linalg.slogdet(W).logabsdet), s, size

    least, s, size = cost(W)
    for _ in range(steps):
        score = (s / size[:, None]).flatten(1)
        G = score @ s.flatten(1).T / p - eye
        if float(G.abs().max()) < tolerance:
            break
        slope = (1 - (1 - (smoothing / size).square()) / g) / size  # [n, p] mean second derivative of |.|
        H = (slope @ s.square().sum(1).T / p).clamp_min(1e-2)
        E = -(H.T * G - G.T) / (H * H.T - 1).clamp_min(0.05)
        E = E - torch.diag(E.diagonal()) - torch.diag(G.diagonal() / (1 + H.diagonal()))
        moved = _downhill(cost, W, E, least) or _downhill(cost, W, -G, least)
        if moved is None:
            break
        W, least, s, size = moved
    return W


_Cost = Callable[[Tensor], tuple[float, Tensor, Tensor]]


def _downhill(cost: _Cost, W: Tensor, E: Tensor, least: float) -> tuple[Tensor, float, Tensor, Tensor] | None:
    """(I + a E) W for the first a = 1, 1/2, ... that lowers the cost."""
    for halving in range(10):
        tried = W + 0.5**halving * (E @ W)
        value, s, size = cost(tried)
        if value < least:
            return tried, value, s, size
    return None
