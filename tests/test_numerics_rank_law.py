"""The rank law against the ranks of the matrices, on random layers."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from unbatch.layers.affine import Affine
from unbatch.numerics.rank_law import conv_ranks

SMALL = st.integers(1, 3)


def measured(layer: nn.Module, shape: tuple[int, ...], seed: int) -> tuple[int, int, int]:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng))
    z = layer(torch.zeros(1, *shape, dtype=torch.float64))
    dz = torch.randn(z.shape, generator=rng, dtype=torch.float64)
    forward = Affine().forward_equations(layer, shape, z)
    backward = Affine().gradient_equations(layer, shape, dz, torch.zeros_like(layer.weight))
    return forward.rank(), backward.rank(), (forward + backward).rank()


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    channels=st.tuples(SMALL, st.integers(1, 6)),
    groups=st.integers(1, 2),
    kernel=st.tuples(SMALL, SMALL),
    stride=st.tuples(SMALL, SMALL),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sides=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    seed=st.integers(0, 10**6),
)
def test_counting_is_right_where_it_answers(channels, groups, kernel, stride, dilation, sides, seed) -> None:
    before, after = (groups * c for c in channels)
    try:
        law = conv_ranks(before, after, sides, kernel, stride=stride, dilation=dilation, groups=groups)
    except ValueError:
        law = None
    assume(law is not None)
    layer = nn.Conv2d(before, after, kernel, stride, dilation=dilation, groups=groups, bias=False).double()
    assert (law.weight, law.gradient, law.both) == measured(layer, (before, *sides), seed)


def test_one_dimension() -> None:
    layer = nn.Conv1d(3, 4, 3, stride=3, bias=False).double()
    law = conv_ranks(3, 4, (21,), (3,), stride=(3,), dilation=(1,))
    assert (law.weight, law.gradient, law.both) == measured(layer, (3, 21), 0)


@pytest.mark.parametrize(
    ("after", "kernel", "stride", "deficit"),
    [(6, 4, 2, 1470), (1, 3, 1, 2146)],  # measured by matrices in the published systems' terms
)
def test_first_layers_of_the_published_networks(after: int, kernel: int, stride: int, deficit: int) -> None:
    law = conv_ranks(3, after, (32, 32), (kernel, kernel), stride=(stride, stride), dilation=(1, 1))
    assert law.deficit == deficit


def test_where_counting_is_not_known_to_do() -> None:
    kw = {"stride": (1, 1), "dilation": (1, 1)}
    assert conv_ranks(1, 2, (9, 5), (3, 3), **kw) is None  # two filters on one channel commute
    assert conv_ranks(3, 2, (5, 5), (4, 4), **kw) is None  # the kernel reaches as far as the outputs do
    assert conv_ranks(3, 7, (53,), (4,), stride=(3,), dilation=(2,)) is None  # 147 by count, 150 touched, 146 in truth
    with pytest.raises(ValueError, match="does not fit"):
        conv_ranks(3, 2, (2, 5), (4, 4), **kw)
