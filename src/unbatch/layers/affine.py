"""affine: what a layer that is affine in its input says of it; products by the layer itself and by autograd."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from unbatch.errors import UnbatchError
from unbatch.layer import LayerRule, shaped
from unbatch.network.operations import AffineOperation, Reshape
from unbatch.numerics.linear.linsys import COLUMN_ENTRIES, LinearSystem, affine


@final
class Affine(LayerRule):
    """Layers that are affine in their input, such as dense layers, convolutions and average pooling.

    f(x) = A x + c: dense layers, convolutions, average pooling, batch norm in eval mode, upsampling, reshaping.

    Forward: A x = z - c. Gradient: h(x, W) = <f_W(x), dz> is affine in x and in W, so dL/dW = dh/dW is affine in x: for a
    dense layer dz_j x = (dL/dW)_j, for a convolution the correlation of x with dz dilated by the stride, channel by
    channel. Any stride, padding (zeros, reflected, circular), dilation and groups; A is never unrolled.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.Upsample,
        nn.UpsamplingNearest2d,
        nn.UpsamplingBilinear2d,
        nn.Flatten,
        nn.Unflatten,
        nn.Identity,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.ConstantPad1d,
        nn.ConstantPad2d,
        nn.ConstantPad3d,
        nn.ReflectionPad1d,
        nn.ReflectionPad2d,
        nn.ReflectionPad3d,
        nn.ReplicationPad1d,
        nn.ReplicationPad2d,
        nn.ReplicationPad3d,
        nn.ZeroPad1d,
        nn.ZeroPad2d,
        nn.ZeroPad3d,
        nn.PixelShuffle,
        Reshape,
        AffineOperation,
    )

    def accepts(self, layer: nn.Module) -> bool:
        """Batch and instance norm in eval mode and with statistics of their own; dropout in eval mode."""
        norms = _BatchNorm | _InstanceNorm
        if isinstance(layer, norms) and (layer.training or layer.running_mean is None):
            return False
        if (
            isinstance(layer, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d)
            and layer.training
            and layer.p > 0
        ):
            return False
        return super().accepts(layer)

    def forward_equations(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor) -> LinearSystem:
        """A x = z - f(0) for `output` z. Raises UnbatchError: z, or `shape`, is not the layer's.

        >>> system = Affine().forward_equations(nn.AvgPool1d(2), (1, 4), torch.tensor([[3.0, 5.0]]))
        >>> system.matrix().tolist(), system.b.tolist()
        ([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], [3.0, 5.0])
        """
        f = _Function(layer, shape, output)
        return affine(lambda x: f(x), shape, shaped(output, f.shape, "output"))

    def gradient_equations(
        self, layer: nn.Module, shape: tuple[int, ...], grad_output: Tensor, grad_weight: Tensor
    ) -> LinearSystem:
        """(d/dW <f_W(x), dz>) = dL/dW for `grad_output` dz; a layer without a weight gives none. Raises as above."""
        f = _Function(layer, shape, grad_output)
        dz = shaped(grad_output, f.shape, "grad_output")
        if "weight" not in f.state:
            return LinearSystem.none(f.zero.numel(), dz)
        W = f.state["weight"]
        dW = shaped(grad_weight, tuple(W.shape), "grad_weight", batch=False)

        def h(x: Tensor, W: Tensor) -> Tensor:
            out: Tensor = (f(x[None], W) * dz).sum()
            return out

        by_weight, by_input = grad(h, argnums=1), grad(h, argnums=0)
        offset, base = by_weight(f.zero[0], W), by_input(f.zero[0], torch.zeros_like(W))
        chunk = max(1, COLUMN_ENTRIES // max(f.zero.numel(), dz.numel()))

        def push(v: Tensor) -> Tensor:
            if not len(v):
                return v.new_zeros(0, W.numel())
            found: Tensor = vmap(by_weight, in_dims=(0, None), chunk_size=chunk)(v.view(-1, *shape), W) - offset
            return found.flatten(1)

        def pull(u: Tensor) -> Tensor:
            if not len(u):
                return u.new_zeros(0, f.zero.numel())
            found: Tensor = vmap(by_input, in_dims=(None, 0), chunk_size=chunk)(f.zero[0], u.view(-1, *W.shape)) - base
            return found.flatten(1)

        one = (
            isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1
        )  # each channel its part of dL/dW
        return LinearSystem(push, pull, (dW - offset).flatten(), f.zero.numel(), shape[0] if one else 1)

    def grad_input(self, layer: nn.Module, shape: tuple[int, ...], output: Tensor, grad_output: Tensor) -> Tensor:
        """A^T dz. Raises UnbatchError: `grad_output` is not the layer's."""
        return self.forward_equations(layer, shape, grad_output).pull(grad_output.double().reshape(1, -1)).view(shape)


class _Function:
    """f(x [k, *shape], W) of a layer in float64, without the hooks that a user may have set on it."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], like: Tensor) -> None:
        self.layer = copy.copy(layer)
        self.layer._forward_hooks, self.layer._forward_pre_hooks = OrderedDict(), OrderedDict()
        self.layer._backward_hooks, self.layer._backward_pre_hooks = OrderedDict(), OrderedDict()
        self.zero = torch.zeros(1, *shape, dtype=torch.float64, device=like.device)
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        self.state = {k: t.detach().to(self.zero) if t.is_floating_point() else t.detach() for k, t in tensors.items()}
        try:
            self.shape = tuple(self(self.zero).shape[1:])
        except (RuntimeError, ValueError, IndexError) as error:
            kind = type(layer).__name__
            raise UnbatchError(f"an input of shape {tuple(shape)} does not fit this {kind}: {error}") from error

    def __call__(self, x: Tensor, W: Tensor | None = None) -> Tensor:
        state: dict[str, Any] = self.state if W is None else {**self.state, "weight": W}
        found: Tensor = functional_call(self.layer, state, (x,))
        return found
