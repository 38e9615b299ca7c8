"""separable-layer: what it counts, against the gradients of tiny networks and the way down that the attack takes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from clients import Exchange, normal
from torch import Tensor, nn

from unbatch.analysis import Analysis, LayerRisk, Verdict
from unbatch.errors import NotApplicable
from unbatch.inversion.descent.forecast import Prospects, prospects
from unbatch.inversion.descent.places import places
from unbatch.inversion.descent.redesign import redesigns
from unbatch.inversion.descent.separation import separated, span
from unbatch.inversion.descent.walk import walk
from unbatch.inversion.view import View
from unbatch.network.sections import section
from unbatch.network.tracing import trace
from unbatch.numerics.windows.maps import maps_in
from unbatch.observation import Observation

SHAPE = (2, 8, 8)


class Residual(nn.Module):
    """Channels 2, 16, 32 and 64 on 8, 8, 4 and 2 pixels a side, with one block of two convolutions."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, mode: str = "zeros", stride: int = 2, half: int = 1) -> None:
        super().__init__()
        wide = 64 // half
        self.conv1 = nn.Conv2d(2, 16 // half, 3, padding=1, padding_mode=mode)
        self.conv2 = nn.Conv2d(16 // half, 32 // half, 3, 2, 1, padding_mode=mode)
        self.left = nn.Conv2d(32 // half, 32 // half, 3, padding=1, padding_mode=mode)
        self.right = nn.Conv2d(32 // half, 32 // half, 3, padding=1, padding_mode=mode)
        self.conv3 = nn.Conv2d(32 // half, wide, 3, stride, 1, padding_mode=mode)
        self.head = nn.Linear(wide * (4 // stride) ** 2, 5)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv2(self.act(self.conv1(x))))
        z = self.act(self.right(self.act(self.left(y))) + y)
        return self.head(self.act(self.conv3(z)).flatten(1))


def drawn(model: nn.Module) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng) / p[0].numel() ** 0.5 * (1.0 if p.ndim > 1 else 0.1)
    return model


def plain(*middle: nn.Module, width: int = 32, sides: int = 2) -> nn.Sequential:
    """A convolution to 8 channels, what is given, a strided convolution that may tell examples apart, and a dense head."""
    last = nn.Conv2d(8, width, 3, 2, 1)
    return normal(nn.Conv2d(2, 8, 3, 2, 1), *middle, last, nn.ReLU(), nn.Flatten(), nn.Linear(width * sides**2, 5))


def found(obs: Observation) -> tuple[dict[str, LayerRisk], dict[str, Verdict]]:
    findings = Analysis.parse("separable-layer")(obs)
    risks = {f.layer: f for f in findings if isinstance(f, LayerRisk)}
    return risks, {f.name: f for f in findings if isinstance(f, Verdict)}


def counted(obs: Observation) -> Prospects:
    return prospects(View.of(obs), None, torch.Generator().manual_seed(0))


def test_a_residual_network_layer_by_layer(exchange: Exchange) -> None:
    obs, *_ = exchange(drawn(Residual()), shape=SHAPE, n=3)
    risks, verdicts = found(obs)
    assert {name: (risk.rank, risk.level) for name, risk in risks.items()} == {
        "conv1": (16, "low"),
        "conv2": (32, "partial"),
        "left": (32, "exact"),
        "right": (32, "exact"),
        "conv3": (12, "exact"),
        "head": (3, "exact"),
    }
    assert "4 windows an example, rank at most min(3 x 4, 64) = 12: a batch of up to 16 can be" in risks["conv3"].words
    assert "The shallowest that does so for this batch." in risks["conv3"].words
    assert "another branch leads around its input" in risks["right"].words
    assert "from what lies above, of up to 18 examples: 48 equations for 48 unknowns" in risks["left"].words
    assert "a batch of up to 2 can be told apart here." in risks["left"].words
    assert "176 equations for 192 unknowns of each channel; of up to 2 examples it would follow" in risks["conv2"].words
    assert "it reads the network's inputs" in risks["conv1"].words
    assert "by running the network" in risks["head"].words
    assert verdicts["examples told apart"].value == 16
    assert "a batch of up to 16 can be told apart at 'conv3', the shallowest" in verdicts["examples told apart"].words
    down = verdicts["equations for each unknown"]
    assert "the inputs of 'right' and 'left' follow linearly; that of 'conv2' is the first to stay open" in down.words
    assert "equations for the 384 unknowns of the inputs: enough, as they are up to a batch of" in down.words
    assert 1.5 < down.value <= 16 * 64 * 3 / 384  # no more than what reaches the input of 'conv2'


@pytest.mark.parametrize("n", [1, 3, 12])
def test_the_ranks_of_gradients_are_those_that_are_counted(exchange: Exchange, n: int) -> None:
    obs, *_ = exchange(drawn(Residual()), shape=SHAPE, n=n, dtype=torch.float64)
    for prospect in counted(obs).each:
        rank = int(torch.linalg.matrix_rank(obs.update[prospect.place.weight].flatten(1)))
        assert prospect.rank(n) - 2 <= rank <= prospect.rank(n)  # a unit that is off for everybody sends nothing
        assert rank == prospect.rank(n) or prospect.name != "conv3"


@pytest.mark.parametrize("n", [1, 2, 3, 9, 16])
def test_the_way_down_is_the_one_that_the_attack_takes(exchange: Exchange, n: int) -> None:
    """The same tensors, of which the same many equations are independent, with true values and gradients above."""
    obs, x, y = exchange(drawn(Residual()), shape=SHAPE, n=n, dtype=torch.float64)
    forecast = counted(obs).forecast(n)
    assert forecast.at is not None
    graph = trace(copy.deepcopy(obs.model).requires_grad_(False), SHAPE, "eval")
    every = list(places(graph))
    (start,) = {place.given for place in every if place.weight == forecast.at.place.weight}
    maps = section(graph, graph.input, start)(x).detach().requires_grad_()
    (back,) = torch.autograd.grad(obs.loss(section(graph, start, graph.output)(maps), y), maps)
    eps = torch.finfo(torch.float64).eps
    down = walk(graph, every, start, maps.detach(), back, obs.update, eps, eps)
    assert [(told.rows is None, told.shape) for told in down.told] == [
        (rung.known, (n, *rung.value.shape[1:])) for rung in forecast.rungs
    ]
    for told, rung in zip(down.told, forecast.rungs, strict=True):
        if told.rows is not None:  # a unit that is off for everybody sends nothing
            assert 0.9 * rung.independent <= len(told.rows) <= rung.independent


def test_what_is_excluded_is_not_told_apart_and_well_below_it_all_are(exchange: Exchange) -> None:
    for n in (2, 6, 17):
        obs, *_ = exchange(drawn(Residual()), shape=SHAPE, n=n, dtype=torch.float64)
        (prospect,) = [p for p in counted(obs).each if p.name == "conv3"]
        G, rng = prospect.place.flat(obs.update["conv3.weight"]), torch.Generator().manual_seed(0)
        apart = separated(prospect.place, G, torch.finfo(torch.float64).eps, rng, lambda: True)
        assert prospect.up_to == 16
        assert (apart is not None and len(apart) == n) == (n <= prospect.up_to)


def tiny(**options: object) -> Callable[[], nn.Module]:
    return lambda: drawn(Residual(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "layer", "words"),
    [
        (lambda: plain(nn.GELU()), "2", "its input has negative entries: it comes from '1' (GELU), not from a ReLU"),
        (lambda: plain(nn.Softplus()), "2", "its input is nowhere exactly zero: it comes from '1' (Softplus)"),
        (tiny(mode="reflect"), "conv3", "it pads with 'reflect' in place of zeros"),
        (
            lambda: normal(
                nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
            ),
            "2",
            "it pads with no zeros, so that its corners look like all other windows",
        ),
        (
            lambda: normal(
                nn.Conv2d(2, 8, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(8, 32, 3, 2, 1, groups=2),
                nn.Flatten(),
                nn.Linear(128, 5),
            ),
            "2",
            "its channels are in 2 groups",
        ),
        (
            lambda: normal(
                nn.Conv2d(2, 8, 3, 2, 1),
                nn.ReLU(),
                nn.Conv2d(8, 64, 3, 1, 1),
                nn.AvgPool2d(2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(256, 5),
            ),
            "2",
            "average pooling right behind it sends the same back to several of its windows",
        ),
        (lambda: plain(nn.ReLU(), width=3), "2", "one example alone has more windows than that"),
    ],
)
def test_why_a_layer_tells_no_batch_apart(
    exchange: Exchange, model: Callable[[], nn.Module], layer: str, words: str
) -> None:
    obs, *_ = exchange(model(), shape=SHAPE, n=2)
    assert words in found(obs)[0][layer].words


def test_few_zeros_keep_large_batches_together(exchange: Exchange) -> None:
    """A vector that others add up to is nobody's alone: n - 1 zeros are needed, whatever the width."""
    model = normal(nn.Flatten(), nn.Linear(128, 4), nn.ReLU(), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 30))
    model[1].bias.data[1:] += 100.0  # three of four neurons are on for everybody
    obs, *_ = exchange(model, shape=SHAPE, n=4)
    (prospect,) = [p for p in counted(obs).each if p.name == "3"]
    assert prospect.counted == 4
    assert prospect.up_to == 1
    assert "since only 0 entries of its input are zero for one example and not for all" in found(obs)[0]["3"].words


def test_padding_tells_so_many_corners_from_all_other_windows(exchange: Exchange) -> None:
    """Few padded entries leave more vectors of the span zero there than the corners' own windows."""
    layers = nn.Conv2d(2, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 200, 5, 1, 2, dilation=1), nn.ReLU(), nn.Flatten()
    obs, *_ = exchange(drawn(nn.Sequential(*layers, nn.Linear(9800, 5))), shape=(2, 7, 7), n=3, dtype=torch.float64)
    (prospect,) = [p for p in counted(obs).each if p.name == "2"]
    assert (prospect.counted, prospect.padded, prospect.up_to) == (3, 6 * 16, 2)
    assert "since only 96 entries of a corner's window are padding" in found(obs)[0]["2"].words
    rows = torch.linalg.svd(obs.update["2.weight"].flatten(1), full_matrices=False).Vh[:147]
    padded = prospect.place.windows().padded[0]
    open_ = len(rows) - int(torch.linalg.matrix_rank(rows[:, padded]))
    assert open_ > 3


def test_batch_norm_in_train_mode_leaves_differences(exchange: Exchange) -> None:
    model = normal(nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1)).append(nn.BatchNorm2d(32))
    model.extend([nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)])
    obs, *_ = exchange(model, shape=SHAPE, n=3, mode="train", dtype=torch.float64)
    risks, verdicts = found(obs)
    assert risks["2"].rank == 3 * 4 - 1 == int(torch.linalg.matrix_rank(obs.update["2.weight"].flatten(1)))
    assert risks["2"].level == "unknown"
    assert "'3' is batch norm in train mode: examples mix there" in verdicts["examples told apart"].words
    assert counted(obs).readable == 0
    assert "equations for each unknown" not in verdicts
    still, *_ = exchange(model.eval(), shape=SHAPE, n=3, mode="eval", dtype=torch.float64)
    assert found(still)[0]["2"].rank == 12
    assert "train mode" not in found(still)[1]["examples told apart"].words


def test_what_lies_behind_a_narrow_layer_tells_no_more_than_that_layer(exchange: Exchange) -> None:
    layers = nn.Conv2d(2, 1, 3, 2, 1), nn.ReLU(), nn.Conv2d(1, 40, 3, 1, 1), nn.ReLU(), nn.Conv2d(40, 64, 3, 2, 1)
    obs, *_ = exchange(drawn(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))), shape=SHAPE, n=2)
    forecast = counted(obs).forecast(2)
    assert forecast.at is not None
    assert forecast.target is not None
    assert forecast.target.equations > 1.5 * 2 * 128
    assert forecast.surplus <= 16 / 128
    assert not forecast.readable
    assert "too few to determine them" in found(obs)[1]["equations for each unknown"].words


def test_everything_may_follow_linearly(exchange: Exchange) -> None:
    model = normal(nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 6))
    obs, *_ = exchange(model, shape=SHAPE, n=3)
    risks, verdicts = found(obs)
    assert "from '3' down every layer's input follows linearly" in verdicts["equations for each unknown"].words
    assert risks["1"].level == "exact"
    assert "reads the network's inputs" in risks["1"].words


def test_a_batch_that_no_layer_tells_apart(exchange: Exchange) -> None:
    obs, *_ = exchange(drawn(Residual()), shape=SHAPE, n=40)
    risks, verdicts = found(obs)
    assert {risk.level for risk in risks.values()} == {"low"}
    assert (
        verdicts["examples told apart"].words
        == "no layer tells a batch of 40 apart; up to 16 can be told apart at 'conv3'."
    )
    assert "equations for each unknown" not in verdicts
    obs, *_ = exchange(drawn(Residual(act=nn.Tanh, half=4)), shape=SHAPE, n=2)
    assert "no layer tells a batch of 2 apart: each has more windows" in found(obs)[1]["examples told apart"].words


def test_an_unknown_batch_is_counted_as_one(exchange: Exchange) -> None:
    obs, *_ = exchange(drawn(Residual()), shape=SHAPE, n=2)
    risks, verdicts = found(obs.only("input_shape"))
    assert "The batch size is not known" in verdicts["examples told apart"].words
    assert risks["conv3"].rank == 4


def test_a_layer_that_sent_nothing_tells_nothing(exchange: Exchange) -> None:
    model = drawn(Residual())
    model.conv3.weight.requires_grad_(False)
    obs, *_ = exchange(model, shape=SHAPE, n=2)
    assert "its gradient was not sent" in found(obs)[0]["conv3"].words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local_steps": 2, "learning_rate": 0.1}, "local steps"),
        ({"defences": ["noise:sigma=0.1"]}, "noise fills the span"),
    ],
)
def test_what_it_does_not_speak_of(exchange: Exchange, options: dict[str, object], words: str) -> None:
    obs, *_ = exchange(drawn(Residual()), shape=SHAPE, n=2, **options)
    with pytest.raises(NotApplicable, match=words):
        found(obs)


def test_networks_that_it_does_not_speak_of(exchange: Exchange) -> None:
    dropping = normal(nn.Flatten(), nn.Linear(128, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    obs, *_ = exchange(dropping, shape=SHAPE, n=2, mode="train")
    with pytest.raises(NotApplicable, match="'2' is dropout in train mode"):
        found(obs)
    headless = normal(nn.Conv2d(2, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 5, 4), nn.Flatten())
    obs, *_ = exchange(headless, shape=SHAPE, n=2)
    with pytest.raises(NotApplicable, match="ends in no dense layer"):
        found(obs)
    with pytest.raises(NotApplicable, match="input_shape must be known"):
        found(obs.only("batch_size"))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("padding by reflection in place of zeros", {"mode": "reflect"}),
        ("half the channels in every layer", {"half": 2}),
        ("stride 1 in place of 2 in 'conv3'", {"stride": 1}),
    ],
)
def test_a_redesign_is_the_network_built_that_way(exchange: Exchange, words: str, options: dict[str, object]) -> None:
    obs, *_ = exchange(drawn(Residual()), shape=SHAPE, n=2)
    made = {change.words: change.up_to for change in redesigns(counted(obs))}
    assert set(made) >= {words}
    other, *_ = exchange(drawn(Residual(**options)), shape=SHAPE, n=2)  # type: ignore[arg-type]
    assert made[words] == counted(other).up_to


def test_safer_design_and_the_security_metric_know_of_it(exchange: Exchange) -> None:
    """A layer that leaves unknowns open does not make a network safe."""
    deficient = nn.Conv2d(16, 14, 1)
    layers = nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), deficient, nn.ReLU(), nn.Conv2d(14, 64, 3, 2, 1), nn.ReLU()
    obs, *_ = exchange(drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5))), shape=(1, 8, 8), n=2)
    (metric,) = Analysis.parse("security-metric:work=0")(obs)
    assert metric.value < 0 < counted(obs).readable
    assert re.search(r"by counting, a batch of up to \d+ can be told apart at '4', with equations enough", metric.words)
    changes = {
        v.name: v
        for v in Analysis.parse("safer-design:work=0,exact=1")(obs)
        if v.name.startswith("examples told apart")
    }
    assert "examples told apart: a smooth activation in place of every ReLU" not in changes  # whole maps need no zeros
    layers = nn.Conv2d(1, 16, 3, 2, 1), nn.Tanh(), deficient, nn.Tanh(), nn.Conv2d(14, 64, 3, 1, 1), nn.Tanh()
    obs, *_ = exchange(drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 5))), shape=(1, 8, 8), n=2)
    (metric,) = Analysis.parse("security-metric:work=0")(obs)
    assert metric.value < 0 < counted(obs).readable
    assert "can be told apart at '4', with equations enough" in metric.words
    smooth, *_ = exchange(drawn(Residual(act=nn.Tanh, half=4)), shape=SHAPE, n=2)
    with pytest.raises(NotApplicable):
        Analysis.parse("safer-design:work=0,exact=1")(smooth)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_whole_maps_are_counted_where_no_zeros_tell(exchange: Exchange, n: int) -> None:
    """Behind a smooth activation, at the layer with 32 outputs and 16 windows: two examples, as the attack tells them."""
    obs, *_ = exchange(drawn(Residual(act=nn.Tanh)), shape=SHAPE, n=n, dtype=torch.float64)
    (prospect,) = [p for p in counted(obs).each if p.name == "left"]
    assert (prospect.by_zeros, prospect.by_maps, prospect.up_to) == (0, 2, 2)
    assert (
        "up to 2 can be told apart here by whole maps, which its windows' overlaps tell" in found(obs)[0]["left"].words
    )
    eps = torch.finfo(torch.float64).eps
    rows = span(prospect.place.flat(obs.update["left.weight"]), eps)
    assert (len(maps_in(rows, prospect.place.windows(), most=n)) == n) == (n <= 2)
    assert counted(obs).readable == 2
    changes = {change.words: change.up_to for change in redesigns(counted(obs))}
    assert changes["padding by reflection in place of zeros"] == 0
    assert changes["half the channels in every layer"] == 1
