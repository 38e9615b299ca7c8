"""The rank law against the ranks of the matrices, on random layers."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from unbatch.layers.affine import Affine
from unbatch.numerics.linear.linsys import LinearSystem
from unbatch.numerics.linear.rank_law import conv_ranks

SMALL = st.integers(1, 3)


def measured(layer: nn.Module, shape: tuple[int, ...], seed: int) -> tuple[int, int, int]:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng))
    z = layer(torch.zeros(1, *shape, dtype=torch.float64))
    forward = Affine().forward_equations(layer, shape, z).matrix()
    dz = torch.randn(z.shape, generator=rng, dtype=torch.float64)
    backward = Affine().gradient_equations(layer, shape, dz, torch.zeros_like(layer.weight)).matrix()
    first, second, third = (
        LinearSystem.of(A, A.new_zeros(len(A))).rank() for A in (forward, backward, torch.cat([forward, backward]))
    )
    return first, second, third


LAYERS = {
    "channels": st.tuples(SMALL, st.integers(1, 6)),
    "groups": st.integers(1, 2),
    "kernel": st.tuples(SMALL, SMALL),
    "stride": st.tuples(SMALL, SMALL),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "padding": st.tuples(st.integers(0, 1), st.integers(0, 1)),
    "sides": st.tuples(st.integers(5, 9), st.integers(5, 9)),
    "seed": st.integers(0, 10**6),
}


def held(channels, groups, kernel, stride, dilation, padding, sides, seed) -> bool:
    """Whether the law answers; then it is right."""
    before, after = (groups * c for c in channels)
    kw = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    try:
        law = conv_ranks(before, after, sides, kernel, **kw)
    except ValueError:
        return False
    if law is None:
        return False
    layer = nn.Conv2d(before, after, kernel, **kw, bias=False).double()
    forward, backward, both = measured(layer, (before, *sides), seed)
    assert (law.gradient, law.both) == (backward, both)
    assert law.weight == (None if any(padding) else forward)
    assert law.unknowns == before * sides[0] * sides[1]
    return True


@hypothesis_settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(**LAYERS)
def test_counting_is_right_where_it_answers(**layer) -> None:
    assume(held(**layer))


@pytest.mark.slow
def test_counting_is_right_on_thirty_thousand_layers() -> None:
    answered = {False: 0, True: 0}

    @hypothesis_settings(
        deadline=None, max_examples=30_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(**LAYERS)
    def every(**layer) -> None:
        answered[held(**layer)] += 1

    every()
    print(f"the law answers {answered[True]} of {sum(answered.values())} random layers, each as their matrices do")
    assert answered[True] > 1000


def test_under_padding_rows_of_the_weights_depend_on_each_other() -> None:
    kw = {"stride": (2, 2), "padding": (1, 1)}
    law = conv_ranks(1, 3, (7, 7), (3, 3), **kw, dilation=(1, 1))
    layer = nn.Conv2d(1, 3, 3, **kw, bias=False).double()
    assert measured(layer, (1, 7, 7), 0) == (45, law.gradient, law.both)  # 48 outputs
    assert law.weight is None


def test_one_dimension() -> None:
    layer = nn.Conv1d(3, 4, 3, stride=3, bias=False).double()
    law = conv_ranks(3, 4, (21,), (3,), stride=(3,), dilation=(1,), padding=(0,))
    assert (law.weight, law.gradient, law.both) == measured(layer, (3, 21), 0)


@pytest.mark.parametrize(
    ("after", "kernel", "stride", "deficit"),
    [(6, 4, 2, 1470), (1, 3, 1, 2146)],  # measured by matrices in the published systems' terms
)
def test_first_layers_of_the_published_networks(after: int, kernel: int, stride: int, deficit: int) -> None:
    law = conv_ranks(3, after, (32, 32), (kernel, kernel), stride=(stride, stride), dilation=(1, 1), padding=(0, 0))
    assert law.deficit == deficit


def test_where_counting_is_not_known_to_do() -> None:
    kw = {"stride": (1, 1), "dilation": (1, 1), "padding": (0, 0)}
    assert conv_ranks(1, 2, (9, 5), (3, 3), **kw) is None  # two filters on one channel commute
    assert conv_ranks(3, 2, (5, 5), (4, 4), **kw) is None  # the kernel reaches as far as the outputs do
    assert conv_ranks(1, 1, (9, 9), (3, 3), **kw | {"padding": (2, 2)}) is None  # some windows see one pixel
    assert (
        conv_ranks(3, 7, (53,), (4,), stride=(3,), dilation=(2,), padding=(0,)) is None
    )  # 147 by count, 150 touched, 146 in truth
    with pytest.raises(ValueError, match="does not fit"):
        conv_ranks(3, 2, (2, 5), (4, 4), **kw)


@pytest.mark.slow
def test_the_second_layer_of_a_published_network_by_its_matrix() -> None:
    layer = nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False).double()  # R-GAP's narrow six-layer network
    assert conv_ranks(12, 20, (17, 17), (3, 3), stride=(2, 2), dilation=(1, 1), padding=(1, 1)) is None
    weight, gradient, both = measured(layer, (12, 17, 17), 0)
    print(f"rank W {weight}, K {gradient}, [W; K] {both} of 3468: {round(5 / 6 * (both - 3468))} of c(M)")
    assert (gradient, both) == (1968, 3188)
    assert round(5 / 6 * (both - 3468)) == -233
