import json
import zipfile

import numpy as np
import pytest
import torch
from clients import Exchange, linear
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from unbatch import Attack, Observation
from unbatch.bundle import model_name


def test_a_bundle_round_trips(exchange: Exchange, tmp_path) -> None:
    obs, x, y = exchange(linear(), shape=(4,), n=3, tell=True, input_range=(0, 1), noise=0.5)
    path = tmp_path / "captured.safetensors"
    obs.save(path)
    fresh = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    again = Observation.load(path, model=fresh, loss=F.cross_entropy)
    assert all(torch.equal(again.update[k], obs.update[k]) for k in obs.update)
    assert again.residual(x, y) == 0  # the bundle's parameters, not the factory's
    assert set(again.knowledge) == set(obs.knowledge)
    assert again.knowledge.input_range == (0.0, 1.0)
    assert torch.equal(again.knowledge.labels, obs.knowledge.labels)
    assert again.protocol == obs.protocol
    assert model_name(path) == "Sequential"
    assert not torch.equal(fresh[0].weight, again.model[0].weight)  # a copy was filled


def test_callables_are_not_written(exchange: Exchange, tmp_path) -> None:
    obs, _, _ = exchange(linear(), shape=(4,), n=3, log_prob=lambda seen, clean: torch.zeros(()))
    obs.save(tmp_path / "b")
    assert "log_prob" not in Observation.load(tmp_path / "b", model=linear(), loss=F.cross_entropy).knowledge


def test_attacks_run_on_what_was_loaded(exchange: Exchange, tmp_path) -> None:
    obs, x, y = exchange(linear(), shape=(4,))
    obs.save(tmp_path / "b")
    found = Attack.parse("bias-ratio")(Observation.load(tmp_path / "b", model=linear(), loss=F.cross_entropy))
    torch.testing.assert_close(found.inputs, x, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels, y)


def broken(obs: Observation, tmp_path, kind: str):
    path = tmp_path / "captured.safetensors"
    obs.save(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "pickle":
        torch.save(dict(obs.update), path)
    elif kind == "old pickle":
        torch.save(dict(obs.update), path, _use_new_zipfile_serialization=False)
    elif kind == "garbage":
        path.write_bytes(b"hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    elif kind == "no update":
        save_file({"state/x": torch.ones(2)}, path, {"format": "unbatch-observation", "schema": "1"})
    elif kind == "odd knowledge":
        facts = {"format": "unbatch-observation", "schema": "1", "knowledge": json.dumps({"password": 1})}
        save_file({"update/0.bias": torch.ones(5)}, path, facts)
    elif kind == "missing":
        path.unlink()
    elif kind in ("npz", "npy"):
        arrays = [tensor.numpy() for tensor in obs.update.values()]
        with path.open("wb") as file:
            np.savez(file, *arrays) if kind == "npz" else np.save(file, arrays[0])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("round-1.csv", "1, 2")
    elif kind == "broken zip":
        path.write_bytes(b"PK\x03\x04 and no more")
    elif kind == "hdf5":
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "no whole safetensors file"),
        ("pickle", "is a pickle"),
        ("old pickle", "is a pickle"),
        ("garbage", "no whole safetensors file"),
        ("empty", "no whole safetensors file"),
        ("foreign", "format 'none'"),
        ("no update", "holds no update"),
        ("odd knowledge", "claims knowledge of password"),
        ("missing", "cannot read"),
        ("npz", r"is a numpy archive \(npz\), and no bundle\. unbatch\.read_exchange\(path"),
        ("npy", r"is a numpy array \(npy\)"),
        ("zip", r"is a zip archive of 1 files"),
        ("broken zip", "a damaged zip archive"),
        ("hdf5", "is an HDF5 file"),
    ],
)
def test_what_is_no_bundle_is_refused_in_words(exchange: Exchange, tmp_path, kind: str, words: str) -> None:
    path = broken(exchange(linear(), shape=(4,), n=3)[0], tmp_path, kind)
    with pytest.raises(ValueError, match=words):
        Observation.load(path, model=linear(), loss=F.cross_entropy)


def test_another_model_is_refused_with_the_captured_one_s_name(exchange: Exchange, tmp_path) -> None:
    exchange(linear(), shape=(4,), n=3)[0].save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"captured from another model \(Sequential\)"):
        Observation.load(tmp_path / "b", model=linear(d=7), loss=F.cross_entropy)
