"""What a label looks like to a loss, found once by asking the loss; and labels brought from one form into another."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.errors import UnbatchError

Kind = Literal["class", "probabilities", "binary", "sign", "multi-label", "real"]
PROBES = (5, 7, 11)  # rows to try a loss on: an odd number, of which one is no side of the outputs
NEARLY_WHOLE = 0.1  # entries of a row that far from 0 or 1 at most are read as 0 and 1
CLOSE_TARGETS = 1e-2  # probabilities and real targets agree to that, relative to the larger of 1 and themselves
WORDS_TO = 1e-3  # an entry of a label that near to a whole number is told as that number
BROADCASTS = "it broadcasts labels over outputs, so that every label counts for every example"
CONFIDENT = 40.0  # a logit whose probability is 1 to float32's rounding
WHOLE_KINDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# what a loss raises that is handed labels of another form
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, UserWarning, NotImplementedError)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LabelForm:
    """What the label of one example looks like, as a loss takes it for outputs of one shape.

    `kind`: *class*, a class number (one for each position where `shape` is not empty); *binary*, 0 or 1, for one logit;
    *sign*, -1 or 1; *multi-label*, zeros and ones; *probabilities*, a row of them in place of a class number; *real*, any
    numbers. `shape` is that of one example's label, `whole`
    says that it must be of integers, `count` is the number of values that each entry can have (0: real numbers), and
    `rows` the shape of class probabilities that the loss takes in place of class numbers (None: it takes none).
    `sloped` says whether the loss has a gradient with respect to labels, or rows, in real numbers.

    >>> LabelForm.of(F.cross_entropy, (3,))
    <LabelForm: class numbers 0 to 2 [n], or rows of probabilities [n, 3]>
    >>> LabelForm.of(lambda o, y: F.binary_cross_entropy_with_logits(o.squeeze(1), y.float()), (1,))
    <LabelForm: zeros and ones [n]>
    """

    kind: Kind
    shape: tuple[int, ...]
    whole: bool
    count: int
    rows: tuple[int, ...] | None
    sloped: bool

    @classmethod
    def of(cls, loss: Loss, outputs: tuple[int, ...], *, device: torch.device | None = None) -> LabelForm:
        """The form of label that a loss takes for outputs [n, *outputs]; class numbers where it takes several.

        Each form is tried on random outputs, in float64 and then in float32. One that the loss only takes by broadcasting
        is refused, since that mixes the examples. Raises UnbatchError: the loss takes none of them.

        >>> LabelForm.of(F.mse_loss, (3,)).kind, LabelForm.of(nn.SoftMarginLoss(), (1,)).kind
        ('real', 'sign')
        """
        reasons = list[str]()
        for whole_classes in (True, False):  # class numbers in every precision first: rows may be taken beside them
            for dtype in (torch.float64, torch.float32):
                own = in_dtype(loss, dtype)
                for probe in _probes(outputs, dtype, device):
                    for labels, count in _candidates(probe, whole_classes):
                        reason = objection(own, probe, labels)
                        if reason is None:
                            return _form(own, probe, labels, count)
                        reasons.append(f"{_spelt(labels)}: {reason}")
        raise UnbatchError(
            f"the loss is no finite scalar function of outputs [n, {', '.join(map(str, outputs))}] and labels; tried "
            f"{'; '.join(dict.fromkeys(reasons))}. Give a callable (outputs, labels) -> scalar."
        )

    def __repr__(self) -> str:
        return f"<LabelForm: {self.words()}>"

    def words(self) -> str:
        """The form in words, with shapes of a batch of n: for messages.

        >>> LabelForm.of(F.cross_entropy, (3, 8, 8)).words()
        'class numbers 0 to 2 [n, 8, 8], or rows of probabilities [n, 3, 8, 8]'
        """
        what = {
            "class": f"class numbers 0 to {self.count - 1}",
            "binary": "zeros and ones",
            "multi-label": "zeros and ones",
            "sign": "-1 and 1",
            "probabilities": "rows of probabilities",
            "real": "real numbers",
        }[self.kind]
        rows = f", or rows of probabilities [{', '.join(['n', *map(str, self.rows)])}]" if self.rows else ""
        return f"{what} [{', '.join(['n', *map(str, self.shape)])}]{rows}"

    @property
    def positions(self) -> int:
        """How many entries the label of one example has."""
        return math.prod(self.shape)

    def draw(self, n: int, rng: torch.Generator, like: Tensor) -> Tensor:
        """Random labels [n, *shape] in that form, real ones in the precision of `like` and on its device.

        >>> form, rng = LabelForm.of(F.cross_entropy, (3,)), torch.Generator().manual_seed(0)
        >>> form.draw(4, rng, torch.zeros(4, 3)).dtype
        torch.int64
        """
        drawn = torch.randint(self.count or 2, (n, *self.shape), generator=rng)
        drawn = 2 * drawn - 1 if self.kind == "sign" else drawn
        return drawn.to(like.device) if self.whole else drawn.to(like)

    def every(self, like: Tensor) -> list[Tensor]:
        """Every label that one example can have, each as a batch of one [1, *shape]; empty where they are not a few.

        >>> LabelForm.of(nn.SoftMarginLoss(), (1,)).every(torch.zeros(1))
        [tensor([[-1.]]), tensor([[1.]])]
        """
        if self.kind in ("multi-label", "probabilities", "real") or self.positions != 1:
            return []
        values = (-1, 1) if self.kind == "sign" else range(self.count)
        kind = torch.int64 if self.whole else like.dtype
        return [torch.full((1, *self.shape), value, dtype=kind, device=like.device) for value in values]

    def softened(self) -> LabelForm | None:
        """The form of rows of probabilities in place of class numbers; None where the loss takes none to search for."""
        if self.kind != "class" or self.rows is None or not self.sloped:
            return None
        return replace(self, kind="probabilities", shape=self.rows, whole=False, count=0, rows=None)

    def taken(self, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Labels in the form that the loss takes, real ones in `dtype`; no value changes.

        Class numbers and one-hot rows become each other, [n] and [n, 1] too; rows of probabilities stay where the loss
        takes them. Raises UnbatchError: they cannot be brought into the loss's form.

        >>> form = LabelForm.of(F.mse_loss, (3,))
        >>> form.taken(torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
        """
        n, spelt = len(labels), _spelt(labels)
        if self.kind == "class":
            if self.rows is not None and tuple(labels.shape[1:]) == self.rows and not _numbers_of_one(labels, self):
                hard = one_hot_classes(labels)
                return hard if hard is not None else labels.to(dtype)
            rows = one_hot_classes(labels) if labels.ndim == len(self.shape) + 2 else None
            labels = rows if rows is not None else labels
            if labels.numel() == n * self.positions and bool((labels == labels.round()).all()):
                return labels.reshape(n, *self.shape).long() if self.whole else labels.reshape(n, *self.shape).to(dtype)
        elif labels.numel() == n * self.positions:
            labels = labels.reshape(n, *self.shape)
            return labels.long() if self.whole else labels.to(dtype)
        elif labels.numel() == n and len(self.shape) == 1 and _classes_below(labels, self.shape[0]):
            rows = F.one_hot(labels.reshape(n).long(), self.shape[0])
            return rows if self.whole else rows.to(dtype)
        elif self.positions == 1 and labels.ndim == 2 and labels.shape[1] == 2:
            hard = one_hot_classes(labels)
            if hard is not None:
                return self.taken(hard, dtype)
        raise UnbatchError(f"labels {spelt} do not go with this loss, which takes {self.words()}; give them so.")


def _probes(outputs: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Iterator[Tensor]:
    """Random outputs: real numbers, and for losses that want them probabilities."""
    n = next(n for n in PROBES if n not in outputs) if len(outputs) < len(PROBES) else 13
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn((n, *outputs), generator=rng, dtype=torch.float64).to(device, dtype)
    yield drawn
    yield drawn.sigmoid()


def _candidates(outputs: Tensor, classes: bool) -> Iterator[tuple[Tensor, int]]:
    """Labels to try on outputs: class numbers with how many there are, or bits in one form after the other, with 0."""
    n, shape = len(outputs), outputs.shape[1:]
    turn = torch.arange(n, device=outputs.device) % 2

    def filled(shape: Sequence[int]) -> Tensor:
        return turn.view(-1, *[1] * len(shape)).expand(n, *shape).clone()

    if classes:
        if len(shape) and shape[0] > 1:
            yield filled(shape[1:]), shape[0]
        return
    bits = [filled(shape[1:]), filled(shape)] if len(shape) and shape[0] == 1 else [filled(shape)]
    bits += [filled(())] if len(shape) == 1 and shape[0] > 1 else []
    for labels in bits:
        yield labels.to(outputs), 0
    for labels in bits:
        yield labels, 0


def objection(loss: Loss, outputs: Tensor, labels: Tensor) -> str | None:
    """Why a loss does not take these labels beside these outputs, in words; None: it does.

    It must give one finite number, without torch's warning of different shapes, and it must not be the same where labels
    are given to other examples: a loss that broadcasts one against the other sums over all pairs.

    >>> outputs = torch.tensor([[0.1], [0.2], [0.3]])
    >>> print(objection(lambda o, y: (o - y).square().mean(), outputs, torch.tensor([0.0, 1.0, 0.0])))
    it broadcasts labels over outputs, so that every label counts for every example
    """
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("error", UserWarning)
            value = loss(outputs, labels)
            if not isinstance(value, Tensor) or value.ndim != 0:
                return f"gave {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}, no scalar"
            if not bool(value.isfinite()):
                return f"gave {float(value)}"
            turned, other = loss(outputs, labels.roll(1, 0)), loss(outputs, _others(labels))
    except REFUSALS as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    if math.isclose(float(turned), float(value), rel_tol=1e-6) and not math.isclose(
        float(other), float(value), rel_tol=1e-6
    ):
        return BROADCASTS
    return None


def _others(labels: Tensor) -> Tensor:
    """Zeros for ones and ones for zeros."""
    return ~labels if labels.dtype == torch.bool else 1 - labels


def _form(loss: Loss, outputs: Tensor, labels: Tensor, classes: int) -> LabelForm:
    """The form of labels that the loss has been found to take."""
    shape, whole = tuple(labels.shape[1:]), not labels.is_floating_point()
    if classes:
        rows = F.one_hot(labels, classes).movedim(-1, 1).to(outputs)
        taken = objection(loss, outputs, rows) is None and _same_loss(loss, outputs, rows, labels)
        soft = tuple(rows.shape[1:]) if taken else None
        return LabelForm("class", shape, True, classes, soft, taken and _sloped(loss, outputs, rows))
    sloped = not whole and _sloped(loss, outputs, labels)
    if _signs(loss, outputs, labels):
        return LabelForm("sign", shape, whole, 2, None, sloped)
    if whole or _bits(loss, outputs, labels):
        kind: Kind = "binary" if math.prod(shape) == 1 else "multi-label"
        return LabelForm(kind, shape, whole, 2, None, sloped)
    return LabelForm("real", shape, False, 0, None, sloped)


def _same_loss(loss: Loss, outputs: Tensor, labels: Tensor, others: Tensor) -> bool:
    return math.isclose(float(loss(outputs, labels)), float(loss(outputs, others)), rel_tol=1e-5)


def _slopes(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the loss with respect to the outputs."""
    live = outputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = loss(live, labels)
        slope = torch.autograd.grad(value, live, allow_unused=True)[0] if value.requires_grad else None
    return slope if slope is not None else torch.zeros_like(outputs)


def _sloped(loss: Loss, outputs: Tensor, labels: Tensor) -> bool:
    """Whether the loss's gradient can be differentiated with respect to the labels, as a search over them must."""
    live, y = outputs.detach().clone().requires_grad_(), labels.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss(live, y), live, create_graph=True)
            (found,) = torch.autograd.grad(
                (slope * torch.linspace(1, 2, slope.numel()).to(slope).view_as(slope)).sum(), y
            )
    except REFUSALS:
        return False
    return bool(found.any())


def _signs(loss: Loss, outputs: Tensor, labels: Tensor) -> bool:
    """Whether labels are -1 and 1: a label of 0 says nothing to most outputs then, where both signs say something."""

    def speaking(value: int) -> float:
        slope = _slopes(loss, outputs, torch.full_like(labels, value))
        if not bool(loss(outputs, torch.full_like(labels, value)).isfinite()):
            return 0.0
        return float((slope.abs() > 1e-12).double().mean()) if bool(slope.isfinite().all()) else 0.0

    try:
        return speaking(0) < 0.5 < min(speaking(1), speaking(-1))
    except REFUSALS:
        return False


def _bits(loss: Loss, outputs: Tensor, labels: Tensor) -> bool:
    """Whether labels are zeros and ones: a very confident right answer costs next to nothing, a wrong one much."""
    unit = bool((outputs > 0).all() and (outputs < 1).all())
    if labels.numel() != outputs.numel():
        return False
    y = labels.view_as(outputs)
    sure = (y * (1 - 2e-6) + 1e-6) if unit else CONFIDENT * (2 * y - 1)
    try:
        right, wrong = (float(loss(answer, labels)) for answer in (sure, 1 - sure if unit else -sure))
    except REFUSALS:
        return False
    return abs(right) < 1e-3 * abs(wrong)


def in_dtype(loss: Loss, dtype: torch.dtype) -> Loss:
    """The loss for outputs in another precision than the client's: with the tensors that it holds, as class weights, moved.

    Tensors of a module or of a functools.partial are moved; a function that holds some out of reach is run in the precision
    that it takes, and its value brought back.

    >>> in_dtype(nn.CrossEntropyLoss(weight=torch.ones(3)), torch.float64).weight.dtype
    torch.float64
    >>> weights, outputs = torch.ones(2), torch.zeros(1, 2, dtype=torch.float64)
    >>> in_dtype(lambda o, y: F.cross_entropy(o, y, weights), torch.float64)(outputs, torch.tensor([0])).dtype
    torch.float64
    """
    if isinstance(loss, nn.Module):
        held = [t for t in (*loss.parameters(), *loss.buffers()) if t.is_floating_point()]
        return loss if all(t.dtype == dtype for t in held) else _module_in(loss, dtype)
    if isinstance(loss, functools.partial):
        moved = {k: v.to(dtype) if _real(v) else v for k, v in loss.keywords.items()}
        return functools.partial(loss.func, *(v.to(dtype) if _real(v) else v for v in loss.args), **moved)
    return loss if isinstance(loss, _Bridge) else _Bridge(loss)


@functools.lru_cache(maxsize=8)
def _module_in(loss: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(loss).to(dtype)


def _real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class _Bridge:
    """A loss that holds tensors of one precision, for outputs of another."""

    loss: Loss

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        try:
            return self.loss(outputs, labels)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("scalar type", "dtype")):
                raise
            other = torch.float32 if outputs.dtype == torch.float64 else torch.float64
            y = labels.to(other) if labels.is_floating_point() else labels
            return self.loss(outputs.to(other), y).to(outputs.dtype)


def loss_on_cpu(loss: Loss) -> Loss:
    """The loss with the tensors that it holds (class weights) on the CPU, where it is a module."""
    return copy.deepcopy(loss).cpu() if isinstance(loss, nn.Module) else loss


def completed(probabilities: Tensor) -> Tensor:
    """Rows of probabilities [n, k] of which all but the last are given [n, k - 1].

    >>> completed(torch.tensor([[0.5, 0.25]]))
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    return torch.cat([probabilities, 1 - probabilities.sum(1, keepdim=True)], 1)


def one_hot_classes(rows: Tensor) -> Tensor | None:
    """The class numbers [n, ...] of rows [n, k, ...] that are one-hot to `NEARLY_WHOLE`; None where one is not.

    >>> one_hot_classes(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), one_hot_classes(torch.tensor([[0.6, 0.4]]))
    (tensor([1, 0]), None)
    """
    if rows.ndim < 2 or rows.shape[1] < 2 or not rows.numel():
        return None
    likeliest = rows.double().argmax(1)
    sharp = F.one_hot(likeliest, rows.shape[1]).movedim(-1, 1).to(rows.device, torch.float64)
    return likeliest if float((rows.double() - sharp).abs().max()) < NEARLY_WHOLE else None


def agree(found: Tensor, true: Tensor) -> Tensor:
    """Which labels are the same, whatever form each set is in: [p, ...], [p, ...] -> bool [p].

    Class numbers, one-hot rows, [p] and [p, 1], integers, booleans and real numbers are compared by what they say. Zeros
    and ones agree where no entry is 0.1 off, probabilities and real targets to 1 %.

    >>> agree(torch.tensor([2, 0]), torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.4, 0.0]]))
    tensor([ True, False])
    """
    p = len(found)
    if not p:
        return torch.zeros(0, dtype=torch.bool)
    a, b = found.detach().double().cpu().reshape(p, -1), true.detach().double().cpu().reshape(p, -1)
    if a.shape[1] != b.shape[1]:
        a, b = (_rows_like(a, b), b) if a.shape[1] < b.shape[1] else (a, _rows_like(b, a))
    if a.shape[1] != b.shape[1]:
        return torch.zeros(p, dtype=torch.bool)
    if not (found.is_floating_point() or true.is_floating_point()):
        return (a == b).all(1)
    if bool(((b == 0) | (b == 1)).all()):
        return ((a - b).abs() < NEARLY_WHOLE).all(1)
    return ((a - b).abs() <= CLOSE_TARGETS * b.abs().clamp_min(1)).all(1)


def _rows_like(numbers: Tensor, rows: Tensor) -> Tensor:
    """Class numbers [p, s] as rows [p, k s] of the classes that they name; as they are where they name none of them."""
    p, s = numbers.shape
    k = rows.shape[1] // max(s, 1)
    if rows.shape[1] != k * s or k < 2 or not bool((numbers == numbers.round()).all()):
        return numbers
    inside = (numbers >= 0) & (numbers < k)
    hot = F.one_hot(numbers.clamp(0, k - 1).long(), k).movedim(-1, 1) * inside[:, None]  # [p, k, s]
    return hot.reshape(p, -1).double()


def label_words(label: Tensor, classes: Sequence[str] = ()) -> str:
    """One label in words, as a report shows it: by name where the classes have names.

    >>> label_words(torch.tensor(1), ["cat", "dog"]), label_words(torch.tensor([0.4, 0.6]), ["cat", "dog"])
    ('dog', '60 % dog, 40 % cat')
    >>> label_words(torch.tensor([[0, 0], [2, 0]]))
    '2 x 2 labels: 3 of 0, 1 of 2'
    """

    def name(number: float) -> str:
        whole = number == int(number) if math.isfinite(number) else False
        named = whole and 0 <= number < len(classes)
        return classes[int(number)] if named else str(int(number)) if whole else f"{number:.4g}"

    held = label.detach().cpu()
    if held.numel() == 1:
        return name(float(held))
    values = [round(v) if abs(v - round(v)) < WORDS_TO else v for v in held.flatten().tolist()]
    if held.ndim == 1 and held.is_floating_point() and min(values) >= 0 and abs(sum(values) - 1) < 1e-3:
        said = sorted(((v, j) for j, v in enumerate(values) if v >= 0.005), reverse=True)
        return name(said[0][1]) if len(said) == 1 else ", ".join(f"{100 * v:.0f} % {name(j)}" for v, j in said[:5])
    if held.ndim == 1 and set(values) <= {0, 1} and len(values) == len(classes):
        return ", ".join(classes[j] for j, v in enumerate(values) if v) or "none"
    if held.ndim == 1 and len(values) <= 12:
        return f"[{', '.join(f'{v:.4g}' for v in values)}]"
    sides = " x ".join(map(str, held.shape))
    if not held.is_floating_point() or set(values) <= {0.0, 1.0}:
        return f"{sides} labels: {', '.join(f'{times} of {name(v)}' for v, times in Counter(values).most_common(5))}"
    return f"{sides} numbers from {min(values):.4g} to {max(values):.4g}"


def _spelt(labels: Tensor) -> str:
    return f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"


def _classes_below(labels: Tensor, k: int) -> bool:
    return bool(((labels == labels.round()) & (labels >= 0) & (labels < k)).all()) if labels.numel() else True


def _numbers_of_one(labels: Tensor, form: LabelForm) -> bool:
    """Whether labels are class numbers although their shape could be that of rows."""
    return not labels.is_floating_point() and tuple(labels.shape[1:]) == form.shape
