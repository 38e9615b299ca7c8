"""Which label explains the update of one example, once its input is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from unbatch.inversion.view import View
from unbatch.network.dense import forward, layer_inputs
from unbatch.network.precision import in_double, loss_value
from unbatch.observation import Observation

# Two classes may share a gradient up to sign, and then their fits differ by rounding: so many digits count.
DIGITS_OF_A_FIT = 4
EXPLAINS = 1e-3  # relative misfit below which a label explains an update
MOST_SOLVED_ENTRIES = 256  # of a label that is solved for: as many updates are simulated
MOST_SOLVED_NUMBERS = 10**8  # of those updates together; beyond, the last tensors alone are looked at
BITS_TO = 1e-3  # a solved label that is zeros and ones to that is read as such
SURE_FIT = 1e-2  # relative misfit above which no fit is to rounding, whatever the precision


def possible_labels(view: View) -> list[Tensor]:
    """The labels that one example may have, each as the loss takes a batch of one: the known one, else every class.

    Empty where there is no finite number of them (real targets, one label a pixel), or the loss takes none that is known.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> possible_labels(View.of(seen))
    [tensor([0]), tensor([1]), tensor([2])]
    """
    known, form = view.known_labels, view.form
    if known is not None:
        return [known]
    every = view.labels.every(torch.zeros((), dtype=next(view.model.parameters()).dtype, device=view.obs.device))
    return [y for y in every if form is None or bool(form.weight_of(y) > 0)]  # an ignored one sends no update


def explaining_label(obs: Observation, inputs: Tensor, candidates: Sequence[Tensor]) -> Tensor | None:
    """The candidate label with which the gradient at `inputs` [1, *shape] explains the update best, up to a factor.

    Where two classes share a gradient up to sign, the factor that is nearest to 1 tells them apart. The first of more than
    two that fits to rounding is taken. None where there are no candidates.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> explaining_label(seen, x, possible_labels(View.of(seen)))
    tensor([2])
    """
    best: tuple[float, float, Tensor | None] = (torch.inf, torch.inf, None)
    kind = next(obs.model.parameters()).dtype
    for y in candidates:
        factor, fit = obs.fit(inputs, y.to(kind) if y.is_floating_point() else y)
        best = min(best, (round(fit, DIGITS_OF_A_FIT), abs(factor - 1), y), key=lambda found: found[:2])
        if len(candidates) > 2 and fit < min(1e3 * torch.finfo(obs.dtype).eps, SURE_FIT):
            break
    return best[2]


def label_behind(view: View, inputs: Tensor, candidates: Sequence[Tensor] | None = None) -> Tensor | None:
    """The label [1, ...] that explains the update of one example, as the loss takes it; None where none can be told.

    One of the `candidates` (every possible one if not given) up to a factor; where none of them explains it, or there are
    none, the real numbers, bits or probabilities that do, since a gradient is affine in them under all usual losses.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng)
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, torch.tensor([[0.2, 0.5, 0.3]]))
    >>> label_behind(View.of(seen), x)
    tensor([[0.2000, 0.5000, 0.3000]])
    """
    hard = explaining_label(view.obs, inputs, possible_labels(view) if candidates is None else candidates)
    if view.steps or "labels" in view.knowledge:
        return hard
    if hard is not None and view.obs.fit(inputs, hard)[1] < EXPLAINS:
        return hard
    soft = _solved_label(view, inputs)
    return hard if soft is None else soft


def labels_sent_by_head(view: View, inputs: Tensor) -> Tensor | None:
    """The labels [n, ...] of all of a batch behind a gradient, by what the head was given; None where none can be told.

    dL/dW = S^T F with F [n, d] what the inputs [n, *shape] give the head, so that S, what the loss sends back to each
    example's outputs, is solved for, and each takes the class whose loss sends that. Needs F of full rank.

    >>> import unbatch
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(3, 4, generator=rng), torch.tensor([2, 0, 2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> labels_sent_by_head(View.of(seen), x.double())
    tensor([2, 0, 2])
    """
    head, known = view.head, view.known_labels
    if head is None or head.weight not in view.update or view.steps:
        return None
    every = possible_labels(view) if known is None else list(torch.unique(known, dim=0).split(1))
    if not every:
        return None
    model = in_double(view.model)
    F = layer_inputs(model, head.name, inputs, view.protocol.mode).double()
    G = view.update[head.weight].double()
    if head.bias is not None and head.bias in view.update:
        F, G = torch.cat([F, torch.ones_like(F[:, :1])], 1), torch.cat([G, view.update[head.bias].double()[:, None]], 1)
    sent = torch.linalg.lstsq(F.T, G.T).solution  # [n, k]
    outputs = forward(model, inputs, view.protocol.mode)
    turned = list[Tensor]()
    for y in every:
        at = outputs.detach().requires_grad_()
        with torch.enable_grad():
            labels = y.to(at.dtype if y.is_floating_point() else y.dtype).expand(len(inputs), *y.shape[1:])
            (slope,) = torch.autograd.grad(loss_value(view.loss, at, labels), at)
        turned.append(torch.cosine_similarity(slope.flatten(1), sent, dim=1))
    return torch.cat([every[int(k)] for k in torch.stack(turned).nan_to_num(-1.0).argmax(0)])


def _solved_label(view: View, inputs: Tensor) -> Tensor | None:
    """The label in real numbers of one example by linear least squares; None where no such label explains the update."""
    obs, form = view.obs, view.labels
    shape = form.rows if form.kind == "class" else None if form.whole or form.kind == "sign" else form.shape
    if shape is None or not form.sloped:
        return None
    blank = torch.zeros(1, *shape, dtype=next(obs.model.parameters()).dtype, device=obs.device)
    entries = blank.numel()
    if entries > MOST_SOLVED_ENTRIES:
        return None
    names, numbers = list[str](), 0
    for name in reversed(list(obs.update)):
        if not names or (numbers + obs.update[name].numel()) * entries <= MOST_SOLVED_NUMBERS:
            names.append(name)
            numbers += obs.update[name].numel()

    def simulated(label: Tensor) -> Tensor:
        made = obs.simulate(inputs.to(blank), label)
        return _flat(made[name].detach() for name in names)

    unit = torch.eye(entries, dtype=blank.dtype, device=blank.device)
    at_zero = simulated(blank)
    columns = torch.stack([simulated(row.view_as(blank)) - at_zero for row in unit], 1)  # [p, entries]
    seen = _flat(obs.update[name] for name in names)
    right = seen - at_zero
    if form.kind == "class":  # probabilities add up to 1 at every position; the update alone does not tell their sum
        size = columns.norm() / entries**0.5
        sums = torch.ones(1, shape[0], dtype=torch.float64).kron(torch.eye(entries // shape[0], dtype=torch.float64))
        columns, right = (
            torch.cat([columns, size * sums.to(columns)]),
            torch.cat([right, size * right.new_ones(len(sums))]),
        )
    if not bool(columns.isfinite().all() and right.isfinite().all()):  # inputs of no size that the model takes
        return None
    found = torch.linalg.lstsq(columns.T @ columns, columns.T @ right[:, None]).solution[:, 0]
    label = found.to(blank).view_as(blank)
    if form.kind != "real" and float((label - label.round()).abs().max()) < BITS_TO:
        label = label.round()
    return label if obs.residual(inputs, label) < EXPLAINS else None


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])
