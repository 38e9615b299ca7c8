from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch import Attack, NotApplicable, Observation, Truth, observe
from unbatch.attack import ActiveAttack
from unbatch.auditing.run import audit
from unbatch.case import Setting
from unbatch.domain import Table
from unbatch.loss import loss_named
from unbatch.metric import match
from unbatch.models import small
from unbatch.models.small import ActivationName

D, WIDTH = 12, 1200


def attack(options: str = "") -> ActiveAttack:
    made = Attack.parse(f"tensor-moment-deep:{options}" if options else "tensor-moment-deep")
    assert isinstance(made, ActiveAttack)
    return made


def network(activation: ActivationName, layers: int, *, k: int = 4, bias: bool = True, width: int = WIDTH) -> nn.Module:
    """`layers` dense layers: all but the last two as narrow as the construction allows."""
    rng = torch.Generator().manual_seed(5)
    sizes = [D, *[2 * D + 3] * (layers - 2), width, k]
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b, bias=bias), small.ACTIVATIONS[activation]()]
    return small.initialise(nn.Sequential(*parts[:-1]), rng).double()


def batch(n: int = 3, k: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=rng, dtype=torch.float64), torch.randint(k, (n,), generator=rng)


def planted(made: ActiveAttack, model: nn.Module, n: int = 3) -> tuple[Observation, Truth]:
    x, y = batch(n)
    return observe(made.plant(model, torch.Generator().manual_seed(1)), F.cross_entropy, x, y)


def judged(made: Attack, obs: Observation, truth: Truth) -> tuple[torch.Tensor, bool, bool]:
    """Relative errors, whether all are within their bounds, and whether all labels are right."""
    found = made(obs)
    pairs = match(found, truth, Table(shape=tuple(truth.inputs.shape[1:])))
    true = truth.inputs[pairs.true]
    gap = (pairs.inputs - true).flatten(1).norm(dim=1)
    held = bool((gap / pairs.inputs.flatten(1).norm(dim=1) <= found.bound[pairs.found]).all())
    labels = found.labels[pairs.found].tolist() == truth.labels[pairs.true].tolist()
    return gap / true.flatten(1).norm(dim=1), held, labels


@pytest.mark.parametrize("layers", [3, 4, 5, 6])
@pytest.mark.parametrize("activation", ["relu", "leaky-relu", "tanh", "sigmoid"])
def test_every_activation_of_the_paper_at_every_depth(activation: ActivationName, layers: int) -> None:
    made = attack()
    obs, truth = planted(made, network(activation, layers))
    error, held, labels = judged(made, obs, truth)
    assert float(error.max()) < 0.1
    assert held
    assert labels
    assert made(obs).up_to == {"permutation"}


@pytest.mark.parametrize("activation", ["gelu", "silu", "softplus", "elu"])
def test_activations_beyond_the_paper(activation: ActivationName) -> None:
    made = attack()
    obs, truth = planted(made, network(activation, 4))
    error, held, labels = judged(made, obs, truth)
    assert float(error.max()) < 0.15
    assert held
    assert labels


def test_without_planting_the_same_network_is_refused() -> None:
    x, y = batch()
    obs, _ = observe(network("relu", 4), F.cross_entropy, x, y)
    with pytest.raises(NotApplicable, match="were not planted"):
        attack()(obs)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 1.0), ("leaky-relu", 1.0 + 0.01**3)])
def test_the_paper_s_parameters(activation: ActivationName, slope: float) -> None:
    model = network(activation, 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = attack("norm=3").plant(model, torch.Generator().manual_seed(0))
    weights = [layer.weight.detach() for layer in made if isinstance(layer, nn.Linear)]
    eye = torch.eye(D, dtype=torch.float64)
    assert torch.equal(weights[0], torch.cat([eye, -eye, torch.zeros(3, D).double()]))
    for W in weights[1:-2]:
        assert torch.equal(W, torch.diag(torch.tensor([1.0] * 2 * D + [0.0] * 3, dtype=torch.float64)))
    z = weights[-2][:, :D]
    assert torch.equal(weights[-2], torch.cat([z, -z, torch.zeros(WIDTH, 3).double()], 1))
    assert float(z.std()) == pytest.approx(0.1 / (3 * slope), rel=0.03)
    assert all(not bool(layer.bias.any()) for layer in made if isinstance(layer, nn.Linear))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = batch()[0]
    torch.testing.assert_close(made[:-2](x).detach(), x @ z.T * slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_bent_activations_are_inverted_and_not_taken_as_straight(activation: ActivationName) -> None:
    """Entries ten times the typical size bend by percents: the inverse takes that away."""
    made = attack("norm=0.5")
    obs, truth = planted(made, network(activation, 6, width=20_000), n=2)
    error, _, _ = judged(made, obs, truth)
    seen = obs.model[:-3](truth.inputs).detach()[:, : 2 * D]
    straight = seen[:, :D] - seen[:, D:]
    scale = (straight * truth.inputs).sum() / truth.inputs.square().sum()
    bend = (straight / scale - truth.inputs).norm(dim=1) / truth.inputs.norm(dim=1)
    assert float(error.max()) < float(bend.min()) / 2


def test_a_network_without_biases_leaves_the_scale_to_the_norm() -> None:
    obs, truth = planted(attack(), network("relu", 4, bias=False))
    found = attack()(obs)
    assert "scale" in found.up_to
    pairs = match(found, truth, Table(shape=(D,)))
    true = truth.inputs[pairs.true]
    assert float(((pairs.inputs - true).norm(dim=1) / true.norm(dim=1)).max()) < 0.1
    obs, _ = planted(attack(), network("tanh", 4, bias=False))
    with pytest.raises(NotApplicable, match="give norm"):
        attack()(obs)
    x, y = batch()
    x *= 4 / x.norm(dim=1, keepdim=True)
    made = attack("norm=4")
    obs, truth = observe(
        made.plant(network("tanh", 4, bias=False), torch.Generator().manual_seed(1)), F.cross_entropy, x, y
    )
    found = made(obs)
    assert "scale" not in found.up_to
    pairs = match(found, truth, Table(shape=(D,)))
    assert float((pairs.inputs - truth.inputs[pairs.true]).norm(dim=1).max() / 4) < 0.1


def test_the_bias_trick_keeps_residuals_away_from_zero() -> None:
    """One output under squared error, an example whose target is the output without it: it sends nothing unless M > 0."""
    x, _ = batch(2)
    model = network("relu", 4, k=1)
    found = {}
    for trick in (0.0, 5.0):
        made = attack(f"bias_trick={trick}")
        sent = made.plant(model, torch.Generator().manual_seed(1))
        y = sent(x).detach() - 2 * trick
        y[1] += 1
        obs, truth = observe(sent, loss_named("squared-error"), x, y)
        if trick == 0:
            with pytest.raises(NotApplicable, match="rank 1 for 2 examples"):
                made(obs)
            continue
        found = made(obs)
        assert float(found.trace["residuals"].min()) > 0
        pairs = match(found, truth, Table(shape=(D,)))
        assert float((pairs.inputs - x[pairs.true]).norm(dim=1).max() / x.norm(dim=1).min()) < 0.15
        assert float((found.labels[pairs.found] - y[pairs.true, 0]).abs().max()) < 0.5  # the loss takes [n] as well
    with pytest.raises(NotApplicable, match="this head has none"):
        attack("bias_trick=3").plant(network("relu", 4, k=1, bias=False), torch.Generator())


def test_pictures_behind_a_flatten_and_a_normalisation() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network("tanh", 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(((x - 0.4) / 0.25).flatten(1))
            return out

    made = attack()
    rng = torch.Generator().manual_seed(3)
    x, y = torch.rand(3, 3, 2, 2, generator=rng, dtype=torch.float64), torch.tensor([0, 1, 3])
    obs, truth = observe(made.plant(Pictures(), torch.Generator().manual_seed(1)), F.cross_entropy, x, y)
    error, held, labels = judged(made, obs, truth)
    assert float(error.max()) < 0.05
    assert held
    assert labels


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(D, 50), nn.ReLU(), nn.Linear(50, 3)), "three dense layers or more; .* runs 2"),
        (lambda: network("relu", 4)[2:], "fewer than 54 units"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), "dense layers only"),
        (
            lambda: nn.Sequential(
                nn.Linear(D, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 3)
            ),
            "more than dense layers",
        ),
        (
            lambda: nn.Sequential(
                nn.Linear(D, 30), nn.ReLU(), nn.Dropout(), nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 3)
            ),
            "more than an elementwise activation",
        ),
    ],
)
def test_what_cannot_be_planted(model, words: str) -> None:
    with pytest.raises(NotApplicable, match=words):
        attack().plant(model(), torch.Generator())


def test_a_missing_gradient_is_named() -> None:
    obs, _ = planted(attack(), network("relu", 3))
    update = {k: v for k, v in obs.update.items() if k != "4.weight"}
    less = Observation(model=obs.model, loss=obs.loss, update=update, knowledge=obs.knowledge)
    with pytest.raises(NotApplicable, match="'4' sent no gradient"):
        attack()(less)


def test_the_audit_plants_and_labels_the_threat_model() -> None:
    x, y = batch()
    setting = Setting(model=network("sigmoid", 3), loss=F.cross_entropy, inputs=x, labels=y)
    record = audit(setting, attacks=["tensor-moment-deep"], analyses=())
    (run,) = record.runs
    assert (run.status, run.threat_model) == ("done", "malicious server (chooses the parameters)")
    assert max(e.scores["l2-error"] for e in run.examples) < 0.1
    assert not {flag.name for flag in record.flags} & {"bound-violated", "exact-claim-fails"}
