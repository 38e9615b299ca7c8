"""Exchange: what a client sent and the model before it, out of the files that people keep, as an Observation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from unbatch.data.payload import DIFFERENCES, GRADIENTS, STATES, Payload, read_payload
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.loss import Loss
from unbatch.network.unwrapped import unwrapped
from unbatch.observation import Observation
from unbatch.protocol import fit, flatten
from unbatch.update import as_rounded, as_update, some, state_difference

Sent = Literal["gradient", "weights", "delta"]
SENT: tuple[str, ...] = get_args(Sent)
LIKE_THE_MODEL = 0.3  # relative: what the model's parameters may leave of a file that is taken for them
LIKE_SIZES = 2.0  # factor within which every matrix of a model is as large as the model's own
FEWEST_MATRICES = 2  # of which that is no chance
NEAR_ONE = 0.5  # root mean square, by which scales of norm layers may differ from 1
SMALL, UNLIKE = 0.5, 0.5  # size beside the model before, and what that leaves of it, of a gradient or a difference
FAR = 1.2  # of the parameters' size: how far two states of one model may be apart; two draws are 1.4
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def read_exchange(
    path: str | Path,
    *,
    model: nn.Module,
    loss: Loss,
    before: str | Path | None = None,
    sent: Sent | None = None,
    scale: float = 1.0,
    knowledge: Knowledge | None = None,
) -> Observation:
    """An exchange out of files as people keep them: npz, safetensors, torch.save, JSON; by name or in the model's order.

    `path` holds what was `sent`: a gradient, the model's weights after training, or a delta (after - before). With
    `before`, a file of the model that the client started from, it is weights; without, what the file shows. Of weights the
    update is the difference to `before`, or to the model's own state, and the buffers that came with them say whether batch
    norm ran in train mode, and how many steps were taken. `scale` multiplies the update (-1: it was before - after).
    `knowledge` is what is known besides; how the files were read stands in the observation's notes.
    Raises UnbatchError: a file cannot be read, is not of this model, or is weights and nothing says what they were before.

    >>> import numpy as np, tempfile
    >>> model = nn.Linear(2, 3)
    >>> arrays = [tensor.numpy() for tensor in model.state_dict().values()]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/before.npz", *arrays)
    ...     np.savez(f"{folder}/after.npz", *(array + 1 for array in arrays))
    ...     told = {"model": model, "loss": nn.functional.cross_entropy}
    ...     seen = read_exchange(f"{folder}/after.npz", before=f"{folder}/before.npz", **told)
    >>> bool((seen.update["bias"] - 1).abs().max() < 1e-6), seen.knowledge
    (True, Knowledge(local_steps=1))
    """
    network, known, notes = copy.deepcopy(unwrapped(model)), knowledge or Knowledge(), list[str]()
    if before is not None:
        network = _at(network, read_payload(Path(before), network), Path(before), notes)
    held = read_payload(Path(path), network)
    notes += held.notes
    kind = sent or ("weights" if before is not None else _kind(held, Path(path), network, known))
    told = Knowledge()
    if kind == "weights":
        update, buffers = state_difference(network, held.values)
        _check_difference(network, update, Path(path), notes)
        network, update = _as_coarse(network, update, held, notes)
        told = _told_by_buffers(network, buffers, known | told, notes)
        if before is None:
            notes.append("the model before it was taken to be the model as it was given.")
    else:
        own = dict(network.named_buffers(remove_duplicate=False))
        update = as_update(network, {name: tensor for name, tensor in held.values.items() if name not in own})
        notes += [words] if (words := _as_large(held, network)) and sent is None else []
        left = [name for name in held.values if name in own]
        notes += [f"buffers beside it were left out: {some(left)}."] if left else []
    if scale != 1.0:
        update = {name: scale * tensor for name, tensor in update.items()}
        notes.append(f"it was multiplied by {scale:g}.")
    told |= _steps(kind, known | told, notes)
    return Observation(model=network, loss=loss, update=update, knowledge=told | known, notes=tuple(notes))


def _at(network: nn.Module, held: Payload, path: Path, notes: list[str]) -> nn.Module:
    """The network at a state before, in its precision. Raises UnbatchError: it is not whole, or another model's."""
    state_difference(network, held.values)  # names and shapes, and nothing that is not finite
    parameters = dict(network.named_parameters(remove_duplicate=False))
    given = {id(parameters[name]) for name in held.values if name in parameters}
    missing = [name for name, p in network.named_parameters() if id(p) not in given]
    if missing:
        raise UnbatchError(f"{path} lacks {some(missing)}; the model before the client's step is needed whole.")
    weights = as_rounded({name: held.values[name] for name in held.values if name in parameters})
    if any(tensor.dtype == torch.float64 for tensor in weights.values()):
        network = network.double()
    own = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, tensor in held.values.items():
            own[name].copy_(tensor)
    lost = [name for name, _ in network.named_buffers() if name in network.state_dict() and name not in held.values]
    notes += [f"before: {note}" for note in held.notes]
    notes += [f"before: it lacks the buffers {some(lost)}; those of the model were kept."] if lost else []
    return network


def _as_coarse(
    network: nn.Module, update: dict[str, Tensor], held: Payload, notes: list[str]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network and the update in the type that the state after it was rounded to, where that holds its parameters, too.

    So the update is known to be as coarse. Where it does not, the share that was rounded off is noted.
    """
    own = {name: p.detach() for name, p in network.named_parameters() if name in held.values}
    after = as_rounded({name: held.values[name] for name in own})
    kinds = {tensor.dtype for tensor in after.values()}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    if not kind.is_floating_point or kind.itemsize >= 4:
        return network, update
    if all(torch.equal(p.to(kind).to(p.dtype), p) for p in own.values()):
        return network.to(kind), {name: tensor.to(kind) for name, tensor in update.items()}
    moved = sum(float((after[name].double() - own[name].double()).square().sum()) for name in own)
    rounded = sum(float((torch.finfo(kind).eps * own[name].double()).square().sum()) / 12 for name in own)
    if moved:
        notes.append(
            f"the state after was rounded to {str(kind).removeprefix('torch.')} and the one before was not: of their "
            f"difference about {min(1.0, (rounded / moved) ** 0.5):.2g} is rounding, which no attack reads past."
        )
    return network, update


def _kind(held: Payload, path: Path, network: nn.Module, known: Knowledge) -> Sent:
    """What a file without a state before it holds. Raises UnbatchError: it is the model after training."""
    steps = bool(known.get("local_steps") or known.get("epochs"))
    if held.under in GRADIENTS:
        return "gradient"
    if held.under in DIFFERENCES:
        return "delta"
    if why := next(_signs_of_weights(held, network), ""):
        raise UnbatchError(
            f"{path}: this is the model after training, not a difference: {why}. Give the model before it, too: --before "
            "FILE (before=...). If the model that you give is the one before, say --as weights; if this is a gradient or a "
            "difference all the same, --as gradient or --as delta."
        )
    return "delta" if steps else "gradient"


def _signs_of_weights(held: Payload, network: nn.Module) -> Iterator[str]:
    """What shows that values are a model's parameters, in words."""
    buffers = [name for name in held.values if name in dict(network.named_buffers(remove_duplicate=False))]
    if buffers:
        yield f"it holds the buffers {some(buffers, 2)}"
    if held.under in STATES:
        yield f"its tensors stand under {held.under!r}"
    own = {name: p.detach() for name, p in network.named_parameters() if name in held.values}
    sent = {name: held.values[name] for name in own if held.values[name].shape == own[name].shape}
    if not sent:
        return
    factor, left = fit(flatten(sent, sent), flatten(own, sent))
    if left <= LIKE_THE_MODEL and 1 / LIKE_SIZES < factor < LIKE_SIZES:
        yield f"it is the model's own parameters to {left:.0%}"
    scales = [f"{name}.weight" for name, module in network.named_modules() if isinstance(module, NORMS)]
    ones = [sent[name].double() for name in scales if name in sent]
    if ones and all(float((tensor - 1).square().mean().sqrt()) < NEAR_ONE for tensor in ones):
        yield "the scales of its norm layers are near 1"


def _as_large(held: Payload, network: nn.Module) -> str:
    """A note where every matrix of a file is as large as the model's own, which weights are and a gradient may be."""
    own = {name: p.detach() for name, p in network.named_parameters() if name in held.values and p.ndim > 1}
    sizes = [float(held.values[name].double().norm() / p.double().norm()) for name, p in own.items() if p.any()]
    if len(sizes) < FEWEST_MATRICES or not all(1 / LIKE_SIZES < size < LIKE_SIZES for size in sizes):
        return ""
    return "each of its matrices is as large as the model's own: if it is the model after training, give --before."


def _check_difference(network: nn.Module, update: Mapping[str, Tensor], path: Path, notes: list[str]) -> None:
    """Notes how far apart two states are. Raises UnbatchError: they are the same, or the second is a difference already."""
    own = {name: p.detach() for name, p in network.named_parameters()}
    if not any(bool(tensor.any()) for tensor in update.values()):
        raise UnbatchError(
            f"{path} holds the parameters of the model before it: nothing was trained, or one file was given twice."
        )
    weights, moved = flatten(own, update), flatten(update, update)
    sent = moved + weights
    if float(sent.norm()) < SMALL * float(weights.norm()) and fit(sent, weights)[1] > UNLIKE:
        raise UnbatchError(
            f"{path} is small beside the model before it, as a gradient or a difference is, and no model after training: "
            "say --as gradient or --as delta, and give the model before as --weights."
        )
    far = float(moved.norm() / weights.norm()) if float(weights.norm()) else 0.0
    notes.append(f"the update is the difference of the two states, {far:.2g} of the parameters' size.")
    if far > FAR:
        notes.append("so far apart are two models rather than two states of one: is it the right model before?")


def _told_by_buffers(network: nn.Module, after: Mapping[str, Tensor], known: Knowledge, notes: list[str]) -> Knowledge:
    """What batch norm's buffers after training say: its mode, the number of steps, and its statistics."""
    before = dict(network.named_buffers(remove_duplicate=False))
    statistics = [name for name in after if name.endswith(("running_mean", "running_var"))]
    counts = {
        int(after[name]) - int(before[name])
        for name in after
        if name.endswith("num_batches_tracked") and name in before
    }
    if not statistics:
        return Knowledge()
    if all(torch.equal(after[name].to(before[name]), before[name]) for name in statistics):
        if "mode" in known:
            return Knowledge()
        notes.append("batch norm's statistics are those before: the step is taken to be in eval mode.")
        return Knowledge(mode="eval")
    told = Knowledge(buffers={name: tensor for name, tensor in after.items() if name in before}, mode="train")
    taken = counts.pop() if len(counts) == 1 else 0
    stated = known.get("local_steps")
    if taken > 0 and not known.get("epochs") and not stated:
        batches = "1 batch" if taken == 1 else f"{taken} batches"
        notes.append(f"batch norm counted {batches} in train mode: as many local steps.")
        return told | Knowledge(local_steps=taken)
    if taken > 0 and stated and stated != taken:
        batches = "1 batch" if taken == 1 else f"{taken} batches"
        notes.append(f"batch norm counted {batches}, and {stated} local steps are declared.")
    return told


def _steps(kind: Sent, known: Knowledge, notes: list[str]) -> Knowledge:
    """One local step, where weights or a difference were sent and nothing says how many there were.

    Raises UnbatchError: a gradient was sent, and local steps are declared.
    """
    steps = known.get("local_steps") or known.get("epochs")
    if kind == "gradient" and steps:
        raise UnbatchError(
            "what was sent is said to be a gradient, and the protocol to take local steps, after which a difference is "
            "sent: say --as delta or --as weights, or leave the steps out."
        )
    if kind == "gradient" or steps:
        return Knowledge()
    rate = "" if "learning_rate" in known else " of an unknown learning rate"
    notes.append(f"one local step{rate} was taken for granted; --protocol local_steps=N (or epochs=N) says otherwise.")
    return Knowledge(local_steps=1)
