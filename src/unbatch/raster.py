"""Raster: arrays of numbers as small PNG pictures, in a data URI."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TILES = 4  # slices of a volume, frames of a film, channels of a stack
MOST_BYTES = 16_384  # of all tiles together, before compression, so that noise stays small as well
CURVE = (256, 48)  # pixels of one channel of a signal, across and down


def png(picture: Tensor) -> str:
    """A picture [c, h, w] in [0, 1] with one or three channels (of more, the first three) as a PNG data URI.

    >>> png(torch.zeros(1, 2, 2))[:22]
    'data:image/png;base64,'
    """
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels[0].numpy() if len(pixels) == 1 else pixels[:3].permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def has_sides(shape: Sequence[int], least: int) -> bool:
    """Whether numbers of that shape have layers [h, w] to be drawn, each side of at least so many; channels may be last.

    >>> has_sides((16, 8, 8), 8), has_sides((8, 8, 3), 8), has_sides((4, 3), 8)
    (True, True, False)
    """
    sides = shape[-3:-1] if len(shape) > 2 and shape[-1] in (1, 3) else shape[-2:]
    return len(sides) == 2 and min(sides) >= least


def tiles(block: Tensor) -> Tensor:
    """Numbers [..., h, w] in [0, 1] as one picture: at most four layers, evenly spaced, side by side and small.

    A volume [1, d, h, w] gives slices through its depth, a film [3, t, h, w] or [t, 3, h, w] frames in colour, a stack
    [c, h, w] single channels, a picture [h, w, 3] itself.

    >>> tiles(torch.rand(1, 64, 64, 64)).shape, tiles(torch.rand(16, 3, 64, 64)).shape, tiles(torch.rand(8, 8)).shape
    (torch.Size([1, 64, 259]), torch.Size([3, 36, 147]), torch.Size([1, 8, 8]))
    """
    block = block.movedim(-1, -3) if block.ndim > 2 and block.shape[-1] in (1, 3) else block
    if block.ndim > 2 and block.shape[-3] == 3:
        layers = block.reshape(-1, *block.shape[-3:])  # [t, 3, h, w]
    elif block.ndim == 4 and block.shape[0] == 3:
        layers = block.movedim(0, 1)
    else:
        layers = block.reshape(-1, 1, *block.shape[-2:])
    count = min(len(layers), TILES)
    places = ((torch.arange(count) + 0.5) * len(layers) / count).long()
    layers = layers[places]  # [count, c, h, w]
    c, h, w = layers.shape[1:]
    share = math.sqrt(MOST_BYTES / (count * c * h * w))
    if share < 1:
        layers = F.interpolate(layers, size=(max(int(h * share), 1), max(int(w * share), 1)), mode="area")
    apart = layers.new_ones(c, layers.shape[2], 1)
    return torch.cat([part for layer in layers for part in (apart, layer)][1:], 2)


def curves(signals: Tensor) -> Tensor:
    """Signals [c, t] in [0, 1] as one picture [1, h, w]: a curve for each, dark on light, from its least to its largest.

    >>> drawn = curves(torch.linspace(0, 1, 16000)[None])
    >>> drawn.shape, drawn[0, :, 0].argmin() > drawn[0, :, -1].argmin()
    (torch.Size([1, 48, 256]), tensor(True))
    """
    width, height = CURVE
    strips = []
    for signal in signals.clamp(0, 1):
        columns = torch.tensor_split(signal, min(width, len(signal)))
        strip = torch.ones(height, len(columns), dtype=signal.dtype)
        rows = [
            (round((1 - float(part.max())) * (height - 1)), round((1 - float(part.min())) * (height - 1)))
            for part in columns
        ]
        for x, (top, bottom) in enumerate(rows):
            before = rows[max(x - 1, 0)]  # joined to its neighbour, so that a steep curve has no gaps
            strip[min(top, before[1]) : max(bottom, before[0]) + 1, x] = 0
        strips.append(strip)
    return torch.cat(strips, 0)[None]
