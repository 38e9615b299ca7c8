"""Flower: a guard on the client's side, and bundles and audits of every exchange on the server's.

The package is an extra: pip install 'unbatch[flower]'; its simulation on Ray comes with 'flwr[simulation]'. Both of its
interfaces are served: NumPyClient under strategies of `flwr.server`, and messages under strategies of `flwr.serverapp`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unbatch.adapters.trained import check_defences, defended, fresh_draws
from unbatch.adapters.weights import UNTOLD, WeightsExchange, weights_exchange
from unbatch.analysis import Analysis
from unbatch.attack import Attack
from unbatch.auditing.guard import PLANTED, Leak, check_planted, guard, planted_signs, planted_words, refuse_other_batch
from unbatch.auditing.last_round import LastRound
from unbatch.auditing.run import audit
from unbatch.defence import Defence, Round, Stack
from unbatch.errors import MissingExtra, UnbatchError
from unbatch.files import write_atomically
from unbatch.knowledge import Knowledge
from unbatch.loss import Loss
from unbatch.plugin import OneOrMore
from unbatch.protocol import Protocol, Update
from unbatch.reporting.inspection import SignRead
from unbatch.reporting.results import Audit
from unbatch.truth import Truth

BUNDLE, RECORD, AUDIT, PAGE = "update.safetensors", "exchange.json", "audit.json", "report.html"
HELD = "the client's guard holds this update back."  # all that the server is told: why is the client's own matter
LAST_ROUND = "unbatch-last-round"  # in a client's own state: the parameters that it received
_EMPTY = "_empty"  # the key of Flower's record of no arrays
log = logging.getLogger("unbatch.flower")

Mod = Callable[[Any, Any, Callable[[Any, Any], Any]], Any]
Batch = Callable[[Any, Any], tuple[Tensor, Tensor]]  # (message, context) -> inputs and labels behind this round
Private = Callable[
    [int, Mapping[str, Any]], tuple[Tensor, Tensor]
]  # (round, what was told) -> the same, in a simulation


def guard_mod(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    protocol: Protocol | None = None,
    defend: OneOrMore[Defence] = (),
    defences: OneOrMore[Defence] = (),
    knowledge: Knowledge | None = None,
    max_psnr: float = 20.0,
    attacks: OneOrMore[Attack] | None = None,
    seconds: float = 30.0,
    seed: int = 0,
    folder: str | Path | None = None,
    planted: Literal["refuse", "freeze", "ignore"] = "refuse",
) -> Mod:
    """A mod for a Flower ClientApp that attacks what the client is about to send, and sends nothing where it leaks.

    Give it as the first of the mods, which is the last to see a reply: `ClientApp(..., mods=[guard_mod(...)])`, or
    `@app.train(mods=[guard_mod(...)])`. It looks at replies to training. `model` is of the form that the server sends,
    with any parameters; those of the message are loaded into a copy. `batch(message, context)` returns the examples that
    the client trains on in this round, inputs [n, ...] and labels [n, ...], in the order in which it takes them.

    `protocol` says what the message and `context.run_config` do not tell of the client's step (`weights_exchange`).
    `defend` are defences that the mod puts on the difference of weights before it is looked at and sent, in every round,
    each with fresh noise; `defences` are those that the client, or a mod within, has put on it already. All other
    arguments and rules are those of `unbatch.guard`. What the attacks found in each round is written under `folder`, if it
    is named, as `Audited` writes it: for the client's own eyes, since it shows its examples.

    A model that looks planted (`unbatch.inspect`) is not trained on where its weights show it; where only the batch does,
    nothing is sent. The model of the round before, by which a layer that was put in its place shows, is kept in the
    client's own `context.state`. With `planted="freeze"` a model is trained on, and the layers with a sign are sent back as
    they came (where the client takes several local steps it must freeze them itself, by `Inspection.weights`, or the rest
    of the update is held back as one that its batch does not explain); with "ignore" no signs are looked at.

    Where an example leaks, and where the guard cannot tell (nothing was told of the step, another batch is behind the
    update, no attack could run), the server gets an error in place of the weights, without the reason; the log has it.
    Raises UnbatchError: Flower is missing, or a defence of `defend` changes training itself.
    """
    check_planted(planted, PLANTED)
    stack = Stack.of(defend)
    _flower("guard_mod")
    _network(model)
    check_defences(stack)
    inner = Defence.several(defences)
    attacked = None if attacks is None else Attack.several(attacks)
    rules = {"max_psnr": max_psnr, "attacks": attacked, "seconds": seconds, "seed": seed}
    kept = None if folder is None else Path(folder)
    return _Guarded(model, loss, batch, protocol, stack, tuple(inner), knowledge, rules, kept, planted)


@dataclass(frozen=True)
class _Guarded:
    """The mod: Flower calls it with a message, a context, and what comes after it."""

    model: nn.Module
    loss: Loss
    batch: Batch
    given: Protocol | None
    defend: Stack
    inner: tuple[Defence, ...]
    knowledge: Knowledge | None
    rules: Mapping[str, Any]
    folder: Path | None
    planted: Literal["refuse", "freeze", "ignore"]

    def __call__(self, message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        try:
            received = _values(_only_arrays(message.content, "the message"), self.model)  # before training may empty it
            words = self._signs(message, context, received) if self.planted == "refuse" else []
        except Exception as error:
            return _held(message, f"the model that was received cannot be read: {error}")
        if words:
            return _held(message, f"nothing is trained: {' '.join(words)}")
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        try:
            return self._checked(message, context, received, reply)
        except Leak as leak:
            return _held(message, str(leak))
        except Exception as error:  # what cannot be looked at is not sent
            return _held(message, _words(error))

    def _checked(self, message: Any, context: Any, received: Any, reply: Any) -> Any:
        """The reply, defended, if nothing in it leaks. Raises Leak, or UnbatchError where the guard cannot tell."""
        inputs, labels = self.batch(message, context)
        arrays = _only_arrays(reply.content, "the reply")
        told = dict(context.run_config) | _told(message.content) | _told(reply.content)
        seen = self._exchange(received, arrays, told, len(inputs))
        if not seen.moved and not self.defend.defences:
            return reply
        frozen = self._planted(message, context, seen, inputs, labels)
        if frozen:
            log.warning("these layers look planted and are sent back as they came: %s", ", ".join(sorted(frozen)))
            _replace(arrays, seen, {name: torch.zeros_like(t) for name, t in seen.update.items() if name in frozen})
            seen = self._exchange(received, arrays, told, len(inputs)).frozen(frozen)
        if self.defend.defences:
            _replace(arrays, seen, self._defended(seen, inputs, labels))
            seen = self._exchange(received, arrays, told, len(inputs)).frozen(frozen)  # as it was rounded
        try:
            found = self._guarded(seen, inputs, labels)
        except Leak as leak:
            self._keep(message, leak.audit)
            raise
        self._keep(message, found)
        return reply

    def _defended(self, seen: WeightsExchange, inputs: Tensor, labels: Tensor) -> Update:
        """What the defences of `defend` make of the difference. Raises UnbatchError: another batch is behind it."""
        if not self.inner:  # what the server told of the step may be wrong, and behind noise that would not show
            left = seen.observation(self.loss).residual(inputs, labels) if seen.moved else None
            refuse_other_batch(left, seen.model, inputs, seen.protocol)
        turn = Round(
            model=seen.model, loss=self.loss, inputs=inputs, labels=labels, protocol=seen.protocol, rng=fresh_draws()
        )
        return defended(self.defend, turn, seen.update)

    def _guarded(self, seen: WeightsExchange, inputs: Tensor, labels: Tensor) -> Audit:
        """The audit of what is about to be sent. Raises Leak."""
        return guard(
            seen.update,
            model=seen.model,
            loss=self.loss,
            inputs=inputs,
            labels=labels,
            protocol=seen.protocol,
            defences=[*self.defend.defences, *self.inner],
            knowledge=seen.knowledge.only("buffers") | (self.knowledge or Knowledge()),
            planted="refuse" if self.planted == "refuse" else "ignore",
            **self.rules,
        )

    def _signs(self, message: Any, context: Any, received: Any) -> list[str]:
        """The signs of planting that the weights alone show, before anything is trained, in words."""
        try:
            seen = self._exchange(received, _only_arrays(message.content, "the message"), {}, 1)
        except UnbatchError:  # what cannot be read now is refused once there is something to send
            return []
        return planted_words(self._raised(message, context, seen))

    def _planted(self, message: Any, context: Any, seen: WeightsExchange, inputs: Tensor, labels: Tensor) -> set[str]:
        """The weights of layers that have a sign, by themselves and by the batch, where those are to be frozen."""
        if self.planted != "freeze":
            return set()
        raised = self._raised(message, context, seen, inputs, labels)
        return {weight for sign in raised for weight in sign.weights}

    def _raised(
        self,
        message: Any,
        context: Any,
        seen: WeightsExchange,
        inputs: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> list[SignRead]:
        """The signs that are raised; what the next round is compared with is kept in the client's own state."""
        number, last = _round(message) or None, _last_round(context)
        raised = planted_signs(seen.model, self.loss, inputs, labels, last.before(number))
        _keep_round(context, last.followed(number, seen.model, raised))
        return raised

    def _keep(self, message: Any, found: Audit) -> None:
        """Write what the attacks found, where a folder is named; where that fails the guard's answer stands without it."""
        if self.folder is None:
            return
        with _said("what the guard found could not be written"):
            place = _made(self.folder, _name(_round(message), str(message.metadata.dst_node_id)))
            found.save(place / AUDIT)
            found.to_html(place / PAGE)

    def _exchange(self, received: Any, arrays: Any, told: Mapping[str, Any], examples: int) -> WeightsExchange:
        back = _values(arrays, self.model)
        return weights_exchange(self.model, received, back, told=told, examples=examples, protocol=self.given)


def _last_round(context: Any) -> LastRound:
    """What the mod kept of the model that this client received before."""
    state = context.state
    if LAST_ROUND not in state:
        return LastRound()
    number = int(state[f"{LAST_ROUND}-number"]["number"]) or None
    return LastRound(number, {name: torch.from_numpy(array.numpy()) for name, array in state[LAST_ROUND].items()})


def _keep_round(context: Any, last: LastRound) -> None:
    """Keep it where Flower keeps what a client's app knows from one round to the next."""
    from flwr.app import Array, ArrayRecord, ConfigRecord

    context.state[LAST_ROUND] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in last.state.items()})
    context.state[f"{LAST_ROUND}-number"] = ConfigRecord({"number": last.number or 0})


def _round(message: Any) -> int:
    """The number of a round, as strategies of messages configure it, and the legacy ones group by it; 0 if neither says."""
    told = _told(message.content) if message.has_content() else {}
    number = told.get("server-round", message.metadata.group_id)
    return int(number) if str(number).isdigit() else 0


def _held(message: Any, why: str) -> Any:
    """The reply of a client that sends nothing. Why is logged here, and not told to the server: it speaks of the batch."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode

    log.warning("round %s: nothing is sent: %s", _round(message), why)
    return Message(Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=HELD), reply_to=message)


def _replace(arrays: Any, seen: WeightsExchange, update: Update) -> None:
    """Put the weights that went out, moved by `update`, in the place of those that came back."""
    from flwr.app import Array

    own = dict(seen.model.named_parameters(remove_duplicate=False))
    moved = {id(own[name]): tensor for name, tensor in update.items()}
    keys = [key for key in arrays if key != _EMPTY]
    for key, (name, held) in zip(keys, seen.after.items(), strict=True):
        if name in own and id(own[name]) in moved:
            new = own[name].detach().double() + moved[id(own[name])].double()
            arrays[key] = Array(new.to(held.dtype).cpu().numpy())


@dataclass(kw_only=True)
class ExchangeRecord:
    """What became of one exchange: what was told of it, where its files are, and what went wrong."""

    round: int
    client: str
    place: str  # its folder
    known: str = ""  # what the server knows besides the update
    notes: list[str] = field(default_factory=list)
    bundle: str = ""
    sha256: str = ""  # of the bundle
    outcome: str = ""  # of the audit, where there is one
    headline: str = ""
    seconds: float = 0.0
    problem: str = ""


class _Kept(NamedTuple):
    """An exchange of this round, to be audited."""

    record: ExchangeRecord
    exchange: WeightsExchange
    told: Mapping[str, Any]


class Audited:
    """A Flower strategy with a witness: what every client sends is kept in a file of its own and, if asked, audited.

    `strategy` is any strategy of Flower, of `flwr.serverapp.strategy` or `flwr.server.strategy`; this one stands in its
    place and does what it does. `model` is of the form that is sent, `loss` the clients' loss. Under `folder`, for each
    round and client, `round-0001/client-ID/` gets

    - `update.safetensors`: the exchange with the global model before it, as `Observation.load` and `unbatch audit` read it
    - `exchange.json`: what was told of it, and what went wrong (`records` holds the same)
    - with `audits`, `audit.json` and `report.html`

    all written whole or not at all, for their owner alone to read. The difference of weights, local steps, learning rate,
    batch sizes and buffers are taken from the exchange as far as it tells (`weights_exchange`); `told` is what both sides
    know besides (the app's run_config), `protocol` and `knowledge` say the rest. The attacks of each audit share `seconds`,
    after the round's aggregation and before its end. A server has no private examples, so there are no scores; in a
    simulation `truth(round, told)` gives them, inputs [n, ...] and labels, where a client's metrics tell which it is.
    An error in any of this is recorded and logged; no round is stopped by it.
    Raises UnbatchError: Flower is missing, this is no strategy or no module, or the folder holds exchanges already.
    """

    def __init__(
        self,
        strategy: Any,
        *,
        model: nn.Module,
        loss: Loss,
        folder: str | Path,
        protocol: Protocol | None = None,
        told: Mapping[str, Any] | None = None,
        knowledge: Knowledge | None = None,
        audits: bool = False,
        truth: Private | None = None,
        attacks: OneOrMore[Attack] | None = None,
        analyses: OneOrMore[Analysis] | None = None,
        seconds: float = 60.0,
        seed: int = 0,
    ) -> None:
        _register(strategy)
        _network(model)
        self.strategy, self.model, self.loss = strategy, model, loss
        self.folder = _empty_folder(Path(folder))
        self.protocol, self.told, self.knowledge = protocol, dict(told or {}), knowledge
        self.audits, self.truth, self.seconds, self.seed = audits, truth, seconds, seed
        self.attacks = None if attacks is None else Attack.several(attacks)
        self.analyses = None if analyses is None else Analysis.several(analyses)
        self.records = list[ExchangeRecord]()
        self._sent = dict[str, tuple[Any, dict[str, Any]]]()  # client -> the model that it was sent, and what else
        self._inner = {name: getattr(strategy, name) for name in HOOKS if hasattr(strategy, name)}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the strategy's own."""
        if name.startswith("__") or "strategy" not in vars(self):
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def __repr__(self) -> str:
        return f"<Audited {self.strategy!r}, to {self.folder}>"

    def start(self, *args: Any, **kwargs: Any) -> Any:
        """Run all rounds, as the strategy's own `start` does, with the witness in each of them."""
        with _bound(self.strategy, configure_train=self.configure_train, aggregate_train=self.aggregate_train):
            return self.strategy.start(*args, **kwargs)

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Any]:
        """The strategy's messages of this round; what each client is sent is noted."""
        messages = list(self._inner["configure_train"](server_round, arrays, config, grid))
        self._sent.clear()
        for message in messages:
            with _said("what a client was sent could not be noted"):
                held = _only_arrays(message.content, "the message")
                self._sent[str(message.metadata.dst_node_id)] = dict(held.items()), _told(message.content)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
        """The strategy's aggregate of this round; what each client sent is written, and audited."""
        replies, kept = list(replies), list[_Kept]()
        for reply in replies:
            client = str(reply.metadata.src_node_id)
            with self._kept(server_round, client, kept) as take:
                if reply.has_error():
                    raise UnbatchError(f"no weights came back: {reply.error.reason}")
                metrics = _told(reply.content)
                examples = metrics.get(getattr(self.strategy, "weighted_by_key", "num-examples"))
                take(_only_arrays(reply.content, "the reply"), metrics, examples)
        result = self._inner["aggregate_train"](server_round, replies)
        self._audit(kept)
        return result

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        """The strategy's instructions of this round; what each client is sent is noted."""
        pairs = list(self._inner["configure_fit"](server_round, parameters, client_manager))
        self._sent.clear()
        for proxy, ins in pairs:
            with _said("what a client was sent could not be noted"):
                self._sent[str(proxy.cid)] = ins.parameters, dict(ins.config)
        return pairs

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> Any:
        """The strategy's aggregate of this round; what each client sent is written, and audited."""
        kept = list[_Kept]()
        summed = len(results) > 1 and len({id(result.parameters) for _, result in results}) == 1
        for proxy, result in results:
            with self._kept(server_round, str(proxy.cid), kept) as take:
                if summed:
                    raise UnbatchError(
                        "secure aggregation: the server holds the clients' average, and no client's own."
                    )
                take(result.parameters, dict(result.metrics), result.num_examples)
        aggregated = self._inner["aggregate_fit"](server_round, results, failures)
        self._audit(kept)
        return aggregated

    @contextmanager
    def _kept(
        self, round_: int, client: str, kept: list[_Kept]
    ) -> Iterator[Callable[[Any, Mapping[str, Any], Any], None]]:
        """Write what one client sent, or why it could not be; nothing that fails in it is passed on."""
        name = _name(round_, client)
        again = sum(each.place.partition("+")[0] == name for each in self.records)
        record = ExchangeRecord(round=round_, client=client, place=f"{name}+{again}" if again else name)
        self.records.append(record)

        def take(back: Any, metrics: Mapping[str, Any], examples: Any) -> None:
            if client not in self._sent:
                raise UnbatchError("it is not known what this client was sent: the strategy did not configure it.")
            out, config = self._sent[client]
            count = int(examples) if isinstance(examples, int | float) and examples >= 1 else None
            told = self.told | config | dict(metrics)
            exchange = weights_exchange(
                self.model,
                _values(out, self.model),
                _values(back, self.model),
                told=told,
                examples=count,
                protocol=self.protocol,
                knowledge=self.knowledge,
            )
            record.notes = list(exchange.notes)
            record.known = str(exchange.knowledge)
            path = _made(self.folder, record.place) / BUNDLE
            exchange.observation(self.loss).save(path)
            record.bundle = f"{record.place}/{BUNDLE}"
            record.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            kept.append(_Kept(record, exchange, told))

        try:
            yield take
        except Exception as error:
            record.problem = _words(error)
            log.warning("round %s, client %s: %s", round_, client, record.problem)
        self._write(record)

    def _audit(self, kept: Sequence[_Kept]) -> None:
        """Audit what was kept of this round. What fails is recorded, and the others are audited all the same."""
        for record, exchange, told in kept if self.audits else ():
            start = time.monotonic()
            try:
                found = self._audited(exchange, self._truth(record.round, told))
                place = _made(self.folder, record.place)
                found.save(place / AUDIT)
                found.to_html(place / PAGE)
                record.outcome, record.headline = found.outcome.value, found.headline
            except Exception as error:
                record.problem = _words(error)
                log.warning("round %s, client %s was not audited: %s", record.round, record.client, record.problem)
            record.seconds = time.monotonic() - start
            self._write(record)
        if kept and self.audits:
            log.info("round %s: %s", kept[0].record.round, "; ".join(r.headline or r.problem for r, *_ in kept))

    def _truth(self, round_: int, told: Mapping[str, Any]) -> Truth | None:
        if self.truth is None:
            return None
        inputs, labels = self.truth(round_, told)
        return Truth(inputs=inputs, labels=labels)

    def _audited(self, exchange: WeightsExchange, truth: Truth | None) -> Audit:
        if not exchange.steps_told:
            raise UnbatchError(UNTOLD)
        if not exchange.moved:
            raise UnbatchError("the weights came back as they went out: there is nothing to audit.")
        found = audit(
            exchange.observation(self.loss),
            truth=truth,
            attacks=self.attacks,
            analyses=self.analyses,
            seeds=(self.seed,),
            total_budget=self.seconds,
        )
        found.notes += list(exchange.notes)
        found.environment["flwr"] = _flower("Audited").__version__
        return found

    def _write(self, record: ExchangeRecord) -> None:
        with _said("a record could not be written"):
            path = _made(self.folder, record.place) / RECORD
            write_atomically(path, json.dumps(asdict(record), indent=1), private=True)


def _name(round_: int, client: str) -> str:
    """Of the folder of one exchange."""
    return f"round-{round_:04d}/client-{re.sub(r'[^A-Za-z0-9._-]', '_', client).lstrip('.') or 'unnamed'}"


def _made(folder: Path, name: str) -> Path:
    """The folder of one exchange, made for its owner alone."""
    place = folder / name
    for part in (folder, place.parent, place):
        part.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


HOOKS = ("configure_train", "aggregate_train", "configure_fit", "aggregate_fit")


def _flower(what: str) -> Any:
    try:
        import flwr
    except ImportError as error:
        raise MissingExtra.of(what, "flwr", "flower") from error
    return flwr


def _network(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UnbatchError(
            f"model is of type {type(model).__name__}; give the module itself, such as the factory's result."
        )


def _register(strategy: Any) -> None:
    """Let `isinstance` take an audited strategy for one. Raises UnbatchError: what is wrapped is none."""
    _flower("Audited")
    from flwr.server.strategy import Strategy as OfNumPy
    from flwr.serverapp.strategy import Strategy as OfMessages

    kinds = [kind for kind in (OfMessages, OfNumPy) if isinstance(strategy, kind)]
    if not kinds:
        raise UnbatchError(
            f"{type(strategy).__name__} is no strategy of Flower; give one of flwr.serverapp.strategy or "
            "flwr.server.strategy, built with its own arguments."
        )
    for kind in kinds:
        kind.register(Audited)


def _empty_folder(folder: Path) -> Path:
    if any(folder.glob("round-*")):
        raise UnbatchError(
            f"{folder} holds the exchanges of an earlier run; name another folder, such as one with the run's number in it."
        )
    return folder


@contextmanager
def _bound(strategy: Any, **hooks: Callable[..., Any]) -> Iterator[None]:
    """Have the strategy's own loop call these in the place of its methods."""
    for name, hook in hooks.items():
        setattr(strategy, name, hook)
    try:
        yield
    finally:
        for name in hooks:
            delattr(strategy, name)


@contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("%s: %s", what, _words(error))


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, UnbatchError) else f"{type(error).__name__}: {error}"


def _only_arrays(content: Any, what: str) -> Any:
    """The one ArrayRecord of a message. Raises UnbatchError: there are none, or several."""
    found = list(content.array_records.values())
    if len(found) != 1:
        raise UnbatchError(f"{what} holds {len(found)} records of arrays, and one, the model's, is read.")
    return found[0]


def _values(held: Any, model: nn.Module) -> Any:
    """The arrays of a record, by name, or as a list where they are only numbered; and those of legacy Parameters."""
    from flwr.common import Parameters, parameters_to_ndarrays

    if isinstance(held, Parameters):
        return parameters_to_ndarrays(held)
    arrays: dict[str, np.ndarray[Any, Any]] = {key: array.numpy() for key, array in held.items() if key != _EMPTY}
    if not arrays:
        raise UnbatchError("the record of the model is empty.")
    numbered = all(key.isdigit() for key in arrays) and not set(arrays) & set(model.state_dict())  # in Flower's order
    return list(arrays.values()) if numbered else arrays


def _told(content: Any) -> dict[str, Any]:
    """What the configuration and the metrics of a message say, in one."""
    held = dict[str, Any]()
    for record in (*content.config_records.values(), *content.metric_records.values()):
        held |= dict(record)
    return held
