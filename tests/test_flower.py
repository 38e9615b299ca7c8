"""Flower: real ClientApps and strategies, two honest rounds of two clients, their reports; what the guard holds back."""

import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Audit, Knowledge, Observation, Protocol, UnbatchError
from unbatch.adapters.flower import AUDIT, BUNDLE, HELD, PAGE, RECORD, Audited, guard_mod

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
pytest.importorskip("flwr", minversion="1.22")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

try:  # of later versions than the first that is supported: who a process is, which Flower sets where it runs an app
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:
    TaskIdentity = None
try:
    from flwr.compat.common.recorddict_compat import fitins_to_recorddict, recorddict_to_fitres
except ImportError:
    from flwr.common.recorddict_compat import fitins_to_recorddict, recorddict_to_fitres

RATE, NODES = 0.5, (11, 22)
SHAPE = Knowledge(input_shape=(6,), domain="table", input_range=(-4.0, 4.0))


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    if TaskIdentity is not None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    if TaskIdentity is not None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = None


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def batch(node: int) -> tuple[Tensor, Tensor]:
    """The one private example of a node."""
    return torch.randn(1, 6, generator=torch.Generator().manual_seed(node)), torch.tensor([node % 3])


def trained(net: nn.Module, node: int, rate: float, steps: int = 1) -> nn.Module:
    optimiser = torch.optim.SGD(net.parameters(), lr=rate)
    x, y = batch(node)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


class Client(NumPyClient):
    """A client as Flower's tutorials for NumPyClient have it."""

    def __init__(self, node: int, net: nn.Module) -> None:
        self.node, self.net = node, net

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        state = zip(self.net.state_dict(), map(torch.from_numpy, parameters), strict=True)
        self.net.load_state_dict(dict(state))
        trained(self.net, self.node, float(config["lr"]))
        return [tensor.numpy() for tensor in self.net.state_dict().values()], 1, {"partition-id": self.node}


def numpy_app(mods: Sequence[Any] = (), factory: Callable[[], nn.Module] = model) -> ClientApp:
    return ClientApp(lambda context: Client(context.node_id, factory()).to_client(), mods=list(mods))


def message_app(mods: Sequence[Any] = (), factory: Callable[[], nn.Module] = model) -> ClientApp:
    """A client as Flower's tutorials for messages have it."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        net = factory()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        trained(net, context.node_id, message.content["config"]["lr"])
        content = {
            "arrays": ArrayRecord(net.state_dict()),
            "metrics": MetricRecord({"num-examples": 1, "partition-id": context.node_id}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def context(node: int, **run_config: Any) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config=run_config)


class Grid:
    """What a strategy needs of a grid: it calls the app, once a message, and the messages are copied as on a wire."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app

    def get_node_ids(self) -> list[int]:
        return list(NODES)

    def send_and_receive(self, messages: Any, timeout: float | None = None) -> list[Message]:
        return [self.answer(message) for message in messages]

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        records = {key: ArrayRecord(dict(r.items())) for key, r in message.content.array_records.items()}
        records |= {key: ConfigRecord(dict(r.items())) for key, r in message.content.config_records.items()}
        sent = Message(RecordDict(records), dst_node_id=node, message_type=message.metadata.message_type)
        return self.app(sent, context(node))


def run_messages(app: ClientApp, strategy: Any, rounds: int = 2, **config: Any) -> Any:
    arrays = ArrayRecord(model().state_dict())
    told = ConfigRecord({"lr": RATE, "local-epochs": 1, "batch-size": 1} | config)
    return strategy.start(Grid(app), arrays, num_rounds=rounds, train_config=told)


def run_numpy(app: ClientApp, strategy: Any, rounds: int = 2) -> Any:
    """Flower's own legacy workflow of a round, on the grid above."""
    grid = Grid(app)
    manager = SimpleNamespace(
        num_available=lambda: 2,
        wait_for=lambda *_: True,
        sample=lambda num_clients, **_: [SimpleNamespace(cid=str(node), node_id=node) for node in NODES],
    )
    parameters = strategy.initialize_parameters(manager)
    for number in range(1, rounds + 1):
        results = []
        for proxy, ins in strategy.configure_fit(number, parameters, manager):
            content = fitins_to_recorddict(ins, keep_input=True)
            reply = grid.answer(Message(content, dst_node_id=proxy.node_id, message_type=MessageType.TRAIN))
            if not reply.has_error():
                results.append((proxy, recorddict_to_fitres(reply.content, keep_input=False)))
        parameters, _ = strategy.aggregate_fit(number, results, [])
    return parameters


def message_strategy() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def numpy_strategy(**options: Any) -> LegacyFedAvg:
    weights = [tensor.numpy() for tensor in model().state_dict().values()]
    return LegacyFedAvg(
        **options,
        initial_parameters=ndarrays_to_parameters(weights),
        on_fit_config_fn=lambda number: {"lr": RATE, "local_epochs": 1, "batch_size": 1},
    )


KINDS = {"messages": (run_messages, message_app, message_strategy), "numpy": (run_numpy, numpy_app, numpy_strategy)}


def weights_of(result: Any) -> list[np.ndarray]:
    from flwr.common import parameters_to_ndarrays

    return result.arrays.to_numpy_ndarrays() if hasattr(result, "arrays") else parameters_to_ndarrays(result)


@pytest.mark.parametrize("kind", KINDS)
def test_two_honest_rounds_end_in_reports_with_certified_recoveries(kind: str, tmp_path: Path) -> None:
    run, app, strategy = KINDS[kind]
    plain = run(app(), strategy())
    audited = Audited(
        strategy(),
        model=model(),
        loss=F.cross_entropy,
        folder=tmp_path,
        knowledge=SHAPE,
        audits=True,
        attacks="bias-ratio",
        analyses=(),
    )
    found = run(app(), audited)
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(plain), weights_of(found), strict=True))
    kept = sorted((r.round, r.client, r.problem) for r in audited.records)
    assert kept == [(n, str(node), "") for n in (1, 2) for node in NODES]
    for record in audited.records:
        place = tmp_path / f"round-000{record.round}" / f"client-{record.client}"
        assert {path.name for path in place.iterdir()} == {BUNDLE, RECORD, AUDIT, PAGE}
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in place.iterdir())
        audit = Audit.load(place / AUDIT)
        assert "1 row certified to be behind this update" in audit.headline
        assert audit.headline in (place / PAGE).read_text()
        assert audit.knowledge["learning_rate"] == str(RATE)
        assert record.headline == json.loads((place / RECORD).read_text())["headline"] == audit.headline
        seen = Observation.load(place / BUNDLE, model=model(), loss=F.cross_entropy)
        x, y = batch(int(record.client))
        assert seen.residual(x, y) < 1e-5
        (example,) = unbatch.attacks.BiasRatio()(seen).inputs
        assert torch.allclose(example.float(), x[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_simulation_audits_are_held_to_the_examples_themselves(kind: str, tmp_path: Path) -> None:
    run, app, strategy = KINDS[kind]
    audited = kept(strategy(), tmp_path, audits=True, truth=lambda number, told: batch(told["partition-id"]))
    run(app(), audited, rounds=1)
    for record in audited.records:
        assert record.headline.startswith("1 of 1 private row recovered exactly")
        audit = Audit.load(tmp_path / record.place / AUDIT)
        assert audit.clients[0].residual < 1e-5
        assert audit.runs[0].examples[0].scores["psnr"] > 80


def guarded(**options: Any) -> Any:
    return guard_mod(
        model(),
        F.cross_entropy,
        lambda message, context: batch(context.node_id),
        **({"attacks": "bias-ratio"} | options),
    )


def train_message(content: dict[str, Any] | None = None, **config: Any) -> Message:
    told = ConfigRecord({"lr": RATE, "local-epochs": 1} | config)
    held = content or {"arrays": ArrayRecord(model().state_dict())}
    return Message(RecordDict(held | {"config": told}), dst_node_id=NODES[0], message_type=MessageType.TRAIN)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_holds_a_leak_back_and_does_not_tell_the_server_why(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, app, strategy = KINDS[kind]
    audited = Audited(strategy(), model=model(), loss=F.cross_entropy, folder=tmp_path)
    begun = model().state_dict().values()
    kept = run(app([guarded(folder=tmp_path / "own")]), audited, rounds=1)
    assert kept is None or kept.arrays is None or all(map(np.array_equal, weights_of(kept), begun))
    assert "nothing is sent: this update must not be sent: Example 0 is recovered exactly" in caplog.text
    for node in NODES:
        place = tmp_path / "own" / f"round-000{kind == 'messages':d}" / f"client-{node}"
        assert Audit.load(place / AUDIT).recovered() == {(0, 0)}
        assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (place, *list(place.parents)[:2])} == {0o700}
    assert not list(tmp_path.rglob(BUNDLE))
    if kind == "messages":
        assert [record.problem for record in audited.records] == [f"no weights came back: {HELD}"] * 2


def test_a_guard_lets_through_what_its_attacks_cannot_read() -> None:
    """A defence that the mod puts on: the noise is fresh, and the guard looks at what is sent."""
    app = message_app([guarded(defend="noise:sigma=1", attacks="gradient-matching", seconds=1.0)])
    plain = message_app()(train_message(), context(NODES[0]))
    one, other = (app(train_message(), context(NODES[0])) for _ in range(2))
    clean, first, second = (r.content["arrays"].to_torch_state_dict() for r in (plain, one, other))
    assert {name: t.dtype for name, t in clean.items()} == {name: t.dtype for name, t in first.items()}
    for noised in (first, second):
        noise = torch.cat([(noised[name] - t).flatten() for name, t in clean.items()])
        assert 0.7 < float(noise.std()) < 1.3
    assert not any(torch.equal(first[name], second[name]) for name in clean)
    assert one.content["metrics"]["num-examples"] == 1


def test_what_a_client_was_told_is_not_enough_or_wrong_and_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    def other(message: Message, context: Context) -> tuple[Tensor, Tensor]:
        return batch(context.node_id + 1)

    for mod, words in (
        (guard_mod(model(), F.cross_entropy, other), "this batch is not behind this update"),
        (guard_mod(nn.Linear(2, 2), F.cross_entropy, other), "give its own factory"),
        (guard_mod(model(), F.cross_entropy, lambda *_: 1 / 0), "ZeroDivisionError"),
    ):
        caplog.clear()
        reply = message_app([mod])(train_message(), context(NODES[0]))
        assert reply.has_error()
        assert reply.error.reason == HELD
        assert words in caplog.text
    caplog.clear()
    content = RecordDict({"arrays": ArrayRecord(model().state_dict()), "config": ConfigRecord({"lr": RATE})})
    untold = Message(content, dst_node_id=NODES[0], message_type=MessageType.TRAIN)
    assert message_app([guarded()])(untold, context(NODES[0])).error.reason == HELD
    assert "for how long the client trained" in caplog.text
    caplog.clear()
    assert message_app([guarded()])(untold, context(NODES[0], **{"local-epochs": 1})).error.reason == HELD
    assert "Example 0 is recovered exactly" in caplog.text  # the app's own configuration tells


def kept(strategy: Any, folder: Path, **options: Any) -> Audited:
    how = {"attacks": "bias-ratio", "analyses": (), "knowledge": SHAPE}
    return Audited(strategy, model=model(), loss=F.cross_entropy, folder=folder, **(how | options))


def seen_of(folder: Path, number: int = 1, node: int = NODES[0]) -> Observation:
    path = folder / f"round-{number:04d}" / f"client-{node}" / BUNDLE
    return Observation.load(path, model=model(), loss=F.cross_entropy)


@pytest.mark.parametrize("kind", KINDS)
def test_an_audit_that_fails_stops_no_round_and_is_said(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, app, strategy = KINDS[kind]
    expected = weights_of(run(app(), strategy()))

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory for this")

    monkeypatch.setattr("unbatch.adapters.flower.audit", fails)
    audited = kept(strategy(), tmp_path, audits=True)
    assert all(map(np.array_equal, weights_of(run(app(), audited)), expected))
    assert {record.problem for record in audited.records} == {"RuntimeError: no memory for this"}
    assert len(audited.records) == len(list(tmp_path.rglob(BUNDLE))) == 4
    assert "no memory for this" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_not_fit_and_a_folder_that_cannot_be_written_stop_no_round(kind: str, tmp_path: Path) -> None:
    run, app, strategy = KINDS[kind]
    expected = weights_of(run(app(), strategy()))
    wrong = kept(strategy(), tmp_path / "wrong", audits=True)
    wrong.model = nn.Linear(3, 3)
    assert all(map(np.array_equal, weights_of(run(app(), wrong)), expected))
    assert len([record for record in wrong.records if record.problem and not record.bundle]) == 4
    (tmp_path / "file").write_text("")
    full = kept(strategy(), tmp_path / "file" / "folder", audits=True)
    assert all(map(np.array_equal, weights_of(run(app(), full)), expected))
    assert all("file" in record.problem for record in full.records)


def test_an_exchange_of_which_nothing_tells_for_how_long_is_written_and_not_audited(tmp_path: Path) -> None:
    audited = kept(message_strategy(), tmp_path, audits=True)
    audited.start(Grid(message_app()), ArrayRecord(model().state_dict()), 1, train_config=ConfigRecord({"lr": RATE}))
    assert all("for how long the client trained" in record.problem for record in audited.records)
    assert all(record.bundle and "for how long the client trained" in record.notes[0] for record in audited.records)
    assert seen_of(tmp_path).knowledge.batch_size == 1
    assert not list(tmp_path.rglob(AUDIT))


def test_secure_aggregation_is_said_and_no_average_is_taken_for_a_client(tmp_path: Path) -> None:
    """As SecAggPlusWorkflow hands it over: every client's result holds the average."""
    audited = kept(numpy_strategy(), tmp_path)
    manager = SimpleNamespace(num_available=lambda: 2, wait_for=lambda *_: True, sample=lambda **_: [])
    average = audited.initialize_parameters(manager)
    results = [
        (SimpleNamespace(cid=str(n)), FitRes(Status(Code.OK, ""), parameters=average, num_examples=1, metrics={}))
        for n in NODES
    ]
    audited.configure_fit(1, average, manager)
    assert audited.aggregate_fit(1, results, [])[0] is not None
    assert all(record.problem.startswith("secure aggregation") for record in audited.records)
    assert not list(tmp_path.rglob(BUNDLE))


def test_strategies_of_flower_for_privacy_are_wrapped_and_what_they_ask_is_known(tmp_path: Path) -> None:
    asked = DifferentialPrivacyClientSideFixedClipping(
        message_strategy(), 0.0, clipping_norm=0.05, num_sampled_clients=2
    )
    run_messages(message_app([fixedclipping_mod]), kept(asked, tmp_path / "client"), rounds=1)
    seen = seen_of(tmp_path / "client")
    assert seen.knowledge.clip == 0.05
    assert math.sqrt(sum(float(u.double().square().sum()) for u in seen.update.values())) == pytest.approx(
        0.05, rel=1e-4
    )
    after = DifferentialPrivacyServerSideFixedClipping(
        message_strategy(), 0.0, clipping_norm=0.05, num_sampled_clients=2
    )
    run_messages(message_app(), kept(after, tmp_path / "server"), rounds=1)
    assert seen_of(tmp_path / "server").residual(*batch(NODES[0])) < 1e-5  # as the server got it, before it clipped


def test_a_mod_within_is_named_in_defences_and_the_guard_sees_what_it_made() -> None:
    mods = [guarded(defences="clip:norm=0.05", attacks="bias-ratio"), fixedclipping_mod]
    reply = message_app(mods)(train_message(clipping_norm=0.05), context(NODES[0]))
    assert reply.error.reason == HELD  # a clipped gradient is as readable as a whole one


def test_several_local_steps_on_several_examples_are_guarded_under_their_own_protocol(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, y = torch.cat([batch(1)[0], batch(2)[0]]), torch.tensor([1, 2])
    app = ClientApp()

    @app.train(mods=[guard_mod(model(), F.cross_entropy, lambda *_: (x, y), attacks="gradient-matching", seconds=0.5)])
    def train(message: Message, context: Context) -> Message:
        net = model()
        net.load_state_dict(
            message.content["arrays"].to_torch_state_dict(keep_input=False)
        )  # which empties the message
        optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
        for i in context.run_config.get("order", "0101"):
            optimiser.zero_grad()
            F.cross_entropy(net(x[int(i) :][:1]), y[int(i) :][:1]).backward()
            optimiser.step()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": 2})}
        return Message(RecordDict(content), reply_to=message)

    told = {"local-epochs": 2, "batch-size": 1}
    app(train_message(**told), context(NODES[0]))
    assert "not behind this update" not in caplog.text
    app(train_message(**told), context(NODES[0], order="1010"))
    assert "this batch is not behind this update" in caplog.text


def test_messages_that_are_no_training_go_through_and_those_that_hold_no_one_model_do_not() -> None:
    def answers(message: Message, context: Context) -> Message:
        records = {name: ArrayRecord(model().state_dict()) for name in ("one", "two")}
        return Message(RecordDict(records), reply_to=message)

    asked = Message(RecordDict(), dst_node_id=NODES[0], message_type=MessageType.QUERY)
    assert guarded()(asked, context(NODES[0]), answers).has_content()
    assert guarded()(train_message(), context(NODES[0]), answers).error.reason == HELD
    two = {name: ArrayRecord(model().state_dict()) for name in ("one", "two")}
    assert guarded()(train_message(two), context(NODES[0]), answers).error.reason == HELD


def test_weights_that_did_not_move_are_sent_without_a_guard() -> None:
    def unmoved(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord(model().state_dict())}), reply_to=message)

    assert guarded()(train_message(), context(NODES[0]), unmoved).has_content()


def imprinted() -> nn.Module:
    """The model with equal rows and thresholds that part what they measure."""
    made = model()
    with torch.no_grad():
        made[0].weight.fill_(1 / 6)
        made[0].bias.copy_(torch.linspace(-1, 1, 12))
    return made


def test_a_planted_model_is_not_trained_on_or_its_planted_layer_is_sent_back_as_it_came(
    caplog: pytest.LogCaptureFixture,
) -> None:
    received = {"arrays": ArrayRecord(imprinted().state_dict())}
    untrained = guarded()(train_message(received), context(NODES[0]), lambda *_: pytest.fail("it was trained on"))
    assert untrained.has_error()
    assert "nothing is trained: The model looks planted: duplicated-" in caplog.text
    options = {"attacks": "gradient-matching", "seconds": 0.5, "max_psnr": 1e9}
    answer = message_app([guarded(planted="freeze", **options)])(train_message(received), context(NODES[0]))
    assert answer.has_content(), caplog.text
    back, came = answer.content["arrays"].to_torch_state_dict(), imprinted().state_dict()
    assert [name for name in came if torch.equal(back[name], came[name])] == ["0.weight", "0.bias"]


def other_layer() -> nn.Module:
    """The model with its first layer drawn anew, as no round of training leaves it; no weight looks odd by itself."""
    made = model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made[0].reset_parameters()
    return made


def test_a_layer_put_in_its_place_shows_beside_the_round_before(caplog: pytest.LogCaptureFixture) -> None:
    client, trained_in = context(NODES[0]), list[int]()

    def received(net: nn.Module, number: int) -> Message:
        return train_message({"arrays": ArrayRecord(net.state_dict())}, **{"server-round": number})

    def training(number: int) -> Callable[[Message, Context], Message]:
        def call(message: Message, context: Context) -> Message:
            trained_in.append(number)
            return Message(RecordDict({"arrays": ArrayRecord(model().state_dict())}), reply_to=message)

        return call

    mod = guarded()
    for number, net in ((1, model()), (2, model()), (3, other_layer()), (4, other_layer()), (5, model())):
        mod(received(net, number), client, training(number))
    assert trained_in == [1, 2, 5], "a layer that was put in its place is compared with what stood there before it"
    assert caplog.text.count("nothing is trained: The model looks planted: replaced-layer at '0'") == 2
    mod(received(other_layer(), 8), client, training(8))  # rounds lie between, in which training goes on
    mod(received(model(), 8), client, training(88))  # the server says the number: one that stands still is compared
    assert trained_in == [1, 2, 5, 8]
    untold = Context(run_id=1, node_id=NODES[0], node_config={}, state=RecordDict(), run_config={})
    guarded(planted="ignore")(received(model(), 1), untold, training(1))
    assert not untold.state


def test_a_layer_put_in_its_place_is_sent_back_as_it_came(caplog: pytest.LogCaptureFixture) -> None:
    client, app = context(NODES[0]), message_app([guarded(planted="freeze", attacks="label-count")])
    for number, net in ((1, model()), (2, other_layer())):
        told = {"arrays": ArrayRecord(net.state_dict())}
        answer = app(train_message(told, **{"server-round": number}), client)
        assert answer.has_content(), caplog.text
        back, came = answer.content["arrays"].to_torch_state_dict(), net.state_dict()
        frozen = [name for name in came if torch.equal(back[name], came[name])]
        assert frozen == ([] if number == 1 else ["0.weight", "0.bias"])


def test_what_is_to_be_done_with_a_planted_model_is_one_of_three() -> None:
    with pytest.raises(UnbatchError, match="it is one of refuse, freeze, ignore"):
        guarded(planted="freez")


@pytest.mark.parametrize("defence", ["mixup", "local-steps", "secure-aggregation", "label-smoothing"])
def test_defences_that_change_training_are_refused_where_the_mod_is_made(defence: str) -> None:
    with pytest.raises(UnbatchError, match="changes how a client trains"):
        guarded(defend=[defence, "clip:norm=1"])


def test_noise_of_the_mod_hides_neither_another_batch_nor_a_learning_rate_that_the_server_made_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"defend": "noise:sigma=1", "attacks": "gradient-matching", "seconds": 0.5}
    app = message_app([guarded(**options, protocol=Protocol(learning_rate=RATE / 100))])
    assert app(train_message(), context(NODES[0])).error.reason == HELD
    assert "this batch is not behind this update" in caplog.text


def test_defences_are_put_on_weights_that_did_not_move_as_well() -> None:
    def unmoved(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord(model().state_dict())}), reply_to=message)

    mod = guarded(defend="noise:sigma=1", attacks="gradient-matching", seconds=0.5)
    sent = mod(train_message(), context(NODES[0]), unmoved).content["arrays"].to_torch_state_dict()
    assert not any(torch.equal(tensor, sent[name]) for name, tensor in model().state_dict().items())


def test_a_second_run_of_the_same_strategy_is_kept_beside_the_first(tmp_path: Path) -> None:
    audited = kept(message_strategy(), tmp_path)
    for _ in range(2):
        run_messages(message_app(), audited, rounds=1)
    assert len(list(tmp_path.rglob(BUNDLE))) == len({record.place for record in audited.records}) == 4


def test_defences_that_change_what_is_sent_are_put_on_it() -> None:
    app = message_app([guarded(defend=["clip:norm=0.01", "prune:share=0.9"], attacks="gradient-matching", seconds=0.5)])
    reply = app(train_message(), context(NODES[0]))
    sent = reply.content["arrays"].to_torch_state_dict()
    moved = {name: sent[name] - tensor for name, tensor in model().state_dict().items()}
    assert math.sqrt(sum(float(u.square().sum()) for u in moved.values())) == pytest.approx(0.01, rel=1e-3)
    share = sum(int((u == 0).sum()) for u in moved.values()) / sum(u.numel() for u in moved.values())
    assert share == pytest.approx(0.9, abs=0.02)


def test_what_is_no_strategy_or_no_model_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnbatchError, match="object is no strategy of Flower"):
        kept(object(), tmp_path)
    with pytest.raises(UnbatchError, match="give the module itself"):
        Audited(message_strategy(), model=model, loss=F.cross_entropy, folder=tmp_path)
    with pytest.raises(UnbatchError, match="give the module itself"):
        guard_mod(model, F.cross_entropy, batch)
    run_messages(message_app(), kept(message_strategy(), tmp_path), rounds=1)
    with pytest.raises(UnbatchError, match="holds the exchanges of an earlier run"):
        kept(message_strategy(), tmp_path)


def test_an_audited_strategy_is_a_strategy_and_has_its_own_s_attributes(tmp_path: Path) -> None:
    audited, legacy = kept(message_strategy(), tmp_path), kept(numpy_strategy(), tmp_path)
    assert isinstance(audited, Strategy)
    assert isinstance(legacy, LegacyStrategy)
    assert audited.fraction_evaluate == 0.0
    assert legacy.min_fit_clients == 2
    with pytest.raises(AttributeError):
        audited.nothing_such  # noqa: B018


SIMULATED = """
import logging, os, sys
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
os.environ["RAY_ADDRESS"] = "local"  # a cluster of its own, whatever else runs on this machine
sys.path.insert(0, sys.argv[2])
from test_flower import F, SHAPE, ArrayRecord, Audited, ConfigRecord, guarded, message_app, message_strategy, model
from test_flower import numpy_app, numpy_strategy
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

kind, folder, mods = sys.argv[1], sys.argv[3], [guarded()] if sys.argv[4] == "guarded" else []


def audited(strategy):
    return Audited(
        strategy, model=model(), loss=F.cross_entropy, folder=folder, knowledge=SHAPE, audits=True, attacks="bias-ratio",
        analyses=(), told={"local-epochs": 1},
    )


if kind == "messages":
    server = ServerApp()

    @server.main()
    def main(grid, context):
        arrays = ArrayRecord(model().state_dict())
        config = ConfigRecord({"lr": 0.5, "local-epochs": 1})
        audited(message_strategy()).start(grid, arrays, num_rounds=2, train_config=config, timeout=120)

    client = message_app(mods)
else:
    server = ServerApp(
        server_fn=lambda context: ServerAppComponents(
            strategy=audited(numpy_strategy(fraction_evaluate=0.0)), config=ServerConfig(num_rounds=2)
        )
    )
    client = numpy_app(mods)
ray = {"init_args": {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False, "log_to_driver": True}}
run_simulation(server, client, 2, backend_config=ray | {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
"""


def simulated(kind: str, folder: Path, guarded: bool = False) -> str:
    """Two clients and two rounds in Flower's own simulation, in a process of its own; what it said."""
    path = os.pathsep.join([str(Path(unbatch.__file__).parents[1]), str(Path(__file__).parent)])
    words = [sys.executable, "-c", SIMULATED, kind, str(Path(__file__).parent), str(folder), "guarded" * guarded]
    done = subprocess.run(words, capture_output=True, text=True, timeout=420, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_rounds_on_flower_s_own_simulation_end_in_reports(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    said = simulated(kind, tmp_path)
    records = [json.loads(path.read_text()) for path in tmp_path.rglob(RECORD)]
    assert sorted(record["round"] for record in records) == [1, 1, 2, 2], said
    assert len({record["client"] for record in records}) == 2
    for record in records:
        assert not record["problem"]
        assert "1 row certified to be behind this update" in record["headline"]
        assert (tmp_path / record["bundle"]).parent.joinpath(PAGE).exists()


@pytest.mark.slow
def test_on_flower_s_own_simulation_a_guard_holds_every_leak_back(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    said = simulated("messages", tmp_path, guarded=True)
    records = [json.loads(path.read_text()) for path in tmp_path.rglob(RECORD)]
    assert [record["problem"] for record in records] == [f"no weights came back: {HELD}"] * 4, said
    assert not list(tmp_path.rglob(BUNDLE))
