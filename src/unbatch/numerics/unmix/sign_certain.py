"""Sign-certain rows: examples isolated exactly where the network is linear between kinks, as with relu.

Where the activation is piecewise linear, delta_i = G(z_i) a for a few columns G(z) that depend on z through the signs of
the preactivations only. A rough z gives most signs right, so U c = G a holds exactly on most rows and is broken by the
few whose sign is wrong: min |U c - G a|_1 with q . z = 1 recovers c exactly, as least absolute deviations do under sparse
outliers. With inactive rows alone this is the null vector of those rows of U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unbatch.numerics.unmix.mixture import Mixture

RESIDUAL_COLUMNS = 64  # classes up to which all of them span the residual
EXACT_STEPS = 4  # last of the reweighted steps that are taken in float64; those before only have to find the rows


def piecewise_linear(mixture: Mixture, rng: torch.Generator) -> bool:
    """Whether the network is linear between kinks, as with relu.

    Whether deltas are piecewise constant up to the residual: two labels' difference stays as z moves a little.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> piecewise_linear(made_mixture(4, torch.relu)[0], rng), piecewise_linear(made_mixture(4)[0], rng)
    (True, False)
    """
    z = torch.randn(2, mixture.n, generator=rng, dtype=torch.float64).to(mixture.U)
    z = mixture.scaled(z) if mixture.ones is not None else z
    a, b = fan(mixture, z, None), fan(mixture, z * (1 + 1e-7), None)
    a, b = a[..., :1] - a[..., 1:2] if mixture.classes else a, b[..., :1] - b[..., 1:2] if mixture.classes else b
    same = (a - b).abs() <= 1e-11 * a.abs()
    return bool(same.double().mean() > 0.9)


def layered(mixture: Mixture, rng: torch.Generator) -> bool:
    """Whether layers above have kinks of their own.

    Whether kinks above the layer's own change its active rows too, so that only rows of exact zeros are certain.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> rng = torch.Generator().manual_seed(0)
    >>> layered(mixture, rng)
    False
    """
    z = torch.randn(4, mixture.n, generator=rng, dtype=torch.float64).to(mixture.U)
    near = mixture.scaled(z * (1 + 0.1 * torch.randn(z.shape, generator=rng, dtype=torch.float64).to(z)))
    z = mixture.scaled(z)
    a, b = fan(mixture, z, None), fan(mixture, near, None)
    a, b = (a[..., :1] - a[..., 1:2], b[..., :1] - b[..., 1:2]) if mixture.classes else (a, b)
    both = (mixture.before(z) > 0) & (mixture.before(near) > 0)  # [g, m] active under relu
    same = ((a - b).abs() <= 1e-9 * a.abs()).all(2)
    return float((same & both).sum()) < 0.5 * float(both.sum())


def zeroed(mixture: Mixture, rng: torch.Generator) -> bool:
    """Whether neurons that are off give exact zeros.

    Whether a good part of a delta's entries is exactly zero, as behind relu and hardtanh.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> zeroed(made_mixture(4, torch.relu)[0], rng), zeroed(made_mixture(4)[0], rng)
    (True, False)
    """
    z = torch.randn(4, mixture.n, generator=rng, dtype=torch.float64).to(mixture.U)
    F = mixture.F(mixture.scaled(z), some_labels(mixture, 4))
    return float((F == 0).double().mean()) > 0.1


def some_labels(mixture: Mixture, count: int) -> Tensor:
    """Labels of the mixture's kind for so many examples: the first class, or targets of zero.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> some_labels(made_mixture(4)[0], 2)
    tensor([0, 0])
    """
    if mixture.classes:
        return torch.zeros(count, dtype=torch.long, device=mixture.U.device)
    return mixture.U.new_zeros(count, mixture.targets)


def fan(mixture: Mixture, z: Tensor, y: Tensor | None) -> Tensor:
    """The few columns of which an example's delta is a combination.

    Columns [g, m, k] whose combinations the delta of z is: one a class, or one an entry of a real target.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> fan(mixture, z, None).shape  # one for each class
    torch.Size([4, 80, 4])
    """
    if mixture.classes and (mixture.classes <= RESIDUAL_COLUMNS or y is None):
        classes = torch.arange(min(mixture.classes, RESIDUAL_COLUMNS), device=z.device)
        return torch.stack([mixture.F(z, c.expand(len(z))) for c in classes], 2)
    if mixture.classes and y is not None:
        return mixture.F(z, y)[:, :, None]
    zero = z.new_zeros(len(z), mixture.targets)
    F0 = mixture.F(z, zero)
    return torch.stack([mixture.F(z, zero + e) - F0 for e in torch.eye(mixture.targets).to(z)], 2)


def isolate(
    mixture: Mixture, z: Tensor, y: Tensor | None = None, *, steps: int = 15, spread: float = 0.3, zeros: bool = False
) -> tuple[Tensor, Tensor]:
    """Exact dual vectors of examples from rough guesses, where the network is linear between kinks.

    Dual vectors q [g, n], q . z = 1, and the share [g] of live rows on which U S q = G a holds exactly.

    Weights begin at 1 / P(sign of row j is wrong) under an error of z whose preactivations have `spread` times their own
    standard deviation. With `zeros` only rows on which G vanishes count.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(2, torch.relu)
    >>> q, share = isolate(mixture, z)
    >>> (q @ z.T).round(decimals=6).abs()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    parts = _parts(mixture, len(z))
    found = [_isolate(mixture, z[i], None if y is None else y[i], steps, spread, zeros, pairs) for i, pairs in parts]
    if not found:
        return z, z.new_zeros(0)
    return torch.cat([q for q, _ in found]), torch.cat([share for _, share in found])


def _isolate(
    mixture: Mixture, z: Tensor, y: Tensor | None, steps: int, spread: float, zeros: bool, pairs: Tensor
) -> tuple[Tensor, Tensor]:
    before, G = mixture.before(z), fan(mixture, z, y)  # [g, m], [g, m, k]
    said = torch.ones_like(before)
    if zeros:
        said, G = (G == 0).all(2).to(G), G[..., :0]
    wrong = 0.5 * torch.erfc(before.abs() / (spread * before.std(1, keepdim=True) * 2**0.5))
    tie = z / mixture.S * float(mixture.S.mean())
    c, share = _deviations(mixture, G, tie, said / (wrong + 0.02), said, steps, pairs)
    q = c / mixture.S
    return q / (q * z).sum(1, keepdim=True), share


def deviations(
    mixture: Mixture, columns: Callable[[Tensor], Tensor], tie: Tensor, *, steps: int = 12
) -> tuple[Tensor, Tensor]:
    """Combinations of the gradient's columns that agree exactly with given columns on as many rows as can be.

    The same with G = columns(numbers) [g, m, k] given: c = S q [g, n] on the side of tie [g, n], and the share [g].

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> G = fan(mixture, z, None)
    >>> c, share = deviations(mixture, lambda which: G[which], mixture.dual(mixture.F(z, y)) * mixture.S)
    >>> bool((share > 0.9).all())
    True
    """
    found = []
    for i, pairs in _parts(mixture, len(tie)):
        G = columns(i)
        said = G.new_ones(G.shape[:2])
        found.append(_deviations(mixture, G, tie[i], said, said, steps, pairs))
    if not found:
        return tie, tie.new_zeros(0)
    return torch.cat([c for c, _ in found]), torch.cat([share for _, share in found])


def _parts(mixture: Mixture, g: int, chunk: int = 2**24) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of candidates taken at a time, and the products of U's columns [m, n (n + 1) / 2] that all of them share."""
    if not g:
        return
    m, n = mixture.U.shape
    i, j = torch.triu_indices(n, n, device=mixture.U.device)
    pairs = mixture.U[:, i] * mixture.U[:, j] * m  # w pairs holds weighted Gram matrices of U
    size = max(1, chunk // (n * n + m * (1 + min(mixture.classes or mixture.targets, RESIDUAL_COLUMNS))))
    for part in torch.split(torch.arange(g, device=mixture.U.device), size):
        yield part, pairs


def _deviations(
    mixture: Mixture, G: Tensor, tie: Tensor, trust: Tensor, said: Tensor, steps: int, pairs: Tensor
) -> tuple[Tensor, Tensor]:
    """c [g, n], c . tie = 1, and the share of rows with U_j c = G_j a.

    Reweighted least squares towards sum_j |U_j c - G_j a|, the first weights being `trust`; rows that are not `said` do
    not count. A share that n + k rows alone could reach means nothing; one well above it is an example's.
    """
    (g, m, k), n = G.shape, mixture.n
    G = G / (G.square().sum((1, 2), keepdim=True).sqrt() / m**0.5 + 1e-300)
    tie = torch.cat([tie, tie.new_zeros(g, k)], 1)
    U = mixture.U * m**0.5
    alive = mixture.U.norm(dim=1) > 1e-9  # [m]: rows that some example reaches
    rough = pairs.float()
    i, j = torch.triu_indices(n, n, device=tie.device)

    def normal(w: Tensor, pairs: Tensor, ridge: float) -> Tensor:  # M^T diag(w) M, M = [U, -G], [g, n + k, n + k]
        H = tie.new_empty(g, n + k, n + k)
        upper = (w.to(pairs) @ pairs).to(H)
        H[:, i, j], H[:, j, i] = upper, upper
        weighted = (G * w[:, :, None]).mT  # [g, k, m]
        H[:, n:, :n], H[:, n:, n:] = -weighted @ U, weighted @ G
        H[:, :n, n:] = H[:, n:, :n].mT
        diagonal = H.diagonal(dim1=1, dim2=2)
        diagonal += ridge * diagonal.mean(1, keepdim=True)
        return H

    def apply(c: Tensor) -> Tensor:  # M c [g, m]
        error: Tensor = c[:, :n] @ U.T - (G @ c[:, n:, None])[..., 0]
        return error

    w, error, ref, c = trust, trust, trust, tie
    for step in range(steps):
        H = normal(w, *((rough, 1e-8) if step < steps - EXACT_STEPS else (pairs, 1e-13)))
        c = torch.linalg.solve_ex(H, tie[:, :, None])[0][..., 0].nan_to_num()
        c = c / ((c * tie).sum(1, keepdim=True) + 1e-300)
        error = apply(c).abs()
        ref = (c[:, :n] @ U.T).square().mean(1, keepdim=True).sqrt() + 1e-300
        typical = error.masked_fill((said == 0) | ~alive, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()
        floor = torch.maximum(typical / ref, torch.full_like(ref, 1e-9))
        w = said / (error / ref + floor) if step else trust / (error / ref + 0.1)
        w = w / w.amax(1, keepdim=True)
    fits = _fits(mixture, c, error, ref)
    for _ in range(2):  # refinement on the rows that fit alone, as a correction, which the normal equations do not blur
        w = (fits | ~alive).to(tie) * said
        H, left = normal(w, pairs, 1e-12), w * apply(c)
        slope = torch.cat([left @ U, -(G.mT @ left[:, :, None])[..., 0]], 1)
        both = torch.linalg.solve_ex(H, torch.stack([slope, tie], 2))[0].nan_to_num()
        share = (tie * both[..., 0]).sum(1) / ((tie * both[..., 1]).sum(1) + 1e-300)
        c = c - both[..., 0] + share[:, None] * both[..., 1]
        error = apply(c).abs()
        fits = _fits(mixture, c, error, ref)
    return c[:, :n], (said * (fits & alive)).sum(1) / alive.sum()


def exact_rows(mixture: Mixture, c: Tensor, error: Tensor) -> Tensor:
    """How many rows agree to rounding.

    Share [g] of live rows whose error [g, m] of U c is rounding.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> mixture, z, y = made_mixture(4, torch.relu)
    >>> c = mixture.dual(mixture.F(z, y)) * mixture.S
    >>> exact_rows(mixture, c, torch.zeros(4, 80).double())
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    alive = mixture.U.norm(dim=1) > 1e-9
    scale = mixture.U.shape[0] ** 0.5
    fits = _fits(mixture, c, scale * error.abs(), c.norm(dim=1, keepdim=True))  # |U c| = |c|
    share: Tensor = (fits & alive).to(c).sum(1) / alive.sum()
    return share


def _fits(mixture: Mixture, c: Tensor, error: Tensor, ref: Tensor) -> Tensor:
    """Rows [g, m] whose error is rounding: of the gradient, which U c takes over from S^-1 c, or of this arithmetic."""
    n = mixture.n
    noise = mixture.noise * (c[:, :n] / mixture.S).norm(dim=1, keepdim=True)
    fits: Tensor = error <= 10 * noise + 1e-8 * ref
    return fits
