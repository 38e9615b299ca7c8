"""affine: what a layer that is affine in its input says of it; products by the layer itself and by autograd."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from unbatch.layer import LayerRule
from unbatch.numerics.linsys import LinearSystem, affine


@final
class Affine(LayerRule):
    """f(x) = A x + c: dense layers, convolutions, average pooling, batch norm in eval mode, upsampling, reshaping.

    Forward: A x = z - c. Gradient: h(x, W) = <f_W(x), dz> is affine in x and in W, so dL/dW = dh/dW is affine in x: for a
    dense layer dz_j x = (dL/dW)_j, for a convolution the correlation of x with dz dilated by the stride, channel by
    channel. Any stride, padding (zeros, reflected, circular), dilation and groups; A is never unrolled.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.Upsample,
        nn.Flatten,
        nn.Unflatten,
        nn.Identity,
        nn.Dropout,
        nn.Dropout2d,
        nn.ZeroPad2d,
        nn.PixelShuffle,
    )

    def accepts(self, layer: nn.Module) -> bool:
        """Batch norm and dropout in eval mode only; batch norm with statistics of its own."""
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return not layer.training and layer.running_mean is not None
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            return not layer.training or layer.p == 0
        return isinstance(layer, self.kinds)

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """A x = z - f(0) for `output` z."""
        z = output.detach().double()
        state = _state(layer, z)
        expected = functional_call(layer, state, (z.new_zeros(1, *shape),)).shape
        return affine(lambda x: functional_call(layer, state, (x,)), shape, _shaped(z, expected, "output"))

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """(d/dW <f_W(x), dz>) = dL/dW for `grad_output` dz; a layer without a weight gives none."""
        dz = grad_output.detach().double()
        state = _state(layer, dz)
        zero = dz.new_zeros(1, *shape)
        dz = _shaped(dz, functional_call(layer, state, (zero,)).shape, "grad_output")
        if "weight" not in state:
            return LinearSystem.some(torch.zeros(0, dtype=torch.long, device=dz.device), dz.new_zeros(0), zero.numel())
        W = state["weight"]
        dW = _shaped(grad_weight.detach().double(), W.shape, "grad_weight")

        def h(x: Tensor, W: Tensor) -> Tensor:
            out: Tensor = (functional_call(layer, {**state, "weight": W}, (x[None],)) * dz).sum()
            return out

        by_weight, by_input = grad(h, argnums=1), grad(h, argnums=0)
        offset, base = by_weight(zero[0], W), by_input(zero[0], torch.zeros_like(W))

        def push(v: Tensor) -> Tensor:
            found: Tensor = vmap(by_weight, in_dims=(0, None))(v.view(-1, *shape), W) - offset
            return found.flatten(1)

        def pull(u: Tensor) -> Tensor:
            found: Tensor = vmap(by_input, in_dims=(None, 0))(zero[0], u.view(-1, *W.shape)) - base
            return found.flatten(1)

        return LinearSystem(push, pull, (dW - offset).flatten(), zero.numel())


def _state(layer: nn.Module, like: Tensor) -> dict[str, Any]:
    """The layer's parameters and buffers in float64."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {k: t.detach().to(like) if t.is_floating_point() else t.detach() for k, t in tensors.items()}


def _shaped(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """A tensor of that shape, with or without the batch's side of 1."""
    if tuple(tensor.shape) not in (tuple(shape), tuple(shape)[1:]) and tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; for one example of this layer it has {tuple(shape)}."
        )
    return tensor.reshape(shape)
