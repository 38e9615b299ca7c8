import pytest
from torch import nn
from torch.nn import functional as F

from unbatch.loss import identify, loss_named

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
    "loss",
    [
        F.l1_loss,
        F.smooth_l1_loss,
        lambda o, y: F.cross_entropy(o, y) ** 2,
        lambda o, y: F.cross_entropy(o, y) + 1.0,  # same gradient, another value
        lambda o, y: F.multi_margin_loss(o, y),
        lambda o, y: o,
    ],
)
def test_other_losses_are_not_mistaken(loss) -> None:
    assert identify(loss, (1, 4)) is None


def test_a_name_does_not_decide() -> None:
    def cross_entropy(outputs, labels):
        return F.mse_loss(outputs, labels)

    form = identify(cross_entropy, (1, 3))
    assert form is not None
    assert form.name == SQ
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        loss_named("hinge")
