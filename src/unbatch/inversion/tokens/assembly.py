"""Assembly: how often each sentence occurs in the batch, and with which labels, by the gradient's being their sum."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.loss import Loss
from unbatch.network.precision import loss_value
from unbatch.network.products import Product, multiplied
from unbatch.observation import Observation
from unbatch.protocol import Update

WHOLE_TO = 0.1  # an occurrence that near to a whole number is one
WHOLE_TO_AFTER_STEPS = 0.4  # the same where the network moves under the client, whose steps are then run again
MOST_LABELS = 64  # that one sentence can have, each tried
MOST_SIMULATED = 2048  # updates of one sentence with one label
MOST_SUMMED = 2**18  # numbers of them that are compared
MOST_ORDERED = 4  # examples of a batch whose orders are tried
MOST_BATCH = 1024  # examples of a batch whose size is not known
ALIKE_TO = 1e-10  # relative, between outputs that are the same
WEIGHT_TO = 1e-6  # of a label's weight in the loss, from which on it is another than the first one's
EXPLAINED_TO = 0.05  # relative, what a batch may leave of an update that it is told from up to a factor
NULL_TO = 1e-9  # a singular value of the labels' own columns below which they are dependent


@dataclass(frozen=True, eq=False)
class Batch:
    """Sentences with their labels, as many times as they occur."""

    inputs: Tensor  # [n, t]
    labels: Tensor  # [n, ...]


def sentence_labels(reader: TokenReader, outputs: Tensor) -> list[Tensor]:
    """Every label that one sentence can have, each [1, ...] as the loss takes it. Raises NotApplicable: not a few."""
    every = reader.view.labels.every(outputs)
    if not 0 < len(every) <= MOST_LABELS:
        raise NotApplicable(
            "the labels of a sentence are not one of a few, and the update does not say which they are."
        )
    return every


def assembled(reader: TokenReader, sentences: Tensor) -> Batch:
    """The batch that the update is of, from different sentences [m, t] among which all of its own are.

    A gradient is linear in the examples: sum over sentences and labels of (occurrences) g(sentence, label) / n. The head's
    gradient tells the share of each where the head was trained, else a few simulated updates of the smaller tensors. Shares
    are found up to what the labels of one sentence have in common (their columns add up to zero, weighted by the predicted
    probabilities), and that is settled by their being whole numbers. Under class weights a share is w_label / sum_i w_i,
    and clipping puts a factor on all of them: then the known size of the batch tells the unit, and the batch has to explain
    the update.
    Raises NotApplicable: these sentences do not explain the gradient, or labels are not few.
    """
    sentences = _once(reader, sentences)
    run = multiplied(reader.model, sentences, reader.mode)
    if run.outputs is None or not len(sentences):
        raise NotApplicable("no sentence passed.")
    outputs = run.outputs.double()
    labels = sentence_labels(reader, outputs)
    slopes = _slopes(reader.view.loss, outputs, labels)  # [m, l, k]
    told = _by_head(reader, run.products, outputs, slopes)
    shares = told if told is not None else _by_updates(reader.view.obs, sentences, labels)
    if reader.view.steps > 1:
        shares = -shares  # a difference of parameters goes down the gradient
    power, weights = _reduction(reader.view.loss, outputs, labels)
    n = reader.view.knowledge.get("batch_size")
    counts = _counts(shares, slopes, power, n) if bool((weights == 1).all()) else None
    if counts is not None:
        return _batch_of(counts, sentences, labels)
    whole_to = WHOLE_TO_AFTER_STEPS if reader.view.steps > 1 else WHOLE_TO
    counts = _counts_in_proportion(shares, slopes, weights, n, whole_to)
    found = _batch_of(counts, sentences, labels) if counts is not None else None
    if found is None or reader.view.obs.fit(found.inputs, found.labels)[1] > EXPLAINED_TO:
        raise NotApplicable("the sentences that were found do not add up to the gradient, so that some are missing.")
    return found


def in_order(obs: Observation, batch: Batch) -> Batch:
    """The batch in the order in which local steps on parts of it explain the update best, where orders are few."""
    n, protocol = len(batch.inputs), obs.protocol
    if protocol.steps(n) < 2 or (protocol.local_batch_size or n) >= n or n > MOST_ORDERED:
        return batch
    orders = [list(order) for order in itertools.permutations(range(n))]
    best = min(orders, key=lambda order: obs.fit(batch.inputs[order], batch.labels[order])[1])
    return Batch(batch.inputs[best], batch.labels[best])


def _batch_of(counts: Tensor, sentences: Tensor, labels: Sequence[Tensor]) -> Batch:
    """The batch of sentences [m, t] that occur with each of the labels so many times [m, l]."""
    which = counts.nonzero()
    times = counts[which[:, 0], which[:, 1]]
    rows = which.repeat_interleave(times, 0)
    return Batch(sentences[rows[:, 0]], torch.cat(list(labels))[rows[:, 1]])


def _once(reader: TokenReader, sentences: Tensor) -> Tensor:
    """The shortest of the sentences that no output tells apart, as none tells how often a lone word is repeated."""
    if not len(sentences):
        return sentences
    order = (sentences != reader.padding).sum(1).argsort(stable=True) if reader.padding is not None else slice(None)
    sentences = sentences[order]
    outputs = multiplied(reader.model, sentences, reader.mode).outputs
    if outputs is None:
        return sentences
    flat = outputs.double().flatten(1)
    same = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") <= ALIKE_TO * flat.norm(dim=1)
    earlier = same & torch.ones_like(same).tril(-1)
    return sentences[~earlier.any(1)]


def _slopes(loss: Loss, outputs: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """What the loss of one sentence alone sends back to its outputs, for every label; [m, l, k]."""
    found = []
    for one in outputs:
        found.append(torch.stack([_slope(loss, one[None], y).flatten() for y in labels]))
    return torch.stack(found)


def _slope(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss's derivative at outputs [n, ...], of the same shape."""
    at = outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = loss_value(loss, at, labels.to(at) if labels.is_floating_point() else labels)
        (slope,) = torch.autograd.grad(value, at)
    return slope


def _reduction(loss: Loss, outputs: Tensor, labels: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The power of n by which the loss divides a sum over n examples, 1 of a mean, 0 of a sum; each label's weight [l].

    Beside an example of label 0 one of label l counts w_l / (w_l + w_0) of what it does alone, where the mean is one over
    weights; weights are in units of the first label's, and 1 under all other losses.
    """
    shares = list[float]()
    for y in labels:
        alone = _slope(loss, outputs[:1], y)[0]
        beside = _slope(loss, torch.cat([outputs[:1]] * 2), torch.cat([y, labels[0]]))[0]
        shares.append(float(beside.norm() / alone.norm().clamp_min(1e-300)))
    share = torch.tensor(shares, dtype=torch.float64, device=outputs.device)
    if not bool(((share > 0) & (share < 1 - ALIKE_TO)).all()):
        return (1.0 if float(share[0]) < 0.75 else 0.0), torch.ones_like(share)
    weights = share / (1 - share)
    even = bool(((weights - 1).abs() < WEIGHT_TO).all())
    return 1.0, torch.ones_like(weights) if even else weights


def _by_head(reader: TokenReader, products: Sequence[Product], outputs: Tensor, slopes: Tensor) -> Tensor | None:
    """The shares [m, l] by the gradient of the dense layer whose outputs are the network's; None where there is none."""
    update, m = reader.view.update, len(outputs)
    head = products[-1] if products else None
    if head is None or head.weight not in update or outputs.ndim != 2:
        return None
    if len(head.rows) != m or m >= head.rows.shape[1]:
        return None
    weight = dict(reader.model.named_parameters())[head.weight].detach()
    made = head.rows @ (weight.T if head.side == 1 else weight)
    if made.shape != outputs.shape:
        return None
    bias = outputs - made
    if float((bias - bias[:1]).norm()) > ALIKE_TO * float(outputs.norm() + bias.norm()):
        return None
    gradient = head.gradient(update)  # [k, d]
    sent = torch.linalg.lstsq(head.rows.T, gradient.T).solution  # [m, k]
    return torch.stack([torch.linalg.pinv(s.T) @ g for s, g in zip(slopes, sent, strict=True)])


def _by_updates(obs: Observation, sentences: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """The shares [m, l] by simulated updates of each sentence with each label, on the smaller tensors."""
    if len(sentences) * len(labels) > MOST_SIMULATED:
        raise NotApplicable("the head sent no gradient, and there are too many sentences and labels to try them all.")
    names, numbers = list[str](), 0
    for name in sorted(obs.update, key=lambda name: obs.update[name].numel()):
        if not names or numbers + obs.update[name].numel() <= MOST_SUMMED:
            names.append(name)
            numbers += obs.update[name].numel()

    def flat(update: Update) -> Tensor:
        return torch.cat([update[name].detach().double().flatten() for name in names])

    try:
        columns = torch.stack([flat(obs.simulate(s[None], y)) for s in sentences for y in labels], 1)
    except (RuntimeError, UnbatchError) as error:
        raise NotApplicable(f"no update of one sentence can be simulated: {error}") from error
    found: Tensor = torch.linalg.pinv(columns, rtol=1e-6) @ flat(obs.update)
    return found.view(len(sentences), len(labels))


def _counts(shares: Tensor, slopes: Tensor, power: float, n: int | None) -> Tensor | None:
    """How often each sentence has each label [m, l], from its share of the gradient; None: no whole number of times."""
    for size in [n] if n is not None else range(1, MOST_BATCH + 1):
        counts = _whole(shares * size**power, slopes)
        if counts is not None and int(counts.sum()) == size and len(shares):
            return counts
    return None


def _counts_in_proportion(
    shares: Tensor, slopes: Tensor, weights: Tensor, n: int | None, whole_to: float
) -> Tensor | None:
    """The same in a batch of n by the proportion of the shares alone, under labels' weights [l]; None: none is whole."""
    least = _least(shares, slopes)
    if n is None or least is None or not float((least / weights).sum()) > 0:
        return None
    counts = least / weights
    counts = counts * (n / counts.sum())
    near = counts.round()
    whole = bool(((counts - near).abs() < whole_to).all()) and int(near.sum()) == n
    return near.long() if whole else None


def _least(shares: Tensor, slopes: Tensor) -> Tensor | None:
    """The shares [m, l] of which each sentence has at least one that is 0 and none below it, as they are up to a factor.

    None: its labels have more in common than one direction.
    """
    rows = list[Tensor]()
    for share, slope in zip(shares, slopes, strict=True):
        S, Vh = torch.linalg.svd(slope.T)[1:]
        common = Vh[torch.cat([S, S.new_zeros(len(Vh) - len(S))]) <= NULL_TO * S[:1]]
        if len(common) > 1:
            return None
        if len(common):
            p = common[0] / common[0].sum()
            share = share - (share / p.clamp_min(1e-300)).min() * p
        rows.append(share)
    return torch.stack(rows)


def _whole(shares: Tensor, slopes: Tensor) -> Tensor | None:
    """Whole numbers near to shares [m, l] up to what each sentence's labels have in common; None where there are none."""
    rows = list[Tensor]()
    for share, slope in zip(shares, slopes, strict=True):
        S, Vh = torch.linalg.svd(slope.T)[1:]
        full = torch.cat([S, S.new_zeros(len(Vh) - len(S))])
        common = Vh[full <= NULL_TO * full[:1]]
        if len(common) > 1:
            return None
        if not len(common):
            tries = [share]
        else:
            p = common[0] / common[0].sum()
            least = float((share / p.clamp_min(1e-300)).min())
            tries = [share - (least - j) * p for j in range(9)]
        whole = [t.round() for t in tries if bool(((t - t.round()).abs() < WHOLE_TO).all() and (t > -0.5).all())]
        if not whole:
            return None
        rows.append(whole[0].long())
    return torch.stack(rows)
