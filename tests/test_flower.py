"""Flower: real ClientApps and strategies, two honest rounds of two clients, their reports; what the guard holds back."""

import json
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
from unbatch import Audit, Knowledge, Observation
from unbatch.adapters.flower import AUDIT, BUNDLE, HELD, PAGE, RECORD, Audited, guard_mod

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
pytest.importorskip("flwr", minversion="1.21")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg

try:  # who a process is stands in a class since 1.25; Flower sets it where it runs an app
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:
    TaskIdentity = None

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
        return [tensor.numpy() for tensor in self.net.state_dict().values()], 1, {}


def numpy_app(mods: Sequence[Any] = (), factory: Callable[[], nn.Module] = model) -> ClientApp:
    return ClientApp(lambda context: Client(context.node_id, factory()).to_client(), mods=list(mods))


def message_app(mods: Sequence[Any] = (), factory: Callable[[], nn.Module] = model) -> ClientApp:
    """A client as Flower's tutorials for messages have it."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        net = factory()
        net.load_state_dict(message.content["arrays"].to_torch_state_dict(keep_input=False))
        trained(net, context.node_id, message.content["config"]["lr"])
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
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
        records = {key: ArrayRecord(dict(r)) for key, r in message.content.array_records.items()}
        records |= {key: ConfigRecord(dict(r)) for key, r in message.content.config_records.items()}
        sent = Message(RecordDict(records), dst_node_id=node, message_type=message.metadata.message_type)
        return self.app(sent, context(node))


def run_messages(app: ClientApp, strategy: Any, rounds: int = 2, **config: Any) -> Any:
    arrays = ArrayRecord(model().state_dict())
    told = ConfigRecord({"lr": RATE, "local-epochs": 1, "batch-size": 1} | config)
    return strategy.start(Grid(app), arrays, num_rounds=rounds, train_config=told)


def run_numpy(app: ClientApp, strategy: Any, rounds: int = 2) -> Any:
    """Flower's own legacy workflow of a round, on the grid above."""
    from flwr.compat.common.recorddict_compat import fitins_to_recorddict, recorddict_to_fitres

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
    kept = run(app([guarded()]), audited, rounds=1)
    assert kept is None or kept.arrays is None or all(map(np.array_equal, weights_of(kept), begun))
    assert "Example 0 is recovered exactly" in caplog.text
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
    net = ArrayRecord(model().state_dict())
    content = RecordDict({"arrays": net.copy(), "config": ConfigRecord({"lr": RATE})})
    untold = Message(content, dst_node_id=NODES[0], message_type=MessageType.TRAIN)
    assert message_app([guarded()])(untold, context(NODES[0])).error.reason == HELD
    assert "for how long the client trained" in caplog.text
    content["arrays"] = net
    caplog.clear()
    assert message_app([guarded()])(untold, context(NODES[0], **{"local-epochs": 1})).error.reason == HELD
    assert "Example 0 is recovered exactly" in caplog.text  # the app's own configuration tells


SIMULATED = """
import logging, os, sys
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
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
