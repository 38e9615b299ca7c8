"""safer-design: changes that make the published metric more negative, and what they cost."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from clients import Exchange, normal
from torch import nn

from unbatch.analyses.safer_design import METRICS, SaferDesign
from unbatch.analysis import Analysis, Verdict
from unbatch.auditing.client import observe
from unbatch.case import Case
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.observation import Observation


def metric(obs: Observation) -> float:
    return Analysis.parse("security-metric:work=0")(obs)[0].value


def counted(found: Sequence[Verdict]) -> list[Verdict]:
    """Those of the published metric, the safest first."""
    return sorted((v for v in found if v.name.startswith("c(M)")), key=lambda v: v.value)


def proposed(exchange: Exchange, spec: str) -> list[Verdict]:
    obs, x, y = exchange(spec)
    return counted(SaferDesign(work=0)(obs, at=(x, y)))


def test_changes_of_a_published_network_the_safest_first(exchange: Exchange) -> None:
    found = proposed(exchange, "photos:model=cnn2-c2,bias=false")
    assert [(v.name, v.value) for v in found] == [
        ("c(M): conv1 at stride 4", -2436),
        ("c(M): conv1 with 3 of 6 channels", -2262),
    ]
    assert found[0].words == ("c(M) is -1,470 now. Parameters 12,447 -> 3,753; numbers that reach head 1,350 -> 384.")
    assert (
        "conv1 followed by average pooling of 2 along each side: not counted, since c(M): the ranks" in found[1].words
    )


def test_the_change_of_a_network_that_gives_all_away(exchange: Exchange) -> None:
    (found,) = proposed(exchange, "photos:model=cnn2-c1")
    assert (found.name, found.value) == ("c(M): conv1 at stride 2", 3 * 9 * 6 + 6 * 15 * 15 - 36 - 3072)
    assert "c(M) is 0 now." in found.words
    assert found.words.endswith(
        "conv1 with 3 of 6 channels, conv1 followed by average pooling of 2 along each side: not counted, since c(M): the "
        "ranks of conv1 cannot be counted, and their unknowns are more than exact=1024 to measure."
    )
    found = proposed(exchange, "photos:model=cnn2-c1,size=16")
    assert [(v.name, v.value) for v in found] == [
        ("c(M): conv1 at stride 2", 3 * 9 * 6 + 6 * 49 - 36 - 768),
        ("c(M): conv1 followed by average pooling of 2 along each side", 3 * 9 * 6 + 6 * 7 * 7 - 36 - 768),
        ("c(M): conv1 with 3 of 6 channels", 3 * 9 * 3 + 3 * 14 * 14 - 9 - 768),
    ]


@pytest.mark.parametrize("name", ["cnn3-c4", "cnn3-c1"])
def test_values_are_those_of_the_security_metric(exchange: Exchange, name: str) -> None:
    """Of the network built anew with that change: c(M) is generic in the weights."""
    obs, x, y = exchange(f"photos:size=12,model={name}")
    found = counted(SaferDesign(most=9)(obs, at=(x, y)))
    assert found
    assert min(v.value for v in found) < metric(obs)
    for verdict in found:
        layer, what = verdict.name.removeprefix("c(M): ").split(" ", 1)
        changed = list(obs.model)
        place = [n for n, _ in obs.model.named_children()].index(layer)
        conv = changed[place]
        stride = conv.stride if what.startswith("with") else tuple(2 * s for s in conv.stride)
        channels = conv.out_channels // 2 if what.startswith("with") else conv.out_channels
        changed[place] = nn.Conv2d(conv.in_channels, channels, conv.kernel_size, stride, conv.padding)
        later = next((k for k in range(place + 1, len(changed)) if isinstance(changed[k], nn.Conv2d)), None)
        if later is not None:
            c = changed[later]
            changed[later] = nn.Conv2d(channels, c.out_channels, c.kernel_size, c.stride, c.padding)
        trunk = nn.Sequential(*changed[:-1])
        model = normal(*changed[:-1], nn.Linear(trunk(torch.zeros(1, 3, 12, 12)).numel(), 9))
        assert metric(exchange(model, shape=(3, 12, 12))[0]) == verdict.value


def test_nothing_that_does_not_help_is_proposed(exchange: Exchange) -> None:
    obs = exchange(normal(nn.Conv2d(1, 9, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9 * 36, 3)), shape=(1, 8, 8))[0]
    assert metric(obs) == 0
    share = Analysis.parse("security-metric")(obs)[1].value
    found = SaferDesign(most=9)(obs)
    changes = {v.name.split(": ")[1] for v in found}
    values = {v.name: v.value for v in found}
    assert len(changes) > 1
    for change in changes:
        assert values.get(f"c(M): {change}", 0) < 0 or values[f"determined share: {change}"] < share - 0.01
    tiny = exchange(normal(nn.Conv2d(1, 1, 8), nn.Tanh(), nn.Flatten(), nn.Linear(1, 2)), shape=(1, 8, 8))[0]
    share, verdict = SaferDesign()(tiny)
    assert share.name == "determined share: no change"
    assert (verdict.name, verdict.value) == ("c(M): no change", metric(tiny))
    assert verdict.words.startswith("none of 1 changes to a convolution makes it safer.")


def test_a_network_without_convolutions_is_told_so(exchange: Exchange) -> None:
    obs = exchange(normal(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)), shape=(12,))[0]
    (verdict,) = SaferDesign()(obs)
    assert (verdict.name, verdict.value) == ("c(M): no change", 0)
    assert "no convolution lies before the first dense layer" in verdict.words


def test_what_is_too_large_to_measure_is_said(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    obs, x, y = exchange("photos:size=16,model=cnn2-c1,activation=relu")
    found = SaferDesign(exact=100)(obs, at=(x, y))
    assert {v.name.split(":")[0] for v in found} == {"determined share", "examples told apart"}
    last = [v for v in found if v.name.startswith("determined share")][-1]
    assert "c(M) of the network as it is: not counted" in last.words
    monkeypatch.setattr("unbatch.analyses.safer_design.CHANGED_UNKNOWNS", 100)
    last = SaferDesign(work=1e9)(obs, at=(x, y))[-1]
    assert last.name.startswith("examples told apart")
    assert re.search(r"no change could be counted\..*4 networks take about 1.1e\+10 operations", last.words)
    last = SaferDesign(exact=100, work=1e9)(obs, at=(x, y))[-1]
    assert last.name.startswith("examples told apart")
    assert "unknowns are more than exact=100 to measure" in last.words
    with pytest.raises(NotApplicable, match="input_shape"):
        SaferDesign()(obs.only("batch_size"), at=(x, y))


def test_at_most_so_many_are_given_and_the_answer_is_the_same_again(exchange: Exchange) -> None:
    obs, x, y = exchange("photos:size=10,model=cnn3-c1")
    every = SaferDesign(most=9)(obs, at=(x, y))
    assert len(every) > 1
    first = every[0].name.split(": ")[1]
    assert {v.name.split(": ")[1] for v in SaferDesign(most=1)(obs, at=(x, y))} == {first}
    assert list(every) == list(SaferDesign(most=9)(obs, at=(x, y)))
    shares = [v.value for v in every if v.name.startswith("determined share")]
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    ("spec", "now"),
    [
        ("safer-design:own=5", "exact"),
        ("safer-design:largest=5", "exact"),
        ("security-metric:largest=5", "exact"),
        ("layer-equations:condition=5", "exact"),
    ],
)
def test_an_option_that_had_another_name_says_so(spec: str, now: str) -> None:
    with pytest.raises(UnbatchError, match=f"unknown option '.*'; it is called '{now}' now"):
        Analysis.parse(spec)


def test_another_metric_stands_beside(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "dense inputs", lambda links, at, largest: float(links[-1].unknowns))
    obs, x, y = exchange("photos:model=cnn2-c2,size=16,bias=false")
    found = SaferDesign()(obs, at=(x, y))
    assert {v.name for v in found if not v.name.startswith("determined share")} == {
        f"{name}: conv1 {change}"
        for name in ("c(M)", "dense inputs")
        for change in ("at stride 4", "with 3 of 6 channels", "followed by average pooling of 2 along each side")
    }


def test_the_network_and_its_buffers_are_left_alone() -> None:
    model = normal(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    model.insert(1, nn.BatchNorm2d(4))
    x, y = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    obs = observe(model, nn.functional.cross_entropy, x, y)[0]
    before = {k: t.clone() for k, t in obs.model.state_dict().items()}
    assert SaferDesign()(obs)
    assert all(torch.equal(before[k], t) for k, t in obs.model.state_dict().items())


def test_the_share_as_it_is_is_that_of_the_security_metric() -> None:
    """The noise, the range and what is sent count in both."""
    setting = Case.parse("photos:size=8,model=cnn2-c1").setting()
    x, y = setting.inputs, setting.labels
    obs, _ = observe(setting.model, setting.loss, x, y, knowledge=setting.knowledge, defences=["noise:sigma=0.1"])
    own = {v.name: v.value for v in Analysis.parse("security-metric")(obs, at=(x, y))}["determined share"]
    assert own < 0.9
    found = SaferDesign()(obs, at=(x, y))
    words = next(v.words for v in found if v.name.startswith("determined share"))
    assert words.startswith(f"determined share is {own:,.6g} now.")
