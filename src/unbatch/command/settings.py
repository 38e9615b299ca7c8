"""Settings: from words on the command line to what is audited."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from unbatch.adapters.huggingface import own_labels, with_its_loss
from unbatch.auditing.stand_in import stand_in_inputs
from unbatch.auditing.suites import suite as attacks_of
from unbatch.bundle import holds_state, is_bundle, model_name
from unbatch.case import Case, Setting
from unbatch.command.named import load_dataset, load_loss, load_model, load_weights
from unbatch.data import Data, read, read_dataset
from unbatch.data.exchange import SENT, Sent, read_exchange
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge, check_fields
from unbatch.label_form import LabelForm
from unbatch.loss import Loss
from unbatch.network.dense import forward
from unbatch.observation import Observation
from unbatch.privacy import told_privacy
from unbatch.protocol import Protocol
from unbatch.truth import Truth


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options of a command name: a built-in case, or a model with data, a captured update, or both.

    None stands for an option that was not given: one that is given is used or refused. A model of a case's own is named
    without a colon, and is an option of the case.
    """

    case: str | None = None
    model: str | None = None
    weights: Path | None = None
    data: Path | None = None
    loss: str | None = None
    reduction: str | None = None
    size: int | None = None
    classes: str | None = None
    batch: int | None = None
    observation: Path | None = None
    before: Path | None = None
    as_: str | None = None
    scale: float | None = None
    shape: str | None = None
    protocol: str | None = None
    knows: Sequence[str] = ()
    may_draw: bool = False  # whether a batch is drawn where there is neither data nor an update

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Asked:
        """What a command was given, by the names of its parameters; those that name no target are left out."""
        names = [each.name for each in fields(cls) if given.get(each.name) is not None]
        return cls(**{name: given[name] for name in names})

    def __post_init__(self) -> None:
        if self.case is not None and self.model is not None and ":" not in self.model:  # one of the case's own models
            joint = "," if ":" in self.case else ":"
            object.__setattr__(self, "case", f"{self.case}{joint}model={self.model}")
            object.__setattr__(self, "model", None)
        self._check_target()
        if self.observation is not None and self.data is None:  # what is known of the examples behind a captured update
            told = {"input_shape": self.shape, "batch_size": self.batch}
            known = [f"{name}={value}" for name, value in told.items() if value is not None]
            object.__setattr__(self, "knows", (*self.knows, *known))
        for name, instead in self._unused().items():
            if getattr(self, name) is not None:
                raise UnbatchError(f"--{name.rstrip('_')} would not be used: {instead}")
        if self.batch is not None and self.batch < 1:
            raise UnbatchError(f"--batch {self.batch} is no batch; give at least 1.")

    def _check_target(self) -> None:
        if self.case is not None and (self.data or self.observation):
            raise UnbatchError("give a built-in case, or --model with --data or --observation, not both.")
        if self.case is None and self.model is None:
            lone = "".join(f" --{name} alone is not enough." for name in ("data", "observation") if getattr(self, name))
            raise UnbatchError(
                "nothing to audit: give a case (`unbatch list cases`), or --model package.module:factory with --data or "
                f"--observation.{lone}"
            )
        if self.case is None and self.data is None and self.observation is None and not self.may_draw:
            raise UnbatchError(
                "--model alone is not enough: give --data for its private batch, or --observation for an update."
            )

    @property
    def drawn(self) -> bool:
        """Whether there is a model alone, for which a batch is drawn."""
        return self.may_draw and self.case is None and self.data is None and self.observation is None

    def _unused(self) -> dict[str, str]:
        """The options that this target has no use for, and what to write instead."""
        if self.case is not None:
            name, joint = self.case, "," if ":" in self.case else ":"
            own = {"shape": "a case has its own."}
            own |= {option: f"write it as {name}{joint}{option}={value}." for option, value in _OF_CASES.items()}
            if self.model is not None:
                own = {"batch": own["batch"], "shape": own["shape"]}
            return {
                **own,
                **self._unused_of_capture(),
                "size": f"the pictures of a case have the case's own size; `unbatch show {name.partition(':')[0]}` says "
                "which option sets it.",
                "classes": "a case has its own.",
                **({} if self.model else {"weights": "a case has its own model; give yours with --model."}),
            }
        unused = {}
        if self.loss is not None and ":" in self.loss:
            unused["reduction"] = (
                f"it is for a loss given by name, and {self.loss} takes the mean or the sum by itself."
            )
        if self.data is None:
            unused["size"] = "it resizes the pictures of --data, and there is none."
            unused["classes"] = "it numbers the labels of --data, and there is none."
        elif not self.data.is_dir():
            unused["size"] = f"it resizes the pictures of a folder, and {self.data} is none; resize the data itself."
        if self.data is not None:
            unused["shape"] = "the examples of --data have their own."
        return unused | self._unused_of_capture()

    def _unused_of_capture(self) -> dict[str, str]:
        if self.observation is None:
            return dict.fromkeys(_OF_FILES, "it is for the file of an --observation, and there is none.")
        if not is_bundle(self.observation):
            return {} if self.before is None else {"weights": f"{self.before} holds the parameters of the model."}
        unused = dict.fromkeys(_OF_FILES, f"{self.observation} is a bundle, which says by itself what it holds.")
        if self.weights is not None and holds_state(self.observation):
            unused["weights"] = f"{self.observation} holds the parameters of its own model; leave it out."
        return unused


_OF_FILES = ("before", "as_", "scale")  # options of captured files that are no bundles
_OF_CASES = {"loss": "squared-error", "reduction": "sum", "batch": "4"}  # options of every case, and a value of each


@dataclass(frozen=True, kw_only=True)
class Ways:
    """How a target is audited: the options of `unbatch audit` that name no target, as `Asked` holds those that do."""

    attack: Sequence[str] = ()
    suite: str | None = None
    defence: Sequence[str] = ()
    remedy: Sequence[str] = ()
    metric: Sequence[str] = ()
    analysis: Sequence[str] = ()
    seed: Sequence[int] = ()
    budget: float | None = None
    device: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Ways:
        """What a command was given, by the names of its parameters; the others are left out."""
        return cls(**{each.name: given[each.name] for each in fields(cls) if given.get(each.name) is not None})

    def of_use_to(self, asked: Asked) -> Ways:
        """The same, if the target has a use for each. Raises UnbatchError: see `refuse_unused`."""
        options = ("attack", "suite", "defence", "remedy", "metric", "seed")
        refuse_unused(asked, **{name: getattr(self, name) for name in options})
        return self

    def arguments(self) -> dict[str, Any]:
        """What `unbatch.audit` is called with.

        >>> chosen = Ways(suite="first", seed=[3]).arguments()
        >>> chosen["attacks"], chosen["seeds"]
        (('bias-ratio', 'label-count', 'gradient-matching'), (3,))
        """
        return {
            "attacks": list(self.attack) or (attacks_of(self.suite) if self.suite else None),
            "defences": tuple(self.defence),
            "remedies": tuple(self.remedy),
            "metrics": list(self.metric) or None,
            "analyses": list(self.analysis) or None,
            "seeds": tuple(self.seed or (0,)),
            "budget": self.budget,
            "device": self.device,
        }


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where an audit goes and what of it is kept: the options of `unbatch audit` that change no result."""

    folder: Path
    save_images: Path | None = None
    resume: bool = False
    force: bool = False
    no_private: bool = False
    no_appendix: bool = False
    auditor: str = ""
    quiet: bool = False
    as_json: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Output:
        """What a command was given, by the names of its parameters; the others are left out."""
        return cls(**{each.name: given[each.name] for each in fields(cls)})

    def arguments(self) -> dict[str, Any]:
        """What `run_audit` is called with.

        >>> Output(folder=Path("audit"), as_json=True).arguments()["quiet"]
        True
        """
        return {
            "folder": self.folder,
            "pictures": self.save_images,
            "resume": self.resume,
            "force": self.force,
            "private": not self.no_private,
            "appendix": not self.no_appendix,
            "auditor": self.auditor,
            "quiet": self.quiet or self.as_json,
        }


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is audited, and the truth that is known of a captured update."""

    what: Observation | list[Setting]
    truth: Truth | None = None


def target_of(asked: Asked) -> Target:
    """The clients or the captured update that these words name.

    Raises UnbatchError: they name nothing, or contradict each other; the message says which to give.

    >>> target_of(Asked(case="digits:batch=2,width=8")).what
    [<Setting digits:batch=2,width=8: 2 images [1, 8, 8], Sequential of 610 parameters>]
    """
    if asked.case is not None:
        built = Case.parse(asked.case)
        settings = [built.setting(client) for client in range(built.clients)]
        settings = settings if asked.model is None else _with_own_model(asked, settings)
    elif asked.observation is not None:
        return _captured(asked, asked.observation)
    else:
        settings = [_drawn(asked) if asked.drawn else _client(asked)]
    rules = _rules(asked.protocol) if asked.protocol else None
    if rules is not None and not (rules.local_steps or rules.epochs):
        _refuse_idle(rules)
    told = [replace(s, protocol=rules or s.protocol, knowledge=s.knowledge | _known(asked.knows, s)) for s in settings]
    return Target(what=told)


def refuse_unused(asked: Asked, **given: Any) -> None:
    """Refuse what an audit of this target would not use: a captured update has its defences in it, and no truth.

    `given` holds the options besides, None or empty where they were not given.
    Raises UnbatchError: one would be ignored, a choice is given twice over, or one thing twice.
    """
    if asked.observation is not None:
        if given.get("remedy"):
            raise UnbatchError("--remedy would not be used: a captured update already has its defences in it.")
        if given.get("metric") and asked.data is None:
            raise UnbatchError(
                "--metric would not be used: a captured update has no truth to compare with; give it with --data."
            )
    if given.get("attack") and given.get("suite"):
        raise UnbatchError("give --attack or --suite, not both.")
    for option, values in given.items():
        twice = [value for i, value in enumerate(values or ()) if value in values[:i]]
        if twice and option in ("attack", "seed", "remedy", "metric"):
            raise UnbatchError(f"--{option} {twice[0]} is given twice; once does it.")


def case_or_data(asked: Asked) -> Case | Setting:
    """A case with all of its data, or one client that holds all of yours. Raises UnbatchError as `target_of` does."""
    if asked.case is None:
        return _client(replace(asked, batch=None))
    if asked.model is not None:
        raise UnbatchError("give a built-in case, or --model with --data, not both.")
    return Case.parse(asked.case)


def _with_own_model(asked: Asked, settings: Sequence[Setting]) -> list[Setting]:
    """A case's clients, with your model in place of its own: under your loss, the model's, or else the case's."""
    network, criterion = _network_and_loss(asked, settings[0].loss)
    return [
        replace(each, model=network, loss=criterion, labels=own_labels(network, each.inputs, each.labels), name=name)
        for each in settings
        for name in [f"{asked.model} on {each.name}"]
    ]


def _client(asked: Asked) -> Setting:
    data = asked.data or Path()
    examples, (network, criterion) = _examples(asked, data), _network_and_loss(asked)

    def setting(held: Data) -> Setting:
        return Setting(
            model=network,
            loss=criterion,
            inputs=held.inputs,
            labels=held.labels,
            domain=held.domain,
            classes=held.classes,
            notes=held.notes,
            name=f"{asked.model} on {data.name}",
        )

    try:
        return setting(examples)
    except UnbatchError as error:  # it may lie in how the data was read
        try:
            return setting(_in_the_loss_s_form(examples, network, criterion))
        except Exception:  # the loss is the user's: anything may go wrong in it, and the first error is the one to say
            raise UnbatchError(f"{error} How {data} was read: {' '.join(examples.notes)}") from error


def _drawn(asked: Asked) -> Setting:
    """A client with a batch that is drawn, for what can be said of a network before there is any data."""
    network, criterion = _network_and_loss(asked)
    rng, n = torch.Generator().manual_seed(0), asked.batch or 1
    inputs = stand_in_inputs(network, None if asked.shape is None else _sides(asked.shape), n, rng)
    outputs = forward(network, inputs.to(next(network.parameters()).device))
    labels = LabelForm.of(criterion, tuple(outputs.shape[1:]), device=outputs.device).draw(n, rng, outputs)
    note = (
        f"no data were given: {n} input{'s' * (n != 1)} of shape {list(inputs.shape[1:])} and labels were drawn (seed 0). "
        "Counts and ranks are those of nearly every batch of this size; bounds and condition numbers are of this one."
    )
    return Setting(model=network, loss=criterion, inputs=inputs, labels=labels, notes=[note], name=asked.model or "")


def _sides(words: str) -> tuple[int, ...]:
    """The sides of an input, 3,32,32 in words. Raises UnbatchError: they are none."""
    parts = words.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UnbatchError(f"--shape {words!r}: give the sides of one input, such as 3,32,32.")
    return tuple(int(part) for part in parts)


def _in_the_loss_s_form(examples: Data, network: nn.Module, loss: Loss) -> Data:
    """The same labels in the form that the loss takes beside the model's outputs, told: a file does not say [n] or [n, 1].

    Raises whatever the model or the loss raises, and UnbatchError where the labels cannot be said in that form.
    """
    parameter = next(network.parameters())
    some = examples.inputs[:2].to(parameter.device)
    outputs = forward(network, some.to(parameter.dtype) if some.is_floating_point() else some)
    form = LabelForm.of(loss, tuple(outputs.shape[1:]), device=outputs.device)
    values = {"sign": {-1.0, 1.0}, "binary": {0.0, 1.0}, "multi-label": {0.0, 1.0}}.get(form.kind)
    if values is not None and not set(examples.labels.flatten().tolist()) <= values:
        raise UnbatchError(f"the loss takes {form.words()}.")
    labels = form.taken(examples.labels)
    note = f"labels: brought from {list(examples.labels.shape)} into the form that the loss takes, {form.words()}."
    return replace(examples, labels=labels, notes=[*examples.notes, note])


def _captured(asked: Asked, path: Path) -> Target:
    obs, truth, batch = observation_of(asked, path), None, None
    if asked.data is not None:
        batch = _client(asked)
        held = batch.inputs.to(obs.dtype) if batch.inputs.is_floating_point() else batch.inputs
        told = {"notes": batch.notes, "domain": batch.domain, "classes": batch.classes}
        truth = Truth(inputs=held, labels=batch.labels, **told)  # type: ignore[arg-type]
    known = obs.knowledge | _known(asked.knows, batch)
    return Target(what=replace(obs, knowledge=known), truth=truth)


def observation_of(asked: Asked, path: Path) -> Observation:
    """The captured update in a bundle, or in a file as people keep it. Raises UnbatchError: it is not of this model."""
    network, criterion = _network_and_loss(asked)
    rules = _rules(asked.protocol).model_dump(exclude_unset=True, exclude_none=True) if asked.protocol else {}
    told = Knowledge(**rules)
    if not is_bundle(path):
        plain = [words for words in asked.knows if words != "labels"]
        if asked.as_ is not None and asked.as_ not in SENT:
            raise UnbatchError(f"--as {asked.as_!r}: give one of {', '.join(SENT)}.")
        return read_exchange(
            path,
            model=network,
            loss=criterion,
            before=asked.before,
            sent=cast(Sent | None, asked.as_),
            scale=1.0 if asked.scale is None else asked.scale,
            knowledge=told | _known(plain, None),
        )
    try:
        obs = Observation.load(path, model=network, loss=criterion)
    except UnbatchError as error:
        if str(path) not in str(error):
            raise UnbatchError(f"{path} (captured from {model_name(path)!r}): {error}") from None
        raise
    return replace(obs, knowledge=obs.knowledge | told)


def _network_and_loss(asked: Asked, otherwise: Loss | None = None) -> tuple[nn.Module, Loss]:
    """The model, and the loss that is named; if none is, the one that comes with the model, `otherwise`, cross entropy."""
    network = load_model(asked.model or "")
    network, own = with_its_loss(network if asked.weights is None else load_weights(network, asked.weights))
    named = asked.loss is not None or asked.reduction is not None
    criterion = None if named else own or otherwise
    return network, criterion or load_loss(asked.loss, asked.reduction)


def _examples(asked: Asked, path: Path) -> Data:
    """The first `--batch` examples of `--data`. Raises UnbatchError: it holds fewer."""
    words = asked.classes
    names = None if words is None else int(words) if words.strip().isdecimal() else words.split(",")
    if ":" in str(path) and not path.exists():
        return read_dataset(load_dataset(str(path)), batch=asked.batch, classes=names)
    examples = read(path, size=asked.size, classes=names)
    held = len(examples.inputs)
    if not held:
        raise UnbatchError(f"{path} holds no examples.")
    n = held if asked.batch is None else asked.batch
    if not 1 <= n <= held:
        raise UnbatchError(f"--batch {n}, and {path} holds {held} examples; give a number from 1 to {held}.")
    return replace(examples, inputs=examples.inputs[:n], labels=examples.labels[:n])


def _refuse_idle(rules: Protocol) -> None:
    """Refuse what only local steps use, of a client that takes none."""
    idle = [name for name in _OF_STEPS if name in rules.model_fields_set and getattr(rules, name)]
    if idle:
        raise UnbatchError(
            f"--protocol {idle[0]} would not be used: a client without local steps sends one gradient. Add "
            "local_steps=N or epochs=N, or leave it out."
        )


_OF_STEPS = ("learning_rate", "momentum", "weight_decay", "optimiser", "local_batch_size")


def _rules(words: str) -> Protocol:
    parts = [part.partition("=") for part in words.split(",")]
    for name, equals, _ in parts:
        if not equals:
            raise UnbatchError(
                f"--protocol {words!r}: {name!r} has no value; write it as local_steps=4,learning_rate=0.1."
            )
    try:
        return Protocol(**{name.strip(): value.strip() for name, _, value in parts})  # type: ignore[arg-type]  # read off words
    except UnbatchError as error:
        raise UnbatchError(f"--protocol {words!r}: {error}") from None


_COMMAS = re.compile(r"[-+.\deE]+(,[-+.\deE]+)+")  # 3,32,32


def _known(words: Sequence[str], setting: Setting | None) -> Knowledge:
    facts: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        check_fields([name])
        if name in facts:
            raise UnbatchError(f"--knows {word!r}: {name} is given twice.")
        if equals:
            try:
                facts[name] = json.loads(f"[{text}]" if _COMMAS.fullmatch(text) else text)
            except (ValueError, RecursionError):
                facts[name] = text
            if name == "privacy":
                facts[name] = told_privacy(facts[name])
        elif name == "labels" and setting is not None:
            facts[name] = setting.labels.sort(dim=0).values  # which labels, not in which order they were trained on
        else:
            raise UnbatchError(
                f"--knows {word!r}: give FIELD=VALUE ('labels' alone needs a client whose truth is known)."
            )
    try:
        return Knowledge(**facts)
    except UnbatchError as error:
        raise UnbatchError(f"--knows {' '.join(words)}: {error}") from None
