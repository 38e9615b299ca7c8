import numpy as np
import pytest
import torch
from PIL import Image

from unbatch.data import read


def test_npz_of_8_bit_pictures(tmp_path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.arange(5), classes=np.array(list("abcde")))
    data = read(tmp_path / "d.npz")
    assert data.inputs.shape == (5, 3, 8, 8)
    assert data.inputs[2, 1, 3, 4] == pytest.approx(pixels[2, 3, 4, 1] / 255)
    assert data.domain.name == "images"
    assert data.classes == list("abcde")
    assert len(data.notes) == 2


def test_a_folder_with_one_sub_folder_a_class(tmp_path) -> None:
    for i, name in enumerate(["cat", "dog", "cat"]):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (6 + i, 6), (255, 0, 0)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match="images of 3 sizes; give --size"):
        read(tmp_path)
    data = read(tmp_path, size=4)
    assert data.inputs.shape == (3, 3, 4, 4)
    assert data.labels.tolist() == [0, 0, 1]
    assert data.inputs[0, 0].min() == 1


def test_csv(tmp_path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("age,work,label\n20,a,no\n40,b,yes\n60,a,no\n")
    data = read(path)
    assert data.domain.columns == ("age", "work=a", "work=b")
    assert data.inputs[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert data.inputs[:, 1].tolist() == [1, 0, 1]
    assert data.labels.tolist() == [0, 1, 0]
    assert data.classes == ["no", "yes"]


def spoil(tmp_path, kind: str):
    path = tmp_path / {"csv": "x.csv", "npz": "x.npz", "dir": "x", "odd": "x.xml"}[kind.split()[0]]
    if kind == "dir empty":
        path.mkdir()
    elif kind == "dir unreadable":
        path.mkdir()
        (path / "broken.png").write_bytes(b"no picture")
    elif kind == "csv binary":
        path.write_bytes(b"\xff\xfe\x00\x81")
    elif kind == "csv header":
        path.write_text("a,b\n")
    elif kind == "csv ragged":
        path.write_text("a,b\n1,2\n3\n")
    elif kind == "csv nan":
        path.write_text("a,label\nnan,2\n3,1\n")
    elif kind == "csv one":
        path.write_text("label\n2\n")
    elif kind == "npz truncated":
        np.savez(path, inputs=np.ones(3), labels=np.ones(3))
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "npz pickled":
        np.savez(path, inputs=np.array([{}], dtype=object), labels=np.ones(1))
    elif kind == "npz keys":
        np.savez(path, a=np.ones(2))
    elif kind == "odd kind":
        path.write_text("<x/>")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dir empty", "holds no images"),
        ("dir unreadable", "cannot read the image .*broken.png"),
        ("csv binary", "cannot read"),
        ("csv header", "no rows below its header"),
        ("csv ragged", "line 3: 1 fields where the header has 2"),
        ("csv nan", "column 'a' holds NaN"),
        ("csv one", "only the label column"),
        ("csv gone", "does not exist"),
        ("npz truncated", "cannot read"),
        ("npz pickled", "cannot read"),
        ("npz keys", "holds a; it needs one of inputs"),
        ("odd kind", "unknown kind '.xml'"),
    ],
)
def test_bad_data_is_said(tmp_path, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(spoil(tmp_path, kind))


def test_reading_draws_nothing_from_torch() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="does not exist"):
        read(__import__("pathlib").Path("/nowhere"))
    assert torch.equal(before, torch.get_rng_state())
