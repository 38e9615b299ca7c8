"""Tangent: how the output of a piecewise linear network moves with its inputs, at a few products with its layers."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from unbatch.network.operations import Reshape

SAME = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d, Reshape)  # linear


class Tangent(fx.Interpreter):
    """The derivative of a network of convolutions, dense layers, fixed norms, ReLUs and sums at inputs x, as a product.

    `run(v)` is the derivative along v: layers without their biases, fixed norms as slopes, ReLUs as the masks that they
    had at x. It costs what the network does, a third of forward-mode differentiation.

    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> _ = net.get_submodule("0").weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, -9.0]]))
    >>> Tangent(net, torch.ones(1, 2)).run(torch.tensor([[5.0, -5.0]])).tolist()
    [[5.0, 0.0]]
    """

    def __init__(self, network: fx.GraphModule, x: Tensor) -> None:
        super().__init__(network)
        masks = _Masks(network)
        masks.run(x)
        self.passed = masks.passed

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module":
            return super().run_node(n)
        layer, (v,) = self.fetch_attr(str(n.target)), self.fetch_args_kwargs_from_env(n)[0]
        if isinstance(layer, nn.ReLU):
            return v * self.passed[n]
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(v, layer.weight, None)
        if isinstance(layer, nn.Linear):
            return F.linear(v, layer.weight)
        if fixed(layer):
            return F.batch_norm(v, v.new_zeros(v.shape[1]), layer.running_var, layer.weight, None, eps=layer.eps)
        return layer(v)

    @staticmethod
    def reads(network: nn.Module) -> bool:
        """Whether all that a network does is linear but for its ReLUs."""
        if not isinstance(network, fx.GraphModule):
            return False
        for node in network.graph.nodes:
            if node.op == "call_module":
                layer = network.get_submodule(node.target)
                known = type(layer) in (nn.ReLU, nn.Conv2d, nn.Linear, *SAME) or fixed(layer)
            else:
                sums = node.target is operator.add and all(isinstance(arg, fx.Node) for arg in node.args)
                known = node.op in ("placeholder", "output") or sums
            if not known:
                return False
        return True


class _Masks(fx.Interpreter):
    """Runs a network, and keeps where its ReLUs pass."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.passed = dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            found = super().run_node(n)
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), nn.ReLU):
            self.passed[n] = (found > 0).to(found)
        return found


def fixed(layer: nn.Module) -> TypeGuard[nn.BatchNorm1d | nn.BatchNorm2d]:
    """Whether a layer is a batch norm with statistics that do not depend on its input."""
    return isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and not layer.training and layer.running_var is not None
