"""Faces: grey patches of 25 by 25 pixels, half of them faces."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from typing import ClassVar, final

import numpy as np
import torch

from unbatch.case import Case, Examples
from unbatch.domain import Images
from unbatch.errors import MissingExtra


@final
class Faces(Case):
    """Grey patches of 25 by 25 pixels, half of them faces of people.

    100 faces of people and 100 patches of their background, [1, 25, 25] in [0, 1]; two classes.

    >>> import unbatch
    >>> client = unbatch.cases.Faces(batch=3).setting()
    >>> [client.label_name(label) for label in client.labels]
    ['face', 'face', 'not a face']
    """

    source: ClassVar[str] = (
        "Labeled Faces in the Wild: G. Huang, M. Mattar, T. Berg and E. Learned-Miller, 2007 (news photographs, no "
        "licence stated); the subset lfw_subset.npy that scikit-image ships"
    )

    def pool(self, rng: torch.Generator) -> Examples:
        try:
            place = distribution("scikit-image").locate_file("skimage/data/lfw_subset.npy")
        except PackageNotFoundError:
            raise MissingExtra.of("the case faces", "scikit-image", "cases") from None
        patches = torch.as_tensor(np.load(str(place)), dtype=torch.float32).unsqueeze(1)  # [200, 1, 25, 25]
        order = torch.randperm(len(patches), generator=rng)
        return Examples(
            inputs=patches[order].clamp(0, 1),
            labels=(order >= 100).long(),  # the file holds the faces first
            classes=["face", "not a face"],
            domain=Images(shape=(1, 25, 25)),
        )
