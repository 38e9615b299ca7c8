"""A small vision transformer of unbatch's own: patches as tokens, every part of it plain to see."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from unbatch.errors import UnbatchError
from unbatch.models.stack import Shape
from unbatch.models.transformer import TransformerLayer

Pooling = Literal["class", "mean"]
PatchPositions = Literal["learned", "fixed"]
PATCHES_A_SIDE = 8  # of a picture, where no size of patch is asked for
POSITION_SPREAD = 0.02  # of learned positions and the class token, as ViT draws them


class VisionTransformer(nn.Module):
    """A transformer that reads a picture [n, c, h, w] as tokens, one a patch, with positions added to them.

    Pre-norm layers as in ViT (Dosovitskiy et al., 2021). The head is given a class token (`pool` *class*) or the mean over
    all patches. Positions are parameters, or fixed sines and cosines.

    >>> model = build_vision_transformer((3, 32, 32), 10, depth=1, width=12, rng=torch.Generator().manual_seed(0))
    >>> model(torch.zeros(2, 3, 32, 32)).shape, model.positions.shape
    (torch.Size([2, 10]), torch.Size([1, 65, 12]))
    """

    def __init__(
        self,
        shape: Shape,
        outputs: int,
        *,
        patch: int,
        depth: int,
        width: int,
        heads: int,
        act: type[nn.Module],
        bias: bool,
        pool: Pooling,
        positions: PatchPositions,
    ) -> None:
        super().__init__()
        tokens = (shape[1] // patch) * (shape[2] // patch) + (pool == "class")
        self.embed = nn.Conv2d(shape[0], width, patch, patch, bias=bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "class" else None
        self.positions: Tensor
        if positions == "learned":
            self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        else:
            self.register_buffer("positions", torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(
            TransformerLayer(width, heads, act, bias=bias, rotary=False, norm_first=True) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs, bias)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.embed(pictures).flatten(2).transpose(1, 2)  # [n, t, width]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        x = x + self.positions
        seen = torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x)
        outputs: Tensor = self.head(x[:, 0] if self.class_token is not None else x.mean(1))
        return outputs

    @torch.no_grad()
    def draw_positions(self, rng: torch.Generator) -> None:
        """Draws what is this module's own, in place: class token and learned positions; fixed ones are waves."""
        if self.class_token is not None:
            self.class_token.normal_(std=POSITION_SPREAD, generator=rng)
        if isinstance(self.positions, nn.Parameter):
            self.positions.normal_(std=POSITION_SPREAD, generator=rng)
        else:
            self.positions.copy_(waves(*self.positions.shape[1:]))


def build_vision_transformer(
    shape: Shape,
    outputs: int,
    *,
    patch: int | None = None,
    depth: int = 4,
    width: int = 192,
    activation: type[nn.Module] = nn.GELU,
    bias: bool = True,
    pool: Pooling = "class",
    positions: PatchPositions = "learned",
    rng: torch.Generator,
) -> VisionTransformer:
    """A vision transformer for pictures [n, *shape], in training mode on the CPU.

    `patch` pixels a side, by default such that about eight make a side; three heads where the width allows, else two or
    one. Dense layers and the embedding are drawn uniform in +-1/sqrt(fan_in), learned positions and the class token normal
    with spread 0.02, norms are the identity. Raises UnbatchError: no whole number of patches makes a picture.

    >>> model = build_vision_transformer((3, 32, 32), 10, depth=1, width=24, rng=torch.Generator().manual_seed(0))
    >>> model.embed.kernel_size, model(torch.zeros(2, 3, 32, 32)).shape
    ((4, 4), torch.Size([2, 10]))
    """
    with torch.device("meta"):  # no tensor is filled here, so torch's global generator is not read
        model = undrawn_vision_transformer(
            shape, outputs, activation, bias, depth=depth, width=width, patch=patch, pool=pool, positions=positions
        )
    return _drawn_vision_transformer(model.to_empty(device="cpu"), rng)


def _whole_patch(shape: Shape) -> int:
    """Pixels a side of a patch that a whole number of covers the picture, about PATCHES_A_SIDE along its shorter side.

    >>> _whole_patch((3, 32, 32)), _whole_patch((1, 25, 25)), _whole_patch((1, 7, 7))
    (4, 5, 7)
    """
    wanted = min(shape[1:]) / PATCHES_A_SIDE
    whole = [side for side in range(2, min(shape[1:]) + 1) if not shape[1] % side and not shape[2] % side]
    return min(whole or [1], key=lambda side: abs(side - wanted))


def undrawn_vision_transformer(
    shape: Shape,
    outputs: int,
    act: type[nn.Module],
    bias: bool,
    *,
    depth: int,
    width: int,
    patch: int | None = None,
    pool: Pooling = "class",
    positions: PatchPositions = "learned",
) -> VisionTransformer:
    """The same as `build_vision_transformer` before its parameters are drawn.

    >>> undrawn_vision_transformer((1, 8, 8), 3, nn.ReLU, True, depth=1, width=12).embed
    Conv2d(1, 12, kernel_size=(2, 2), stride=(2, 2))
    """
    patch = patch or _whole_patch(shape)
    if shape[1] % patch or shape[2] % patch:
        raise UnbatchError(
            f"pictures of {shape[1]}x{shape[2]} are no whole number of patches of {patch} pixels a side."
        )
    return VisionTransformer(
        shape,
        outputs,
        patch=patch,
        depth=depth,
        width=width,
        heads=next(h for h in (3, 2, 1) if width % h == 0),
        act=act,
        bias=bias,
        pool=pool,
        positions=positions,
    )


@torch.no_grad()
def _drawn_vision_transformer(model: VisionTransformer, rng: torch.Generator) -> VisionTransformer:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-bound, bound, generator=rng)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()  # constants alone
    model.draw_positions(rng)
    return model


def waves(tokens: int, width: int) -> Tensor:
    """Fixed positions [tokens, width]: sines and cosines of waves of 2 pi to 20,000 pi tokens.

    >>> waves(2, 4)[0]
    tensor([0., 0., 1., 1.])
    """
    rates = 10_000.0 ** (-torch.arange(-(-width // 2)) / (width / 2))
    angles = torch.arange(tokens)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
