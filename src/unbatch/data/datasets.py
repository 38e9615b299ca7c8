"""Datasets: one batch of a torch Dataset or DataLoader, drawn with a seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from unbatch.data.arrays import INPUT_NAMES, LABEL_NAMES, data_of
from unbatch.data.examples import Data
from unbatch.data.labels import Classes
from unbatch.errors import UnbatchError

MOST_WHOLE = 4096  # examples of a Dataset that are taken whole where no batch is asked for
INPUTS = (*INPUT_NAMES, "image", "img", "pixel_values", "input_ids", "features")
LABELS = (*LABEL_NAMES, "class", "fine_label")


def read_dataset(
    source: Dataset[Any] | DataLoader[Any], *, batch: int | None = None, seed: int = 0, classes: Classes = None
) -> Data:
    """One batch of a Dataset, drawn with a seed, or the first that a DataLoader gives under it; the notes say so.

    An example is a pair (input, label) or a mapping with one of each by a usual name. A DataLoader draws with its own
    sampler, and puts examples together as it does in training, without its workers; `batch` takes the first of its batch.
    A Dataset of up to 4,096 examples is taken whole where no `batch` is asked for. Random numbers that others draw go on as
    if nothing had been drawn.
    Raises UnbatchError: an example is no such pair, fails, or there are too few of them.

    >>> from torch.utils.data import TensorDataset
    >>> data = read_dataset(TensorDataset(torch.rand(9, 4), torch.arange(9) % 2), batch=3, seed=1)
    >>> data.inputs.shape, data.notes[0]
    (torch.Size([3, 4]), '3 of 9 examples of a TensorDataset were drawn with seed 1: numbers ...')
    """
    what, name = type(source).__name__, type(getattr(source, "dataset", source)).__name__
    with _seeded(source, seed):
        try:
            held, note = (
                _of_loader(source, seed) if isinstance(source, DataLoader) else _of_dataset(source, batch, seed)
            )
        except UnbatchError:
            raise
        except Exception as error:  # the data set's own: anything may go wrong in it
            said = " ".join(str(error).split()[:40])
            raise UnbatchError(
                f"the {what} gives no batch: {type(error).__name__}: {said}. Its examples must be tensors, arrays or "
                "numbers of one shape each; pictures need a transform to tensors."
            ) from error
    x, y = _pair(held, name)
    found = data_of(_array(x, "inputs"), _array(y, "labels"), classes if classes is not None else _classes(source))
    n = len(found.inputs) if batch is None else batch
    if n > len(found.inputs):
        raise UnbatchError(
            f"a batch of {n} is asked for, and the {what} gives one of {len(found.inputs)}; give at most that."
        )
    return replace(found, inputs=found.inputs[:n], labels=found.labels[:n], notes=[note, *found.notes])


def _of_dataset(source: Dataset[Any], batch: int | None, seed: int) -> tuple[Any, str]:
    """A batch of a Dataset, and how it was drawn."""
    name = type(source).__name__
    if isinstance(source, IterableDataset):
        if batch is None:
            raise UnbatchError(f"the {name} gives examples one after the other without end; say how many (batch).")
        held = list(itertools.islice(source, batch))
        if len(held) < batch:
            raise UnbatchError(f"a batch of {batch} is asked for, and the {name} gives {len(held)} examples.")
        return default_collate(held), f"the first {batch} examples of a {name} were taken, under seed {seed}."
    total = len(source)  # type: ignore[arg-type]  # a map-style Dataset has a length
    n = total if batch is None else batch
    if batch is None and total > MOST_WHOLE:
        raise UnbatchError(f"the {name} holds {total:,} examples; say how many make the batch (batch).")
    if not 1 <= n <= total:
        raise UnbatchError(f"a batch of {n} is asked for, and the {name} holds {total:,} examples.")
    places = sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].tolist())
    shown = ", ".join(map(str, places[:20])) + (", ..." if n > 20 else "")
    note = f"{n} of {total:,} examples of a {name} were drawn with seed {seed}: numbers {shown}."
    return default_collate([source[place] for place in places]), note


def _of_loader(source: DataLoader[Any], seed: int) -> tuple[Any, str]:
    """The first batch of a DataLoader, without its workers, and how it was drawn."""
    name = type(source.dataset).__name__
    note = f"the first batch that a DataLoader of {name} gives under seed {seed} was taken."
    if isinstance(source.dataset, IterableDataset) or source.batch_sampler is None:
        plain = DataLoader(source.dataset, source.batch_size, collate_fn=source.collate_fn)
        return next(iter(plain)), note
    places = next(iter(source.batch_sampler))
    return source.collate_fn([source.dataset[place] for place in places]), note


@contextmanager
def _seeded(source: object, seed: int) -> Iterator[None]:
    """Every generator that a data set draws with at a seed, and afterwards as it was."""
    parts = [getattr(part, "generator", None) for part in (source, getattr(source, "sampler", None))]
    own = [each for each in parts if isinstance(each, torch.Generator)]
    states = [each.get_state() for each in own]
    with torch.random.fork_rng(devices=[]):
        for each in (torch.default_generator, *own):
            each.manual_seed(seed)
        try:
            yield
        finally:
            for each, state in zip(own, states, strict=True):
                each.set_state(state)


def _pair(held: Any, name: str) -> tuple[Any, Any]:
    """Inputs and labels of a batch. Raises UnbatchError: there are several inputs, or none can be told."""
    if isinstance(held, Mapping):
        inputs, labels = ([key for key in names if key in held] for names in (INPUTS, LABELS))
        if len(inputs) == 1 and len(labels) == 1:
            return held[inputs[0]], held[labels[0]]
        raise UnbatchError(
            f"an example of the {name} has {', '.join(map(str, held))}; exactly one of {', '.join(INPUTS)} and one of "
            f"{', '.join(LABELS)} is needed. {SEVERAL}"
        )
    if not isinstance(held, Sequence) or len(held) != 2:
        parts = f"{len(held)} parts" if isinstance(held, list | tuple) else "no label"
        raise UnbatchError(f"an example of the {name} has {parts}, and a pair (input, label) is needed. {SEVERAL}")
    return held[0], held[1]


SEVERAL = (
    "Of several inputs, one is recovered: give a Dataset of that one and the label, and a model whose forward takes it and "
    "holds the others; or join them in Python by unbatch.adapters.several_inputs.InputParts."
)


def _array(value: Any, what: str) -> np.ndarray:
    if isinstance(value, Mapping | list | tuple) and not all(isinstance(each, int | float | str) for each in value):
        raise UnbatchError(f"the {what} are a {type(value).__name__} of several tensors. {SEVERAL}")
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    return np.asarray(value)


def _classes(source: object) -> Classes:
    """The names of classes that a data set says, as torchvision's do."""
    names = getattr(getattr(source, "dataset", source), "classes", None)
    return list(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else None
