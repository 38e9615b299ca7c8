"""Data: a user's own examples from an npz file, a folder of images or a csv table, and what was done to read them."""

from __future__ import annotations

from pathlib import Path

from unbatch.data.arrays import read_arrays
from unbatch.data.datasets import read_dataset as read_dataset
from unbatch.data.examples import Data as Data
from unbatch.data.labels import Classes
from unbatch.data.pictures import read_pictures
from unbatch.data.table import read_table
from unbatch.errors import UnbatchError


def read(path: str | Path, *, size: int | None = None, classes: Classes = None) -> Data:
    """Read by what `path` is: a folder of images, `.npz`, or `.csv`; whatever is done to the values stands in `notes`.

    `size` resizes pictures to size x size. `classes` are the names of the model's classes in its order, or their number,
    for a client who holds a few of them. Whole numbers from 0 on are class numbers as they stand; other numbers are real
    targets as they stand; words, and folders' names, are classes in the order given, else in alphabetical order.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "people.csv"
    ...     _ = path.write_text("age,job,label\\n39,clerk,no\\n50,cook,yes\\n")
    ...     data = read(path)
    >>> data.domain.columns, data.labels.tolist(), list(data.classes)
    (('age', 'job=clerk', 'job=cook'), [0, 1], ['no', 'yes'])
    >>> data.domain.render(data.inputs[1])
    'age = 50, job = cook'

    Raises UnbatchError: nothing there, an empty folder, a file that cannot be read, missing values, or examples of
    different shapes.
    """
    path = Path(path)
    if not path.exists():
        raise UnbatchError(f"{path} does not exist; give an .npz file, a .csv file or a folder of images.")
    if path.is_dir():
        return read_pictures(path, size, classes)
    if path.suffix.lower() == ".npz":
        return read_arrays(path, classes)
    if path.suffix.lower() == ".csv":
        return read_table(path, classes)
    raise UnbatchError(f"{path}: unknown kind {path.suffix!r}; give an .npz file, a .csv file or a folder of images.")
