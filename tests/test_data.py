"""A user's own data: values by bit depth, targets as they stand, and a sentence for whatever was done."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unbatch.data import read
from unbatch.errors import UnbatchError


def told(data) -> str:
    return " ".join(data.notes)


def table(tmp_path: Path, text: str, **options):
    path = tmp_path / "t.csv"
    path.write_text(text)
    return read(path, **options)


def folder(tmp_path: Path, **pictures: Image.Image) -> Path:
    """A folder of PNG files by name."""
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    return tmp_path


# --- npz


def arrays(tmp_path: Path, inputs, labels, **more):
    np.savez(tmp_path / "d.npz", inputs=inputs, labels=labels, **more)
    return read(tmp_path / "d.npz")


def test_npz_of_8_bit_pictures(tmp_path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.arange(5), classes=np.array(list("abcde")))
    data = read(tmp_path / "d.npz")
    assert data.inputs.shape == (5, 3, 8, 8)
    assert data.inputs[2, 1, 3, 4] == pytest.approx(pixels[2, 3, 4, 1] / 255)
    assert data.domain.name == "images"
    assert data.classes == list("abcde")
    assert "divided by 255" in told(data)
    assert "channels were moved first" in told(data)


@pytest.mark.parametrize(("kind", "most"), [("uint8", 255), ("uint16", 65535)])
def test_npz_pictures_are_scaled_by_their_bit_depth(tmp_path, kind: str, most: int) -> None:
    pixels = np.linspace(0, most, 128).reshape(2, 8, 8).astype(kind)
    data = arrays(tmp_path, pixels, [1, 2])
    assert data.inputs.shape == (2, 1, 8, 8)
    assert data.inputs[:, 0].numpy() == pytest.approx(pixels / most, abs=1e-6)
    assert f"divided by {most:,}" in told(data)
    assert "were given one" in told(data)


@pytest.mark.parametrize("kind", ["float16", ">f4", "float32", "float64", "longdouble", "bool"])
def test_npz_values_of_other_kinds_stand(tmp_path, kind: str) -> None:
    values = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]).astype(kind)
    data = arrays(tmp_path, values, [0, 1])
    assert data.inputs.is_floating_point()
    assert data.inputs.tolist() == values.astype(float).tolist()
    assert ("read as" in told(data)) == (kind in ("float16", "longdouble", "bool"))


def test_npz_floats_beyond_the_unit_range_are_told(tmp_path) -> None:
    data = arrays(tmp_path, np.array([[0.0, 254.0]]), [1])
    assert data.inputs.tolist() == [[0, 254]]
    assert "as they stand, 0 to 254" in told(data)


@pytest.mark.parametrize("kind", ["int16", "int32", "int64", "uint32"])
def test_npz_whole_numbers_without_a_range_are_refused_and_rows_of_them_are_tokens(tmp_path, kind: str) -> None:
    with pytest.raises(UnbatchError, match=f"{kind} from 0 to 300, and nothing says what range"):
        arrays(tmp_path, np.array([[[0, 300]]]).astype(kind), [1])
    data = arrays(tmp_path, np.array([[0, 300]]).astype(kind), [1])
    assert data.domain.name == "tokens"
    assert "read as token numbers" in told(data)


@pytest.mark.parametrize(
    ("labels", "expected", "words"),
    [
        ([3, 1], [3, 1], "class numbers as they stand, 1 to 3"),
        (np.array([3, 1], dtype="uint8"), [3, 1], "class numbers"),
        ([[3], [1]], [3, 1], r"the shape [2, 1] of class numbers was read as [2]"),
        ([-1, 1], [-1.0, 1.0], "real numbers as they stand, -1 to 1"),
        ([1.0, 2.0], [1.0, 2.0], "All of them are whole"),
        ([0.25, 2.0], [0.25, 2.0], "real numbers as they stand, 0.25 to 2."),
        ([[0.25], [2.0]], [[0.25], [2.0]], "real numbers"),
        ([[0, 0, 1], [1, 0, 0]], [[0.0, 0, 1], [1, 0, 0]], "one-hot rows of 3 classes"),
        ([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]], "real numbers"),
        (["dog", "cat"], [1, 0], "alphabetical order, 0 = cat, 1 = dog"),
        ([b"dog", b"cat"], [1, 0], "alphabetical order, 0 = cat, 1 = dog"),
        (["10", "2"], [10, 2], "class numbers as they stand, 2 to 10"),
        (["-1", "1"], [-1.0, 1.0], "real numbers as they stand, -1 to 1"),
        (["10", "two"], [0, 1], "alphabetical order, 0 = 10, 1 = two"),
        ([True, False], [1, 0], "class numbers"),
        ([[0, 2, 1], [1, 1, 0]], [[0, 2, 1], [1, 1, 0]], "class numbers"),
    ],
)
def test_npz_labels_keep_what_they_say(tmp_path, labels, expected, words: str) -> None:
    data = arrays(tmp_path, np.ones((2, 3), "float32"), np.array(labels))
    assert data.labels.tolist() == expected
    assert data.labels.is_floating_point() == isinstance(np.array(expected).ravel()[0], np.floating)
    assert words in told(data)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"labels": np.array([{}], dtype=object)}, "Python objects is a pickle"),
        ({"labels": np.array([1j])}, "neither numbers nor text"),
        ({"labels": np.array([np.nan])}, "NaN or infinite"),
        ({"labels": np.array([2**63], dtype="uint64")}, "beyond 64-bit"),
        ({"inputs": np.array([["a"]])}, "no numbers that a model takes"),
        ({"inputs": np.array([[1j]])}, "no numbers that a model takes"),
        ({"labels": np.array([5]), "classes": np.array(["a", "b"])}, "run from 5 to 5, but there are 2 classes"),
        ({"labels": np.array(["z"]), "classes": np.array(["a", "b"])}, "z is none of the given classes a, b"),
    ],
)
def test_npz_refused_in_words(tmp_path, more: dict, words: str) -> None:
    np.savez(tmp_path / "d.npz", **({"inputs": np.ones((1, 2)), "labels": np.ones(1, int)} | more))
    with pytest.raises(UnbatchError, match=words):
        read(tmp_path / "d.npz")


# --- pictures

GREY = np.linspace(0, 1, 64).reshape(8, 8)
DEEP = {
    "8.png": (GREY * 255).round().astype("uint8"),
    "16.png": (GREY * 65535).round().astype("uint16"),
    "16.tif": (GREY * 65535).round().astype("uint16"),
    "float.tif": GREY.astype("float32"),
    "1.png": GREY > 0.5,
    "1.tif": GREY > 0.5,
    "8.gif": (GREY * 255).round().astype("uint8"),
    "8.bmp": (GREY * 255).round().astype("uint8"),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("size", [None, 4])
def test_grey_pictures_have_one_channel_and_values_by_their_bit_depth(tmp_path, name: str, size: int | None) -> None:
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    data = read(tmp_path, size=size)
    assert data.inputs.shape == (1, 1, size or 8, size or 8)
    assert data.domain.shape == (1, size or 8, size or 8)
    if size is None:
        expected = (GREY > 0.5).astype(float) if name.startswith("1.") else GREY
        assert data.inputs[0, 0].numpy() == pytest.approx(expected, abs=0.002)
    else:
        assert 0 <= data.inputs.min() < 0.2 < 0.8 < data.inputs.max() <= 1
        assert "resized to 4 x 4" in told(data)
    for start, words in {"16.": "16-bit values were divided by 65,535", "float": "were kept as they stand"}.items():
        assert (words in told(data)) == name.startswith(start)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ((GREY * 255).astype("float32"), "floating point values from 0 to 255, and nothing says"),
        (np.full((8, 8), np.nan, "float32"), "floating point values from nan"),
        ((GREY * 255).astype("int32"), "whole numbers of 32 bits, or signed ones, from 0 to 255"),
    ],
)
def test_pictures_whose_values_have_no_range_are_refused(tmp_path, array: np.ndarray, words: str) -> None:
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(UnbatchError, match=words):
        read(tmp_path)


def colour_png_of_16_bits(pixels: np.ndarray) -> bytes:
    """[h, w, 3] of uint16, which Pillow cannot write."""

    def chunk(kind: bytes, held: bytes) -> bytes:
        return struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))

    h, w = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bits_a_colour_are_told_to_be_cut(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype("uint16")
    (tmp_path / "a.png").write_bytes(colour_png_of_16_bits(pixels))
    data = read(tmp_path)
    assert data.inputs[0].permute(1, 2, 0).numpy() == pytest.approx(pixels / 65535, abs=1 / 255)
    assert "16 bits a colour, of which the upper 8 were read" in told(data)


def test_grey_among_colours_is_repeated_and_told(tmp_path) -> None:
    data = read(folder(tmp_path, a=Image.new("L", (4, 4), 51), b=Image.new("RGB", (4, 4), (255, 0, 0))))
    assert data.inputs.shape == (2, 3, 4, 4)
    assert data.inputs[0].unique().tolist() == pytest.approx([0.2])
    assert "1 of 2 pictures: grey repeated over three channels" in told(data)


@pytest.mark.parametrize(
    ("mode", "words"),
    [("RGBA", "transparent parts"), ("LA", "transparent parts"), ("P", "palette"), ("CMYK", "converted from CMYK")],
)
def test_other_colours_are_read_and_told(tmp_path, mode: str, words: str) -> None:
    picture = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(7)
    picture.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    data = read(tmp_path)
    assert len(data.inputs[0]) == (1 if mode == "LA" else 3)
    assert data.inputs[0, 0, 0, 0] == pytest.approx(76 / 255 if mode == "LA" else 1, abs=0.01)
    assert words in told(data)


def test_an_opaque_alpha_and_a_grey_palette_change_nothing(tmp_path) -> None:
    ramp = Image.fromarray(DEEP["8.png"])
    palette = ramp.convert("RGB").quantize(64)
    data = read(folder(tmp_path, a=ramp.convert("LA"), b=palette))
    assert data.inputs.shape == (2, 1, 8, 8)
    assert "transparent" not in told(data)


def test_a_turned_photograph_stands_upright_and_of_a_film_the_first_frame_is_taken(tmp_path) -> None:
    turned = Image.fromarray(np.array([[0, 255], [0, 255]], dtype="uint8"))
    notes = Image.Exif()
    notes[0x0112] = 6  # turn a quarter to the right
    turned.save(tmp_path / "a.png", exif=notes)
    film = [Image.new("L", (2, 2), shade) for shade in (0, 255)]
    film[0].save(tmp_path / "b.gif", save_all=True, append_images=film[1:])
    data = read(tmp_path)
    assert data.inputs[0, 0].tolist() == [[0, 0], [1, 1]]
    assert data.inputs[1].unique().tolist() == [0]
    assert "1 of 2 pictures: turned upright" in told(data)
    assert "1 of 2 pictures: the first of several frames" in told(data)


def sorted_folder(tmp_path: Path, *places: str) -> Path:
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / place)
    return tmp_path


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
    assert "0 = cat, 1 = dog" in told(data)
    few = read(tmp_path, size=4, classes=["ant", "dog", "cat"])
    assert (few.labels.tolist(), few.classes) == ([2, 2, 1], ["ant", "dog", "cat"])


def test_folders_named_by_numbers_are_class_numbers(tmp_path) -> None:
    data = read(sorted_folder(tmp_path, "10/a.png", "2/a.png"))
    assert data.labels.tolist() == [10, 2]
    assert read(tmp_path, classes=["2", "10"]).labels.tolist() == [1, 0]


def test_a_flat_folder_says_that_labels_are_not_known(tmp_path) -> None:
    data = read(sorted_folder(tmp_path, "a.png", "b.png"))
    assert data.labels.tolist() == [0, 0]
    assert "labels are not known" in told(data)
    assert "label 0, cat, as given" in told(read(tmp_path, classes=["cat"]))
    with pytest.raises(UnbatchError, match="does not say which picture is of which class"):
        read(tmp_path, classes=["cat", "dog"])


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (("a.png", "cat/b.png"), r"pictures beside its class folders \(a.png\)"),
        (("train/cat/a.png", "train/dog/b.png"), r"one folder, 'train', with folders in it \(cat, dog\)"),
    ],
)
def test_classes_that_are_not_clear_are_refused(tmp_path, places: tuple[str, ...], words: str) -> None:
    with pytest.raises(UnbatchError, match=words):
        read(sorted_folder(tmp_path, *places))


def test_hidden_files_are_left_out(tmp_path) -> None:
    sorted_folder(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "._a.png").write_bytes(b"a resource fork")
    data = read(tmp_path)
    assert len(data.inputs) == 1
    assert "1 hidden files were left out" in told(data)


def test_what_else_lies_in_a_folder_is_told(tmp_path) -> None:
    sorted_folder(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "b.heic").write_bytes(b"a photograph of a kind that is not read")
    (tmp_path / "dog").mkdir()
    notes = told(read(tmp_path))
    assert "were left out: b.heic." in notes
    assert "folders without a picture were not counted as classes: dog." in notes


def test_a_file_that_is_no_archive_is_not_called_a_pickle(tmp_path) -> None:
    (tmp_path / "d.npz").write_text("inputs,labels")
    with pytest.raises(UnbatchError, match=r"it is no \.npz file \(a zip archive of arrays\)\. Save it with"):
        read(tmp_path / "d.npz")


# --- csv


def test_csv(tmp_path) -> None:
    data = table(tmp_path, "age,work,label\n20,a,no\n40,b,yes\n60,a,no\n")
    assert data.domain.columns == ("age", "work=a", "work=b")
    assert data.inputs[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert data.inputs[:, 1].tolist() == [1, 0, 1]
    assert data.labels.tolist() == [0, 1, 0]
    assert data.classes == ["no", "yes"]
    assert data.domain.categories == ((1, 2),)
    assert [data.domain.render(row) for row in data.inputs[:2]] == ["age = 20, work = a", "age = 40, work = b"]
    assert "age 40 and 16.33" in told(data)
    assert "work (2)" in told(data)
    assert "0 = no, 1 = yes" in told(data)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["3.25", "-7.5", "100", "12"], [3.25, -7.5, 100.0, 12.0]),
        (["-1", "1", "-1"], [-1.0, 1.0, -1.0]),
        ([str(k) for k in range(12)], list(range(12))),
        (["3", "7"], [3, 7]),
        (["007", "+7"], [7, 7]),
        (["1.0", "2.0"], [1.0, 2.0]),
        (["1e-3", "2"], [pytest.approx(1e-3), 2.0]),
        (["True", "False"], [1, 0]),
        (["b", "10", "a"], [2, 0, 1]),
        (["99999999999999999999", "1"], [pytest.approx(1e20), 1.0]),
    ],
)
def test_csv_targets_are_kept(tmp_path, answers: list[str], expected: list[float]) -> None:
    data = table(tmp_path, "a,y\n" + "".join(f"{k},{answer}\n" for k, answer in enumerate(answers)))
    assert data.labels.tolist() == expected
    assert data.labels.is_floating_point() == any(isinstance(v, float) for v in data.labels.tolist())


@given(st.lists(st.one_of(st.integers(0, 10**6), st.floats(-1e6, 1e6, allow_subnormal=False)), min_size=1, max_size=20))
def test_any_numbers_come_back_as_targets(tmp_path_factory, targets: list[float]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_text("a,y\n" + "".join(f"1,{target!r}\n" for target in targets))
    assert read(path).labels.tolist() == pytest.approx(targets, rel=1e-6)


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False, width=32), min_size=1, max_size=12))
def test_rows_in_words_are_the_file_s_own_values(tmp_path_factory, ages: list[float]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_text("age,y\n" + "".join(f"{age!r},1\n" for age in ages))
    data = read(path)
    shown = [float(data.domain.render(row).removeprefix("age = ")) for row in data.inputs]
    reach = max(map(abs, ages))
    assert shown == pytest.approx(ages, abs=1e-3 * reach)
    assert bool(((data.inputs >= data.domain.low) & (data.inputs <= data.domain.high)).all())


def test_one_row_and_a_constant_column_keep_their_values(tmp_path) -> None:
    one = table(tmp_path, "a,b,y\n.1,.5,1\n")
    assert one.inputs.tolist() == [pytest.approx([0.1, 0.5])]
    assert "kept as they stand, since one row has no spread: a, b" in told(one)
    assert "standardised" not in told(one)
    two = table(tmp_path, "a,b,y\n.1,.5,1\n.1,.7,0\n.1,.9,0\n")
    assert two.inputs[:, 0].tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert "all their values are the same: a" in told(two)
    assert table(tmp_path, "pay,y\n50000,1\n").domain.high == 50000


def test_classes_of_a_client_that_holds_a_few(tmp_path) -> None:
    text = "a,y\n1,dog\n2,cat\n"
    assert table(tmp_path, text, classes=["ant", "cat", "dog"]).labels.tolist() == [2, 1]
    assert table(tmp_path, text, classes=2).labels.tolist() == [1, 0]
    with pytest.raises(UnbatchError, match=r"2 classes \(cat, dog\) where there are 3, so their numbers are not known"):
        table(tmp_path, text, classes=3)
    with pytest.raises(UnbatchError, match="cat is none of the given classes ant, dog"):
        table(tmp_path, text, classes=["ant", "dog"])
    with pytest.raises(UnbatchError, match="give every class's name once"):
        table(tmp_path, text, classes=["cat", "cat"])
    numbers = "a,y\n1,1\n2,3\n"
    assert table(tmp_path, numbers, classes=["1", "2", "3"]).labels.tolist() == [0, 2]  # counted from 1
    assert table(tmp_path, numbers, classes=["a", "b", "c", "d"]).classes == ["a", "b", "c", "d"]
    assert table(tmp_path, numbers, classes=4).labels.tolist() == [1, 3]
    with pytest.raises(UnbatchError, match="run from 1 to 3, but there are 3 classes"):
        table(tmp_path, numbers, classes=3)
    with pytest.raises(UnbatchError, match="real numbers and no class numbers"):
        table(tmp_path, "a,y\n1,0.5\n2,3\n", classes=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("age,y\n39,1\n,0\n", "line 3: column 'age' holds no value"),
        ("age,y\n39,1\nNA,0\n41,0\n", "line 3: column 'age' holds no value .'NA'.; fill it in or drop the row"),
        ("age,y\n39,1\n40,0\nold,0\n", "line 4: column 'age' holds 'old' among numbers"),
        ("job,y\ncook,1\n ,0\n", "line 3: column 'job' holds no value"),
        ("job,y\ncook,1\nclerk,\n", "line 3: column 'y' holds no value"),
        ("a,y\n1,3\n2,NA\n3,4\n", "line 3: column 'y' holds no value"),
        ("a;y\n1,5;3\n2,5;4\n", "line 2: column 'a' holds '1,5'; write numbers with a decimal point"),
        ("0.1,0.5,1\n0.2,0.7,0\n", "the first line holds numbers"),
        ("a,a,y\n1,2,0\n", "two columns are named 'a'"),
        (",a,y\n0,2,0\n", "column 1 has no name"),
        ("a,y\n1e39,0\n2,1\n", "line 2: column 'a' holds 1e39, which is beyond any range"),
        ("a,y\ninf,0\n2,1\n", "line 2: column 'a' holds NaN or an infinite value"),
        ('a,y\n"1,0\n', "unexpected end of data"),
        ("a,y\n" + "".join(f"w{k},0\n" for k in range(1001)), "1,001 different words, more than 1,000"),
    ],
)
def test_csv_refused_in_words(tmp_path, text: str, words: str) -> None:
    with pytest.raises(UnbatchError, match=words):
        table(tmp_path, text)


def test_words_for_what_is_missing_among_words_are_told(tmp_path) -> None:
    data = table(tmp_path, "job,y\ncook,1\n?,0\nclerk,0\n")
    assert data.domain.columns == ("job=?", "job=clerk", "job=cook")
    assert "taken as categories of their own: job=?" in told(data)
    mixed = table(tmp_path, "size,y\nM,1\n38,0\nL,0\n")
    assert "some of these categories are numbers, but most are words: size" in told(mixed)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_a_byte_order_mark_and_quoted_names(tmp_path, separator: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f'"a, or b"{separator}y\n1{separator}3\n\n2{separator}4\n', encoding="utf-8-sig")
    data = read(path)
    assert data.domain.columns == ("a, or b",)
    assert data.labels.tolist() == [3, 4]
    assert "columns are separated by" in told(data)


# --- all of them


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
    elif kind == "npz npy":
        with path.open("wb") as file:
            np.save(file, np.ones(2))
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
        ("npz npy", "a single array without a name"),
        ("odd kind", "unknown kind '.xml'"),
    ],
)
def test_bad_data_is_said(tmp_path, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(spoil(tmp_path, kind))


def test_reading_draws_nothing_from_torch() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="does not exist"):
        read(Path("/nowhere"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_path_may_be_text(tmp_path) -> None:
    table(tmp_path, "a,y\n1,0\n2,1\n")
    assert read(str(tmp_path / "t.csv")).labels.tolist() == [0, 1]


def test_classes_and_categories_that_differ_by_case_or_spaces_alone_are_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sex,size,label\nMale,1,true\nmale,2,True\nfemale,3,false\nfemale,4,true \n")
    notes = " ".join(read(tmp_path / "rows.csv").notes)
    assert "kept apart, though they differ by case or spaces alone: True and true" in notes
    assert "column 'sex': kept apart, though they differ by case or spaces alone: Male and male" in notes
    (tmp_path / "rows.csv").write_text("sex,size,label\nmale,1,true\nfemale,2,false\n")
    assert "kept apart" not in " ".join(read(tmp_path / "rows.csv").notes)
