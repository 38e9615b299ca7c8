"""Moments of weights: guesses of single examples from a mixture's gradient and its random weights, whatever the data.

The rows of a randomly initialised layer are nearly Gaussian, w ~ N(0, v I) on the span of the examples. Neuron j's share in
example i is s'(w_j . z_i) times what the layers above send down, which for class c is some G_jc that can be computed. By
Stein's identity

    sum_j G_jc A_j w_j^T          -> sum_i r_ic E[s''] z_i z_i^T
    sum_j G_jc A_j (w_j w_j^T - v I) -> sum_i r_ic E[s'''] z_i (x) z_i (x) z_i

so the z_i diagonalise all of these matrices at once: the second order is much the surer one (gelu, relu), and vanishes for
odd activations (tanh, sigmoid), which the third one serves.
Source: Wang, Lee, Lei, Reconstructing Training Data from Model Gradient, Provably, AISTATS 2023; several outputs and the
deltas' own columns for weights: this library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.moments.cp import compress, diagonalise
from unbatch.numerics.unmix.mixture import Mixture
from unbatch.numerics.unmix.sign_certain import fan

MOST_COMPONENTS = 24  # components that are diagonalised: seconds there, and too few neurons for more


def weight_moments(mixture: Mixture, rng: torch.Generator) -> Tensor:
    """Guesses of examples from a layer's random weights, whatever the data.

    Guesses [g, n] up to scale and sign: n by the second order and n by the third; none where n > MOST_COMPONENTS.

    >>> from unbatch.numerics.unmix.made import made_mixture
    >>> rng = torch.Generator().manual_seed(0)
    >>> mixture, z, y = made_mixture(3, width=1000)
    >>> guesses = weight_moments(mixture, rng)
    >>> cosines = torch.nn.functional.normalize(guesses, dim=1) @ torch.nn.functional.normalize(z, dim=1).T
    >>> guesses.shape, bool(cosines.abs().max() > 0.9)
    (torch.Size([6, 3]), True)
    """
    n = mixture.n
    if n > MOST_COMPONENTS:
        return mixture.U.new_zeros(0, n)
    origin = mixture.U.new_zeros(1, n)
    if mixture.ones is not None:
        origin = (mixture.ones / mixture.ones.square().sum())[None]
    G = fan(mixture, origin, None)[0]  # [m, k]
    if G.shape[1] > 1:
        G = G - G.mean(1, keepdim=True)  # what all classes share carries no random sign
    w = mixture.W.T - mixture.W.mean(1)  # [m, n]
    A = mixture.U * mixture.S
    second = torch.einsum("mk,ma,mb->kab", G, A, w)
    third = torch.einsum("mk,ma,mb,mc->kabc", G, A, w, w)
    third = third - torch.einsum("mk,ma,bc->kabc", G, A, w.T @ w / len(w))
    third = (third + third.transpose(1, 2) + third.transpose(1, 3)) / 3  # symmetric in its last two places already
    guesses = []
    for slices in ((second + second.mT) / 2, third.flatten(0, 1)):
        size = slices.norm()
        if float(size) > 0:
            guesses.append(diagonalise(compress(slices / size, n)[0], rng).T)
    return torch.cat(guesses) if guesses else origin[:0]
