import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Attack
from unbatch.loss import identify, loss_named
from unbatch.models.small import build

CE, BCE, SQ = "cross-entropy", "binary-cross-entropy", "squared-error"


@pytest.mark.parametrize(
    ("loss", "shape", "name", "reduction", "scale", "smoothing"),
    [
        (F.cross_entropy, (1, 10), CE, "mean", 1, 0),
        (lambda o, y: F.cross_entropy(o, y), (1, 2), CE, "mean", 1, 0),
        (nn.CrossEntropyLoss(reduction="sum"), (1, 3), CE, "sum", 1, 0),
        (nn.CrossEntropyLoss(label_smoothing=0.1), (1, 1000), CE, "mean", 1, 0.1),
        (lambda o, y: 3 * F.nll_loss(o.log_softmax(1), y), (1, 5), CE, "mean", 3, 0),
        (F.binary_cross_entropy_with_logits, (1, 1), BCE, "mean", 1, 0),
        (F.binary_cross_entropy_with_logits, (1, 4), BCE, "mean", 0.25, 0),
        (lambda o, y: F.binary_cross_entropy_with_logits(o.squeeze(1), y, reduction="sum"), (1, 1), BCE, "sum", 1, 0),
        (F.mse_loss, (1, 5), SQ, "mean", 0.2, 0),
        (lambda o, y: 0.5 * (o - y).square().sum(), (1, 7), SQ, "sum", 0.5, 0),
        (lambda o, y: 0.5 * ((o - y) ** 2).sum(1).mean(), (1, 5), SQ, "mean", 0.5, 0),
        (loss_named(SQ), (1, 4), SQ, "mean", 1, 0),
        (loss_named(BCE, "sum"), (1, 1), BCE, "sum", 1, 0),
        (loss_named(CE, "sum"), (1, 4), CE, "sum", 1, 0),
    ],
)
def test_losses_are_known_by_their_values_and_gradients(loss, shape, name, reduction, scale, smoothing) -> None:
    form = identify(loss, shape)
    assert form is not None
    assert (form.name, form.reduction) == (name, reduction)
    assert form.scale == pytest.approx(scale)
    assert form.smoothing == pytest.approx(smoothing, abs=1e-9)


@pytest.mark.parametrize(
    "loss", [lambda o, y: F.cross_entropy(o, y) ** 2, lambda o, y: o, lambda o, y: o.std() + y.sum()]
)
def test_what_is_no_sum_or_mean_of_one_term_an_example_has_no_form(loss) -> None:
    assert identify(loss, (1, 4)) is None


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(outputs, labels, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


UNEVEN = torch.tensor([1.0, 0.2, 0.5, 0.8])


@pytest.mark.parametrize(
    ("loss", "reduction", "weights"),
    [
        (F.l1_loss, "mean", None),
        (F.smooth_l1_loss, "mean", None),
        (lambda o, y: F.cross_entropy(o, y) + 1.0, "mean", None),  # same gradient, another value
        (lambda o, y: F.multi_margin_loss(o, y), "mean", None),
        (focal, "mean", None),
        (nn.BCEWithLogitsLoss(pos_weight=UNEVEN), "mean", None),
        (nn.CrossEntropyLoss(weight=UNEVEN, label_smoothing=0.1, reduction="sum"), "sum", None),
        (nn.CrossEntropyLoss(weight=UNEVEN, label_smoothing=0.1), "mean", UNEVEN),
    ],
)
def test_other_losses_are_known_for_sums_or_means_of_unknown_terms(loss, reduction, weights) -> None:
    form = identify(loss, (1, 4))
    assert form is not None
    assert (form.name, form.reduction) == ("additive", reduction)
    assert form.weights == (None if weights is None else pytest.approx(weights.tolist()))


@pytest.mark.parametrize(
    "loss", [focal, nn.CrossEntropyLoss(weight=UNEVEN.double(), label_smoothing=0.1)], ids=["focal", "weights"]
)
def test_a_batch_is_recovered_exactly_under_a_loss_of_unknown_terms(loss) -> None:
    rng = torch.Generator().manual_seed(0)
    model = build("mlp", (20,), 4, width=150, depth=2, activation="gelu", rng=rng).double()
    x, y = torch.randn(6, 20, generator=rng).double(), torch.tensor([0, 1, 1, 2, 3, 3])
    obs, _ = unbatch.observe(model, loss, x, y)
    found = Attack.parse("unmix")(obs)
    assert found.inputs is not None
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == y.tolist()
    assert float(torch.cdist(x, found.inputs).min(1).values.max()) < 1e-10


def test_a_name_does_not_decide() -> None:
    def cross_entropy(outputs, labels):
        return F.mse_loss(outputs, labels)

    form = identify(cross_entropy, (1, 3))
    assert form is not None
    assert form.name == SQ
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        loss_named("hinge")
