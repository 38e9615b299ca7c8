"""Inspection: a client's first look at a model that it received, before it trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from unbatch import __version__
from unbatch.analysis import Analysis, LayerRisk, Verdict
from unbatch.auditing.client import observe
from unbatch.auditing.stand_in import stand_in_inputs
from unbatch.case import Setting
from unbatch.domain import Domain, domain_of
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.received import Received, exposed
from unbatch.label_form import LabelForm
from unbatch.loss import Loss
from unbatch.network.dense import forward
from unbatch.network.unwrapped import unwrapped
from unbatch.reporting.inspection import Inspection, PrivateExample, SignRead
from unbatch.sign import Sign
from unbatch.update import named_values

EXAMPLES = 64  # that signs are read on, at most
BATCH = 8  # examples of one update, where nobody says how many
LEAKS = ("separable-layer", "gradient-rank", "token-bag")  # analyses that say what any model gives away


def inspect(
    model: nn.Module,
    before: nn.Module | Mapping[str, Any] | None = None,
    data: Setting | tuple[Tensor, Tensor] | None = None,
    *,
    loss: Loss | None = None,
    batch: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Inspection:
    """Look at a model that was received, before training on it: signs that it was planted, and what it would give away.

    `model` holds the parameters that were received. `before` is the model of the round before, or its state. `data` are
    examples of the client's own, a `Setting` or inputs [n, ...] and labels [n, ...]: 32 or more, since some signs are how
    rarely a unit fires; up to 64 are looked at. Without them inputs of `shape` (found out where it is not given) are drawn.
    `loss` defaults to the setting's, or cross entropy. `batch` says of how many examples an update is, 8 by default, for
    what it would give away. Nothing is trained and nothing is sent; the model is left as it is.

    A server that knows these signs can avoid them, so that none raised is no proof. What could not be read is said.
    Raises UnbatchError: what is given does not fit together.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(1 / 64), model[0].bias.copy_(-torch.linspace(0.3, 0.7, 32))
    >>> found = inspect(model)
    >>> "duplicated-rows" in [sign.sign for sign in found.planted], found.weights, found.exit_code
    (True, ['0.weight', '0.bias'], 1)
    """
    model, notes = unwrapped(model), list[str]()
    if next(model.parameters(), None) is None:
        raise UnbatchError("the model has no parameters, so there is nothing planted in it.")
    setting = _setting(model, data, loss)
    inputs, labels, criterion, domain = _examples(model, setting, loss, batch, shape, notes)
    state = None if before is None else before_of(model, before)
    seen = Received.of(model, before=state, inputs=inputs, labels=labels, loss=criterion)
    signs, unread = signs_of(seen, notes)
    n = min(batch or BATCH, EXAMPLES if inputs is None else len(inputs))
    found = Inspection(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        batch=n,
        examples=0 if inputs is None else len(inputs),
        own=setting is not None,
        before=before is not None,
        signs=signs,
        unread=unread,
        notes=notes,
    )
    if inputs is None or labels is None:
        return found
    few = Received.of(model, inputs=inputs[:n], labels=labels[:n], loss=criterion)
    risks, verdicts = _leaks(model, criterion, inputs[:n], labels[:n], domain, notes)
    alone = list(_alone(few, domain if setting is not None else None))
    return found.model_copy(
        update={"leaks": [*_isolated(few), *risks], "verdicts": verdicts, "alone": alone, "notes": notes}
    )


def _setting(model: nn.Module, data: Setting | tuple[Tensor, Tensor] | None, loss: Loss | None) -> Setting | None:
    """The client's examples beside the model that was received, checked to fit it."""
    if data is None:
        return None
    if isinstance(data, Setting):
        return Setting(model=model, loss=loss or data.loss, inputs=data.inputs, labels=data.labels, domain=data.domain)
    if not isinstance(data, Sequence) or len(data) != 2:
        raise UnbatchError("data are inputs [n, ...] and labels [n, ...], or a Setting.")
    return Setting(model=model, loss=loss or nn.functional.cross_entropy, inputs=data[0], labels=data[1])


def _examples(
    model: nn.Module,
    setting: Setting | None,
    loss: Loss | None,
    batch: int | None,
    shape: tuple[int, ...] | None,
    notes: list[str],
) -> tuple[Tensor | None, Tensor | None, Loss, Domain]:
    """Up to EXAMPLES of the client's examples, or as many that are drawn; none where the model takes none that is tried."""
    if setting is not None:
        if len(setting.inputs) < EXAMPLES // 2:
            notes.append(
                f"{len(setting.inputs)} examples were given: how rarely units fire is read on {EXAMPLES // 2} or more."
            )
        return setting.inputs[:EXAMPLES], setting.labels[:EXAMPLES], setting.loss, setting.domain
    criterion, rng = loss or nn.functional.cross_entropy, torch.Generator().manual_seed(0)
    try:
        inputs = stand_in_inputs(model, shape, EXAMPLES, rng)
        outputs = forward(model, inputs)
        labels = LabelForm.of(criterion, tuple(outputs.shape[1:]), device=outputs.device).draw(EXAMPLES, rng, outputs)
    except (UnbatchError, RuntimeError) as error:
        notes.append(f"signs that need a batch were not read: {error}")
        return None, None, criterion, domain_of(torch.zeros(1, 1))
    notes.append(
        f"no data were given: {EXAMPLES} inputs of shape {list(inputs.shape[1:])} were drawn in their place, on which a "
        "planted model may look honest; give your own."
    )
    return inputs, labels, criterion, domain_of(inputs)


def before_of(model: nn.Module, before: nn.Module | Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The parameters of the round before, by the model's own names. Raises UnbatchError: they are of another model."""
    if isinstance(before, nn.Module):
        before = unwrapped(before).state_dict()
    found, own = named_values(model, dict(before), "before", whole=True), model.state_dict()
    odd = [name for name, tensor in found.items() if name not in own or tensor.shape != own[name].shape]
    if odd:
        raise UnbatchError(
            f"before is the state of another model: {odd[0]!r} does not fit; give that of the last round."
        )
    return found


def signs_of(seen: Received, notes: list[str] | None = None) -> tuple[list[SignRead], list[str]]:
    """Every sign read off a received model: those that could be read, the raised ones first, and the names of the others.

    `notes` is told why signs that need a batch were not read, where there is one.

    >>> signs, unread = signs_of(Received.of(nn.Linear(9, 9)))
    >>> [sign.sign for sign in signs if sign.raised], "lone-units" in unread
    ([], True)
    """
    signs, unread = list[SignRead](), list[str]()
    for name, sign in Sign.find().items():
        readings = list(sign().read(seen))
        top = sign()(seen)
        if top is None:
            unread.append(name)
            continue
        beyond = {reading.layer for reading in readings if reading.value > sign.limit}
        weights = [key for key, _ in seen.model.named_parameters() if key.rpartition(".")[0] in beyond]
        signs.append(
            SignRead(
                sign=name,
                layer=top.layer,
                value=top.value,
                limit=sign.limit,
                honest=sign.honest,
                words=top.words,
                weights=weights,
            )
        )
    try:
        len(seen.running)
    except NotApplicable as error:
        if seen.inputs is not None and notes is not None:
            notes.append(f"signs that need a batch were not read: {error}")
    return sorted(signs, key=lambda sign: -(sign.value > sign.limit)), unread


def _isolated(seen: Received) -> Iterator[LayerRisk]:
    """For each layer that holds examples alone, how many."""
    for layer in seen.each_running():
        count, n = len(exposed(layer)), len(layer.energy)
        if count:
            d = layer.matrix.rows.shape[1]
            yield LayerRisk(
                layer=layer.matrix.layer,
                kind="Linear" if layer.back is not None else "layer of several places",
                unknowns=n * d,
                equations=layer.matrix.rows.numel(),
                rank=count * d,
                words=f"{count} of {n} examples stand alone in a unit, or between two: a division gives what entered it.",
                level="exact" if count == n and layer.back is not None else "partial",
                analysis="examples that stand alone",
            )


def _alone(seen: Received, domain: Domain | None) -> Iterator[PrivateExample]:
    """The examples that a layer's gradient holds alone, each once, where it is nearest to the input."""
    told = set[int]()
    for layer in seen.each_running():
        if layer.back is None or len(layer.energy) != len(seen.inputs if seen.inputs is not None else ()):
            continue
        for index, unit in exposed(layer).items():
            if index not in told and seen.inputs is not None:
                told.add(index)
                picture = domain.render(seen.inputs[index]) if domain is not None else ""
                yield PrivateExample(index=index, layer=layer.matrix.layer, unit=unit, picture=picture)


def _leaks(
    model: nn.Module, loss: Loss, inputs: Tensor, labels: Tensor, domain: Domain, notes: list[str]
) -> tuple[list[LayerRisk], list[Verdict]]:
    """What any server would read off an update of this batch, by the analyses that count."""
    try:
        seen, truth = observe(copy.deepcopy(model), loss, inputs, labels, knowledge=domain.public())
    except UnbatchError as error:
        notes.append(f"what it would give away is not known: {error}")
        return [], []
    risks, verdicts = list[LayerRisk](), list[Verdict]()
    for name in LEAKS:
        try:
            findings = Analysis.parse(name)(seen, at=(truth.inputs, truth.labels))
        except (NotApplicable, UnbatchError):
            continue
        risks += [f.model_copy(update={"analysis": name}) for f in findings if isinstance(f, LayerRisk)]
        verdicts += [f.model_copy(update={"analysis": name}) for f in findings if isinstance(f, Verdict)]
    return risks, verdicts
