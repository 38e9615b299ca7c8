"""Files of strangers: what a client sent, however it was kept, becomes the update that it is, or a sentence on why not."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation, UnbatchError, read_exchange
from unbatch.auditing.compression import compression
from unbatch.auditing.diagnosis import unreadable
from unbatch.data.payload import read_payload
from unbatch.torch_file import lay_out, read_torch_file

X = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([3, 5, 0, 3])
KNOWN = Knowledge(input_shape=(3, 6, 6), batch_size=4)
RATE = 0.1
State = Mapping[str, Tensor]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test wrote itself are opened in this process, which takes no second."""

    def run(words: list[str], **options: Any) -> SimpleNamespace:
        lay_out(*words[-2:])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("unbatch.torch_file.subprocess.run", run)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def trained(model: nn.Module, steps: int = 1, mode: bool = True) -> nn.Module:
    """The model after a client's local steps."""
    after = copy.deepcopy(model).train(mode)
    optimiser = torch.optim.SGD(after.parameters(), lr=RATE)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(after(X), Y).backward()
        optimiser.step()
    return after


def gradient(model: nn.Module) -> dict[str, Tensor]:
    found = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def numbers(state: State) -> list[Any]:
    return [tensor.tolist() for tensor in state.values()]


def npz(path: Path, state: State) -> None:
    np.savez(path, *(tensor.numpy() for tensor in state.values()))


def named_npz(path: Path, state: State) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})


def of_torch(make: Callable[[State], Any]) -> Callable[[Path, State], None]:
    return lambda path, state: torch.save(make(state), path)


def bare(path: Path, state: State) -> None:
    """Without an optimiser or a name that tells: what a loop over parameters keeps."""
    torch.save([tensor for name, tensor in state.items() if "running" not in name and "num_batches" not in name], path)


MOMENTUM = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.25, momentum=0.9)
WAYS: dict[str, tuple[str, Callable[[Path, State], None], str]] = {
    "npz in order": ("a.npz", npz, "11 arrays without names were taken in the order of the model."),
    "npz by name": ("a.npz", named_npz, ""),
    "safetensors": ("a.safetensors", lambda path, state: save_file(dict(state), path), ""),
    "state dict": ("a.pt", of_torch(dict), ""),
    "old torch": ("a.pth", lambda p, state: torch.save(dict(state), p, _use_new_zipfile_serialization=False), ""),
    "list": ("a.pt", of_torch(lambda state: list(state.values())), "in the order of the model"),
    "arrays in torch": (
        "a.pt",
        of_torch(lambda state: [t.numpy() for t in state.values()]),
        "in the order of the model",
    ),
    "pairs": ("a.pt", of_torch(lambda state: list(state.items())), ""),
    "parameters": ("a.pt", bare, "8 arrays without names"),
    "wrapped": ("a.pt", of_torch(lambda state: {f"module.{k}": t for k, t in state.items()}), "'module.', which stood"),
    "compiled": (
        "a.safetensors",
        lambda path, state: save_file({f"_orig_mod.{k}": t for k, t in state.items()}, path),
        "'_orig_mod.', which stood before every name, was dropped.",
    ),
    "lightning": (
        "a.ckpt",
        of_torch(lambda state: {"epoch": 3, "state_dict": {f"model.{k}": t for k, t in state.items()}, "loops": {}}),
        "its tensors are those under 'state_dict'",
    ),
    "checkpoint": (
        "a.pt",
        of_torch(lambda state: {"model": dict(state), "optimizer": MOMENTUM.state_dict(), "epoch": 2}),
        "beside them is the state of SGD; if the client ran it, say so: --protocol learning_rate=0.25,momentum=0.9.",
    ),
    "a layer each": (
        "a.pt",
        of_torch(
            lambda state: {
                layer: {k.partition(".")[2]: t for k, t in state.items() if k.startswith(f"{layer}.")}
                for layer in dict.fromkeys(k.partition(".")[0] for k in state)
            }
        ),
        "",
    ),
    "nested lists of arrays": (
        "a.pt",
        of_torch(lambda state: [list(state.values())[:2], [list(state.values())[2:]]]),
        "in the order of the model",
    ),
    "json by name": (
        "a.json",
        lambda path, state: path.write_text(json.dumps(dict(zip(state, numbers(state), strict=True)))),
        "",
    ),
    "json in order": ("a.json", lambda path, state: path.write_text(json.dumps(numbers(state))), "in the order of"),
    "inputs first": (
        "a.npz",
        lambda path, state: npz(path, {k: turned(t) for k, t in state.items()}),
        "kernels have their inputs first",
    ),
    "names of others": (
        "a.npz",
        lambda path, state: named_npz(path, {f"layer{k.replace('.', '/')}": t for k, t in state.items()}),
        "its names are not the model's ('layer0/weight', 'layer0/bias' and 9 more), and its shapes are, in this order.",
    ),
}


def turned(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor


@pytest.mark.parametrize("way", WAYS)
def test_a_state_is_read_however_it_was_kept(way: str, tmp_path: Path, at_once: None) -> None:
    file, write, words = WAYS[way]
    model = normed()
    after = trained(model)
    write(tmp_path / file, after.state_dict())
    model_before = tmp_path / "before.npz"
    npz(model_before, model.state_dict())
    seen = read_exchange(
        tmp_path / file,
        model=normed(),
        loss=F.cross_entropy,
        before=model_before,
        knowledge=KNOWN | Knowledge(learning_rate=RATE),
    )
    for name, p in after.named_parameters():
        torch.testing.assert_close(seen.update[name], (p - model.get_parameter(name)).detach(), rtol=0, atol=1e-7)
    assert all(torch.equal(p, seen.model.get_parameter(name)) for name, p in model.named_parameters())
    assert words in " ".join(seen.notes)
    assert "sha256" in seen.notes[0]
    assert unreadable(seen) == ""
    assert seen.knowledge.local_steps == 1
    if way != "parameters":  # whose buffers were left out
        assert seen.knowledge.mode == "train"
        assert torch.equal(seen.knowledge.buffers["1.running_var"], after[1].running_var)


def written(folder: Path, name: str, state: State) -> Path:
    path = folder / f"{name}.npz"
    named_npz(path, state)
    return path


def read(path: Path, model: nn.Module, known: Knowledge = KNOWN, **given: Any) -> Observation:
    return read_exchange(path, model=model, loss=F.cross_entropy, knowledge=known, **given)


def plain(seed: int = 0) -> nn.Module:
    """Without buffers or norms, so that nothing tells what a file holds but its numbers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, 10))


def test_a_model_after_training_is_no_difference(tmp_path: Path, at_once: None) -> None:
    for make, why in ((normed, "holds the buffers '1.running_mean'"), (plain, "the model's own parameters to")):
        after = written(tmp_path, "after", trained(make()).state_dict())
        with pytest.raises(UnbatchError, match="this is the model after training, not a difference") as said:
            read(after, make())
        assert why in str(said.value)
        assert "--before FILE" in str(said.value)
    torch.save({"net": trained(plain()).state_dict(), "round": 7}, tmp_path / "a.pt")
    with pytest.raises(UnbatchError, match="its tensors stand under 'net'"):
        read(tmp_path / "a.pt", plain(seed=5))


def test_another_draw_of_the_model_is_known_by_its_sizes_and_norms(tmp_path: Path) -> None:
    torch.manual_seed(5)
    layered = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    with pytest.raises(UnbatchError, match="the scales of its norm layers are near 1"):
        read(
            written(tmp_path, "a", layered.state_dict()),
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        )
    seen = read(written(tmp_path, "b", trained(plain()).state_dict()), plain(seed=5))
    assert "if it is the model after training, give --before" in " ".join(seen.notes)
    assert "no batch has such an update" in unreadable(seen)


def test_what_is_said_to_be_a_gradient_or_a_difference_is_taken_for_it(tmp_path: Path, at_once: None) -> None:
    model = plain()
    sent = written(tmp_path, "sent", trained(model).state_dict())
    assert torch.equal(read(sent, model, sent="gradient").update["1.bias"], trained(model)[1].bias)
    assert read(sent, model, sent="delta").knowledge.local_steps == 1
    torch.save({"gradients": list(gradient(model).values()), "labels": Y}, tmp_path / "g.pt")
    seen = read(tmp_path / "g.pt", model)
    assert "local_steps" not in seen.knowledge
    assert seen.residual(X, Y) < 1e-6
    assert "not used: 'labels'" in " ".join(seen.notes)
    torch.save({"delta": {k: -RATE * g for k, g in gradient(model).items()}}, tmp_path / "d.pt")
    seen = read(tmp_path / "d.pt", model, KNOWN | Knowledge(learning_rate=RATE))
    assert seen.knowledge.local_steps == 1
    assert seen.residual(X, Y) < 1e-5


def test_the_model_as_given_is_the_one_before_weights_that_are_said_to_be_such(tmp_path: Path) -> None:
    model = plain()
    seen = read(written(tmp_path, "after", trained(model).state_dict()), model, sent="weights")
    torch.testing.assert_close(seen.update["3.bias"], (trained(model)[3].bias - model[3].bias).detach())
    assert "taken to be the model as it was given" in " ".join(seen.notes)


def test_a_turned_sign_is_said_and_mended_by_a_scale(tmp_path: Path) -> None:
    model, known = plain(), KNOWN | Knowledge(learning_rate=RATE)
    turned_round = written(tmp_path, "delta", {k: RATE * g for k, g in gradient(model).items()})
    assert "its sign is flipped" in unreadable(read(turned_round, model, known, sent="delta"))
    mended = read(turned_round, model, known, sent="delta", scale=-1.0)
    assert unreadable(mended) == ""
    assert mended.residual(X, Y) < 1e-5
    assert "it was multiplied by -1." in mended.notes


def test_a_learning_rate_left_in_or_wrong_is_said(tmp_path: Path) -> None:
    model = plain()
    step = written(tmp_path, "step", {k: -RATE * g for k, g in gradient(model).items()})
    assert "sign is flipped" in unreadable(read(step, model))  # taken for a gradient
    assert unreadable(read(step, model, sent="delta")) == ""  # of an unknown rate
    assert "times as far as any batch could" in unreadable(
        read(step, model, KNOWN | Knowledge(learning_rate=RATE / 20), sent="delta")
    )
    assert "a step of SGD with learning rate 0.1" in unreadable(
        read(step, model, KNOWN | Knowledge(learning_rate=RATE / 20), sent="delta"), X, Y
    )


def test_steps_mode_and_statistics_are_taken_from_the_buffers(tmp_path: Path) -> None:
    model = normed()
    before = written(tmp_path, "before", model.state_dict())
    seen = read(written(tmp_path, "three", trained(model, 3).state_dict()), normed(), before=before)
    assert (seen.knowledge.local_steps, seen.knowledge.mode) == (3, "train")
    assert "counted 3 batches in train mode: as many local steps" in " ".join(seen.notes)
    seen = read(written(tmp_path, "eval", trained(model, 3, mode=False).state_dict()), normed(), before=before)
    assert (seen.knowledge.local_steps, seen.knowledge.mode) == (1, "eval")
    assert "buffers" not in seen.knowledge
    told = KNOWN | Knowledge(local_steps=2)
    seen = read(tmp_path / "three.npz", normed(), told, before=before)
    assert seen.knowledge.local_steps == 2
    assert "counted 3 batches, and 2 local steps are declared" in " ".join(seen.notes)


def test_a_missing_buffer_is_kept_and_a_missing_parameter_refused(tmp_path: Path) -> None:
    model = normed()
    state = model.state_dict()
    after = trained(model).state_dict()
    lacking = written(tmp_path, "before", {k: t for k, t in state.items() if k != "1.running_var"})
    seen = read(written(tmp_path, "after", after), normed(), before=lacking)
    assert "it lacks the buffers '1.running_var'; those of the model were kept" in " ".join(seen.notes)
    part = written(tmp_path, "part", {k: t for k, t in after.items() if not k.startswith("4.")})
    assert "4.weight" not in read(part, normed(), before=lacking).update  # a frozen layer
    with pytest.raises(UnbatchError, match=r"part\.npz lacks '4\.weight', '4\.bias'; the model before .* needed whole"):
        read(tmp_path / "after.npz", normed(), before=part)


def test_two_states_that_are_one_or_two_models_or_no_states(tmp_path: Path) -> None:
    model = plain()
    before = written(tmp_path, "before", model.state_dict())
    with pytest.raises(UnbatchError, match="nothing was trained, or one file was given twice"):
        read(before, plain(), before=before)
    small = written(tmp_path, "gradient", gradient(model))
    with pytest.raises(UnbatchError, match="is small beside the model before it, as a gradient or a difference is"):
        read(small, plain(), before=before)
    other = written(tmp_path, "other", plain(seed=9).state_dict())
    assert "is it the right model before?" in " ".join(read(other, plain(), before=before).notes)
    with pytest.raises(UnbatchError, match="say --as delta or --as weights, or leave the steps out"):
        read(small, plain(), KNOWN | Knowledge(local_steps=2), sent="gradient")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_noticed_and_its_rounding_counted(kind: torch.dtype, tmp_path: Path) -> None:
    model = plain().to(kind).float()  # as the server sent it
    after = {name: tensor.to(kind) for name, tensor in trained(model).state_dict().items()}
    save_file({name: tensor.to(kind) for name, tensor in model.state_dict().items()}, tmp_path / "before.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    told = KNOWN | Knowledge(learning_rate=RATE)
    seen = read(tmp_path / "after.safetensors", plain(), told, before=tmp_path / "before.safetensors")
    assert f"kept in {str(kind).removeprefix('torch.')}" in " ".join(seen.notes)
    assert next(seen.model.parameters()).dtype == kind
    assert seen.dtype == kind  # which attacks reckon with
    exact = {name: p.detach() - model.get_parameter(name).detach() for name, p in trained(model).named_parameters()}
    coarse = {name: float((seen.update[name].float() - u).square().mean().sqrt()) for name, u in exact.items()}
    step = seen.as_gradient()
    for name, off in coarse.items():
        assert off / RATE < 2 * step.rounding(name)
    fine = read(tmp_path / "after.safetensors", model, told, sent="weights")
    assert next(fine.model.parameters()).dtype == kind
    torch.manual_seed(3)
    rough = read(tmp_path / "after.safetensors", trained(model), told, sent="weights")
    assert "of their difference about" in " ".join(rough.notes)


def test_integers_complex_numbers_and_nan_are_refused(tmp_path: Path) -> None:
    model = plain()
    for value, words in ((torch.int8, "updates are floating point"), (torch.complex64, "holds complex numbers")):
        held = {name: tensor.to(value) for name, tensor in gradient(model).items()}
        with pytest.raises(UnbatchError, match=words):
            read(written(tmp_path, "odd", held), model)
    with pytest.raises(UnbatchError, match="NaN or infinite"):
        read(written(tmp_path, "odd", {k: t / 0 for k, t in gradient(model).items()}), model, sent="gradient")


class Payload:
    """What runs code when it is opened by pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_nothing_that_is_pickled_is_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "was run", tmp_path / "a.pt"
    torch.save({"0.weight": Payload(mark)}, path)
    with pytest.raises(UnbatchError, match=r"holds an object \((posix|nt)\.mkdir\) and not tensors alone"):
        read_torch_file(path)
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UnbatchError, match="is a pickle, but not of torch"):
        read_exchange(path, model=plain(), loss=F.cross_entropy)
    torch.save(plain(), path)
    with pytest.raises(UnbatchError, match=r"holds an object \(torch\.nn\.modules.*numpy\.savez"):
        read_torch_file(path)
    np.savez(tmp_path / "a.npz", np.array([Payload(mark)], dtype=object))
    with pytest.raises(UnbatchError, match="an array of Python objects is a pickle"):
        read_payload(tmp_path / "a.npz", plain())
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # and it would have been


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(UnbatchError, match="its tensors would take"):
        read_torch_file(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "of no known kind"),
        (b"hello, world", "of no known kind"),
        (b"PK\x03\x04 and no more", "damaged zip archive"),
        (b'{"0.weight": [1, 2', "begins as JSON and is none"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 file"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'", "cannot read"),
        (b"\x80\x02not a pickle", "is a pickle, but not of torch"),
    ],
)
def test_other_files_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(UnbatchError, match=words):
        read_payload(path, plain())


def test_an_optimiser_s_state_is_no_update(tmp_path: Path, at_once: None) -> None:
    model = plain()
    optimiser = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(X), Y).backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UnbatchError, match="is the state of an optimiser"):
        read_payload(tmp_path / "a.pt", model)


def test_one_vector_of_all_parameters(tmp_path: Path) -> None:
    model = plain()
    flat = torch.cat([g.flatten() for g in gradient(model).values()]).numpy()
    np.save(tmp_path / "a.npy", flat)
    np.savez(tmp_path / "b.npz", flat)
    (tmp_path / "c.json").write_text(json.dumps(flat.tolist()))
    for name in ("a.npy", "b.npz", "c.json"):
        seen = read(tmp_path / name, model)
        assert seen.residual(X, Y) < 1e-6
        assert "one vector was cut into the parameters" in " ".join(seen.notes)


def test_notes_go_with_the_bundle_into_the_report(tmp_path: Path) -> None:
    model = plain()
    seen = read(written(tmp_path, "sent", gradient(model)), model)
    seen.save(tmp_path / "b.safetensors")
    again = Observation.load(tmp_path / "b.safetensors", model=plain(), loss=F.cross_entropy)
    assert again.notes == seen.notes
    record = unbatch.audit(again, attacks="label-count", analyses=())
    assert record.data_notes == list(seen.notes)


def test_compression_is_noticed_and_named() -> None:
    model, rng = plain(), torch.Generator().manual_seed(0)
    seen = unbatch.observe(model, F.cross_entropy, X, Y)[0].update
    assert compression(seen) == []  # with zeros of silent units
    assert compression({name: torch.zeros_like(t) for name, t in seen.items()}) == []
    pixels = (torch.rand(4, 3, 6, 6, generator=rng) > 0.5).float()  # inputs with zeros everywhere
    assert compression(unbatch.observe(model, F.cross_entropy, pixels, Y)[0].update) == []
    one = unbatch.observe(model, F.cross_entropy, pixels[:1], Y[:1])[0].update  # rows that are multiples of one another
    assert compression(one) == []
    for kind in (torch.float16, torch.bfloat16):
        told = [f"its numbers are those of {str(kind).removeprefix('torch.')}: it was sent in half precision."]
        assert compression({name: t.to(kind) for name, t in seen.items()}) == told
        assert compression({name: t.to(kind).double() for name, t in seen.items()}) == told  # wherever it was kept
    for spelt, words in (
        ("prune:share=0.8", "declare --defence prune:share=0.8,"),
        ("quantise:bits=8,stochastic=false", "declare --defence quantise:bits=8,"),
        ("quantise:bits=4", "declare --defence quantise:bits=4,"),
    ):
        (said,) = compression(unbatch.observe(model, F.cross_entropy, X, Y, defences=spelt)[0].update)
        assert words in said
    mask = {name: t * (torch.rand(t.shape, generator=rng) > 0.5) for name, t in seen.items()}
    assert "entries were masked or dropped" in compression(mask)[0]
    captured = Observation(model=model, loss=F.cross_entropy, update={k: t.half() for k, t in seen.items()})
    record = unbatch.audit(captured, attacks="label-count", analyses=())
    assert "The update was compressed: its numbers are those of float16: it was sent in half precision." in record.notes


def test_the_defences_of_a_capture_are_declared() -> None:
    pytest.importorskip("opacus")
    model, private = plain(), "dp-sgd:clip=1,noise_multiplier=2"
    seen, _ = unbatch.observe(model, F.cross_entropy, X, Y, defences=private)
    bare_one = Observation(model=model, loss=F.cross_entropy, update=seen.update, knowledge=KNOWN)
    told = {"attacks": "label-count", "analyses": "dp-reconstruction"}
    assert not unbatch.audit(bare_one, **told).bounds
    record = unbatch.audit(bare_one, defences=private, **told)
    assert record.privacy == seen.knowledge.privacy
    assert record.bounds == unbatch.audit(seen, **told).bounds
    assert record.bounds
    assert record.defences == [str(unbatch.Defence.parse(private))]
    with pytest.raises(UnbatchError, match="the capture says already what was done to its update"):
        unbatch.audit(seen, defences=private, **told)
