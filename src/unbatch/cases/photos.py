"""Photos: crops of nine colour photographs."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Annotated, ClassVar, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from unbatch.case import Case, Examples
from unbatch.domain import Images
from unbatch.errors import MissingExtra

VIEWS_A_PHOTO = 64  # of every photograph

_Pixels = npt.NDArray[np.float32]


class Photo(NamedTuple):
    """What a photograph shows, who ships it, and the middle of its subject as fractions of width and height.

    >>> PHOTOS[1].label, PHOTOS[1].middle
    ('cat', (0.52, 0.45))
    """

    label: str
    shipper: str
    path: str
    middle: tuple[float, float]


PHOTOS = (
    Photo("astronaut", "scikit-image", "skimage/data/astronaut.png", (0.45, 0.35)),
    Photo("cat", "scikit-image", "skimage/data/chelsea.png", (0.52, 0.45)),
    Photo("coffee", "scikit-image", "skimage/data/coffee.png", (0.47, 0.45)),
    Photo("rocket", "scikit-image", "skimage/data/rocket.jpg", (0.5, 0.6)),
    Photo("retina", "scikit-image", "skimage/data/retina.jpg", (0.5, 0.5)),
    Photo("galaxies", "scikit-image", "skimage/data/hubble_deep_field.jpg", (0.5, 0.5)),
    Photo("tissue", "scikit-image", "skimage/data/ihc.png", (0.5, 0.5)),
    Photo("pagoda", "scikit-learn", "sklearn/datasets/images/china.jpg", (0.34, 0.5)),
    Photo("flower", "scikit-learn", "sklearn/datasets/images/flower.jpg", (0.47, 0.5)),
)


@final
class Photos(Case):
    """Views of nine colour photographs, of 32 by 32 pixels or another size.

    Square views [3, size, size] in [0, 1] of nine photographs; the class is which photograph.

    The pool runs in rounds with one view of every photograph each, in random order. The first round shows nearly the
    whole; later ones are smaller crops (45 to 85% of the short side) about the subject, half of them mirrored. No two
    views differ by less than 5% of their norm, so that near duplicates come from the option of that name alone.

    >>> import unbatch
    >>> str(unbatch.cases.Photos(batch=4, size=16))  # as the command line takes it: unbatch audit photos:batch=4,size=16
    'photos:batch=4,size=16'
    """

    source: ClassVar[str] = (
        "shipped with scikit-image: astronaut (NASA), galaxies (NASA, Hubble) and rocket (SpaceX), public domain; cat "
        "(S. van der Walt), coffee (R. Michetti) and retina (M. Häggström), CC0; tissue (Center for Microscopy and "
        "Molecular Imaging), no known restrictions. Shipped with scikit-learn: pagoda (danielbuechele) and flower "
        "(vultilion), CC BY 2.0"
    )

    size: Annotated[int, Field(ge=8, le=128, description="pixels a side")] = 32

    def pool(self, rng: torch.Generator) -> Examples:
        labels = torch.stack(
            [torch.randperm(len(PHOTOS), generator=rng) for _ in range(VIEWS_A_PHOTO)]
        )  # [VIEWS_A_PHOTO, k]
        views = torch.stack([_views(photo, self.size, rng) for photo in PHOTOS])  # [k, VIEWS_A_PHOTO, 3, size, size]
        return Examples(
            inputs=views[labels, torch.arange(VIEWS_A_PHOTO).unsqueeze(1)].flatten(0, 1),
            labels=labels.flatten(),
            classes=[photo.label for photo in PHOTOS],
            domain=Images(shape=(3, self.size, self.size)),
        )


def _views(photo: Photo, size: int, rng: torch.Generator) -> Tensor:
    """Views [v, 3, size, size] of one photograph, nearly the whole first; one too close to an earlier is redrawn."""
    views: list[_Pixels] = []
    while len(views) < VIEWS_A_PHOTO:
        view = _view(photo, size, not views, rng)
        if all(np.linalg.norm(view - other) >= 0.05 * np.linalg.norm(view) for other in views):
            views.append(view)
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def _view(photo: Photo, size: int, whole: bool, rng: torch.Generator) -> _Pixels:
    """A random square view [size, size, 3], brought down to size with antialiasing."""
    picture = _load(photo)
    scale, across, down, flip = torch.rand(4, generator=rng).tolist()
    share = 0.92 + 0.08 * scale if whole else 0.45 + 0.4 * scale
    side = share * min(picture.size)
    pull = 0.95 if whole else 0.5  # towards the subject
    left, top = (
        pull * min(max(m * length - side / 2, 0), length - side) + (1 - pull) * u * (length - side)
        for m, u, length in zip(photo.middle, (across, down), picture.size, strict=True)
    )
    box = (left, top, left + side, top + side)
    small = picture.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=2)
    pixels: _Pixels = np.asarray(small, dtype=np.float32) / np.float32(255)
    return pixels[:, ::-1] if flip < 0.5 and not whole else pixels


@cache
def _load(photo: Photo) -> Image.Image:
    try:
        place = distribution(photo.shipper).locate_file(photo.path)  # importing the shipper would take a second
    except PackageNotFoundError:
        raise MissingExtra.of("the case photos", photo.shipper, "cases") from None
    return Image.open(str(place)).convert("RGB")
