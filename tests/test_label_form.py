"""Labels in every form that losses take: found once, brought from one into another, and recovered in all of them."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Setting, UnbatchError, audit, observe
from unbatch.attack import Attack
from unbatch.inversion.label_fit import label_behind
from unbatch.inversion.view import View
from unbatch.label_form import LabelForm, agree, label_words, one_hot_classes
from unbatch.loss import Loss, loss_named

bce = F.binary_cross_entropy_with_logits
BINARY: dict[str, tuple[Loss, Tensor]] = {  # one logit, in the spellings of training code
    "squeezed": (lambda o, y: bce(o.squeeze(1), y.float()), torch.tensor([1, 0])),
    "column": (lambda o, y: bce(o[:, 0], y), torch.tensor([1.0, 0.0])),
    "unsqueezed": (lambda o, y: bce(o, y.float().unsqueeze(1)), torch.tensor([1, 0])),
    "targets [n, 1]": (bce, torch.tensor([[1.0], [0.0]])),
    "bool": (lambda o, y: bce(o.squeeze(1), y.float()), torch.tensor([True, False])),
    "uint8": (lambda o, y: bce(o.squeeze(-1), y.to(o)), torch.tensor([1, 0], dtype=torch.uint8)),
    "int32": (lambda o, y: bce(o.flatten(), y.float()), torch.tensor([1, 0], dtype=torch.int32)),
    "sum": (lambda o, y: bce(o.squeeze(1), y.float(), reduction="sum"), torch.tensor([1, 0])),
    "named": (loss_named("binary-cross-entropy"), torch.tensor([1, 0])),
}


def network(outputs: int, *, width: int = 24, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, width), nn.Tanh(), nn.Linear(width, outputs))


def batch(n: int) -> Tensor:
    return torch.rand(n, 20, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("loss", "outputs", "kind", "shape", "rows"),
    [
        (F.cross_entropy, (3,), "class", (), (3,)),
        (F.cross_entropy, (3, 8, 8), "class", (8, 8), (3, 8, 8)),
        (lambda o, y: F.nll_loss(o.log_softmax(1), y), (3,), "class", (), None),
        (nn.NLLLoss(), (3,), "class", (), None),
        (lambda o, y: F.nll_loss(o.log(), y), (3,), "class", (), None),  # of a model that returns probabilities
        (nn.CrossEntropyLoss(weight=torch.ones(3)), (3,), "class", (), (3,)),  # it holds float32 tensors
        (nn.MultiMarginLoss(), (3,), "class", (), None),
        (lambda o, y: bce(o.squeeze(1), y.float()), (1,), "binary", (), None),
        (bce, (1,), "binary", (1,), None),
        (nn.BCELoss(), (1,), "binary", (1,), None),
        (bce, (3,), "multi-label", (3,), None),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1.0, 1.0])), (3,), "multi-label", (3,), None),
        (bce, (1, 8, 8), "multi-label", (1, 8, 8), None),
        (F.mse_loss, (3,), "real", (3,), None),
        (lambda o, y: F.mse_loss(o.squeeze(1), y), (1,), "real", (), None),
        (F.mse_loss, (), "real", (), None),
        (nn.KLDivLoss(reduction="batchmean"), (4,), "real", (4,), None),
        (nn.SoftMarginLoss(), (1,), "sign", (1,), None),
        (nn.HingeEmbeddingLoss(), (1,), "sign", (1,), None),
        (lambda o, y: (1 - y * o.squeeze(1)).relu().mean(), (1,), "sign", (), None),
    ],
)
def test_the_form_is_found_by_asking_the_loss(loss, outputs, kind, shape, rows) -> None:
    form = LabelForm.of(loss, outputs)
    assert (form.kind, form.shape, form.rows) == (kind, shape, rows)
    drawn = form.draw(3, torch.Generator().manual_seed(0), torch.zeros(3, *outputs))
    assert drawn.shape == (3, *shape)
    assert torch.equal(form.taken(drawn), drawn)
    for label in form.every(torch.zeros(1)):
        assert label.shape == (1, *shape)


def test_a_loss_that_gives_no_number_has_no_form() -> None:
    with pytest.raises(UnbatchError, match="no finite scalar function"):
        LabelForm.of(lambda o, y: o, (3,))


def test_labels_are_brought_into_the_form_of_the_loss() -> None:
    classes, rows, reals = (
        LabelForm.of(F.cross_entropy, (3,)),
        LabelForm.of(F.mse_loss, (3,)),
        LabelForm.of(F.mse_loss, (1,)),
    )
    number, one_hot = torch.tensor([2, 0]), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    for given in (number, number[:, None], number.float(), number.to(torch.uint8), one_hot, one_hot.long()):
        assert torch.equal(classes.taken(given), number)
        assert torch.equal(rows.taken(given), one_hot)
    soft = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(classes.taken(soft), soft)
    assert torch.equal(classes.taken(torch.tensor([-100, 2])), torch.tensor([-100, 2]))
    assert torch.equal(reals.taken(torch.tensor([0.5, 2.0])), torch.tensor([[0.5], [2.0]]))
    with pytest.raises(UnbatchError, match=r"do not go with this loss, which takes class numbers 0 to 2"):
        classes.taken(torch.rand(2, 5))
    with pytest.raises(UnbatchError, match="do not go"):
        LabelForm.of(lambda o, y: F.nll_loss(o.log_softmax(1), y), (3,)).taken(soft)


def test_labels_are_compared_by_what_they_say() -> None:
    one_hot = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert agree(torch.tensor([1, 0]), one_hot).tolist() == [True, True]
    assert agree(one_hot, torch.tensor([1, 1])).tolist() == [True, False]
    assert agree(torch.tensor([[1.0], [0.0]]), torch.tensor([True, True])).tolist() == [True, False]
    assert agree(torch.tensor([0]), torch.tensor([[0.6, 0.4]])).tolist() == [False]
    assert agree(torch.tensor([[0.601, 0.399]]), torch.tensor([[0.6, 0.4]])).tolist() == [True]
    assert agree(torch.tensor([0.35]), torch.tensor([0.42])).tolist() == [False]
    assert agree(torch.tensor([5]), torch.tensor([[0.0, 1.0]])).tolist() == [False]
    pixels = torch.tensor([[[0, 1], [2, 2]]])
    assert agree(pixels, F.one_hot(pixels, 3).movedim(-1, 1)).tolist() == [True]
    assert one_hot_classes(torch.tensor([[0.6, 0.4]])) is None


def test_labels_are_told_in_words() -> None:
    names = ["cat", "dog", "cow"]
    for label, words in (
        (torch.tensor(1.0), "dog"),
        (torch.tensor([True]), "dog"),
        (torch.tensor([0.0, 0.0, 1.0]), "cow"),
        (torch.tensor([0.75, 0.25, 0.0]), "75 % cat, 25 % dog"),
        (torch.tensor([1.0, 1.0, 0.0]), "cat, dog"),
        (torch.tensor(-100), "-100"),
        (torch.tensor([[1, 1], [0, 1]]), "2 x 2 labels: 3 of dog, 1 of cat"),
    ):
        assert label_words(label, names) == words
    assert label_words(torch.tensor([1.5, -2.0])) == "[1.5, -2]"


@pytest.mark.parametrize("spelling", BINARY)
@pytest.mark.parametrize(("attack", "n"), [("bias-ratio", 1), ("unmix", 2), ("unmix", 1)])
def test_binary_labels_in_every_spelling_are_recovered_with_their_examples(spelling: str, attack: str, n: int) -> None:
    loss, labels = BINARY[spelling]
    own = Setting(model=network(1), loss=loss, inputs=batch(n), labels=labels[:n])
    record = audit(own, attacks=[attack], analyses=[])
    assert record.runs[0].status == "done", record.runs[0].words
    assert len(record.recovered()) == n
    assert [e.scores["label-accuracy"] for e in record.runs[0].examples] == [1.0] * n
    assert {e.label for e in record.runs[0].examples} <= {"0", "1"}


@pytest.mark.parametrize(
    ("loss", "labels", "attack"),
    [
        (F.cross_entropy, F.one_hot(torch.tensor([2, 0]), 3).float(), "unmix"),
        (F.mse_loss, F.one_hot(torch.tensor([2, 0]), 3).float(), "unmix"),
        (loss_named("squared-error"), torch.tensor([2, 0]), "unmix"),
        pytest.param(
            F.cross_entropy, torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]]), "unmix", marks=pytest.mark.slow
        ),
        (F.cross_entropy, torch.tensor([[0.6, 0.3, 0.1]]), "bias-ratio"),
        (bce, torch.tensor([[1.0, 0.0, 1.0]]), "bias-ratio"),
        (F.mse_loss, torch.tensor([[0.3, -2.0, 1.0]]), "bias-ratio"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1.0, 1.0])), torch.tensor([[1.0, 0.0, 1.0]]), "bias-ratio"),
        (nn.MultiMarginLoss(), torch.tensor([2]), "bias-ratio"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), torch.tensor([2]), "bias-ratio"),
        (nn.CrossEntropyLoss(ignore_index=1), torch.tensor([2, 0]), "unmix"),
        (F.cross_entropy, torch.tensor([2]), "bias-ratio"),
    ],
)
def test_whole_batches_come_back_in_the_form_that_the_loss_takes(loss: Loss, labels: Tensor, attack: str) -> None:
    own = Setting(model=network(3), loss=loss, inputs=batch(len(labels)), labels=labels)
    record = audit(own, attacks=[attack], analyses=[])
    run = record.runs[0]
    assert run.status == "done", run.words
    assert len(record.recovered()) == len(labels)
    assert [e.scores["label-accuracy"] for e in run.examples] == [1.0] * len(labels)


@pytest.mark.parametrize("loss", [nn.SoftMarginLoss(), nn.HingeEmbeddingLoss()])
def test_labels_without_a_gradient_are_tried_one_after_the_other(loss: Loss) -> None:
    own = Setting(model=network(1), loss=loss, inputs=batch(2), labels=torch.tensor([[-1.0], [1.0]]))
    record = audit(own, attacks=["gradient-matching:iterations=200"], analyses=[])
    assert record.runs[0].trace["labels"] == "tried"
    if isinstance(loss, nn.SoftMarginLoss):  # the other one's gradient is the same wherever its example lies
        assert record.recovered() == {(0, 0), (0, 1)}
        assert [e.scores["label-accuracy"] for e in record.runs[0].examples] == [1.0, 1.0]


def held_weights(outputs: Tensor, labels: Tensor) -> Tensor:
    """Training code that holds its class weights in float32."""
    return F.cross_entropy(outputs, labels, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])),
        functools.partial(F.cross_entropy, weight=torch.ones(3)),
        held_weights,
    ],
)
def test_a_loss_that_holds_tensors_of_the_clients_precision_is_run_in_another(loss: Loss) -> None:
    own = Setting(model=network(3), loss=loss, inputs=batch(3), labels=torch.tensor([0, 2, 1]))
    record = audit(own, attacks=["unmix"], analyses=[])
    assert len(record.recovered()) == 3, record.runs[0].words
    assert "times" not in record.runs[0].trace.get("words", "")


def test_rows_that_the_loss_ignores_are_no_factor_of_the_update() -> None:
    own = Setting(model=network(3), loss=F.cross_entropy, inputs=batch(3), labels=torch.tensor([-100, 2, 1]))
    record = audit(own, attacks=["unmix"], analyses=[])
    assert record.recovered() == {(0, 1), (0, 2)}
    assert "either 1 of the batch of 3 are ignored" in record.runs[0].trace["words"]


@pytest.mark.parametrize(
    ("last", "loss", "label"),
    [
        (nn.Sigmoid(), nn.BCELoss(), torch.tensor([[1.0]])),
        (nn.Sequential(nn.Sigmoid(), nn.Flatten(0)), nn.BCELoss(), torch.tensor([0.0])),
        (nn.Sequential(nn.Linear(1, 3), nn.LogSoftmax(1)), nn.NLLLoss(), torch.tensor([1])),
    ],
)
@pytest.mark.parametrize("attack", ["bias-ratio", "gradient-matching"])
def test_models_that_return_probabilities(last: nn.Module, loss: Loss, label: Tensor, attack: str) -> None:
    own = Setting(model=nn.Sequential(network(1), last), loss=loss, inputs=batch(1), labels=label)
    record = audit(own, attacks=[attack], analyses=[])
    assert record.recovered() == {(0, 0)}, record.runs[0].words
    assert record.runs[0].examples[0].scores["label-accuracy"] == 1.0


@pytest.mark.parametrize("loss", [F.l1_loss, nn.MultiLabelMarginLoss(), nn.SoftMarginLoss()])
def test_labels_that_can_neither_be_searched_for_nor_tried_are_refused_in_words(loss: Loss) -> None:
    labels = torch.tensor([[1.0, -1.0, 1.0]]) if isinstance(loss, nn.SoftMarginLoss) else torch.tensor([[1, 0, 0]])
    labels = labels.float() if loss is F.l1_loss else labels
    obs, _ = observe(network(3), loss, batch(1), labels)
    with pytest.raises(unbatch.NotApplicable, match="no gradient with respect to them"):
        Attack.parse("gradient-matching")(obs)


def test_one_label_a_pixel_is_searched_for_or_taken_as_known() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1))
    x, y = torch.rand(1, 1, 3, 3), torch.randint(3, (1, 3, 3))
    for known, source in ((Knowledge(), "optimised"), (Knowledge(labels=y), "known")):
        found = Attack.parse("gradient-matching:iterations=1")(
            observe(model, F.cross_entropy, x, y, knowledge=known)[0]
        )
        assert found.trace["labels"] == source
        assert found.labels is None or found.labels.shape == y.shape


def test_known_labels_may_be_in_another_form() -> None:
    model, x, y = network(3), batch(2), torch.tensor([2, 0])
    for loss, truth in ((F.cross_entropy, y), (F.mse_loss, F.one_hot(y, 3).float())):
        for known in (y, y[:, None], F.one_hot(y, 3)):
            seen, _ = observe(model, loss, x, truth, knowledge=Knowledge(labels=known))
            assert agree(View.of(seen).known_labels, y).all()
    seen, _ = observe(model, F.cross_entropy, x, y, knowledge=Knowledge(labels=torch.rand(2, 7)))
    with pytest.raises(unbatch.NotApplicable, match="what is known of the labels is of no use"):
        Attack.parse("gradient-matching")(seen)


def test_a_label_is_solved_for_where_no_class_explains_the_update() -> None:
    model, x, soft = network(3), batch(1), torch.tensor([[0.6, 0.3, 0.1]])
    seen, _ = observe(model, F.cross_entropy, x, soft)
    assert torch.allclose(label_behind(View.of(seen), x), soft, atol=1e-4)
    seen, _ = observe(model, F.cross_entropy, x, torch.tensor([1]), defences="clip:norm=0.01")
    assert label_behind(View.of(seen), x).tolist() == [1]  # a class up to a factor


@pytest.mark.parametrize(
    ("loss", "outputs", "labels"),
    [
        (F.mse_loss, 1, torch.rand(4)),
        (lambda o, y: (o - y).square().mean(), 1, torch.rand(4)),  # torch says nothing of this one
        (lambda o, y: (o.squeeze(1) - y).square().mean(), 1, torch.rand(4, 1)),
        (bce, 1, torch.ones(4)),
        (F.cross_entropy, 3, torch.tensor([0, 1, 2, 3])),
        (F.cross_entropy, 3, torch.tensor([0, 1, 2, -1])),
        (F.cross_entropy, 3, torch.rand(4, 2)),
        (F.cross_entropy, 3, torch.tensor([-100] * 4)),
    ],
)
def test_labels_that_do_not_go_with_the_outputs_are_refused(loss: Loss, outputs: int, labels: Tensor) -> None:
    with pytest.raises(UnbatchError, match="do not go with outputs") as refusal:
        Setting(model=network(outputs), loss=loss, inputs=batch(4), labels=labels)
    assert "give labels so" in str(refusal.value)


def test_a_loss_that_takes_no_labels_is_told_from_labels_that_it_does_not_take() -> None:
    with pytest.raises(UnbatchError, match=r"it gives \[4\], and not one number.*look at the loss itself"):
        Setting(
            model=network(3),
            loss=lambda o, y: F.cross_entropy(o, y, reduction="none"),
            inputs=batch(4),
            labels=torch.tensor([0, 1, 2, 0]),
        )


def test_labels_that_go_with_the_outputs_are_taken() -> None:
    for loss, outputs, labels in (
        (F.cross_entropy, 3, torch.tensor([-100, -100, 2, 0])),
        (nn.CrossEntropyLoss(ignore_index=255), 3, torch.tensor([255, 255, 255, 0])),
        (F.cross_entropy, 3, torch.rand(4, 3).softmax(1)),
        (F.mse_loss, 1, torch.rand(4, 1)),
        (lambda o, y: o.square().mean(), 3, torch.zeros(4)),  # an autoencoder has no labels
        (lambda o, y: (o * y["w"] if isinstance(y, dict) else o * y[:, None]).mean(), 3, torch.rand(4)),
    ):
        kept = Setting(model=network(outputs), loss=loss, inputs=batch(4), labels=labels).labels
        assert torch.equal(kept, labels)
    whole = Setting(
        model=network(3), loss=F.cross_entropy, inputs=batch(2), labels=torch.tensor([2, 0], dtype=torch.int32)
    )
    assert whole.labels.dtype == torch.int64
    assert audit(whole, attacks="unmix", analyses=[]).recovered() == {(0, 0), (0, 1)}


def test_no_label_is_solved_for_at_inputs_that_are_no_numbers() -> None:
    model, x, y = nn.Linear(4, 3), torch.rand(1, 4), torch.tensor([[0.2, 0.5, 0.3]])
    view = View.of(unbatch.observe(model, F.cross_entropy, x, y)[0])
    assert label_behind(view, x) is not None
    for value in (torch.inf, torch.nan):
        label_behind(view, torch.full_like(x, value))  # whatever it says, it ends
