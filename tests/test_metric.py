import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbatch import Images, Metric, Reconstruction, Table, Tokens
from unbatch.domain import domain_of
from unbatch.metric import match
from unbatch.truth import Truth

TABLE = Table(shape=(6,), low=-3, high=3)


def truth(n: int, seed: int = 0) -> Truth:
    rng = torch.Generator().manual_seed(seed)
    return Truth(inputs=torch.randn(n, 6, generator=rng), labels=torch.randint(4, (n,), generator=rng))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), n=st.integers(1, 8), k=st.integers(0, 12), ties=st.sampled_from(["", "sign", "scale"])
)
def test_matching_undoes_order_sign_and_scale(seed: int, n: int, k: int, ties: str) -> None:
    true = truth(n, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    order = torch.randperm(max(n, k), generator=rng)[:k]
    pool = torch.cat([true.inputs, 5 + torch.randn(max(k - n, 0), 6, generator=rng)])
    factor = {"": 1.0, "sign": -1.0, "scale": 0.25}[ties]
    found = Reconstruction(inputs=factor * pool[order], up_to=frozenset({"permutation", ties} - {""}))
    matching = match(found, true, TABLE)
    assert len(set(matching.true.tolist())) == len(matching.true) == min(n, k)
    assert len(set(matching.found.tolist())) == len(matching.found)
    returned = set(order.tolist()) & set(range(n))
    for i, j, x in zip(matching.found, matching.true, matching.inputs, strict=True):
        if int(j) in returned:
            assert int(order[i]) == int(j)
            torch.testing.assert_close(x, true.inputs[j].double(), rtol=1e-5, atol=1e-6)


def test_sign_and_scale_are_resolved_only_where_declared() -> None:
    true = truth(2)
    plain = match(Reconstruction(inputs=-true.inputs), true, TABLE)
    assert torch.equal(plain.factor, torch.ones(2).double())
    assert (plain.inputs - true.inputs[plain.true]).abs().max() > 0.1
    scaled = Reconstruction(inputs=-2 * true.inputs, up_to=frozenset({"scale"}))
    assert (match(scaled, true, TABLE).factor >= 0).all()  # scale alone is no licence to flip
    both = Reconstruction(inputs=-2 * true.inputs, up_to=frozenset({"scale", "sign"}))
    torch.testing.assert_close(match(both, true, TABLE).factor, torch.full((2,), -0.5).double())


def test_one_recovered_example_counts_once() -> None:
    true = truth(3)
    found = Reconstruction(inputs=true.inputs[:1].repeat(3, 1))
    scores = Metric.parse("l2-error").score(*pairs(found, true))
    assert int((scores < 1e-6).sum()) == 1


def pairs(found: Reconstruction, true: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    matching = match(found, true, TABLE)
    return matching.inputs, true.inputs.double()[matching.true]


def test_labels_alone_are_matched_as_a_multiset() -> None:
    true = Truth(inputs=torch.zeros(4, 6), labels=torch.tensor([2, 0, 2, 1]))
    found = Reconstruction(inputs=None, labels=torch.tensor([1, 2, 2, 3]))
    matching = match(found, true, TABLE)
    hits = Metric.parse("label-accuracy").score(found.labels[matching.found], true.labels[matching.true])
    assert sorted(hits.tolist()) == [0, 1, 1, 1]


def test_psnr_has_its_peak_at_the_domain_s_range() -> None:
    a = torch.zeros(1, 3, 12, 12)
    for low, high, gap in ((0.0, 1.0, 0.1), (-1.0, 1.0, 0.2), (0.0, 255.0, 25.5)):
        metric = Metric.parse("psnr").on(Images(shape=(3, 12, 12), low=low, high=high))
        assert metric.score(a + gap, a).item() == pytest.approx(20.0)
    assert Metric.parse("psnr").on(Tokens(shape=(3,), high=9)) is None
    assert Metric.parse("psnr").score(a, a).item() == 300


def test_l2_error_is_relative() -> None:
    true = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert Metric.parse("l2-error").score(true + torch.tensor([[0.0, 0.5]]), true).tolist() == pytest.approx([0.1, 0.5])


def test_ssim_knows_its_window() -> None:
    assert Metric.parse("ssim").on(Images(shape=(1, 8, 8))) is None
    assert Metric.parse("ssim").on(Table(shape=(9,))) is None
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=rng)
    scores = Metric.parse("ssim").on(Images(shape=(3, 32, 32))).score(x + 0.05 * torch.randn(x.shape, generator=rng), x)
    assert scores.shape == (2,)
    assert (scores < 0.999).all()


def test_domains_are_guessed_from_shapes_and_ranges(rng: torch.Generator) -> None:
    pictures = domain_of(torch.rand(2, 3, 8, 8, generator=rng))
    assert (pictures.name, pictures.low, pictures.high) == ("images", 0, 1)
    wide = domain_of(torch.rand(2, 1, 8, 8, generator=rng) * 255)
    assert wide.high > 200
    assert domain_of(torch.rand(2, 5, generator=rng)).name == "table"
    assert domain_of(torch.randint(9, (2, 5), generator=rng)).name == "tokens"


def test_prior_draws_look_like_their_domain(rng: torch.Generator) -> None:
    draws = Images(shape=(3, 32, 32), low=-1, high=1).prior(64, rng)
    assert draws.shape == (64, 3, 32, 32)
    assert draws.min() >= -1
    assert draws.max() <= 1
    step = (draws[..., 1:] - draws[..., :-1]).abs().mean()
    assert step < 0.3 * draws.std()  # smooth, as pictures are
    tokens = Tokens(shape=(4,), high=5, vocabulary=list("abcdef"))
    words = tokens.prior(50, rng)
    assert set(words.unique().tolist()) == set(range(6))
    assert tokens.distance(words[:1], words[:1]).item() == 0
    assert tokens.distance(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 0, 0]])).item() == 0.5
    assert tokens.render(torch.tensor([0, 1, 5])) == "a b f"


def test_rendering(rng: torch.Generator) -> None:
    images = Images(shape=(3, 4, 4))
    assert images.render(torch.rand(3, 4, 4, generator=rng)).startswith("data:image/png;base64,")
    assert images.difference(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)) != images.difference(
        torch.ones(3, 4, 4), torch.zeros(3, 4, 4)
    )
    assert Table(shape=(2,), columns=("age", "pay")).render(torch.tensor([1.0, 2.5])) == "age = 1, pay = 2.5"


def test_relative_leakage_is_similarity_above_the_prior_s(rng: torch.Generator) -> None:
    domain = Images(shape=(1, 24, 24))
    true = domain.prior(3, rng)
    found = (true + 0.2 * torch.randn(true.shape, generator=rng)).clamp(0, 1)

    def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
        return Metric.parse("ssim").score(a[None], b[None]).item()

    for draws in (1, 16):
        drawn = domain.prior(draws, torch.Generator().manual_seed(0))
        alone = [max(0.01, *(ssim(p, x) for p in drawn)) for x in true]
        expected = [(ssim(y, x) - p) / p for y, x, p in zip(found, true, alone, strict=True)]
        made = Metric.parse(f"relative-leakage:draws={draws}").on(domain)
        assert made.score(found, true).tolist() == pytest.approx(expected)
        assert made.score(drawn[:1].expand_as(true), true).max() <= 1e-9  # the prior itself leaks nothing
        assert (made.score(true, true) > made.score(found, true)).all()


def test_relative_leakage_of_small_pictures_is_by_cosine(rng: torch.Generator) -> None:
    domain = Images(shape=(1, 8, 8), low=-1, high=1)
    made = Metric.parse("relative-leakage").on(domain)
    true, found = domain.prior(2, rng), domain.prior(2, rng)
    drawn = domain.prior(16, torch.Generator().manual_seed(0))
    for score, x, y in zip(made.score(found, true), true.double() + 1, found.double() + 1, strict=True):
        cosines = [float((x * p).sum() / (x.norm() * p.norm())) for p in [y, *(drawn.double() + 1)]]
        assert float(score) == pytest.approx((cosines[0] - max(cosines[1:])) / max(cosines[1:]))
    assert Metric.parse("relative-leakage").on(Table(shape=(9,))) is None


def test_categories_are_scored_after_rounding() -> None:
    rows = Table(shape=(5,), categories=((0, 1, 2), (3, 4)))
    metric = Metric.parse("category-accuracy").on(rows)
    true = torch.tensor([[0.0, 1, 0, 1, 0]] * 3)
    found = torch.tensor([[0.1, 0.2, 0.15, 3, 2], [0.1, 0.2, 0.15, 0, 1], [1, 0, 0, -2, -1]])
    assert metric.score(found, true).tolist() == [1, 0.5, 0]
    assert Metric.parse("category-accuracy").on(TABLE) is None
    assert Metric.parse("category-accuracy").on(domain_of(torch.zeros(1, 3, 8, 8))) is None


def test_labels_of_no_matched_pair_have_no_score() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert Metric.parse("label-accuracy").score(none, none).shape == (0,)
    assert Metric.parse("label-accuracy").score(none.reshape(0, 3), none).shape == (0,)
