import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from unbatch.benchmarks import find, tensor


def test_the_paper_s_experiments_in_small(tmp_path: Path) -> None:
    """One draw a point: the paper's way is within the published figure at d = 10, the default below it."""
    pytest.importorskip("matplotlib")
    bench = find("tensor")
    rows = bench.run(seconds=0, sizes=(10,), large=False, out=tmp_path)
    stored = json.loads((tmp_path / "tensor.json").read_text())
    assert stored["rows"] == rows
    assert (tmp_path / "tensor.png").stat().st_size > 10_000
    units = [row for row in rows if row["experiment"] == "e_1, e_2"]
    assert [(row["activation"], row["gradient"]) for row in units] == list(tensor.PUBLISHED)
    for row in units:
        assert row["trials"] == 1
        assert (
            row["default"] < row["paper"] < row["published"] == tensor.PUBLISHED[row["activation"], row["gradient"]][0]
        )
    digits = [row["paper"] for row in rows if row["experiment"] == "digits"]
    assert digits[0] > digits[-1]
    console = Console(width=80, record=True)
    console.print(
        bench.table(
            [*rows, {"experiment": "time", "activation": "relu", "measured": "16.9 s, 1.03 GB, worst error 0.052"}]
        )
    )
    text = console.export_text()
    assert "published" in text
    assert "16.9 s" in text
    assert "…" not in text
    assert "e_1, e_2, sigmoid, dL/dW, d = 10" in text


def test_digits_of_a_folder(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist_test500.npz", images=images, labels=np.array([7, 7, 2, 1, 0]))
    pair, source = tensor._digits(tmp_path)
    assert source == "mnist_test500.npz"
    assert pair.shape == (2, 1, 28, 28)
    second = torch.from_numpy(images[2]).float()
    torch.testing.assert_close(pair[1, 0], second / second.norm())
    assert [round(float(x.norm()), 5) for x in pair] == [1, 1]
    with pytest.raises(ValueError, match="no folder for the bundled digits"):
        tensor._digits(tmp_path / "elsewhere")
