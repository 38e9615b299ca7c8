"""Steps of Opacus as its users run them: flat, per layer, adaptive, ghost clipping; wrapped models; virtual steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import unbatch
from unbatch import capture
from unbatch.models import small
from unbatch.protocol import flatten

opacus = pytest.importorskip("opacus")

N = 6
BOUNDS = ["dp-reconstruction", "van-trees", "cramer-rao"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in log"),
]


def network() -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    return small.build("mlp", (6,), 3, width=8, activation="tanh", rng=rng)


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(n, 6, generator=rng), torch.randint(3, (n,), generator=rng)


def each_gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    return [
        list(torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())))
        for i in range(len(x))
    ]


def clipped(grads: list[Tensor], clip: float) -> list[Tensor]:
    size = torch.cat([g.flatten() for g in grads]).norm()
    return [g * min(1.0, clip / (float(size) + 1e-6)) for g in grads]  # Opacus' 1e-6


def private(model: nn.Module, optimiser: torch.optim.Optimizer, data: Any, *, clip: Any = 0.2, noise=0.0, **how: Any):
    loader = DataLoader(data, batch_size=len(data))
    told = {"noise_multiplier": noise, "max_grad_norm": clip, "poisson_sampling": False} | how
    told["noise_generator"] = torch.Generator().manual_seed(3)
    return opacus.PrivacyEngine().make_private(module=model, optimizer=optimiser, data_loader=loader, **told)


def flat_mean(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).mean(0)


def stepped(n: int = N, noise: float = 0.0, clip: Any = 0.2, **how: Any):
    """A captured private step on a batch of n, whose every gradient is expected to be shortened."""
    model, (x, y) = network(), batch(n)
    wrapped, optimiser, _ = private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), TensorDataset(x, y), clip=clip, noise=noise, **how
    )
    with capture(wrapped, optimiser) as step:
        optimiser.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimiser.step()
    return step


def test_a_wrapped_model_s_private_step_is_one_under_dp_sgd() -> None:
    step, (x, y) = stepped(noise=0.7), batch()
    quiet = stepped()
    assert type(step.model) is nn.Sequential
    assert list(step.gradient) == list(dict(network().named_parameters()))
    expected = flat_mean([clipped(g, 0.2) for g in each_gradient(network(), x, y)])
    torch.testing.assert_close(flatten(quiet.gradient, quiet.gradient).float(), expected)
    seen = step.observation(F.cross_entropy)
    assert seen.knowledge.batch_size == N
    assert seen.knowledge.privacy.clip == pytest.approx(0.2)
    assert seen.knowledge.privacy.noise_multiplier == pytest.approx(0.7)
    assert seen.knowledge.noise == pytest.approx(0.7 * 0.2 / N)
    noise = flatten(step.gradient, step.gradient) - flatten(quiet.gradient, quiet.gradient)
    assert float(noise.std()) == pytest.approx(0.7 * 0.2 / N, rel=0.3)
    assert "Opacus clipped each example's gradient to 0.2" in step.notes[0]
    truth = unbatch.Truth(inputs=x, labels=y)
    audit = unbatch.audit(seen, truth=truth, attacks=["label-count"], analyses=["dp-reconstruction"])
    assert audit.privacy is not None
    assert audit.privacy.epsilon == pytest.approx(seen.knowledge.privacy.epsilon)
    assert audit.bounds


@pytest.mark.parametrize("sent", ["gradient", "difference"])
def test_the_step_is_what_dp_sgd_sends_in_an_audit(sent: str) -> None:
    step, (x, y) = stepped(), batch()
    seen = step.observation(F.cross_entropy, sent=sent)
    protocol = unbatch.Protocol(local_steps=int(sent == "difference"), learning_rate=0.1)
    spec = "dp-sgd:clip=0.2,noise_multiplier=0"
    own, _ = unbatch.observe(network(), F.cross_entropy, x, y, protocol=protocol, defences=spec)
    assert seen.knowledge.privacy == own.knowledge.privacy
    for name, tensor in own.update.items():
        torch.testing.assert_close(seen.update[name], tensor, rtol=1e-4, atol=1e-7)


def test_clipping_by_layer_is_altered_beside_its_privacy() -> None:
    norms = [0.1, 0.05, 0.1, 0.05]
    step, (x, y) = stepped(noise=0.7, clip=norms, clipping="per_layer"), batch()
    quiet = stepped(clip=norms, clipping="per_layer")
    expected = flat_mean(
        [[clipped([g], clip)[0] for g, clip in zip(row, norms, strict=True)] for row in each_gradient(network(), x, y)]
    )
    torch.testing.assert_close(flatten(quiet.gradient, quiet.gradient).float(), expected)
    seen = step.observation(F.cross_entropy)
    whole = sum(norm**2 for norm in norms) ** 0.5  # of which the noise is a multiple, in every entry
    assert seen.knowledge.privacy.clip == pytest.approx(whole)
    assert seen.knowledge.noise == pytest.approx(0.7 * whole / N)
    assert seen.knowledge.altered == "clipping of each layer of each example's gradient"
    assert "each parameter by itself" in step.notes[0]
    truth = unbatch.Truth(inputs=x, labels=y)
    bounds = {
        name: {bound.name for bound in unbatch.audit(obs, truth=truth, attacks=[], analyses=BOUNDS).bounds}
        for name, obs in (("layer", seen), ("flat", stepped(noise=0.7).observation(F.cross_entropy)))
    }
    assert "reconstruction robustness" in bounds["layer"]  # of the noise and the largest change by one example
    assert bounds["flat"] - bounds["layer"] == {"van Trees", "Cramer-Rao"}  # of clipping each example's whole gradient


def test_adaptive_clipping_is_that_of_the_step_and_its_noise_no_less_than_told() -> None:
    how = {
        "clipping": "adaptive",
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 0.2,
        "max_clipbound": 10.0,
        "min_clipbound": 0.01,
        "unclipped_num_std": 1.0,
    }
    step = stepped(noise=1.0, **how)
    quiet, (x, y) = stepped(**how), batch()
    expected = flat_mean([clipped(g, 0.2) for g in each_gradient(network(), x, y)])  # the norm before it moved on
    torch.testing.assert_close(flatten(quiet.gradient, quiet.gradient).float(), expected)
    seen = step.observation(F.cross_entropy)
    assert seen.knowledge.privacy.clip == pytest.approx(0.2)
    noise = flatten(step.gradient, step.gradient) - flatten(quiet.gradient, quiet.gradient)
    more = (1 - 1 / 4) ** -0.5  # of the noise on the gradient, by what the noisy count of examples takes of it
    assert float(noise.std()) == pytest.approx(more * seen.knowledge.noise, rel=0.3)
    assert "The clipping is adaptive" in step.notes[1]


def test_virtual_steps_are_one_step_of_all_their_batches() -> None:
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    model, (x, y) = network(), batch()
    wrapped, optimiser, loader = private(model, torch.optim.SGD(model.parameters(), lr=0.1), TensorDataset(x, y))
    expected = flat_mean([clipped(g, 0.2) for g in each_gradient(network(), x, y)])
    virtual = BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimiser)
    with virtual as parts, capture(wrapped, optimiser) as step:
        for inputs, labels in parts:
            optimiser.zero_grad()
            F.cross_entropy(wrapped(inputs), labels).backward()
            optimiser.step()
    assert step.passes == 3
    assert step.observation(F.cross_entropy).knowledge.batch_size == N
    found = step.observation(F.cross_entropy).update
    torch.testing.assert_close(flatten(found, found).float(), expected)


def test_gradients_that_are_accumulated_and_batches_that_are_drawn_are_a_mean_over_their_own_examples() -> None:
    model, (x, y) = network(), batch()
    rows = each_gradient(network(), x, y)
    wrapped, optimiser, _ = private(model, torch.optim.SGD(model.parameters(), lr=0.1), TensorDataset(x, y))
    with capture(wrapped, optimiser) as step:  # expected are 6 a pass: Opacus divides by 12
        for part in (slice(0, 2), slice(2, 4)):
            F.cross_entropy(wrapped(x[part]), y[part]).backward()
        optimiser.step()
    found = step.observation(F.cross_entropy).update
    assert step.passes == 2
    expected = flat_mean([clipped(g, 0.2) for g in rows[:4]])
    torch.testing.assert_close(flatten(found, found).float(), expected)
    torch.testing.assert_close(flatten(step.gradient, step.gradient).float(), expected * 4 / 12)


def test_ghost_clipping_and_models_that_are_not_wrapped() -> None:
    x, y = batch()
    expected = flat_mean([clipped(g, 0.2) for g in each_gradient(network(), x, y)])
    model = network()
    wrapped, optimiser, criterion, _ = private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        TensorDataset(x, y),
        grad_sample_mode="ghost",
        criterion=nn.CrossEntropyLoss(),
    )
    with capture(wrapped, optimiser) as step:
        optimiser.zero_grad()
        criterion(wrapped(x), y).backward()
        optimiser.step()
    assert step.passes == 1
    found = step.observation(F.cross_entropy)
    torch.testing.assert_close(flatten(found.update, found.update).float(), expected)
    model = network()
    _, optimiser, _ = private(model, torch.optim.SGD(model.parameters(), lr=0.1), TensorDataset(x, y), wrap_model=False)
    with capture(model, optimiser) as step:
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    found = step.observation(F.cross_entropy)
    torch.testing.assert_close(flatten(found.update, found.update).float(), expected)
    plain = network()
    for own, other in zip(found.model.modules(), plain.modules(), strict=True):
        assert len(own._forward_hooks) == len(other._forward_hooks)


def test_models_that_opacus_wrapped_are_audited_and_defended_as_they_are() -> None:
    from opacus.grad_sample import GradSampleModule

    x, y = batch(1)
    wrapped = GradSampleModule(network())
    seen, truth = unbatch.observe(wrapped, F.cross_entropy, x, y)
    assert unbatch.audit(seen, truth=truth, attacks=["bias-ratio"], analyses=()).recovered() == {(0, 0)}
    kept, _ = unbatch.observe(wrapped, F.cross_entropy, x, y, defences="dp-sgd:clip=0.2,noise_multiplier=0")
    own, _ = unbatch.observe(network(), F.cross_entropy, x, y, defences="dp-sgd:clip=0.2,noise_multiplier=0")
    assert all(torch.equal(kept.update[name], tensor) for name, tensor in own.update.items())
