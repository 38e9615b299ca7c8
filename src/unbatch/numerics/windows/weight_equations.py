"""What a convolution's weight gradient says of its inputs, once the gradient that came back to its output is known."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.numerics.windows.geometry import PADDED, Windows


def weight_equations(deltas: Tensor, windows: Windows) -> Tensor:
    """The matrix that a whole batch's input maps obey: one for all input channels that see the same outputs.

    dL/dK[o, c, a] = sum over examples i and places p of delta[i, o, p] x[i, c, entry(p, a)]: for each input channel c
    c_out k^2 equations for its n maps, with the same matrix for every channel. A convolution in groups has such a matrix
    for each group, of that group's output channels.

    `deltas` [n, c_out, p] is dL/d(output); `windows` are those of ONE input channel, [1, height, width]. Returns
    [c_out k^2, n height width], rows in the order of dL/dK[:, c] flattened.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x = torch.randn(2, 3, 5, 5, generator=rng, dtype=torch.float64)
    >>> K = torch.randn(4, 3, 3, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    >>> out = torch.nn.functional.conv2d(x, K, stride=2, padding=1)
    >>> delta = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    >>> (dK,) = torch.autograd.grad(out, K, delta)
    >>> windows = Windows.of((1, 5, 5), kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    >>> A = weight_equations(delta.flatten(2), windows)
    >>> A.shape, torch.allclose(A @ x[:, 1].flatten(), dK[:, 1].flatten())
    (torch.Size([36, 50]), True)
    """
    n, c_out, _ = deltas.shape
    size, k = torch.Size(windows.shape).numel(), windows.entries.shape[1]
    found = deltas.new_zeros(k, n, size, c_out)
    for a in range(k):
        held = windows.entries[:, a] != PADDED  # [p]
        found[a].index_add_(1, windows.entries[held, a].to(deltas.device), deltas[:, :, held].transpose(1, 2))
    return found.permute(3, 0, 1, 2).reshape(c_out * k, n * size)
