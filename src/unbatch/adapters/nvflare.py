"""NVFlare: a guard on the client's side, as a filter of its task results. An extra: pip install 'unbatch[nvflare]'."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unbatch.adapters.trained import check_defences, defended, fresh_draws
from unbatch.adapters.weights import WeightsExchange, weights_exchange
from unbatch.attack import Attack
from unbatch.auditing.guard import PLANTED, Leak, check_planted, guard, planted_signs
from unbatch.auditing.last_round import LastRound
from unbatch.case import Setting
from unbatch.defence import Defence, Round, Stack
from unbatch.errors import MissingExtra, UnbatchError
from unbatch.plugin import OneOrMore
from unbatch.protocol import Protocol, Update
from unbatch.reporting.results import Audit
from unbatch.update import named_values

try:
    from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.event_type import EventType
    from nvflare.apis.filter import ContentBlockedException
    from nvflare.apis.fl_constant import FilterKey, FLContextKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.app_constant import AppConstants
except ImportError as error:
    raise MissingExtra.of("the guard for NVFlare", "nvflare", "nvflare") from error

HELD = "the client's guard holds this update back."  # all that the exception says: why is the client's own matter
KINDS = (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF)
log = logging.getLogger("unbatch.nvflare")

Behind = Callable[[FLContext], Setting]  # what the client trained on in this task


class GuardFilter(DXOFilter):  # type: ignore[misc] # NVFlare has no types
    """A filter of NVFlare's task results that attacks what the client is about to send, and blocks it where it leaks.

    Put it last among the client's task result filters, for the tasks in which it trains: after it nothing changes what is
    sent. It looks at WEIGHTS and WEIGHT_DIFF; the global model is that of the task, which it sees as the task begins.

    `setting` is a function of the FLContext, or its name as "package.module:function", that returns the `Setting` behind
    this task: a model of the form that is sent, the loss, the inputs [n, ...] and labels that the client trained on, in
    the order in which it took them, and what the client does (`protocol`). `protocol` here, a Protocol or its fields by
    name, goes before that one. NUM_STEPS_CURRENT_ROUND in the result's meta tells the local steps where neither does.
    `defend` are defences that the filter puts on the difference of weights before it is looked at and sent, with fresh
    noise each time; `defences` are those that the client, or an earlier filter, has put on it already. All other arguments
    and rules are those of `unbatch.guard`. Under `folder`, on the client's own disk, `result-0001/` and so on hold the
    audit of every look and its page, which show the private batch. Every argument can be written in a job's JSON.

    Of a model that looks planted (`unbatch.inspect`), by itself, on the batch or beside that of the round before, nothing
    is sent. With `planted="freeze"` the layers with a sign are sent back as they came (where the client takes several local
    steps it must freeze them itself, or the rest is blocked as what its batch does not explain); with "ignore" no signs are
    looked at.

    Where an example leaks, and where the guard cannot tell (no global model was seen, the result was encrypted, another
    batch is behind it, no attack could run), the result is blocked: NVFlare sends TASK_RESULT_FILTER_ERROR in its place,
    without the reason, which is in the client's log.
    Raises UnbatchError: `setting` names nothing, or a defence of `defend` changes training itself.
    """

    def __init__(
        self,
        setting: Behind | str,
        protocol: Protocol | Mapping[str, Any] | None = None,
        defend: OneOrMore[Defence] = (),
        defences: OneOrMore[Defence] = (),
        max_psnr: float = 20.0,
        attacks: OneOrMore[Attack] | None = None,
        seconds: float = 30.0,
        seed: int = 0,
        data_kinds: list[str] | None = None,
        folder: str | Path | None = None,
        planted: Literal["refuse", "freeze", "ignore"] = "refuse",
    ) -> None:
        super().__init__([kind.value for kind in KINDS], data_kinds)
        # What was given stands by its own name: the Job API reads a job's JSON off these attributes.
        self.setting, self.protocol, self.defend, self.defences = setting, protocol, defend, defences
        self.max_psnr, self.attacks, self.seconds, self.seed = max_psnr, attacks, seconds, seed
        self.folder = None if folder is None else str(folder)
        self.planted = planted
        check_planted(planted, PLANTED)
        self.looks = 0
        self._function = _function(setting)
        self._given = Protocol(**protocol) if isinstance(protocol, Mapping) else protocol
        self._stack, self._inner = Stack.of(defend), tuple(Defence.several(defences))
        check_defences(self._stack)
        self._attacked = None if attacks is None else Attack.several(attacks)
        self._received: dict[str, Any] | str = "no task was seen to begin"
        self._number: int | None = None  # of the round, as the task says
        self._last = self._looked_at = LastRound()  # the model of the round before, and that of this one

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep the global model of the task that begins; when results are filtered, NVFlare has let go of it."""
        if event_type == EventType.BEFORE_TASK_EXECUTION:
            self._receive(fl_ctx.get_prop(FLContextKey.TASK_DATA))

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter a result; of a task's data, among whose filters it may stand too, keep the global model alone."""
        if fl_ctx.get_prop(FLContextKey.FILTER_DIRECTION) == FilterKey.IN:
            self._receive(shareable)
            return shareable
        return super().process(shareable, fl_ctx)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The weights, defended; None where they are sent as they are. Raises ContentBlockedException."""
        try:
            return self._checked(dxo, fl_ctx)
        except Leak as leak:
            self._keep(leak.audit)
            log.warning("nothing is sent: %s", leak)
        except Exception as error:  # what cannot be looked at is not sent
            log.warning("nothing is sent: %s", f"{type(error).__name__}: {error}")
        raise ContentBlockedException(HELD)

    def _receive(self, task: Any) -> None:
        """Keep a copy of the global model; in its place the reason why there is none."""
        self._last = self._looked_at
        try:
            dxo = from_shareable(task)
        except (ValueError, AttributeError):
            self._received = "the task holds no model"
            return
        if dxo.data_kind != DataKind.WEIGHTS:
            self._received = f"the task holds {DataKind(dxo.data_kind).value}, and not the weights of the global model"
        elif dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM):
            self._received = f"the global model is processed by {dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)}"
        else:
            self._received = {name: _copied(value) for name, value in dxo.data.items()}
            number = task.get_header(AppConstants.CURRENT_ROUND)
            self._number = number if isinstance(number, int) else None

    def _checked(self, dxo: DXO, fl_ctx: FLContext) -> DXO | None:
        if isinstance(self._received, str):
            raise UnbatchError(f"the global model is not known: {self._received}.")
        if dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM):
            raise UnbatchError(
                f"the result is processed by {dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)} already; put this filter "
                "before the one that does it."
            )
        behind = self._function(fl_ctx)
        if not isinstance(behind, Setting):
            raise UnbatchError(f"setting returned a {type(behind).__name__}, and no unbatch.Setting.")
        seen = self._exchange(dxo, self._received, behind)
        frozen = self._planted(seen, behind)
        if not seen.moved and not self._stack.defences:
            return None
        if frozen:
            log.warning("these layers look planted and are sent back as they came: %s", ", ".join(sorted(frozen)))
            self._replace(dxo, seen, {name: torch.zeros_like(t) for name, t in seen.update.items() if name in frozen})
            seen = self._exchange(dxo, self._received, behind).frozen(frozen)
        if self._stack.defences:
            self._replace(dxo, seen, self._defended(seen, behind))
            seen = self._exchange(dxo, self._received, behind).frozen(frozen)  # as it was rounded
        self._keep(self._guarded(seen, behind))
        return dxo if self._stack.defences or frozen else None

    def _defended(self, seen: WeightsExchange, behind: Setting) -> Update:
        """What the defences of `defend` make of the difference."""
        turn = Round(
            model=seen.model,
            loss=behind.loss,
            inputs=behind.inputs,
            labels=behind.labels,
            protocol=seen.protocol,
            rng=fresh_draws(),
        )
        return defended(self._stack, turn, seen.update)

    def _guarded(self, seen: WeightsExchange, behind: Setting) -> Audit:
        """The audit of what is about to be sent. Raises Leak."""
        return guard(
            seen.update,
            model=seen.model,
            loss=behind.loss,
            inputs=behind.inputs,
            labels=behind.labels,
            protocol=seen.protocol,
            defences=[*self._stack.defences, *self._inner],
            knowledge=seen.knowledge.only("buffers") | behind.domain.public() | behind.knowledge,
            max_psnr=self.max_psnr,
            attacks=self._attacked,
            seconds=self.seconds,
            seed=self.seed,
            planted="refuse" if self.planted == "refuse" else "ignore",
            before=self._last.before(self._number) or None,
        )

    def _planted(self, seen: WeightsExchange, behind: Setting) -> set[str]:
        """The weights with a sign, where they are to be frozen; what the next round is compared with is kept."""
        if self.planted == "ignore":
            return set()
        inputs, labels = (behind.inputs, behind.labels) if self.planted == "freeze" else (None, None)
        before = self._last.before(self._number)
        raised = planted_signs(seen.model, behind.loss, inputs, labels, before)
        self._looked_at = self._last.followed(self._number, seen.model, raised)
        return {weight for sign in raised for weight in sign.weights} if self.planted == "freeze" else set()

    def _keep(self, record: Audit) -> None:
        """Write the audit of this look and its page, where a folder was named."""
        self.looks += 1
        if self.folder is not None:
            place = Path(self.folder) / f"result-{self.looks:04d}"
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            record.save(place / "audit.json")
            record.to_html(place / "report.html")

    def _exchange(self, dxo: DXO, received: Mapping[str, Any], behind: Setting) -> WeightsExchange:
        """The exchange of weights that a result makes with the global model."""
        told = {"local_steps": dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND)}
        given = self._given or (behind.protocol if behind.protocol.model_fields_set else None)
        differs = dxo.data_kind == DataKind.WEIGHT_DIFF
        sent = _moved(received, dxo.data) if differs else dxo.data
        found = weights_exchange(behind.model, received, sent, told=told, examples=len(behind.inputs), protocol=given)
        if not differs:
            return found
        held = named_values(found.model, dxo.data, "the difference")
        return replace(found, update={name: tensor.to(held[name].dtype) for name, tensor in found.update.items()})

    def _replace(self, dxo: DXO, seen: WeightsExchange, update: Update) -> None:
        """Put the defended difference, or the weights that it leads to, in the place of what the client sends."""
        own = dict(seen.model.named_parameters(remove_duplicate=False))
        moved = {id(own[name]): tensor for name, tensor in update.items()}
        for key, name in zip(dxo.data, _names(seen, dxo.data), strict=True):
            if name in own and id(own[name]) in moved:
                new = moved[id(own[name])].double()
                if dxo.data_kind == DataKind.WEIGHTS:
                    new = new + own[name].detach().double()
                dxo.data[key] = _like(new, dxo.data[key])


def _names(seen: WeightsExchange, data: Mapping[str, Any]) -> Sequence[str]:
    """The model's names of what is sent, in its order."""
    return list(named_values(seen.model, dict(data), "the result", whole=True))


def _moved(received: Mapping[str, Any], difference: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that a difference leads to, in float64, so that it can be taken out of them again as it was."""
    missing = [name for name in difference if name not in received]
    if missing:
        raise UnbatchError(f"the difference names {', '.join(missing[:4])}, which the global model has not.")
    return {name: _wide(received[name]) + _wide(value) for name, value in difference.items()}


def _wide(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.double() if tensor.is_floating_point() else tensor


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else np.array(value)


def _like(value: Tensor, kept: Any) -> Any:
    """A value in the form and precision of the one that it replaces."""
    if isinstance(kept, Tensor):
        return value.to(kept)
    return value.cpu().numpy().astype(np.asarray(kept).dtype).reshape(np.shape(kept))


def _function(setting: Behind | str) -> Behind:
    """The function itself, or what its name in a job's configuration leads to."""
    if not isinstance(setting, str):
        return setting
    module, _, name = setting.partition(":")
    try:
        found: Behind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnbatchError(
            f"setting={setting!r} names nothing ({error}); write it as 'package.module:function'."
        ) from error
    return found
