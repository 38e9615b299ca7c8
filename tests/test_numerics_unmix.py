"""The solver on mixtures of its own, without a model: one hidden layer, cross entropy or squared error."""

from dataclasses import replace

import pytest
import torch
from mixtures import ACTIVATIONS, SWITCHES, Problem
from torch import Tensor
from torch.nn import functional as F

from unbatch.numerics.unmix import pattern as patterns
from unbatch.numerics.unmix.certificate import mixture_radius
from unbatch.numerics.unmix.descent import Descent, beginning, descend
from unbatch.numerics.unmix.equation import (
    Equation,
    accept,
    choose_labels,
    choose_targets,
    complement,
    explained,
    placed,
    polish,
)
from unbatch.numerics.unmix.joint import refine_jointly
from unbatch.numerics.unmix.mixture import Mixture, misfits
from unbatch.numerics.unmix.moment_start import weight_moments
from unbatch.numerics.unmix.part import KnownPart
from unbatch.numerics.unmix.pattern import NEAR_PATTERN, Corners, apart, finish, relax, switches, turned
from unbatch.numerics.unmix.sign_certain import isolate, piecewise_linear
from unbatch.numerics.unmix.solver import in_part, softened, unmix


def random(mixture: Mixture, rng: torch.Generator) -> Tensor:
    return torch.randn(60, mixture.n, generator=rng, dtype=torch.float64)


def test_the_truth_solves_the_equation_and_is_isolated_by_its_dual() -> None:
    p = Problem()
    outside, excess, drop = misfits(p.mixture, p.z, p.y)
    assert float(outside.max()) < 1e-12
    assert float(excess.abs().max()) < 1e-9
    assert float(drop.max()) < 1
    q = p.mixture.dual(p.mixture.F(p.z, p.y))
    torch.testing.assert_close(q @ p.z.T, torch.eye(6, dtype=torch.float64), atol=1e-8, rtol=0)
    assert torch.equal(choose_labels(p.mixture, p.z, torch.arange(4)), p.y)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "softplus"])
def test_the_geodesic_ends_at_the_last_digit_too(activation: str) -> None:
    p = Problem(activation, n=12, d=20)
    near, kw = p.near(0.01), {"steps": 30, "target": 0.0}
    bent = polish(p.mixture, near, p.y, **kw)[0]
    straight = polish(p.mixture, near, p.y, **kw, geodesic=False)[0]
    assert float((bent - p.z).norm()) < 2 * float((straight - p.z).norm())


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_the_derivative_is_that_of_the_residual(real: bool, own: bool) -> None:
    p = Problem(real=real)
    rows = torch.linalg.qr(torch.randn(6, 6, 3, generator=p.rng, dtype=torch.float64)).Q.mT
    equation = Equation(p.mixture, p.near(0.1), p.y, rows if own else None)
    x, which = equation.start(), torch.arange(6)
    r, Jt = equation.linearise(x, which)
    gram, downhill = equation.normal(x, which)
    torch.testing.assert_close(gram, Jt @ Jt.mT)
    torch.testing.assert_close(downhill, (Jt @ r[:, :, None])[..., 0])
    u = torch.randn(r.shape, generator=p.rng, dtype=torch.float64)
    torch.testing.assert_close(equation.pull(x, which, u), (Jt @ u[:, :, None])[..., 0])
    for b in range(equation.unknowns):
        step = 1e-6 * torch.eye(equation.unknowns, dtype=torch.float64)[b]
        slope = (equation.residual(x + step, which) - equation.residual(x - step, which)) / 2e-6
        torch.testing.assert_close(Jt[:, b], slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "softplus"])
def test_polish_ends_at_the_truth(activation: str) -> None:
    p = Problem(activation)
    z, _, costs = polish(p.mixture, p.near(0.05), p.y, steps=40)
    assert float(costs.max()) < 1e-20
    torch.testing.assert_close(z, p.z, atol=1e-8, rtol=0)


def test_real_targets_are_solved_for() -> None:
    p = Problem("tanh", real=True, k=1)
    torch.testing.assert_close(choose_targets(p.mixture, p.z), p.y, atol=1e-7, rtol=1e-7)
    start = p.near(0.02)
    z, y, _ = polish(p.mixture, start, choose_targets(p.mixture, start), steps=60)
    torch.testing.assert_close(z, p.z, atol=1e-7, rtol=0)
    torch.testing.assert_close(y, p.y, atol=1e-6, rtol=1e-6)


def test_subtraction_leaves_a_smaller_mixture_of_the_others() -> None:
    p = Problem()
    rest = p.mixture.without(p.mixture.F(p.z[:2], p.y[:2]), p.z[:2])
    assert rest.n == 4
    z = p.z[2:] @ rest.basis.T
    torch.testing.assert_close(z @ rest.basis, p.z[2:])
    assert float(misfits(rest, z, p.y[2:])[2].max()) < 30


def test_phantoms_are_rejected() -> None:
    """F near 0 at a saturated head, an example of another batch, a wrong label, a mixture of two, and one twice."""
    p = Problem("gelu", seed=1)
    mixture, z, y = p.mixture, p.z, p.y
    assert sorted(accept(mixture, z, y).tolist()) == list(range(6))
    out = mixture.deltas  # far along the direction of an example the head says one class and F vanishes
    far = mixture.scaled(z + 1e4 * complement(mixture.ones[None], 6)[:1])
    sure = torch.stack([out(mixture.before(far), torch.full((6,), c)).norm(dim=1) for c in range(4)]).min(0)
    tiny = sure.values / mixture.F(z, y).norm(dim=1)
    assert float(tiny.min()) < 1e-6  # the phantom is there: q = 0 solves U S q = F
    assert not len(accept(mixture, far, sure.indices))
    other = Problem("gelu", seed=2).x @ p.P.T
    assert not len(accept(mixture, mixture.scaled(other), y))
    assert not len(accept(mixture, z, (y + 1) % 4))
    mean = (z[:3] + z[3:]) / 2
    assert not len(accept(mixture, mean, y[:3]))
    assert not len(accept(mixture, z + 1e-3 * complement(mixture.ones[None], 6)[:1], y))
    twice = torch.cat([z, z])
    assert len(accept(mixture, twice, torch.cat([y, y]))) == 6


def test_phantoms_do_not_come_out_of_the_search() -> None:
    p = Problem("gelu", seed=3)
    far = p.mixture.scaled(p.z + 1e4 * complement(p.mixture.ones[None], 6)[:1])
    phantoms = lambda left, rng: far @ left.basis.T  # noqa: E731
    found = unmix(p.mixture, [("phantoms", phantoms), ("random", random)], p.rng)
    gap = torch.cdist(found.z, p.z, compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(gap.argmin(1).tolist()) == list(range(6))
    assert float(gap.min(1).values.max()) < 1e-6
    assert "phantoms" in {entry["start"] for entry in found.log}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_whole_batch_from_random_starts(activation: str) -> None:
    p = Problem(activation, n=4, m=100)
    found = unmix(p.mixture, [("random", random)], torch.Generator().manual_seed(0))
    gap = torch.cdist(found.z, p.z, compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(gap.argmin(1).tolist()) == [0, 1, 2, 3]
    assert float(gap.min(1).values.max()) < 1e-7
    assert torch.equal(found.labels, p.y[gap.argmin(1)])
    assert sum(entry["found"] for entry in found.log if entry["start"] == "random") >= 4
    reach = mixture_radius(p.mixture, found.z, found.labels, torch.Generator().manual_seed(0))
    assert bool((gap.min(1).values <= reach).all())


def test_a_batch_without_a_bias() -> None:
    p = Problem("gelu", n=4, m=100, bias=False)
    z, _, _ = polish(p.mixture, p.near(0.02), p.y, steps=40)
    torch.testing.assert_close(z, p.z, atol=1e-8, rtol=0)


def test_kinks_are_seen() -> None:
    rng = torch.Generator().manual_seed(0)
    assert {name: piecewise_linear(Problem(name).mixture, rng) for name in ACTIVATIONS} == {
        name: name in ("relu", "leaky") for name in ACTIVATIONS
    }


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_least_absolute_deviations_make_rough_guesses_exact(activation: str) -> None:
    p = Problem(activation, m=200)
    rough = p.near(0.15)
    q, share = isolate(p.mixture, rough)
    true = p.mixture.dual(p.mixture.F(p.z, p.y))
    parallel = F.cosine_similarity(q * p.mixture.S, true * p.mixture.S)
    torch.testing.assert_close(parallel, torch.ones(6, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(share.min()) > 0.5
    assert float(isolate(p.mixture, p.z)[1].min()) > 0.99
    unrelated = p.mixture.scaled(torch.randn(6, 6, generator=p.rng, dtype=torch.float64))
    assert float(isolate(p.mixture, unrelated)[1].median()) < float(share.median())


@pytest.mark.parametrize("activation", list(SWITCHES))
def test_the_two_values_of_a_row_are_found(activation: str) -> None:
    p = Problem(activation, m=200)
    two = switches(p.mixture, p.rng)
    F_, derivative = p.mixture.F(p.z, p.y), p.mixture.F(p.z, (p.y + 1) % 4)
    on = (F_ - derivative).abs() > 0.5 * (
        p.mixture.deltas(torch.full((6, 200), 1e-3).double(), p.y)
        - p.mixture.deltas(torch.full((6, 200), 1e-3).double(), (p.y + 1) % 4)
    ).abs()
    a = two.residual(on, F_)
    torch.testing.assert_close((two.columns(on, torch.arange(6)) @ a[:, :, None])[..., 0], F_)
    least, most = two.ends(a)
    torch.testing.assert_close(torch.where(on, most, least), F_)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "softplus"])
def test_smooth_activations_are_no_switches(activation: str) -> None:
    p = Problem(activation)
    assert switches(p.mixture, p.rng) is None


def test_real_targets_and_deeper_networks_are_left_to_the_signs() -> None:
    p = Problem("relu", real=True)
    assert switches(p.mixture, p.rng) is None
    V = torch.randn(80, 80, generator=p.rng, dtype=torch.float64) / 80**0.5

    def deeper(before: Tensor, y: Tensor) -> Tensor:
        live = before.detach().requires_grad_()
        loss = F.cross_entropy(torch.relu(torch.relu(live) @ V)[:, :4], y, reduction="sum")
        return torch.autograd.grad(loss, live)[0]

    assert switches(replace(Problem("relu").mixture, deltas=deeper), p.rng) is None


@pytest.mark.parametrize("activation", list(SWITCHES))
def test_the_program_ends_at_patterns_from_guesses_with_many_wrong_signs(activation: str) -> None:
    p = Problem(activation, n=20, d=40, m=400, seed=1)
    rough = p.near(0.6 if activation != "hardtanh" else 0.3)
    on = lambda z: (p.mixture.before(z) > 0) if activation != "hardtanh" else p.mixture.before(z).abs() < 1  # noqa: E731
    truth = on(p.z)
    before = (on(rough) != truth).double().mean(1)
    assert float(before.median()) > 0.1
    two = switches(p.mixture, p.rng)
    corners = relax(p.mixture, p.mixture, two, rough, p.y)
    after = (corners.pattern != truth).double().mean(1)
    assert float(after.median()) < 0.2 * float(before.median())
    near = apart(corners, truth[:3], 20)
    assert len(near.x) >= 12
    assert float((near.pattern[:, None] != truth[:3]).double().mean(2).min()) >= NEAR_PATTERN
    q, last, share = finish(p.mixture, two, near.pattern, near.delta)
    true = p.mixture.dual(p.mixture.F(p.z, p.y))
    cosine = F.normalize(q * p.mixture.S, dim=1) @ F.normalize(true * p.mixture.S, dim=1).T
    best, which = cosine.max(1)  # a guess may end at another example than the one it was nearest to
    exact = best > 1 - 1e-12
    assert float(exact.double().mean()) > 0.8
    assert torch.equal(last[exact], truth[which[exact]])
    assert torch.equal(share > 0.9, exact)


def test_programs_and_preactivations_by_turns_reach_nine_twentieths_of_the_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = Problem("relu", n=90, d=180, m=200, seed=1)
    rough, truth, two = p.near(0.45), p.mixture.before(p.z) > 0, switches(p.mixture, p.rng)
    assert two is not None
    wrong = lambda c: float((c.pattern[:, None] != truth).double().mean(2).amin(1).mean())  # noqa: E731
    sure = lambda c: int((finish(p.mixture, two, c.pattern, c.delta)[2] > patterns.SURE_SHARE).sum())  # noqa: E731
    first = relax(p.mixture, p.mixture, two, rough, p.y)
    later = turned(p.mixture, p.mixture, two, first, patterns.SHORT_PROGRAMS)
    assert wrong(later) < 0.75 * wrong(first)
    again = sure(first)
    assert again > 0.9 * len(truth)
    monkeypatch.setattr(patterns, "PATTERN_RESTARTS", 0)
    assert again > sure(first) + 5


def test_turns_leave_the_examples_that_are_found() -> None:
    """Guesses half way between one that is found and one that is not: programs know the deltas' space alone."""
    p = Problem("relu", n=100, d=200, m=240, seed=1)
    truth, two = p.mixture.before(p.z) > 0, switches(p.mixture, p.rng)
    assert two is not None
    rest = p.mixture.isolated(torch.linalg.inv(p.z).T[:50])
    assert float((p.z[50:] - p.z[50:] @ rest.basis.T @ rest.basis).norm()) < 1e-8  # what is left is orthogonal to them

    def found(corners: Corners) -> tuple[int, int]:
        wrong, which = (corners.pattern[:, None] != truth).double().mean(2).min(1)
        return int((which < 50).sum()), len(set(which[(which >= 50) & (wrong < 0.04)].tolist()))

    first = relax(p.mixture, rest, two, (p.z[50:] + p.z[:50]) / 2, p.y[50:])
    later = turned(p.mixture, rest, two, first, patterns.SHORT_PROGRAMS)
    assert found(later)[0] < found(first)[0]
    assert found(later)[1] > found(first)[1] + 10


@pytest.mark.parametrize(
    ("activation", "low", "high"), [("relu", 0, torch.inf), ("leaky", 0, torch.inf), ("hardtanh", -1, 1)]
)
def test_the_edges_of_a_switch_are_found(activation: str, low: float, high: float) -> None:
    p = Problem(activation, n=5, m=60)
    two = switches(p.mixture, p.rng)
    assert two is not None
    torch.testing.assert_close(two.low, torch.full((60,), low).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(two.high, torch.full((60,), high).double(), atol=1e-12, rtol=0)
    at = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]]).double().expand(-1, 60)
    inside, slope = two.chance(at, torch.ones(4, 1).double())
    draws = at[..., None] + torch.randn(200_000, generator=p.rng).double()
    on = (draws > low) & (draws < high)
    torch.testing.assert_close(inside, on.double().mean(2), atol=5e-3, rtol=0)
    torch.testing.assert_close(slope, ((draws - at[..., None]) * on).mean(2), atol=5e-3, rtol=0)


def test_a_neuron_that_is_off_between_two_edges_is_no_switch() -> None:
    p = Problem("relu", n=5, m=60)
    V = torch.randn(4, 60, generator=p.rng, dtype=torch.float64)

    def deltas(before: Tensor, y: Tensor) -> Tensor:
        return (before.abs() > 1) * (F.one_hot(y, 4).double() @ V)

    assert switches(replace(p.mixture, deltas=deltas), p.rng) is None
    one = lambda before, y: (before > 1) * (F.one_hot(y, 4).double() @ V)  # noqa: E731
    assert switches(replace(p.mixture, deltas=one), p.rng) is not None


def test_the_truth_stays_and_what_ends_at_nothing_is_dropped() -> None:
    p = Problem("relu", n=20, d=40, m=400, seed=1)
    two = switches(p.mixture, p.rng)
    assert two is not None
    corners = relax(p.mixture, p.mixture, two, p.z, p.y)
    truth = p.mixture.before(p.z) > 0
    for ends in (corners, turned(p.mixture, p.mixture, two, corners, patterns.LONG_PROGRAMS)):
        assert float((ends.pattern != truth).double().mean(1).max()) < NEAR_PATTERN
        assert float(ends.off.max()) < 1e-2
    nothing = replace(corners[torch.arange(3)], off=torch.tensor([torch.inf, torch.nan, 0.5]))
    assert not len(apart(nothing, truth[:0], 9).x)


def test_twins_are_told_apart_where_it_is_asked_for() -> None:
    one = torch.zeros(2, 100, dtype=torch.bool)
    one[1, :4] = True
    twins = Corners(one, one.double(), torch.tensor([0.02, 0.01]), torch.arange(2)[:, None])
    which = lambda known, **near: apart(twins, known, 9, **near).x[:, 0].tolist()  # noqa: E731
    assert which(one[:0]) == [1]
    assert which(one[:0], near=0.01) == [1, 0]
    assert which(one[:1]) == []
    assert which(one[:1], near=0.01) == [1]


def test_a_start_without_guesses_is_passed_over() -> None:
    p = Problem("relu", n=4, m=100)
    empty = lambda left, rng: torch.zeros(0, left.n, dtype=torch.float64)  # noqa: E731
    found = unmix(p.mixture, [("empty", empty), ("random", random)], torch.Generator().manual_seed(0))
    assert len(found.z) == 4
    assert [entry["found"] for entry in found.log if entry["start"] == "empty"] == [0]


def test_two_pictures_that_are_nearly_one_are_both_found() -> None:
    p = Problem("relu", n=8, d=30, m=300, twins=0.05)
    both = p.mixture.before(p.z[:2]) > 0
    assert 0 < float((both[0] != both[1]).double().mean()) < NEAR_PATTERN
    found = unmix(p.mixture, [("random", random)], torch.Generator().manual_seed(0), attempts=3)
    gap = torch.cdist(found.z, p.z, compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(gap.argmin(1).tolist()) == list(range(8))
    assert float(gap.min(1).values.max()) < 1e-6


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_a_larger_batch_behind_switches_comes_from_random_guesses(activation: str) -> None:
    p = Problem(activation, n=30, d=60, m=300)
    found = unmix(p.mixture, [("random", random)], torch.Generator().manual_seed(0), attempts=1)
    gap = torch.cdist(found.z, p.z, compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(gap.argmin(1).tolist()) == list(range(30))
    assert float(gap.min(1).values.max()) < 1e-7
    assert torch.equal(found.labels, p.y[gap.argmin(1)])
    assert "settle" not in {entry["start"] for entry in found.log}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_joint_refinement_averages_noise(activation: str) -> None:
    p = Problem(activation, m=300)
    noise = 1e-6 * torch.randn(p.A.shape, generator=p.rng, dtype=torch.float64) * p.A.abs().mean()
    B = (p.A + noise) @ p.P.T
    U, S, Vh = torch.linalg.svd(B, full_matrices=False)
    turned = replace(p.mixture, U=U, S=S, W=Vh @ p.mixture.W, ones=Vh @ p.mixture.ones)
    start = turned.scaled(p.z @ Vh.T + 1e-5)
    z, _, left = refine_jointly(turned, start, p.y)
    assert float((z @ Vh - p.z).norm()) < 0.2 * float((start @ Vh - p.z).norm())
    assert left < 2 * float(noise.norm() / p.A.norm())


def test_some_examples_are_refined_while_others_are_unknown() -> None:
    p = Problem("gelu")
    start = p.near(1e-3)[:4]
    z, _, left = refine_jointly(p.mixture, start, p.y[:4], others=2, steps=12)
    assert left < 1e-10
    torch.testing.assert_close(z, p.z[:4], atol=1e-8, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "leaky", "hardtanh"])
def test_examples_found_are_determined_while_two_fewer_are_missing_than_there_are_classes(activation: str) -> None:
    p = Problem(activation, n=8, m=120, k=5)
    q = p.mixture.dual(p.mixture.F(p.z, p.y))
    near = p.near(1e-3)
    for missing in (1, 3):
        f = 8 - missing
        found = in_part(p.mixture, q[:f], near[:f], torch.arange(5), [])
        torch.testing.assert_close(found.z, p.z[:f], rtol=0, atol=1e-8)
        assert torch.equal(found.labels, p.y[:f])
        reach = mixture_radius(p.mixture, found.z, found.labels, p.rng, jointly=True)
        assert bool(((found.z - p.z[:f]).norm(dim=1) <= reach).all())
        assert bool((reach < 1e-6).all())
    assert not len(in_part(p.mixture, q[:4], near[:4], torch.arange(5), []).z)
    assert not KnownPart(p.mixture, p.z[:4], p.y[:4]).determined.any()
    assert mixture_radius(p.mixture, p.z[:4], p.y[:4], p.rng, jointly=True).isinf().all()
    assert mixture_radius(p.mixture.unweighed(), p.z[:7], p.y[:7], p.rng, jointly=True).isinf().all()


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_a_whole_batch_of_another_loss_disagrees_with_its_outputs(activation: str) -> None:
    """Its error is spread over k directions of a delta, and is lost among the noise of all of them."""
    p = Problem(activation, n=8, m=120, k=5)
    deltas = p.mixture.deltas

    def smoothed(before: Tensor, y: Tensor) -> Tensor:
        return (1 - 3e-6) * deltas(before, y) + 3e-6 * sum(deltas(before, 0 * y + i) for i in range(5)) / 5

    for other in (False, True):
        mixture = replace(p.mixture, noise=1e-6 * float(p.mixture.S[-1]), deltas=smoothed if other else deltas)
        z, y, _ = refine_jointly(mixture, p.z, p.y)
        assert explained(mixture, z, y)
        reach = mixture_radius(mixture, z, y, p.rng, jointly=True)
        assert bool((reach.isfinite() & ((z - p.z).norm(dim=1) > reach)).any()) is False
        assert bool(reach.isfinite().all()) is not other, (reach, (z - p.z).norm(dim=1))


def test_what_is_subtracted_wrongly_is_an_error_of_the_rest_in_every_place_that_counts_errors() -> None:
    p = Problem("relu", n=6, m=60, k=3)
    mixture = replace(p.mixture, outside=1e-15)
    rest = mixture.without(mixture.sent(p.z[:4], p.y[:4]), p.z[:4] * (1 + 1e-6))
    assert rest.noise == rest.outside > 1e-8 * float(p.mixture.S[-1])


def test_a_guess_that_has_no_size_leaves_the_others() -> None:
    p = Problem("relu", n=8, m=120, k=5)
    q, near = p.mixture.dual(p.mixture.F(p.z, p.y))[:7], p.near(1e-3)[:7]
    q[3], near[5] = torch.inf, torch.nan
    found = in_part(p.mixture, q, near, torch.arange(5), [])
    torch.testing.assert_close(found.z, p.z[[0, 1, 2, 4, 6]], rtol=0, atol=1e-8)


def test_without_a_bias_one_fewer_may_be_missing() -> None:
    p = Problem("relu", n=8, m=120, k=5, bias=False)
    assert [bool(KnownPart(p.mixture, p.z[:f], p.y[:f]).determined.all()) for f in (4, 5, 6)] == [False, False, True]


def test_smooth_networks_move_along_more_than_their_outputs() -> None:
    p = Problem("gelu", n=6)
    assert not KnownPart(p.mixture, p.z[:5], p.y[:5]).determined.any()


def test_a_few_labels_that_are_known_do() -> None:
    p = Problem("gelu", n=4, m=100)
    found = unmix(p.mixture, [("random", random)], torch.Generator().manual_seed(0), classes=p.y.unique())
    assert len(found.z) == 4
    stopped = unmix(p.mixture, [("random", random)], torch.Generator().manual_seed(0), tick=lambda share: False)
    assert len(stopped.z) == 0
    assert stopped.labels.shape == (0,)


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_a_descent_from_the_origin_finds_all_examples_at_once(activation: str) -> None:
    p = Problem(activation, n=10, d=20, m=200)
    rng = torch.Generator().manual_seed(0)
    y = p.y.sort().values
    *_, (_, z) = descend(p.mixture, beginning(p.mixture, rng), y, rng)
    gap = torch.cdist(z, p.z, compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(gap.argmin(1).tolist()) == list(range(10))
    assert float(gap.min(1).values.max()) < 1e-4
    assert torch.equal(y, p.y[gap.argmin(1)])


def test_a_descent_is_a_start_that_bears_wrong_labels() -> None:
    p = Problem("gelu", n=10, d=20, m=200)

    def labels(z: Tensor, y: Tensor) -> Tensor:
        left = p.y.sort().values[: 10 - len(z)].clone()
        left[0] = (left[0] + 1) % 4
        return left

    found = unmix(p.mixture, [("descent", Descent(labels))], torch.Generator().manual_seed(0))
    assert len(found.z) >= 8
    gap = torch.cdist(found.z, p.z, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(gap.min(1).values.max()) < 1e-7
    assert torch.equal(found.labels, p.y[gap.argmin(1)])


def test_a_descent_through_smooth_neighbours_reaches_kinked_networks() -> None:
    p = Problem("relu", n=10, d=20, m=300)
    rng = torch.Generator().manual_seed(0)
    y, smooth = p.y.sort().values, softened(p.mixture, 1.0)
    *_, (_, z) = descend(p.mixture, beginning(p.mixture, rng), y, rng, smooth)
    gap = torch.cdist(z, p.z) / p.z.norm(dim=1)
    assert float(gap.min(0).values.median()) < 0.2
    q = isolate(p.mixture, z)[0]
    true = p.mixture.dual(p.mixture.F(p.z, p.y))
    cosine = torch.nn.functional.normalize(q * p.mixture.S, dim=1) @ torch.nn.functional.normalize(true * p.mixture.S).T
    assert int((cosine.amax(0) > 1 - 1e-9).sum()) >= 8


def test_what_dual_vectors_isolate_can_be_projected_out() -> None:
    p = Problem("relu", n=6, d=20, m=100)
    found, others = p.z[:2], p.z[2:]
    q = p.mixture.dual(p.mixture.F(found, p.y[:2]))
    rest = p.mixture.isolated(q)
    assert rest.n == 4
    z = others @ rest.basis.T
    torch.testing.assert_close(z @ rest.basis, others, atol=1e-9, rtol=0)
    torch.testing.assert_close(rest.F(z, p.y[2:]).T @ z, rest.U * rest.S, atol=1e-12, rtol=0)
    assert p.mixture.isolated(q[:0]) is p.mixture


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_moments_of_the_weights_point_at_the_examples(activation: str) -> None:
    p = Problem(activation, n=4, d=20, m=2000)
    guesses = torch.nn.functional.normalize(weight_moments(p.mixture, p.rng), dim=1)
    cosine = (guesses @ torch.nn.functional.normalize(p.z, dim=1).T).abs().amax(0)
    chance = torch.nn.functional.normalize(torch.randn(8, 4, generator=p.rng, dtype=torch.float64), dim=1)
    chance = (chance @ torch.nn.functional.normalize(p.z, dim=1).T).abs().amax(0)
    assert float(cosine.mean()) > 0.9
    assert float((1 - cosine).mean()) < 0.5 * float((1 - chance).mean())
    found = unmix(p.mixture, [("moments", weight_moments)], p.rng)
    assert len(found.z) == 4
    assert {entry["start"] for entry in found.log} <= {"moments", "settle"}


def test_rough_directions_are_placed_by_the_equation_where_ones_is_a_poor_ruler() -> None:
    p = Problem("relu", n=6, d=40, m=300)
    shift = 0.9 * torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    rough = -3 * (p.z + shift * p.mixture.ones / p.mixture.ones.square().sum())  # z . ones from .1 to 1.9, wrong sign
    found = placed(p.mixture, rough, torch.arange(4))
    torch.testing.assert_close(found @ p.mixture.ones, torch.ones(6, dtype=torch.float64))
    far = (p.mixture.scaled(rough) - p.z).norm(dim=1)
    assert float((found - p.z).norm(dim=1)[far > 0.5 * p.z.norm(dim=1)].max()) < 0.5 * float(far.max())


def test_moments_are_not_tried_for_many() -> None:
    p = Problem("gelu", n=26, d=40, m=100)
    assert weight_moments(p.mixture, p.rng).shape == (0, 26)


def test_what_is_looser_than_allowed_is_not_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem("gelu", n=4, m=100)
    starts = [("truth", lambda left, rng: p.z @ left.basis.T)]
    reach = mixture_radius(p.mixture, p.z, p.y, torch.Generator().manual_seed(0)) / p.z.norm(dim=1)
    assert len(unmix(p.mixture, starts, p.rng, attempts=1).z) == 4
    monkeypatch.setattr("unbatch.numerics.unmix.solver.LOOSE_RADIUS", float(reach.min()) / 100)
    assert not len(unmix(p.mixture, starts, p.rng, attempts=1).z)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_two_classes_whose_deltas_are_parallel_are_told_apart(activation: str) -> None:
    p = Problem(activation, k=2, n=8, m=200)
    assert 0 < int(p.y.sum()) < 8
    assert torch.equal(choose_labels(p.mixture, p.near(0.05), torch.arange(2)), p.y)


def test_guesses_beyond_those_polished_are_kept_where_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbatch.numerics.unmix.equation.NOISE_SLACK", 0.0)  # so nothing is
    p = Problem()
    many = lambda mixture, rng: torch.randn(100, mixture.n, generator=rng, dtype=torch.float64)  # noqa: E731
    found = unmix(p.mixture, [("random", many)], torch.Generator().manual_seed(0), attempts=1)
    assert len(found.z) == 0
    assert found.guesses.shape == (100, 6)
    assert found.log[0]["guesses"] == 64


def test_nothing_to_isolate() -> None:
    p = Problem("relu")
    q, share = isolate(p.mixture, p.z[:0])
    assert q.shape == (0, 6)
    assert share.shape == (0,)
