"""feature-inversion: exact features behind convolutions, and pictures from them; the truth is compared here only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from clients import Exchange
from torch import Tensor, nn

from unbatch.attacks.feature_inversion import CoarseToFine, FeatureInversion
from unbatch.attacks.unmix import Unmix
from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge
from unbatch.models.small import initialise
from unbatch.network.dense import layer_inputs
from unbatch.observation import Observation
from unbatch.progress import Watch, watching
from unbatch.protocol import Protocol

KNOWN = {"dtype": torch.float64, "input_range": (0.0, 1.0), "mode": "train"}


def lenet5(channels: tuple[int, int], units: int) -> nn.Module:
    """LeCun's LeNet-5 for 3x32x32, with more channels and padding: conv, pool, conv, pool, dense, dense, head."""
    a, b = channels
    first = [nn.Conv2d(3, a, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)]
    second = [nn.Conv2d(a, b, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    dense = [nn.Linear(64 * b, units), nn.Tanh(), nn.Linear(units, 84), nn.Tanh(), nn.Linear(84, 9)]
    return initialise(nn.Sequential(*first, *second, *dense), torch.Generator().manual_seed(0))


def distances(found: Tensor, true: Tensor) -> Tensor:
    """[k, n] euclidean, of flattened rows."""
    return torch.cdist(found.double().flatten(1), true.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def psnr(found: Tensor, x: Tensor) -> Tensor:
    """Of every true picture, against the nearest one returned; in [0, 1]."""
    error = distances(found.clamp(0, 1), x).min(0).values.square() / x[0].numel()
    return -10 * error.log10()


def holds(obs: Observation, x: Tensor, iterations: int, *, worst: float, median: float) -> None:
    """unmix returns every example's features; the pictures are above these floors in dB."""
    exact = Unmix()(obs)
    assert exact.inputs is not None
    assert exact.layer
    features = layer_inputs(obs.model, exact.layer, x, "train")
    gap = distances(exact.inputs, features)
    assert len(set(gap.argmin(1).tolist())) == len(exact) == len(x)
    assert float((gap.min(0).values / features.norm(dim=1)).max()) < 1e-4
    found = FeatureInversion(iterations=iterations)(obs)
    assert found.inputs is not None
    assert not found.layer
    assert found.bound is None  # pictures are a guess
    assert len(found) == len(x)
    quality = psnr(found.inputs, x)
    assert float(quality.min()) > worst
    assert float(quality.median()) > median
    nearest = distances(found.inputs, x).argmin(0)
    assert found.labels is not None
    assert exact.labels is not None
    assert torch.equal(found.labels[nearest], exact.labels[gap.argmin(0)])


# floors in dB, a few below what was measured: worst and median 20.7, 21.6; 24.0, 27.9; 24.0, 27.9
@pytest.mark.parametrize(
    ("n", "iterations", "worst", "median"),
    [
        (4, 150, 18.0, 19.0),
        pytest.param(8, 600, 22.0, 25.5, marks=pytest.mark.slow),
        pytest.param(16, 600, 22.0, 25.5, marks=pytest.mark.slow),
    ],
)
def test_lenet(exchange: Exchange, n: int, iterations: int, worst: float, median: float) -> None:
    case = Case.parse(f"photos:batch={n}").setting()
    obs, x, _ = exchange(lenet5((24, 48), 200), case.loss, case.inputs, case.labels, **KNOWN)
    holds(obs, x, iterations, worst=worst, median=median)


# measured: 32.1, 32.2; 24.5 (21.1 in another run), 29.7; 43.7 (37.9), 50.8; 21.5, 28.7; 38.2, 49.1; 20.8, 28.3
@pytest.mark.parametrize(
    ("n", "depth", "iterations", "worst", "median"),
    [
        (4, 1, 120, 28.0, 29.0),
        pytest.param(4, 2, 600, 18.0, 25.0, marks=pytest.mark.slow),
        pytest.param(8, 1, 400, 34.0, 44.0, marks=pytest.mark.slow),
        pytest.param(8, 2, 400, 18.0, 25.0, marks=pytest.mark.slow),
        pytest.param(16, 1, 300, 34.0, 44.0, marks=pytest.mark.slow),
        pytest.param(16, 2, 300, 18.5, 25.0, marks=pytest.mark.slow),
    ],
)
def test_vgg(exchange: Exchange, n: int, depth: int, iterations: int, worst: float, median: float) -> None:
    spelling = f"photos:batch={n},model=convnet,width=32,activation=gelu,depth={depth}"
    obs, x, _ = exchange(spelling, **KNOWN)
    holds(obs, x, iterations, worst=worst, median=median)


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("photos:batch=4,size=8,width=50,activation=gelu", "reads the inputs themselves"),
        ("tables:batch=4,width=50,activation=gelu", "no pictures"),
        ("photos:batch=4,size=16,model=lenet,activation=gelu", "head"),
    ],
)
def test_obstacles_in_words(exchange: Exchange, spelling: str, words: str) -> None:
    with pytest.raises(NotApplicable, match=words):
        FeatureInversion()(exchange(spelling, **KNOWN)[0])


SMALL = "photos:batch=2,size=8,model=convnet,depth=1,width=8,activation=tanh"


def test_dropout_before_the_dense_layer_leaves_no_one_picture() -> None:
    layers = [nn.Conv2d(3, 4, 5, stride=2), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 60), nn.GELU()]
    model = initialise(nn.Sequential(*layers, nn.Linear(60, 9)), torch.Generator().manual_seed(0)).double()
    setting = Case.parse("photos:batch=2,size=16").setting()
    x, known = setting.inputs.double(), Knowledge(input_shape=(3, 16, 16), input_range=(0, 1))

    def seen(mode: Literal["train", "eval"]) -> Observation:
        return observe(model, setting.loss, x, setting.labels, knowledge=known, protocol=Protocol(mode=mode))[0]

    assert len(FeatureInversion(iterations=1)(seen("eval")))
    assert len(Unmix()(seen("train")))  # the features themselves are exact all the same
    with pytest.raises(NotApplicable, match=r"'4' are random in the client's mode \(dropout\)"):
        FeatureInversion()(seen("train"))


def test_nothing_found_gives_no_pictures(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    obs, x, _ = exchange(SMALL, **KNOWN)
    monkeypatch.setattr("unbatch.attacks.feature_inversion.LARGEST_FEATURE_BOUND", 0.0)  # no bound is as small
    found = FeatureInversion(iterations=5)(obs)
    assert found.inputs is not None
    assert found.inputs.shape == (0, *x.shape[1:])
    assert found.trace["misfit"] is None


def test_a_stop_keeps_the_best(exchange: Exchange) -> None:
    obs, x, _ = exchange(SMALL, **KNOWN)
    ticks: list[tuple[float, float | None]] = []
    watch = Watch(lambda share, best: ticks.append((share, best)))
    with watching(watch):
        whole = FeatureInversion(iterations=40)(obs)
    begun = max(i for i, (share, _) in enumerate(ticks) if share == 0)  # of the search for pictures
    assert [share for share, _ in ticks[begun:]] == [step / 40 for step in range(41)]
    bests = [best for _, best in ticks[begun:]]
    assert bests == sorted(bests, reverse=True)

    def stop(share: float, best: float | None) -> None:
        calls.append(share)
        watch.stop = len(calls) > begun + 20

    calls: list[float] = []
    watch = Watch(stop)
    with watching(watch):
        stopped = FeatureInversion(iterations=40)(obs)
    assert watch.cut_short
    assert len(calls) == begun + 21
    assert len(stopped) == len(whole) == len(x)
    assert max(whole.trace["misfit"]) < max(stopped.trace["misfit"]) < 1


def test_the_best_point_is_returned_not_the_last(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    obs, x, _ = exchange(SMALL, **KNOWN)

    def search(objective: Callable[[Tensor], Tensor], start: Tensor, **_: object) -> Iterator[tuple[float, Tensor]]:
        order = distances(layer_inputs(obs.model, exact.layer, x, "train"), exact.inputs).argmin(0)
        truth = (x[order].flatten(1) - 0.5) / 0.25
        for point in (start, truth, start):
            yield float(objective(point).detach()), point

    exact = Unmix()(obs)
    assert exact.inputs is not None
    monkeypatch.setattr("unbatch.attacks.feature_inversion.signed_adam", search)
    found = FeatureInversion(iterations=3)(obs)
    assert found.inputs is not None
    assert float(distances(found.inputs, x).min(0).values.max()) < 1e-6
    assert max(found.trace["misfit"]) < 1e-4


def test_flat_pictures_come_first_and_the_score_does_not_change_its_weight() -> None:
    target = torch.rand(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    search = CoarseToFine(lambda p: (p - target).norm(dim=1), (3, 2, 2), 0.01, 10)
    values = []
    for _ in range(10):
        values.append(float(search(target)))
        assert search.misfit == [0.0, 0.0]
        assert search.score == pytest.approx(values[0] * 0.01)
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(search.score)
