"""Settings: from words on the command line to what is audited."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from unbatch.bundle import model_name
from unbatch.case import Case, Setting
from unbatch.data import read
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge, check_fields
from unbatch.loss import Loss, loss_named
from unbatch.observation import Observation
from unbatch.protocol import Protocol


def target_of(
    case: str | None,
    model: str | None,
    data: Path | None,
    loss: str,
    reduction: str,
    size: int | None,
    batch: int | None,
    observation: Path | None,
    protocol: str | None,
    knows: Sequence[str],
) -> Observation | list[Setting]:
    """The clients or the captured update that these words name.

    Raises UnbatchError: they name nothing, or contradict each other; the message says which to give.
    """
    if case is not None and (model or data or observation):
        raise UnbatchError("give a built-in case, or --model with --data or --observation, not both.")
    if case is not None:
        built = Case.parse(case)
        settings = [built.setting(client) for client in range(built.clients)]
    elif model is None:
        raise UnbatchError(
            "nothing to audit: give a case (`unbatch list cases`), or --model with --data or --observation."
        )
    elif observation is not None:
        network, criterion = load_model(model), load_loss(loss, reduction)
        try:
            obs = Observation.load(observation, model=network, loss=criterion)
        except ValueError as error:
            if str(observation) not in str(error):
                raise UnbatchError(f"{observation} (captured from {model_name(observation)!r}): {error}") from None
            raise
        told = _rules(protocol).model_dump(exclude_unset=True, exclude_none=True) if protocol else {}
        return replace(obs, knowledge=obs.knowledge | Knowledge(**told) | _known(knows, None))
    elif data is not None:
        examples = read(data, size=size)
        n = batch or len(examples.inputs)
        settings = [
            Setting(
                model=load_model(model),
                loss=load_loss(loss, reduction),
                inputs=examples.inputs[:n],
                labels=examples.labels[:n],
                domain=examples.domain,
                classes=examples.classes,
                name=f"{model} on {data.name}",
            )
        ]
    else:
        raise UnbatchError(
            "--model alone is not enough: give --data for its private batch, or --observation for an update."
        )
    rules = _rules(protocol) if protocol else None
    return [replace(s, protocol=rules or s.protocol, knowledge=s.knowledge | _known(knows, s)) for s in settings]


def case_or_data(
    case: str | None, model: str | None, data: Path | None, loss: str, reduction: str, size: int | None
) -> Case | Setting:
    """A case with all of its data, or one client that holds all of yours. Raises UnbatchError as `target_of` does."""
    if case is not None and not (model or data):
        return Case.parse(case)
    found = target_of(case, model, data, loss, reduction, size, None, None, None, ())
    return cast(list[Setting], found)[0]


def load_model(spec: str) -> nn.Module:
    """The model that ``package.module:factory`` returns. Raises UnbatchError: it cannot be imported or is no model.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    made = _named(spec, "model")
    network = made() if callable(made) and not isinstance(made, nn.Module) else made
    if not isinstance(network, nn.Module):
        raise UnbatchError(f"{spec} gave {type(network).__name__}, not a torch.nn.Module.")
    return network


def load_loss(spec: str, reduction: str) -> Loss:
    """A loss by its usual name, or the callable that ``package.module:loss`` names.

    >>> load_loss("torch.nn.functional:mse_loss", "mean").__name__
    'mse_loss'
    """
    if ":" not in spec:
        if reduction not in ("mean", "sum"):
            raise UnbatchError(f"--reduction is mean or sum, not {reduction!r}.")
        return loss_named(spec, cast(Any, reduction))
    criterion = _named(spec, "loss")
    if not callable(criterion):
        raise UnbatchError(f"{spec} is {type(criterion).__name__}, not a callable (outputs, labels) -> scalar.")
    return cast(Callable[..., Any], criterion)


def _named(spec: str, what: str) -> Any:
    module, colon, name = spec.partition(":")
    if not colon:
        raise UnbatchError(f"--{what} {spec!r} is not package.module:name.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnbatchError(
            f"cannot import --{what} {spec}: {error}. It is looked up from the current folder."
        ) from error


def _rules(words: str) -> Protocol:
    pairs = dict(part.partition("=")[::2] for part in words.split(","))
    try:
        return Protocol(**pairs)  # type: ignore[arg-type]  # pydantic reads numbers off words
    except UnbatchError as error:
        raise UnbatchError(f"--protocol {words!r}: {error}") from None


def _known(words: Sequence[str], setting: Setting | None) -> Knowledge:
    facts: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        check_fields([name])
        if equals:
            try:
                facts[name] = json.loads(text)
            except json.JSONDecodeError:
                facts[name] = text
        elif name == "labels" and setting is not None:
            facts[name] = setting.labels.sort(dim=0).values  # which labels, not in which order they were trained on
        else:
            raise UnbatchError(
                f"--knows {word!r}: give FIELD=VALUE ('labels' alone needs a client whose truth is known)."
            )
    return Knowledge(**facts)
