"""AdamW as torch takes it, and what its first step tells of the gradient."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Protocol
from unbatch.inversion.view import View
from unbatch.protocol import gradient_of_adam, local_update


def client(dtype: torch.dtype, spread: float = 1.0, width: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    model = unbatch.models.small.build("mlp", (6,), 3, width=width, activation="tanh", rng=rng).to(dtype)
    return model, spread * torch.rand(4, 6, generator=rng, dtype=dtype), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_that_of_torch(decay: float) -> None:
    model, x, y = client(torch.float64)
    protocol = Protocol(local_steps=3, optimiser="adamw", learning_rate=0.01, weight_decay=decay)
    own = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(own.parameters(), lr=0.01, weight_decay=decay)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(own(x), y).backward()
        optimiser.step()
    update = local_update(model, F.cross_entropy, x, y, protocol)
    for (name, after), before in zip(own.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(update[name], after - before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_the_first_step_tells_the_gradient_as_far_as_it_says(optimiser: str, dtype: torch.dtype) -> None:
    shares = []
    for scale in (1.0, 1e-4):  # of the loss: gradients near eps and far above
        model, x, y = client(dtype)

        def loss(outputs: Tensor, labels: Tensor, scale: float = scale) -> Tensor:
            return scale * F.cross_entropy(outputs, labels)

        protocol = Protocol(local_steps=1, optimiser=optimiser, learning_rate=1e-3, weight_decay=0.01)
        true = local_update(model, loss, x, y, Protocol(mode="train"))
        before = {name: p.detach() for name, p in model.named_parameters()}
        step = local_update(model, loss, x, y, protocol)
        found, errors = gradient_of_adam(step, before, protocol)
        for name, g in true.items():
            total = g.double() + protocol.decays[0] * before[name].double()
            assert bool(((found[name] - g.double()).abs() <= errors[name]).all())
            open_ = errors[name].isinf()
            least = found[name] + protocol.decays[0] * before[name].double()
            assert bool((least[open_].sign() == total[open_].sign()).all())
            assert bool((least[open_].abs() <= total[open_].abs() * (1 + 1e-6)).all())
            shares.append(float(open_.double().mean()))
    assert max(shares) == 0 if dtype == torch.float64 else max(shares) > 0.9


def test_other_steps_are_refused() -> None:
    for protocol in (Protocol(), Protocol(local_steps=1), Protocol(local_steps=2, optimiser="adamw")):
        with pytest.raises(unbatch.UnbatchError, match="no first step of Adam"):
            gradient_of_adam({}, {}, protocol)


@pytest.mark.parametrize("rate", [1e-3, 0.1])
@pytest.mark.parametrize(("optimiser", "decay"), [("adamw", 0.1), ("adam", 0.01)])
def test_a_first_step_that_was_kept_in_float64_is_read_as_its_gradient(
    optimiser: str, decay: float, rate: float
) -> None:
    model, x, y = client(torch.float64, width=40)
    protocol = Protocol(local_steps=1, optimiser=optimiser, learning_rate=rate, weight_decay=decay)
    seen, truth = unbatch.observe(model, F.cross_entropy, x, y, protocol=protocol)
    own, _ = unbatch.observe(model, F.cross_entropy, x, y)
    told = seen.as_gradient()
    assert set(told.knowledge) == {"input_shape", "batch_size", "mode"}
    for name, tensor in own.update.items():
        off = (told.update[name] - tensor).square().mean().sqrt()
        assert off <= told.rounding(name) <= 0.01 * tensor.square().mean().sqrt()
    found = unbatch.attacks.Unmix()(seen)
    assert len(found) == len(x)
    gaps = torch.cdist(found.inputs, x, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert bool((gaps <= found.bound * found.inputs.norm(dim=1)).all())
    assert float(found.bound.max()) < 1e-4
    audit = unbatch.audit(seen, truth=truth, attacks=["unmix"], analyses=())
    assert {index for _, index in audit.recovered()} == {0, 1, 2, 3}


def test_coarser_or_altered_or_longer_steps_of_adam_are_left_as_they_are() -> None:
    one = Protocol(local_steps=1, optimiser="adamw", learning_rate=1e-3)
    for dtype, protocol, defences in (
        (torch.float32, one, ()),
        (torch.float64, Protocol(local_steps=2, optimiser="adamw", learning_rate=1e-3), ()),
        (torch.float64, one, "noise:sigma=1e-9,relative=false"),
        (torch.float64, one, "secure-aggregation:clients=2"),
    ):
        model, x, y = client(dtype, width=40)
        seen, _ = unbatch.observe(model, F.cross_entropy, x, y, protocol=protocol, defences=defences)
        assert seen.as_gradient() is seen


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_attacks_read_that_gradient_too(optimiser: str) -> None:
    """One example by its ratio and by matching, and labels by counting; a bound holds."""
    model, x, y = client(torch.float64, width=40)
    protocol = Protocol(local_steps=1, optimiser=optimiser, learning_rate=1e-3, weight_decay=0.01)
    one, _ = unbatch.observe(model, F.cross_entropy, x[:1], y[:1], protocol=protocol)
    found = unbatch.Attack.parse("bias-ratio")(one)
    assert found.inputs is not None
    assert found.bound is not None
    assert float((found.inputs - x[:1]).norm() / found.inputs.norm()) <= float(found.bound[0]) < 1e-4
    found = unbatch.Attack.parse("gradient-matching")(one)
    assert found.inputs is not None
    assert torch.allclose(found.inputs, x[:1], atol=1e-4)
    whole, _ = unbatch.observe(model, F.cross_entropy, x, y, protocol=protocol)
    found = unbatch.Attack.parse("label-count")(whole)
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == sorted(y.tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_audit_says_of_how_many_entries_rounding_leaves_the_sign_alone(dtype: torch.dtype) -> None:
    model, x, y = client(dtype)
    protocol = Protocol(local_steps=1, optimiser="adamw", learning_rate=1e-3, weight_decay=0.01)
    setting = unbatch.Setting(model=model, loss=F.cross_entropy, inputs=x, labels=y, protocol=protocol)
    found = unbatch.audit(setting, attacks=["unmix", "bias-ratio", "label-count"], analyses=())
    step = local_update(model, F.cross_entropy, x, y, protocol)
    _, errors = gradient_of_adam(step, {name: p.detach() for name, p in model.named_parameters()}, protocol)
    share = float(torch.cat([e.flatten() for e in errors.values()]).isinf().double().mean())
    said = [note for note in found.notes if note.startswith("AdamW's first step")]
    if dtype == torch.float64:
        assert (share, said) == (0.0, [])
    else:
        assert share > 0.6
        assert f"tells of {share:.0%} of the entries the sign of the gradient and not its size" in said[0]
        assert "no defence" in said[0]
        assert f"of {share:.0%} of the entries it tells a sign alone" in found.runs[0].words


def test_the_rank_of_an_adam_step_counts_no_examples() -> None:
    model, x, y = client(torch.float32)
    protocol = Protocol(local_steps=1, optimiser="adamw", learning_rate=1e-3)
    seen, _ = unbatch.observe(model, F.cross_entropy, x[:1], y[:1], protocol=protocol)
    with pytest.raises(unbatch.NotApplicable, match="its rank is not that of a gradient"):
        unbatch.Analysis.parse("gradient-rank")(seen)


def test_after_several_steps_of_adam_no_gradient_is_told() -> None:
    model, x, y = client(torch.float64)
    protocol = Protocol(local_steps=2, optimiser="adam", learning_rate=1e-3)
    seen, _ = unbatch.observe(model, F.cross_entropy, x, y, protocol=protocol)
    assert seen.signs_alone is None
    assert "no gradient is told" in View.of(seen).no_gradient
