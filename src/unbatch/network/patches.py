"""Patches: a network's first layer that reads its input in windows, one a token, and what is added to those tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.network.dense import in_mode
from unbatch.network.precision import in_double, loss_value, outputs_of

AGREES = 1e-9  # of numbers of two runs that are to be the same, relative, in float64


@dataclass(frozen=True, eq=False)
class PatchEmbedding:
    """The layer that makes tokens of a picture's windows: E_t = W (scale_t * x[pixel_t] + shift_t) + b, t = 1 to T.

    Windows of p entries, of which each is one number of the input under an elementwise affine map. `positions` are, of one
    parameter, the flat places of the entries that are added to each token, so that their gradient is what the tokens send
    back: dL/d positions = dL/dE. None where there is no such parameter.
    """

    weight: str  # parameter name
    bias: str | None
    pixel: Tensor  # [T, p] the flat place in the input of a window's entry
    scale: Tensor  # [T, p]
    shift: Tensor  # [T, p]
    positions: str | None = None
    places: Tensor | None = None  # [T, width]

    @property
    def tokens(self) -> int:
        """How many windows there are."""
        return len(self.pixel)

    def picture(self, windows: Tensor, shape: Sequence[int]) -> Tensor:
        """The input [*shape] of which these are the windows [T, p]; the mean where several hold one number.

        >>> net = nn.Conv2d(1, 2, 2, 2)
        >>> found = patch_embedding(net, (1, 4, 4))
        >>> x = torch.arange(16.0).view(1, 4, 4).double()
        >>> torch.equal(found.picture(found.windows(x), (1, 4, 4)), x)
        True
        """
        numbers = ((windows - self.shift.to(windows)) / self.scale.to(windows)).flatten()
        at = self.pixel.flatten().to(windows.device)
        size = torch.Size(shape).numel()
        count = torch.zeros(size, dtype=windows.dtype, device=windows.device).index_add_(
            0, at, torch.ones_like(numbers)
        )
        total = torch.zeros_like(count).index_add_(0, at, numbers)
        return (total / count).view(*shape)

    def windows(self, picture: Tensor) -> Tensor:
        """The windows [T, p] of one input, as the layer is given them."""
        numbers = picture.flatten()[self.pixel.to(picture.device)]
        return self.scale.to(numbers) * numbers + self.shift.to(numbers)


def patch_embedding(model: nn.Module, input_shape: tuple[int, ...]) -> PatchEmbedding:
    """The layer that reads the input in windows, found by running the model and listening: no name is looked at.

    The first dense layer or convolution whose input is windows of numbers of the network's input, in which every number
    occurs; and the parameter of whose gradient a part is, example by example, what its outputs send back.
    Raises NotApplicable: there is no such layer, and why.

    >>> patch_embedding(nn.Sequential(nn.Conv2d(1, 3, 2, 2), nn.Flatten(), nn.Linear(12, 2)), (1, 4, 4)).pixel[0]
    tensor([0, 1, 4, 5])
    """
    double = in_double(model)
    double.requires_grad_(True)
    size = torch.Size(input_shape).numel()
    rng = torch.Generator().manual_seed(0)
    device = next(double.parameters()).device
    code = torch.arange(size, dtype=torch.float64) / size
    check = torch.rand(2, size, generator=rng, dtype=torch.float64)
    probes = torch.stack([torch.zeros_like(code), torch.ones_like(code), code, *check]).view(5, *input_shape).to(device)
    heard = _Windowed(double)
    with torch.no_grad(), in_mode(double, "eval"), heard, suppress(_Enough):
        outputs_of(double, probes)
    if heard.first is None:
        raise NotApplicable("no dense layer or convolution reads the input in windows, one a token.")
    weight, bias, windows, _ = heard.first
    shift, scale = windows[0], windows[1] - windows[0]
    if bool((scale == 0).any()):
        raise NotApplicable(f"{weight!r} sees numbers beside the input's own (padding), and no patches of it.")
    pixel = ((windows[2] - shift) / scale * size).round().long()
    found = PatchEmbedding(weight, bias, pixel.clamp(0, size - 1).cpu(), scale.cpu(), shift.cpu())
    for example, seen in zip(probes[2:], windows[2:], strict=True):
        if not torch.allclose(found.windows(example), seen, rtol=AGREES, atol=AGREES):
            raise NotApplicable(f"what {weight!r} sees is no windows of the input's own numbers.")
    if len(torch.unique(pixel)) < size:
        raise NotApplicable(f"{weight!r} does not see every number of the input.")
    name, places = _added(double, probes)
    return PatchEmbedding(weight, bias, found.pixel, found.scale, found.shift, name, places)


def _added(model: nn.Module, probes: Tensor) -> tuple[str | None, Tensor | None]:
    """The parameter whose gradient of one example is, at these places [T, width], what the embedding's tokens send back."""
    heard = _Windowed(model, stop=False)
    with torch.enable_grad(), in_mode(model, "eval"), heard:
        outputs = outputs_of(model, probes)
    if heard.first is None:
        return None, None
    tokens = heard.first[3]
    parameters = dict(model.named_parameters())
    rng = torch.Generator().manual_seed(1)
    along = torch.randn(outputs.shape[1:], generator=rng, dtype=torch.float64).to(outputs)
    sent, own = list[Tensor](), list[dict[str, Tensor]]()
    for example in (3, 4):
        value = (outputs[example] * along).sum()
        grads = torch.autograd.grad(value, [tokens, *parameters.values()], retain_graph=True, allow_unused=True)
        sent.append(_rows(grads[0])[example])
        own.append({k: g for k, g in zip(parameters, grads[1:], strict=True) if g is not None})
    width, close = sent[0].shape[1], AGREES * float(sent[0].abs().max())
    for name, gradient in own[0].items():
        for axis in [
            k for k, side in enumerate(gradient.shape) if side == width and gradient.numel() >= sent[0].numel()
        ]:
            rows = gradient.movedim(axis, -1).reshape(-1, width)
            if not bool(((rows - sent[0][0]).abs().amax(1) <= close).any()):
                continue
            nearest = torch.cdist(sent[0], rows, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            again = own[1][name].movedim(axis, -1).reshape(-1, width)
            agree = (rows[nearest] - sent[0]).abs().max() <= close and (again[nearest] - sent[1]).abs().max() <= close
            reached = bool((sent[0].abs().max(1).values > 0).all())
            if bool(agree) and reached and len(torch.unique(nearest)) == len(nearest):
                flat = torch.arange(gradient.numel()).view(gradient.shape).movedim(axis, -1).reshape(-1, width)
                return name, flat[nearest.cpu()]
    return None, None


def back_from_patches(
    model: nn.Module,
    front: PatchEmbedding,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    mode: Literal["train", "eval"] = "eval",
    *,
    create_graph: bool = False,
) -> Tensor:
    """What the tokens of one picture's windows send back, dL/dE [T, width], computed by the model on x [1, *shape].

    Raises NotApplicable: the embedding does not run, or nothing comes back to it.

    >>> net = nn.Sequential(nn.Conv2d(1, 3, 2, 2), nn.Flatten(), nn.Linear(12, 2))
    >>> x, y = torch.zeros(1, 1, 4, 4), torch.tensor([1])
    >>> back_from_patches(net, patch_embedding(net, (1, 4, 4)), x, y, F.cross_entropy).shape
    torch.Size([4, 3])
    """
    heard = _Windowed(model, stop=False)
    with torch.enable_grad(), in_mode(model, mode):
        with heard:
            outputs = outputs_of(model, x, twice=create_graph)
        if heard.first is None or heard.first[0] != front.weight:
            raise NotApplicable(f"{front.weight!r} does not read the picture first.")
        value = loss_value(loss, outputs, y)
    (back,) = torch.autograd.grad(value, heard.first[3], create_graph=create_graph, materialize_grads=True)
    return _rows(back)[0]


class _Windowed(TorchFunctionMode):
    """Hears the first call of a dense layer on tokens, or of a convolution, with the windows that it was given."""

    def __init__(self, model: nn.Module, *, stop: bool = True) -> None:
        super().__init__()
        self.stop = stop  # the run, once it is heard
        self.names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.first: tuple[str, str | None, Tensor, Tensor] | None = None  # weight, bias, windows [5, T, p], tokens

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.first is None and func in (F.linear, F.conv2d, F.conv1d):
            named = _NAMED if func is not F.linear else _NAMED[:3]
            call = dict(zip(named, args, strict=False)) | dict(kwargs or {})
            weight, bias = (self.names.get(id(call.get(part))) for part in ("weight", "bias"))
            windows = _windows(func, call)
            if weight is not None and windows is not None:
                self.first = weight, bias, windows.detach(), out
                if self.stop:
                    raise _Enough
        return out


class _Enough(UnbatchError):  # noqa: N818 (no error)
    """What a run was for is heard; nobody sees it."""


_NAMED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _windows(func: Callable[..., Any], call: Mapping[str, Any]) -> Tensor | None:
    """What a dense layer or a convolution was given, as windows [n, T, p]; None where it reads none."""
    x, weight = call["input"], call["weight"]
    if func is F.linear:
        return x if x.ndim == 3 else None
    if func is not F.conv2d or x.ndim != 4 or call.get("groups", 1) != 1 or isinstance(call.get("padding", 0), str):
        return None
    options = {part: call[part] for part in ("stride", "padding", "dilation") if part in call}
    return F.unfold(x, weight.shape[2:], **options).transpose(1, 2)


def _rows(tokens: Tensor) -> Tensor:
    """Tokens [n, T, width] of what a dense layer or a convolution gave."""
    return tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class FirstDenseLayers:
    """The dense layers that see the tokens before any of them saw another: h_t = norm(E_t + c_t), or E_t + c_t itself.

    Each reads one vector a token; `rows` are the tokens of the input's windows among them, `others` counts the rest (a
    class token), whose vectors are the same for every input.
    """

    weights: tuple[tuple[str, str | None], ...]  # names of weight and bias
    rows: Tensor  # [T]
    others: int
    added: Tensor  # [T, width] c_t, with the embedding's bias
    gain: Tensor | None  # [width] of the layer norm; None where there is no norm
    offset: Tensor | None


def first_dense_layers(model: nn.Module, front: PatchEmbedding, input_shape: tuple[int, ...]) -> FirstDenseLayers:
    """The dense layers that read the patches' tokens one by one, found by running the model and listening.

    Raises NotApplicable: a dense layer on tokens that are affine in one window each, under a layer norm or none, does not
    run first.

    >>> from unbatch.models.vision_transformer import build_vision_transformer
    >>> net = build_vision_transformer((1, 8, 8), 3, depth=1, width=12, rng=torch.Generator().manual_seed(0))
    >>> found = first_dense_layers(net, patch_embedding(net, (1, 8, 8)), (1, 8, 8))
    >>> [weight for weight, _ in found.weights], found.others
    (['blocks.0.attention.query.weight', 'blocks.0.attention.key.weight', 'blocks.0.attention.value.weight'], 1)
    """
    double = in_double(model)
    parameters = dict(double.named_parameters())
    rng = torch.Generator().manual_seed(2)
    x = torch.rand(3, *input_shape, generator=rng, dtype=torch.float64).to(next(double.parameters()).device)
    x[0] = 0
    heard = _AfterEmbedding(double, front.weight)
    with torch.no_grad(), in_mode(double, "eval"), heard:
        outputs_of(double, x)
    if heard.seen is None:
        raise NotApplicable("no dense layer reads the tokens of the patches one by one.")
    z = heard.seen if heard.norm is None else heard.norm[0]  # [3, T', width]
    W = parameters[front.weight].detach().flatten(1)
    windows = torch.stack([front.windows(example) for example in x])  # [3, T, p]
    made = windows @ W.T
    if z.shape[2] != made.shape[2]:
        raise NotApplicable(
            f"the first dense layers behind the embedding read vectors of {z.shape[2]} numbers and its tokens have "
            f"{made.shape[2]}: they mix the tokens of a picture."
        )
    nearest = torch.cdist(made[2] - made[1], z[2] - z[1], compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    added = z[:, nearest] - made
    close = AGREES * float(z.abs().max())
    if len(torch.unique(nearest)) < len(nearest) or float((added - added[:1]).abs().max()) > close:
        raise NotApplicable("the first dense layers on tokens do not read one patch each, up to a norm.")
    rest = torch.ones(z.shape[1], dtype=torch.bool, device=z.device).index_fill_(0, nearest, False)
    if bool(rest.any()) and float((z[1:, rest] - z[:1, rest]).abs().max()) > close:
        raise NotApplicable(
            "the first dense layers on tokens read some that depend on the input and are no patch of it."
        )
    gain, offset = (None if each is None else each.detach() for each in (heard.norm or (None, None, None))[1:])
    return FirstDenseLayers(tuple(heard.weights), nearest, int(rest.sum()), added[0], gain, offset)


class _AfterEmbedding(TorchFunctionMode):
    """Hears the first dense layers on tokens [n, T, width] behind the embedding, and a layer norm right before them."""

    def __init__(self, model: nn.Module, embedding: str) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.embedding, self.open = embedding, False
        self.norms: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}  # by what came out
        self.kept: list[Tensor] = []  # lest another tensor takes over an identity
        self.seen: Tensor | None = None
        self.norm: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        self.weights: list[tuple[str, str | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.layer_norm and self.open:
            call = dict(zip(("input", "shape", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
            self.norms[id(out)] = call["input"], call.get("weight"), call.get("bias")
            self.kept.append(out)
        if func in (F.linear, F.conv2d):
            call = dict(zip(_NAMED, args, strict=False)) | dict(kwargs or {})
            name = self.names.get(id(call["weight"]))
            if self.open and func is F.linear and name is not None and call["input"].ndim == 3:
                self._dense(call, name)
            self.open = self.open or name == self.embedding
        return out

    def _dense(self, call: Mapping[str, Any], name: str) -> None:
        if self.seen is None:
            self.seen, self.norm = call["input"], self.norms.get(id(call["input"]))
        if call["input"] is self.seen:
            self.weights.append((name, self.names.get(id(call.get("bias")))))
