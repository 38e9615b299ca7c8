"""dp-sgd: per-example clipping and noise against a slow loop, epsilon against closed forms and a published figure."""

import math
import sys

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Case, observe
from unbatch.adapters.opacus import epsilon
from unbatch.loss import Loss, loss_named
from unbatch.models import small
from unbatch.observation import Observation
from unbatch.protocol import Protocol, Update

N = 5


def client(name: str = "mlp", **more) -> tuple[nn.Module, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (6,) if name == "mlp" else (1, 8, 8)
    model = small.build(name, shape, 4, width=8, activation="tanh", rng=rng, **more).double()
    return model, torch.randn(N, *shape, generator=rng, dtype=torch.float64), torch.randint(4, (N,), generator=rng)


def flat(update: Update) -> Tensor:
    return torch.cat([u.flatten() for u in update.values()])


def each_gradient(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> list[Tensor]:
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    return rows


def clipped_sum(rows: list[Tensor], clip: float) -> Tensor:
    return torch.stack([row * min(1.0, clip / (float(row.norm()) + 1e-6)) for row in rows]).sum(0)  # Opacus' 1e-6


@pytest.mark.parametrize("name", ["mlp", "lenet"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("share", [0.3, 1.0, 30.0])
def test_every_example_is_clipped_by_itself(name: str, reduction: str, share: float) -> None:
    model, x, y = client(name)
    loss = loss_named("cross-entropy", reduction)  # type: ignore[arg-type]
    rows = each_gradient(model, loss, x, y)
    clip = share * float(torch.stack([row.norm() for row in rows]).median())
    spec = f"dp-sgd:clip={clip},noise_multiplier=0,reduction={reduction}"
    obs, _ = observe(model, loss, x, y, defences=[spec])
    expected = clipped_sum(rows, clip) / (N if reduction == "mean" else 1)
    assert torch.allclose(flat(obs.update), expected, rtol=1e-9, atol=1e-12)
    plain = flat(observe(model, loss, x, y)[0].update)
    assert torch.allclose(flat(obs.update), plain, rtol=1e-9, atol=1e-12) == (share == 30.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_is_gaussian_of_the_size_that_is_told(reduction: str) -> None:
    model = nn.Linear(300, 200, bias=False).double()
    x, y = torch.randn(N, 300, dtype=torch.float64), torch.randint(200, (N,))
    loss = loss_named("cross-entropy", reduction)  # type: ignore[arg-type]

    def sent(noise: float, seed: int = 0) -> Observation:
        spec = f"dp-sgd:clip=0.5,noise_multiplier={noise},reduction={reduction}"
        return observe(model, loss, x, y, defences=[spec], seed=seed)[0]

    obs = sent(1.5)
    off = flat(obs.update) - flat(sent(0).update)  # [60000]
    deviation = 1.5 * 0.5 / (N if reduction == "mean" else 1)
    assert obs.knowledge.noise == pytest.approx(deviation)
    assert float(off.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(off.mean())) < 5 * deviation / math.sqrt(60_000)
    assert float((off.abs() < deviation).double().mean()) == pytest.approx(0.6827, abs=0.01)
    assert torch.equal(flat(sent(1.5).update), flat(obs.update))
    again = flat(sent(1.5, seed=1).update) - flat(sent(0).update)
    assert abs(float(torch.corrcoef(torch.stack([off, again]))[0, 1])) < 0.02


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(local_steps=3, learning_rate=0.3),
        Protocol(local_steps=3, learning_rate=0.3, momentum=0.5, weight_decay=0.1),
        Protocol(local_steps=2, learning_rate=0.1, optimiser="adam"),
    ],
    ids=str,
)
def test_local_steps_are_private_steps(protocol: Protocol) -> None:
    model, x, y = client()
    rows = each_gradient(model, F.cross_entropy, x, y)
    clip = 0.5 * float(rows[0].norm())
    obs, _ = observe(
        model, F.cross_entropy, x, y, protocol=protocol, defences=[f"dp-sgd:clip={clip},noise_multiplier=0"]
    )
    start = [p.detach().clone() for p in model.parameters()]
    how = {"lr": protocol.learning_rate, "weight_decay": protocol.weight_decay}
    sgd = protocol.optimiser == "sgd"
    kind = torch.optim.SGD if sgd else torch.optim.Adam
    optimiser = kind(model.parameters(), **how, **({"momentum": protocol.momentum} if sgd else {}))
    for _ in range(protocol.local_steps):
        total = clipped_sum(each_gradient(model, F.cross_entropy, x, y), clip) / N
        for p, g in zip(model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = g.view_as(p)
        optimiser.step()
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), start, strict=True)])
    assert torch.allclose(flat(obs.update), moved, rtol=1e-6, atol=1e-10)


def test_it_trains_inside_whatever_stands_around_or_within() -> None:
    model, x, y = client()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    private = "dp-sgd:clip=0.2,noise_multiplier=0"
    expected = flat(observe(model, smooth, x, y, defences=[private])[0].update)
    for stack in ([private, "label-smoothing:epsilon=0.3"], ["label-smoothing:epsilon=0.3", private]):
        assert torch.allclose(flat(observe(model, F.cross_entropy, x, y, defences=stack)[0].update), expected)
    with pytest.raises(ValueError, match="twice"):
        observe(model, F.cross_entropy, x, y, defences=["dp-sgd", "dp-sgd:clip=2"])


def test_what_is_known_of_its_noise_follows_the_stack() -> None:
    model, x, y = client()

    def noise(*stack: str, **how) -> float | None:
        return observe(model, F.cross_entropy, x, y, defences=stack, **how)[0].knowledge.get("noise")

    quick = "dp-sgd:clip=2,noise_multiplier=3,accountant=rdp"
    assert noise(quick) == pytest.approx(6 / N)
    assert noise("noise:sigma=0.5", quick) == pytest.approx(math.hypot(6 / N, 0.5))
    assert noise(quick, "secure-aggregation:clients=2") == pytest.approx(6 * math.hypot(1 / 3, 1 / 2))
    assert noise("secure-aggregation:clients=2", quick) is None
    assert noise("clip:norm=1", quick) is None
    assert noise(quick, protocol=Protocol(local_steps=1, learning_rate=0.1)) == pytest.approx(0.6 / N)
    two = Protocol(local_steps=2, learning_rate=0.1)
    assert noise(f"{quick},steps=2", protocol=two) is None  # the second step sees the first's
    with pytest.raises(
        ValueError, match=r"accounts for 1 private step, and this update takes 2; declare dp-sgd:steps=2"
    ):
        noise(quick, protocol=two)


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1.0, 1, 1e-5), (4.0, 1, 1e-5), (5.0, 10, 1e-6), (0.5, 3, 1e-5)])
def test_epsilon_of_full_batches_is_the_gaussian_mechanism_s(sigma: float, steps: int, delta: float) -> None:
    """Balle and Wang (ICML 2018): delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu), mu = sqrt(T) / sigma."""
    mu = math.sqrt(steps) / sigma

    def gap(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu))) - delta

    closed = brentq(gap, 0, 500)
    told = {"noise_multiplier": sigma, "sampling_rate": 1.0, "steps": steps, "delta": delta}
    tight, loose = epsilon(**told, accountant="prv"), epsilon(**told, accountant="rdp")  # type: ignore[arg-type]
    assert closed <= tight <= closed + 0.02
    assert closed < loose < 1.15 * closed + 0.1


def test_epsilon_of_sampled_batches_is_below_the_published_one() -> None:
    """Abadi et al. (CCS 2016, section 3.2): q = .01, sigma = 4, T = 10,000, delta = 1e-5 give 1.26 by moments."""
    told = {"noise_multiplier": 4.0, "sampling_rate": 0.01, "steps": 10_000, "delta": 1e-5}
    tight, loose = epsilon(**told, accountant="prv"), epsilon(**told, accountant="rdp")  # type: ignore[arg-type]
    assert 0.9 < tight < loose < 1.26


def test_epsilon_at_the_ends() -> None:
    assert epsilon(noise_multiplier=0.0, sampling_rate=0.1, steps=1, delta=1e-5, accountant="prv") == math.inf
    with pytest.raises(ValueError, match="take accountant=rdp"):
        epsilon(noise_multiplier=0.05, sampling_rate=0.01, steps=200, delta=1e-5, accountant="prv")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_is_refused_in_opacus_own_words(mode: str) -> None:
    setting = Case.parse("digits:batch=2,model=resnet-small,width=4").setting()
    with pytest.raises(ValueError, match=r"BatchNorm cannot support.*nn\.GroupNorm"):
        observe(
            setting.model,
            setting.loss,
            setting.inputs,
            setting.labels,
            protocol=Protocol(mode=mode),
            defences=["dp-sgd"],
        )
    bare = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        observe(bare, setting.loss, setting.inputs, setting.labels, defences=["dp-sgd"])


def test_other_models_and_losses() -> None:
    model, x, y = client()
    with pytest.raises(ValueError, match="set dp-sgd:reduction=sum"):
        observe(model, loss_named("cross-entropy", "sum"), x, y, defences=["dp-sgd"])
    in_place = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)).double()
    with pytest.raises(ValueError, match="Opacus cannot train this model privately"):
        observe(in_place, F.cross_entropy, x, y, defences=["dp-sgd"])
    grouped = nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Linear(4, 4)).double()
    grouped.register_parameter("unused", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    eight = Protocol(mode="eval")
    sent = observe(grouped, F.cross_entropy, x, y, protocol=eight, defences=["dp-sgd:noise_multiplier=0,clip=100"])[0]
    assert torch.allclose(
        flat(sent.update), flat(observe(grouped, F.cross_entropy, x, y, protocol=eight)[0].update), rtol=1e-5
    )


def test_options_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="noise_multiplier=0 where clip=none"):
        unbatch.Defence.parse("dp-sgd:clip=none,noise_multiplier=1")
    with pytest.raises(ValueError, match="clip=inf: Input should be a finite number"):
        unbatch.Defence.parse("dp-sgd:clip=inf")


def test_without_opacus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    model, x, y = client()
    with pytest.raises(ValueError, match=r"pip install 'unbatch\[opacus\]'"):
        observe(model, F.cross_entropy, x, y, defences=["dp-sgd"])


def test_report_json_and_console_show_the_budget(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from unbatch.command.cli import main
    from unbatch.reporting.results import Audit

    monkeypatch.chdir(tmp_path)
    spec = "dp-sgd:noise_multiplier=4,sampling_rate=0.01,steps=10000"
    with pytest.raises(SystemExit):
        main(
            [
                "audit",
                "digits:batch=2,width=16",
                "--attack",
                "label-count",
                "--analysis",
                "gradient-rank",
                "--defence",
                spec,
            ]
        )
    said = " ".join(capsys.readouterr().out.split())
    assert "epsilon = 0.9569 at delta = 1e-05 (prv accountant): noise multiplier 4, clip 1, sampling rate 0.01" in said
    assert "steps 10,000." in said
    held = Audit.load("audit/audit.json").privacy
    assert held is not None
    assert (held.epsilon, held.steps) == (pytest.approx(0.957, abs=1e-3), 10_000)
    page = (tmp_path / "audit" / "report.html").read_text()
    for words in ("<strong>0.9569</strong>", "noise multiplier", "sampling rate", "10,000"):
        assert words in page
    with pytest.raises(SystemExit):
        main(["risk", "digits:batch=2,width=16", "--analysis", "gradient-rank", "--defence", spec])
    assert "epsilon = 0.9569" in capsys.readouterr().out
