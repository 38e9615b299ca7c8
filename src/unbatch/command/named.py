"""Named: a user's own model, weights and loss, by the names that the command line takes them by."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from unbatch.command.blame import lines_of
from unbatch.errors import UnbatchError
from unbatch.loss import Loss, loss_named
from unbatch.torch_file import read_torch_file

SEED = 0  # of every random number that a factory draws: the same command gives the same model
_INSIDE = ("state_dict", "model_state_dict", "model")  # under which checkpoints keep the parameters
_WRAPPED = ("module.", "_orig_mod.", "_module.", "model.")  # prefixes that wrappers put before the names


def load_model(spec: str) -> nn.Module:
    """The model that ``package.module:factory`` returns, called with no argument and with the random seed 0.

    The seed, of torch, numpy and Python, makes the same command give the same model; the program's own random numbers go
    on afterwards as if nothing had been drawn. For parameters of your own there is `load_weights`.

    >>> load_model("torch.nn:Identity")
    Identity()

    Raises UnbatchError: it cannot be imported, needs arguments, fails, or returns no model.
    """
    with _seeded():
        made = _named(spec, "model")
        if isinstance(made, nn.Module):
            return made
        if not callable(made):
            raise UnbatchError(
                f"{spec} gave {type(made).__name__}, not a torch.nn.Module; name a function that returns your model."
            )
        needed = _needed(made)
        if needed:
            raise UnbatchError(
                f"--model {spec} needs arguments ({', '.join(needed)}), and it is called without any; name a function "
                f"that gives them, such as `def model(): return {spec.partition(':')[2]}(...)`."
            )
        try:
            network = made()
        except (Exception, SystemExit) as error:
            raise UnbatchError(f"--model {spec} fails: {_told(error)} Mend it there.") from error
    if not isinstance(network, nn.Module):
        raise UnbatchError(f"{spec} gave {type(network).__name__}, not a torch.nn.Module; return the model itself.")
    return network


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """The model with the parameters and buffers of a file in it: safetensors, or a `state_dict` that torch.save wrote.

    A torch file is read with ``weights_only``, in a process of its own: nothing in it is run. A prefix that a wrapper left
    before every name, such as ``module.``, is dropped.
    Raises UnbatchError: no such file, another kind, or names and shapes of another model.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> trained = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(trained, f"{folder}/trained.safetensors")
    ...     load_weights(nn.Linear(2, 3), Path(folder) / "trained.safetensors").weight.sum()
    tensor(6., grad_fn=<SumBackward0>)
    """
    state = _state(path)
    names = set(network.state_dict())
    for prefix in _WRAPPED:
        if not names & set(state) and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        said = " ".join(str(error).split()[:60])
        raise UnbatchError(
            f"--weights {path} does not fit {type(network).__name__}: {said} Give the file of this model."
        ) from None
    return network


def _state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except OSError as error:
        raise UnbatchError(f"cannot read --weights {path}: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise UnbatchError(f"--weights {path} is no whole safetensors file ({error}); copy or save it again.") from None
    except UnbatchError as error:
        raise UnbatchError(f"--weights: {error}") from None
    for name in _INSIDE:
        if isinstance(held, Mapping) and isinstance(held.get(name), Mapping):
            held = held[name]
    if not isinstance(held, Mapping) or not held or not all(isinstance(t, Tensor) for t in held.values()):
        raise UnbatchError(
            f"--weights {path} holds no state_dict; save model.state_dict(), which maps names to tensors."
        )
    return {str(name): tensor for name, tensor in held.items()}


def load_dataset(spec: str) -> Dataset[Any] | DataLoader[Any]:
    """The Dataset or DataLoader that ``package.module:name`` names, or that the function of that name returns.

    Raises UnbatchError: it cannot be imported, fails, or is neither.
    """
    with _seeded():
        made = _named(spec, "data")
        if not isinstance(made, Dataset | DataLoader) and callable(made):
            try:
                made = made()
            except (Exception, SystemExit) as error:
                raise UnbatchError(f"--data {spec} fails: {_told(error)} Mend it there.") from error
    if not isinstance(made, Dataset | DataLoader):
        raise UnbatchError(
            f"{spec} gave {type(made).__name__}; name a torch Dataset, a DataLoader, or a function of one."
        )
    return made


def load_loss(spec: str | None, reduction: str | None) -> Loss:
    """A loss by its usual name, or the callable that ``package.module:loss`` names; cross entropy and mean by default.

    >>> load_loss("torch.nn.functional:mse_loss", None).__name__
    'mse_loss'

    Raises UnbatchError: no such loss, or a class where one of its instances is needed.
    """
    spec, reduction = spec or "cross-entropy", reduction or "mean"
    if ":" not in spec:
        if reduction not in ("mean", "sum"):
            raise UnbatchError(f"--reduction is mean or sum, not {reduction!r}.")
        return loss_named(spec, cast(Any, reduction))
    with _seeded():
        criterion = _named(spec, "loss")
    name = spec.partition(":")[2]
    if inspect.isclass(criterion):
        raise UnbatchError(
            f"--loss {spec} is a class, and a loss is called with (outputs, labels); name an instance: write "
            f"`criterion = {name}()` in a module of yours and give --loss yourmodule:criterion."
        )
    if not callable(criterion):
        raise UnbatchError(f"{spec} is {type(criterion).__name__}, not a callable (outputs, labels) -> scalar.")
    return cast(Callable[..., Any], criterion)


def _named(spec: str, what: str) -> Any:
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        near = spec.strip(":").rpartition(".")
        hint = f" Write --{what} {near[0]}:{near[2]}." if near[0] and near[2] != "py" else ""
        raise UnbatchError(f"--{what} {spec!r} is not package.module:name.{hint}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    hint = f" Write --{what} {module[:-3].replace('/', '.')}:{name}." if module.endswith(".py") else ""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    except (ImportError, AttributeError, TypeError) as error:
        raise UnbatchError(
            f"cannot import --{what} {spec}: {error}. It is looked up from the current folder.{hint}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UnbatchError(f"--{what} {spec}: importing {module} fails: {_told(error)} Mend it there.") from error


def _needed(made: Callable[..., Any]) -> list[str]:
    """The arguments that a call cannot do without."""
    try:
        given = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):  # built in: it does not tell
        return []
    collected = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # *args and **kwargs may be empty
    return [each.name for each in given if each.default is each.empty and each.kind not in collected]


def _told(error: BaseException) -> str:
    where = lines_of(error)
    return f"{type(error).__name__}: {error}{f' ({where[-1]})' if where else ''}."


@contextmanager
def _seeded() -> Iterator[None]:
    before, others = random.getstate(), np.random.get_state()
    cards = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(SEED)
        for card in cards:
            torch.cuda.default_generators[card].manual_seed(SEED)
        random.setstate(random.Random(SEED).getstate())
        np.random.set_state(np.random.RandomState(SEED).get_state())
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(others)
