"""Pictures: the examples on which benchmarks measure, of a folder or bundled; no benchmark itself."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unbatch.case import Case
from unbatch.errors import UnbatchError

FILES = {  # in the folder that a benchmark is given
    "cifar10": "cifar10_test600.npz",
    "mnist": "mnist_test500.npz",
    "fashion": "fashion_mnist500.npz",
    "adult": "adult2000.csv",
}
BUNDLED = {  # what is there without a folder, or takes a file's place
    "cifar10": "photos:batch=500",
    "mnist": "digits:batch=20",
    "photos": "photos:batch=500",
    "photos64": "photos:size=64,batch=300",
    "breast-cancer": "tables:dataset=breast-cancer,batch=300",
}
TABLES = {"adult", "breast-cancer"}  # rows of numbers that are standardised


@cache
def pool(name: str, data: Path | None) -> tuple[Tensor, Tensor]:
    """All examples of one name: pictures [p, c, h, w] in [0, 1], or rows [p, d] of a table, and their labels [p].

    Of the folder `data`, which holds a file of FILES (npz with images uint8 [p, h, w, c] or [p, h, w], and labels; or a
    csv); the bundled ones of BUNDLED where no folder is given, or the name is no file's.
    Raises UnbatchError: the folder does not hold the file, or without a folder nothing takes its place.

    >>> rows, labels = pool("breast-cancer", None)
    >>> rows.shape, labels.shape
    (torch.Size([300, 30]), torch.Size([300]))
    """
    if name in FILES and data is not None:
        path = data / FILES[name]
        if not path.is_file():
            instead = f", or no folder for the bundled {source(name, None)}" if name in BUNDLED else ""
            raise UnbatchError(f"{path} does not exist; give a folder that holds it{instead}.")
        return _table(path) if path.suffix == ".csv" else _images(path)
    if name not in BUNDLED:
        raise UnbatchError(f"{name} is not bundled; give a folder that holds {FILES.get(name, 'it')}.")
    setting = Case.parse(BUNDLED[name]).setting()
    return setting.inputs, setting.labels


def source(name: str, data: Path | None) -> str:
    """Where `pool` finds the examples of that name: a file's name, or a bundled case's.

    >>> source("cifar10", Path("elsewhere")), source("cifar10", None)
    ('cifar10_test600.npz', 'photos')
    """
    return FILES[name] if name in FILES and data is not None else BUNDLED[name].partition(":")[0]


def _images(path: Path) -> tuple[Tensor, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    return images.float() / 255, labels


def _table(path: Path) -> tuple[Tensor, Tensor]:
    """Rows of a csv: numbers with zero mean and unit variance, words one-hot; the last column is the label."""
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    columns = np.array(rows).T
    numeric = [c for c in columns[:-1] if all(value.lstrip("-").isdigit() for value in c)]
    words = [c for c in columns[:-1] if not all(value.lstrip("-").isdigit() for value in c)]
    scaled = StandardScaler().fit_transform(np.array(numeric, dtype=float).T)
    coded = OneHotEncoder(sparse_output=False).fit_transform(np.array(words).T)
    labels = np.unique(columns[-1], return_inverse=True)[1]
    return torch.from_numpy(np.concatenate([scaled, coded], 1)), torch.from_numpy(labels).long()
