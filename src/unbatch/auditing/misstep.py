"""Misstep: why a client's training step fails, in the words of whoever gave the model, the loss and the batch."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.loss import Loss
from unbatch.network.dense import in_mode

Mode = Literal["train", "eval"]


def misstep(model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, mode: Mode) -> UnbatchError | None:
    """Take the step apart and say which part of it fails: forward, loss or backward; None where none does.

    >>> def each(outputs, labels):
    ...     return nn.functional.cross_entropy(outputs, labels, reduction="none")
    >>> print(misstep(nn.Linear(3, 2), each, torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), "eval"))
    the loss returned a tensor of shape (4,), and one number is needed; take its mean or sum.
    """
    words = _words(copy.deepcopy(model), loss, inputs, labels, mode)
    return UnbatchError(words) if words else None


def _words(model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, mode: Mode) -> str:
    with torch.enable_grad(), in_mode(model, mode):
        try:
            outputs = model(inputs)
        except Exception as error:
            alone = " Batch norm needs more than one example in train mode; take more, or mode=eval." * (
                len(inputs) == 1
            )
            return (
                f"the model's forward fails in {mode} mode on inputs {_form(inputs)}: {_line(error)}{alone} Give inputs of "
                "the form that the model takes."
            )
        try:
            value = loss(outputs, labels)
        except Exception as error:
            return (
                f"the loss fails on outputs {_form(outputs)} and labels {_form(labels)}: {_line(error)} If it is the "
                "labels, give them in the form that the loss takes: cross entropy takes class numbers, int64 [n]."
            )
        wrong = _wrong(value)
        if wrong:
            return wrong
        try:
            names, weights = zip(*((k, p) for k, p in model.named_parameters() if p.requires_grad), strict=True)
            gradients = torch.autograd.grad(value, weights, allow_unused=True)
        except Exception as error:
            return f"the backward pass of the model and the loss fails: {_line(error)} It must be differentiable."
    if all(gradient is None for gradient in gradients):
        return "the loss does not depend on the model's parameters; compute it from the outputs that it is given."
    bad = [name for name, g in zip(names, gradients, strict=True) if g is not None and not g.isfinite().all()]
    if bad:
        return f"the gradient of {bad[0]!r} is not finite, though the loss is; look for a root or a logarithm at zero."
    return ""


def _wrong(value: object) -> str:
    """What is wrong with what a loss returned, if anything."""
    if not isinstance(value, Tensor):
        return f"the loss returned {type(value).__name__}, not a tensor; return the tensor itself, without .item()."
    if value.numel() != 1:
        return (
            f"the loss returned a tensor of shape {tuple(value.shape)}, and one number is needed; take its mean or sum."
        )
    if not value.requires_grad:
        return "the loss does not depend on the model's outputs by a gradient; return it without .detach() or .item()."
    if not value.isfinite():
        return (
            f"the loss is {value.item()} on this batch; look for diverged parameters, a logarithm of zero, or "
            "inputs far outside of the model's range."
        )
    return ""


def _form(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _line(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    return f"{text if len(text) <= 200 else text[:197] + '...'}."
