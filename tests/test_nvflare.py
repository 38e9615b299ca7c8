"""The guard for NVFlare: real results in real filter chains; what leaks is blocked, what is defended goes through."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Audit, Protocol, Setting, UnbatchError

pytest.importorskip("nvflare")

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.task_utils import apply_filters
from nvflare.app_common.app_constant import AppConstants

from unbatch.adapters.nvflare import HELD, GuardFilter

RATE, KINDS = 0.5, [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def normed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def batch(n: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    return torch.randn(n, 6, generator=rng), torch.arange(n) % 3


def behind(fl_ctx: FLContext) -> Setting:
    x, y = batch()
    return Setting(model=model(), loss=F.cross_entropy, inputs=x, labels=y, protocol=Protocol(learning_rate=RATE))


def two(fl_ctx: FLContext) -> Setting:
    x, y = batch(2)
    return Setting(model=model(), loss=F.cross_entropy, inputs=x, labels=y)


def arrays(state: dict[str, Tensor], as_tensors: bool = False) -> dict[str, Any]:
    return {name: tensor.clone() if as_tensors else tensor.numpy().copy() for name, tensor in state.items()}


def trained(net: nn.Module, n: int = 1, steps: int = 1) -> dict[str, Tensor]:
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    x, y = batch(n)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


class Client:
    """What NVFlare's runner does with one task: events, the executor, then the filters of results, on one FLContext."""

    def __init__(self, *filters: GuardFilter, tensors: bool = False) -> None:
        self.filters, self.tensors = filters, tensors
        self.context = FLContext()

    def task(self, net: nn.Module, kind: str = DataKind.WEIGHTS, number: int | None = None) -> None:
        data = DXO(kind, data=arrays(net.state_dict(), self.tensors)).to_shareable()
        if number is not None:
            data.set_header(AppConstants.CURRENT_ROUND, number)
        self.context.set_prop(FLContextKey.TASK_DATA, data, private=True, sticky=False)
        for each in self.filters:
            each.handle_event(EventType.BEFORE_TASK_EXECUTION, self.context)
        self.context.set_prop(FLContextKey.TASK_DATA, None, private=True, sticky=False)  # as it does before the filters

    def send(self, result: Shareable) -> Shareable:
        chain = {f"train{FilterKey.DELIMITER}{FilterKey.OUT}": list(self.filters)}
        return apply_filters("task_result_filters", result, self.context, chain, "train", FilterKey.OUT)

    def round(
        self,
        kind: str = DataKind.WEIGHTS,
        steps: int = 1,
        n: int = 1,
        make: Callable = model,
        number: int | None = None,
        **meta: Any,
    ) -> DXO:
        net = make()
        self.task(net, number=number)
        before, after = make().state_dict(), trained(net, n, steps)
        if kind == DataKind.WEIGHT_DIFF:
            after = {name: tensor - before[name] for name, tensor in after.items()}
        told = {MetaKey.NUM_STEPS_CURRENT_ROUND: steps} | meta
        sent = DXO(kind, data=arrays(after, self.tensors), meta=told).to_shareable()
        return from_shareable(self.send(sent))


@pytest.mark.parametrize("tensors", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_leaks_is_blocked_and_ends_in_a_report_of_the_client_s_own(
    kind: str, tensors: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = GuardFilter(behind, attacks=["bias-ratio"], folder=tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(ContentBlockedException) as blocked:
        Client(guarded, tensors=tensors).round(kind)
    assert str(blocked.value) == HELD
    assert blocked.value.__cause__ is None
    assert "Example 0 is recovered exactly" in caplog.text
    record = Audit.load(tmp_path / "result-0001" / "audit.json")
    assert record.recovered() == {(0, 0)}
    assert "recovered exactly" in (tmp_path / "result-0001" / "report.html").read_text()


@pytest.mark.parametrize("tensors", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_defended_goes_through_with_fresh_noise(kind: str, tensors: bool, tmp_path: Path) -> None:
    noise = "noise:sigma=0.5,relative=false"
    guarded = GuardFilter(behind, defend=noise, attacks=["label-count", "bias-ratio"], folder=tmp_path)
    client = Client(guarded, tensors=tensors)
    sent, again = client.round(kind), client.round(kind)
    assert sent.get_filter_history() == ["GuardFilter"]
    plain = trained(model())
    if kind == DataKind.WEIGHT_DIFF:
        plain = {name: tensor - model().state_dict()[name] for name, tensor in plain.items()}
    off = np.concatenate([(np.asarray(sent.data[name]) - tensor.numpy()).ravel() for name, tensor in plain.items()])
    assert abs(off.std() - 0.5) < 5 * 0.5 / (2 * len(off)) ** 0.5  # five standard deviations of it
    assert list(sent.data) == list(plain)
    for name, value in sent.data.items():
        assert isinstance(value, Tensor if tensors else np.ndarray)
        assert torch.as_tensor(value).dtype == torch.float32
        assert not np.array_equal(np.asarray(value), np.asarray(again.data[name]))
    assert Audit.load(tmp_path / "result-0002" / "audit.json").recovered() == set()


def test_weights_that_did_not_move_are_defended_as_well() -> None:
    told = {"learning_rate": RATE, "local_steps": 1}
    sent = Client(GuardFilter(behind, told, defend="noise:sigma=0.5", attacks="label-count", seconds=5)).round(steps=0)
    assert not any(np.array_equal(sent.data[name], tensor.numpy()) for name, tensor in model().state_dict().items())


def test_what_does_not_leak_is_sent_as_it_is() -> None:
    client = Client(GuardFilter(two, {"learning_rate": RATE, "local_steps": 1}, attacks="label-count", seconds=5))
    sent = client.round(n=2)
    assert sent.get_filter_history() is None
    assert all(np.array_equal(sent.data[name], tensor.numpy()) for name, tensor in trained(model(), 2).items())


def test_steps_and_buffers_are_taken_from_the_result() -> None:
    def of(fl_ctx: FLContext) -> Setting:
        x, y = batch(4)
        return Setting(model=normed(), loss=F.cross_entropy, inputs=x, labels=y)

    told = {"learning_rate": RATE}
    quick: dict[str, Any] = {"attacks": "label-count", "seconds": 5}
    for kind in KINDS:
        sent = Client(GuardFilter(of, told, **quick)).round(kind, steps=3, n=4, make=normed)
        assert int(sent.data["1.num_batches_tracked"]) == 3
    plain = GuardFilter(lambda ctx: behind(ctx), **quick)
    with pytest.raises(ContentBlockedException):  # batch statistics or not: with the wrong number of steps it is held
        Client(plain).round(steps=3, **{MetaKey.NUM_STEPS_CURRENT_ROUND: 2})


@pytest.mark.parametrize(
    ("why", "setting", "meta", "words"),
    [
        ("other batch", two, {}, "this batch is not behind this update"),
        ("no setting", lambda ctx: None, {}, "setting returned a NoneType"),
        ("failing", lambda ctx: 1 / 0, {}, "ZeroDivisionError"),
        ("encrypted", behind, {MetaKey.PROCESSED_ALGORITHM: "HE"}, "processed by HE already"),
        ("untold", behind, {MetaKey.NUM_STEPS_CURRENT_ROUND: None}, "for how long the client trained"),
    ],
)
def test_what_cannot_be_looked_at_is_blocked(
    why: str, setting: Any, meta: dict, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ContentBlockedException, match=HELD):
        Client(GuardFilter(setting, attacks="bias-ratio", seconds=5)).round(**meta)
    assert words in caplog.text


def test_without_the_global_model_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    client = Client(GuardFilter(behind))
    result = DXO(DataKind.WEIGHTS, data=arrays(model().state_dict())).to_shareable()
    for before, words in (
        (lambda: None, "no task was seen to begin"),
        (lambda: client.task(model(), DataKind.WEIGHT_DIFF), "the task holds WEIGHT_DIFF"),
        (
            lambda: client.filters[0].handle_event(EventType.BEFORE_TASK_EXECUTION, FLContext()),
            "the task holds no model",
        ),
    ):
        before()
        with caplog.at_level(logging.WARNING), pytest.raises(ContentBlockedException):
            client.send(result)
        assert words in caplog.text
    chain = {f"train{FilterKey.DELIMITER}{FilterKey.IN}": list(client.filters)}  # or it stands among the task's filters
    task = DXO(DataKind.WEIGHTS, data=arrays(model().state_dict())).to_shareable()
    assert apply_filters("task_data_filters", task, client.context, chain, "train", FilterKey.IN) is task
    assert from_shareable(client.send(result)).data.keys() == model().state_dict().keys()  # came back as it went out


def test_other_results_pass() -> None:
    client = Client(GuardFilter(behind))
    for kind in (DataKind.METRICS, DataKind.STATISTICS):
        other = DXO(kind, data={"accuracy": 1.0}).to_shareable()
        assert from_shareable(client.send(other)).data == {"accuracy": 1.0}
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    assert client.send(failed) is failed
    only = Client(GuardFilter(behind, data_kinds=[DataKind.WEIGHT_DIFF]))
    assert only.round(DataKind.WEIGHTS).data_kind == DataKind.WEIGHTS


def test_every_argument_is_one_of_a_job_s_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvflare import FilterType
    from nvflare.app_common.executors.multi_process_executor import MultiProcessExecutor  # noqa: F401 (part of the Job API)
    from nvflare.job_config.api import FedJob

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    args = {
        "setting": "test_nvflare:behind",
        "protocol": {"learning_rate": RATE},
        "defend": ["clip:norm=1"],
        "seconds": 5,
        "folder": "looks",
    }
    guarded = GuardFilter(**args)
    assert isinstance(guarded._function(FLContext()), Setting)
    job = FedJob(name="guarded")
    job.set_app_packages(["unbatch"])
    job.to(guarded, "site-1", filter_type=FilterType.TASK_RESULT, tasks=["train"])
    job.export_job(str(tmp_path))
    (path,) = tmp_path.rglob("config_fed_client.json")
    (chain,) = json.loads(path.read_text())["task_result_filters"]
    (told,) = chain["filters"]
    assert told["path"] == "unbatch.adapters.nvflare.GuardFilter"
    assert {name: told["args"][name] for name in args} == args
    assert vars(GuardFilter(**told["args"]))["defend"] == args["defend"]
    assert not list(tmp_path.rglob("unbatch"))


def imprinted() -> nn.Module:
    """The model with equal rows and thresholds that part what they measure."""
    made = model()
    with torch.no_grad():
        made[0].weight.fill_(1 / 6)
        made[0].bias.copy_(torch.linspace(-1, 1, 12))
    return made


def other_layer() -> nn.Module:
    """The model with its first layer drawn anew, as no round of training leaves it; no weight looks odd by itself."""
    made = model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made[0].reset_parameters()
    return made


def of_two(**options: Any) -> GuardFilter:
    """A guard whose attack finds nothing in a batch of two, so that the signs alone decide."""
    told = {"learning_rate": RATE, "local_steps": 1}
    return GuardFilter(two, told, **({"attacks": "label-count", "seconds": 5} | options))


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_planted_model_nothing_is_sent_or_its_planted_layer_as_it_came(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ContentBlockedException):
        Client(of_two()).round(kind, n=2, make=imprinted)
    assert "The model looks planted: duplicated-" in caplog.text
    sent = Client(of_two(planted="ignore")).round(kind, n=2, make=imprinted).data
    back = Client(of_two(planted="freeze")).round(kind, n=2, make=imprinted).data
    came = imprinted().state_dict()
    for name, tensor in came.items():
        unmoved = torch.zeros_like(tensor) if kind == DataKind.WEIGHT_DIFF else tensor
        frozen = name in ("0.weight", "0.bias")
        assert np.array_equal(back[name], unmoved.numpy() if frozen else sent[name])
        assert not np.array_equal(sent[name], unmoved.numpy())


def test_a_layer_put_in_its_place_shows_beside_the_round_before(caplog: pytest.LogCaptureFixture) -> None:
    client, sent = Client(of_two()), list[int]()
    for number, make in ((0, model), (1, model), (2, other_layer), (3, other_layer), (4, model), (7, other_layer)):
        with contextlib.suppress(ContentBlockedException), caplog.at_level(logging.WARNING):
            client.round(n=2, make=make, number=number)
            sent.append(number)
    assert sent == [0, 1, 4, 7]  # before round 7 lie some of which this client knows nothing
    assert caplog.text.count("The model looks planted: replaced-layer at '0'") == 2


def test_what_names_nothing_or_changes_training_is_refused() -> None:
    with pytest.raises(UnbatchError, match="it is one of refuse, freeze, ignore"):
        GuardFilter(behind, planted="freez")
    for wrong in ("test_nvflare:nothing", "no_such_module:f", "behind"):
        with pytest.raises(UnbatchError, match="names nothing"):
            GuardFilter(wrong)
    with pytest.raises(UnbatchError, match="changes how a client trains"):
        GuardFilter(behind, defend="local-steps:steps=2")
    with pytest.raises(UnbatchError, match="unknown attack"):
        GuardFilter(behind, attacks="pray")


NETS = """
import torch
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def batch():
    return torch.randn(1, 6, generator=torch.Generator().manual_seed(4)), torch.tensor([0])


def setting(fl_ctx):
    import unbatch

    x, y = batch()
    told = unbatch.Protocol(learning_rate=0.5, local_steps=1)
    return unbatch.Setting(model=Net(), loss=nn.functional.cross_entropy, inputs=x, labels=y, protocol=told)
"""
CLIENT = """
import nvflare.client as flare
import torch
from nets import Net, batch

flare.init()
while flare.is_running():
    net, (x, y) = Net(), batch()
    net.load_state_dict(flare.receive().params)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimiser.step()
    flare.send(flare.FLModel(params=net.state_dict()))
"""
JOB = """
from nvflare import FilterType
from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob
from nvflare.job_config.script_runner import ScriptRunner

from nets import Net
from unbatch.adapters.nvflare import GuardFilter

job = FedAvgJob(name="guarded", n_clients=2, num_rounds=1, initial_model=Net())
job.set_app_packages(["unbatch"])
for site, how in (("site-1", {}), ("site-2", {"defend": ["noise:sigma=0.5,relative=false"]})):
    guard = GuardFilter("nets:setting", attacks=["bias-ratio", "label-count"], folder=f"FOLDER/{site}", **how)
    job.to(ScriptRunner(script="client.py"), site)
    job.to(guard, site, filter_type=FilterType.TASK_RESULT, tasks=["train"])
job.simulator_run("FOLDER/workspace")
"""


@pytest.mark.slow
def test_nvflare_s_own_simulation_blocks_the_one_and_sends_the_other(tmp_path: Path) -> None:
    for name, text in (("nets", NETS), ("client", CLIENT), ("job", JOB)):
        (tmp_path / f"{name}.py").write_text(text.replace("FOLDER", str(tmp_path)))
    sources = os.pathsep.join([str(Path(unbatch.__file__).parents[1]), str(tmp_path)])
    run = subprocess.run(
        [sys.executable, "job.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": sources, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    said = run.stdout + run.stderr
    assert "nothing is sent: this update must not be sent: Example 0 is recovered exactly." in said
    blocked, sent = (sorted((tmp_path / site).glob("result-*/audit.json")) for site in ("site-1", "site-2"))
    assert [Audit.load(path).recovered() for path in blocked] == [{(0, 0)}]
    assert [Audit.load(path).recovered() for path in sent] == [set()]
    assert "error code: TASK_RESULT_FILTER_ERROR" in said  # all that the server was told
