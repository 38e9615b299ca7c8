"""Next tokens: the sentences of a language model's batch, by what the head's gradient says follows each beginning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.tokens.assembly import ALIKE_TO, WHOLE_TO, Batch
from unbatch.inversion.tokens.fronts import Front, TokenReader
from unbatch.network.precision import loss_value
from unbatch.network.products import multiplied

IGNORED = -100  # the label that says that no answer is asked for
SLOPE_TO = 1e-9  # relative, to which a loss has cross entropy's derivative
MIDDLE_WORDS = 0.5  # the share of words whose gradient tells a beginning's weight, as none of them follows it


def next_tokens(reader: TokenReader, beginnings: Tensor, lengths: Tensor) -> Batch:
    """The batch of a language model from the beginnings [p, t] (padded, of `lengths` [p]) of its sentences.

    The head's gradient is sum_u (c_u p_u - m_u) h_u^T / N over the different beginnings u: h_u what enters the head behind
    it, p_u the predicted probabilities, m_u how often each token follows it and c_u how often any does. The h_u are
    independent, so each bracket is known; its middle entries tell c_u / N, and the rest m_u. Sentences are the paths
    through the tree of beginnings, and end where less goes on than comes in.
    Raises NotApplicable: the outputs are no next token's scores, the head sent no gradient of its own, or counts are not
    whole.
    """
    front = _head(reader)
    order = lengths.argsort(stable=True)
    beginnings, lengths = beginnings[order], lengths[order]
    each = torch.arange(len(lengths), device=lengths.device)
    entering = reader.rows(front, beginnings)[each, lengths - 1]  # [p, d]
    kept = ~repeats(entering)
    beginnings, lengths, entering = beginnings[kept], lengths[kept], entering[kept]
    each, at = each[: len(lengths)], lengths - 1
    if len(entering) >= front.width:
        raise NotApplicable(
            f"{len(entering)} beginnings enter a head of width {front.width}, and cannot be told apart."
        )
    weight_name = front.layers[0][0]
    gradient = reader.view.update[weight_name].double()  # [v, d]
    sent = torch.linalg.lstsq(entering.T, gradient.T).solution  # [p, v]
    predicted = _predicted(reader, beginnings)[each, at]  # [p, v]
    share = (sent / predicted.clamp_min(1e-300)).median(1).values  # c_u / N
    follows = share[:, None] * predicted - sent  # m_u / N
    first = float(share[lengths == 1].sum())
    counts = _whole_counts(follows, first, reader.view.knowledge.get("batch_size"))
    sentences = _paths(beginnings, lengths, counts)
    return labelled(reader, sentences)


def repeats(rows: Tensor) -> Tensor:
    """Which rows [p, d] are the same as an earlier one: a lone word repeated, where positions do not enter."""
    same = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") <= ALIKE_TO * rows.norm(dim=1)
    found: Tensor = (same & torch.ones_like(same).tril(-1)).any(1)
    return found


def _head(reader: TokenReader) -> Front:
    """The front of the dense layer whose outputs are scores of words at each position."""
    front = reader.fronts[-1]
    name, side, _, _ = front.layers[0]
    weight = dict(reader.model.named_parameters())[name]
    if front.reach == "sentence" or side != 1 or len(weight) != reader.vocabulary or len(front.layers) > 1:
        raise NotApplicable("the last dense layer that sent a gradient does not score the next token at each position.")
    return front


def _predicted(reader: TokenReader, beginnings: Tensor) -> Tensor:
    """The probabilities [p, t, v] that the model gives to each next token.

    Raises NotApplicable: the loss is no cross entropy of outputs [n, v, t] and next tokens [n, t].
    """
    outputs = multiplied(reader.model, beginnings, reader.mode).outputs
    p, t = beginnings.shape
    if outputs is None or outputs.shape != (p, reader.vocabulary, t):
        raise NotApplicable("the outputs are no scores of next tokens [n, vocabulary, length].")
    probe = outputs[:1].double().detach().requires_grad_()
    labels = torch.full((1, t), IGNORED, device=beginnings.device)
    labels[0, 0] = 1
    try:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss_value(reader.view.loss, probe, labels), probe)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise NotApplicable(f"the loss takes no next tokens as labels: {error}") from error
    expected = probe.detach().softmax(1)[0, :, 0]
    expected[1] -= 1
    if float((slope[0, :, 0] - expected).norm()) > SLOPE_TO * float(expected.norm()):
        raise NotApplicable("the loss is no mean of cross entropies over next tokens.")
    return outputs.double().softmax(1).transpose(1, 2)


def _whole_counts(follows: Tensor, first: float, n: int | None) -> Tensor:
    """How often each token follows each beginning [p, v], whole numbers; `first` is n in the unit of `follows`."""
    sizes = [n] if n is not None else range(1, 1025)
    for size in sizes:
        counts = follows * (size / first) if first > 0 else follows
        near = counts.round()
        if bool(((counts - near).abs() < WHOLE_TO).all() and (near >= 0).all()):
            return near.long()
    raise NotApplicable("what follows the beginnings that were found is no whole number of times: some are missing.")


def _paths(beginnings: Tensor, lengths: Tensor, counts: Tensor) -> list[list[int]]:
    """The sentences, each as often as it occurs, from how often tokens follow beginnings."""
    t = beginnings.shape[1]
    known = {tuple(u[:k]): c for u, k, c in zip(beginnings.tolist(), lengths.tolist(), counts, strict=True)}
    found = list[list[int]]()
    for u, follow in known.items():
        for token in follow.nonzero().flatten().tolist():
            onward = int(known[*u, token].sum()) if len(u) < t and (*u, token) in known else 0
            ending = int(follow[token]) - onward
            if ending < 0:
                raise NotApplicable("more sentences go on from a beginning than come to it.")
            found += [[*u, token]] * ending
    return found


def labelled(reader: TokenReader, sentences: Sequence[list[int]]) -> Batch:
    """Sentences as inputs [n, t] with their next tokens, in the form of labels that explains the update best."""
    t = reader.length
    fill = reader.padding if reader.padding is not None else 0
    inputs = torch.tensor([[*s[:t], *[fill] * (t - len(s))] for s in sentences], device=reader.view.obs.device)
    following = [[*s[1 : t + 1], *[IGNORED] * (t + 1 - len(s))] for s in sentences]
    shifted = torch.tensor(following, device=inputs.device)
    there = torch.tensor([[k < len(s) for k in range(t)] for s in sentences], device=inputs.device)
    own = torch.where(there, inputs, IGNORED)
    best: tuple[float, Tensor] = (torch.inf, shifted)
    for labels in (shifted, own):  # the model shifts them itself
        try:
            best = min(best, (reader.view.obs.fit(inputs, labels)[1], labels), key=lambda found: found[0])
        except (RuntimeError, UnbatchError, IndexError):
            continue
    return Batch(inputs, best[1])
