"""Networks with one layer changed: what changes, what stays, and that they run."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from unbatch.inversion.backward.variants import Variant, first_dense, parameters, variants
from unbatch.network.chain import Link, chain, follow


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def changed(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Variant]:
    return {variant.words: variant for variant in variants(chain(model, shape), rng())}


def modules(variant: Variant) -> list[str]:
    return [str(link.module).partition(",")[0] for link in variant.links]


def small() -> nn.Sequential:
    layers = OrderedDict(
        first=nn.Conv2d(3, 6, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(6, eps=1e-3, momentum=None),
        act=nn.PReLU(6),
        second=nn.Conv2d(6, 8, 3),
        groups=nn.GroupNorm(2, 8),
        tanh=nn.Tanh(),
        flat=nn.Flatten(),
        head=nn.Linear(8 * 36, 5),
    )
    return nn.Sequential(layers)


def test_every_change_is_named_after_its_layer() -> None:
    assert list(changed(small(), (3, 8, 8))) == [
        "first at stride 2",
        "first with 3 of 6 channels",
        "first followed by average pooling of 2 along each side",
        "second at stride 2",
        "second with 4 of 8 channels",
        "second followed by average pooling of 2 along each side",
    ]


def test_the_layers_after_a_change_are_fitted_and_the_others_stay() -> None:
    links = chain(small(), (3, 8, 8))
    found = {variant.words: variant.links for variant in variants(links, rng())}
    narrow = found["first with 3 of 6 channels"]
    assert [link.name for link in narrow] == [link.name for link in links]
    first, norm, act, second, *rest = narrow
    assert (first.module.out_channels, first.module.bias, first.module.padding) == (3, None, (1, 1))
    assert (norm.module.num_features, norm.module.eps, norm.module.momentum) == (3, 1e-3, None)
    assert act.module.num_parameters == 3
    assert (second.module.in_channels, second.module.out_channels) == (3, 8)
    assert all(new is old for new, old in zip(rest, links[4:], strict=True)), "what need not change is the layer itself"
    strided = found["second at stride 2"]
    assert all(new is old for new, old in zip(strided[:3], links[:3], strict=True))
    assert strided[3].module.stride == (2, 2)
    assert strided[-1].module.in_features == 8 * 9
    pooled = found["second followed by average pooling of 2 along each side"]
    assert [link.name for link in pooled][3:5] == ["second", "second, pooled"]
    assert pooled[3].module is links[3].module
    assert pooled[-1].before == (8 * 9,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_changed_network_runs_as_its_links_say(dtype: torch.dtype) -> None:
    model = small().to(dtype).eval()
    x = torch.rand(2, 3, 8, 8, generator=rng(), dtype=dtype)
    for variant in variants(chain(model, (3, 8, 8)), rng()):
        for k, link in enumerate(variant.links):
            before = follow(variant.links[:k], x)
            assert tuple(link.module(before.reshape(2, *link.before)).shape[1:]) == link.after
        assert follow(variant.links, x).shape == (2, 5)
        assert follow(variant.links, x).dtype == dtype
        assert not any(link.module.training for link in variant.links)


def test_fresh_weights_follow_the_default_law_and_the_generator() -> None:
    links = chain(small(), (3, 8, 8))
    with torch.random.fork_rng(devices=[]):
        once, again = (next(iter(variants(links, rng()))).links[0].module.weight for _ in range(2))
        state = torch.random.get_rng_state()
        other = next(iter(variants(links, torch.Generator().manual_seed(1)))).links[0].module.weight
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator is not read"
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert 0.8 / 27**0.5 < float(once.detach().abs().max()) <= 1 / 27**0.5


def test_the_network_itself_is_left_alone() -> None:
    model = small()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    list(variants(chain(model, (3, 8, 8), "train"), rng()))
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert model[0].stride == (1, 1)


def test_a_reshape_that_is_no_module_is_followed() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Linear(144, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.act(self.conv(x)).flatten(1))

    found = changed(Viewed(), (1, 8, 8))
    assert [variant.links[-1].before for variant in found.values()] == [(36,), (72,), (36,)]


def test_changes_that_do_not_fit_are_left_out() -> None:
    same = nn.Sequential(nn.Conv2d(1, 4, 3, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(256, 3))
    assert list(changed(same, (1, 8, 8))) == [
        "0 with 2 of 4 channels",
        "0 followed by average pooling of 2 along each side",
    ], "PyTorch knows no strided 'same'"
    one = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Tanh(), nn.Conv2d(1, 4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    assert list(changed(one, (3, 8, 8))) == ["2 at stride 2", "2 with 2 of 4 channels"], "a kernel of 6 fits 6"
    head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 5, 6), nn.Flatten())
    kept = list(changed(head, (3, 8, 8)))
    assert len(kept) > 1
    assert not [words for words in kept if words.startswith("2 with")], "the outputs stay as many"
    fixed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(144, 3))
    assert list(changed(fixed, (1, 8, 8))) == ["0 at stride 2", "0 followed by average pooling of 2 along each side"]


def test_depthwise_convolutions_stay_so() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 16, 3, groups=8), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 16, 3)
    )
    links = changed(model, (3, 8, 8))["0 with 4 of 8 channels"].links
    assert (links[2].module.groups, links[2].module.out_channels) == (4, 8)
    assert links[-1].module.in_features == 8 * 16


def test_one_dimension() -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Tanh(), nn.Conv1d(6, 8, 3), nn.Flatten(), nn.Linear(64, 2)
    )
    found = changed(model, (4, 12))
    assert found["0 with 3 of 6 channels"].links[1].module.num_features == 3
    assert found["0 followed by average pooling of 2 along each side"].links[1].after == (6, 5)
    assert found["3 at stride 2"].links[-1].before == (32,)


def test_dense_networks_have_no_variants() -> None:
    links = chain(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (4,))
    assert list(variants(links, rng())) == []
    assert first_dense(links) == 1
    assert parameters(links) == 15 + 8
    assert first_dense([Link("", nn.Tanh(), (1,), (1,))]) == 1
