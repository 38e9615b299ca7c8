"""Token labels: what each token of a batch's sentences was labelled, where a model classifies every token by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.assembly import EXPLAINED_TO, WHOLE_TO, Batch
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.next_tokens import IGNORED
from unbatch.network.products import multiplied

ALIKE_TO = 1e-10  # relative, between vectors that are the same
SILENT_TO = 1e-3  # of the largest, below which a token has sent nothing: it has no label


def labels_each_token(reader: TokenReader) -> bool:
    """Whether the network gives scores [n, k, t] of k classes, which are not its words, to each token."""
    outputs = multiplied(reader.model, reader.draw(1, torch.Generator().manual_seed(0)), reader.mode).outputs
    return outputs is not None and outputs.ndim == 3 and outputs.shape[1:] != (reader.vocabulary, reader.length)


def labelled_tokens(reader: TokenReader, sentences: Tensor) -> Batch:
    """Sentences [n, t], each of which occurs once, with the label of each of their tokens [n, t], or `IGNORED`.

    The head's gradient is w sum_u (c_u p_u - m_u) h_u^T over what enters it: h_u behind different beginnings (or sentences
    and places), p_u the predicted probabilities, c_u how many tokens have it and m_u how many of these each label. The h_u
    are independent, so that each bracket is known up to w, which one with a single token tells.
    Raises NotApplicable: as many vectors as the head is wide, another loss, or sentences that are missing or begin alike
    and are labelled differently there, which nothing tells apart.
    """
    n = reader.view.knowledge.get("batch_size", len(sentences))
    if n > len(sentences):
        raise NotApplicable(f"{len(sentences)} different sentences were found, of {n}.")
    there = torch.ones_like(sentences, dtype=torch.bool) if reader.padding is None else sentences != reader.padding
    rows, predicted, gradient = _head(reader, sentences, there)
    which = _first_alike(rows)  # [q], for each token the number of the first one with its vector
    firsts, place = torch.unique(which, return_inverse=True)
    if len(firsts) >= rows.shape[1]:
        raise NotApplicable(f"{len(firsts)} tokens enter a head of width {rows.shape[1]}, and cannot be told apart.")
    sent = torch.linalg.lstsq(rows[firsts].T, gradient.T).solution  # [u, k]
    count = place.bincount(minlength=len(firsts))
    loud = sent.norm(dim=1) > SILENT_TO * sent.norm(dim=1).max()
    if n < len(sentences):  # some fit the spans and sent nothing
        heard = torch.zeros_like(there)
        heard[there] = (loud & (count == 1))[place]
        if int(heard.any(1).sum()) != n:
            raise NotApplicable(f"{int(heard.any(1).sum())} of the sentences that were found sent something, of {n}.")
        return labelled_tokens(reader, sentences[heard.any(1)])
    alone = loud & (count == 1)
    if not bool(alone.any()):
        raise NotApplicable("no token is alone behind its beginning, so that the unit of the labels is open.")
    p = predicted[firsts]
    label = sent[alone].argmin(1)
    unit = (-sent[alone].gather(1, label[:, None])[:, 0] / (1 - p[alone].gather(1, label[:, None])[:, 0])).median()
    counts = torch.where(loud[:, None], count[:, None] * p - sent / unit, 0)
    near = counts.round()
    mixed = (near > 0).sum(1) > 1
    if float((counts - near).abs().max()) > WHOLE_TO or bool((near.sum(1) != torch.where(loud, count, 0)).any()):
        raise NotApplicable("what the head was sent is no whole number of labels: sentences are missing.")
    if bool(mixed.any()):
        raise NotApplicable("sentences begin alike and are labelled differently there: nothing tells which is which.")
    each = torch.where(loud, near.argmax(1), IGNORED)[place]
    labels = torch.full_like(sentences, IGNORED)
    labels[there] = each
    if reader.view.obs.fit(sentences, labels)[1] > EXPLAINED_TO:
        raise NotApplicable("the sentences and labels that were found do not add up to the gradient.")
    return Batch(sentences, labels)


def _head(reader: TokenReader, sentences: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What enters the head at each token [q, d], the predicted probabilities [q, k], and the head's gradient [k, d]."""
    run = multiplied(reader.model, sentences, reader.mode)
    head = run.products[-1] if run.products else None
    if run.outputs is None or head is None or head.weight not in reader.view.update:
        raise NotApplicable("the head sent no gradient, which would tell each token's label.")
    outputs = run.outputs.double().transpose(1, 2)  # [n, t, k]
    weight = dict(reader.model.named_parameters())[head.weight].detach()
    made = head.rows @ (weight.T if head.side == 1 else weight)
    if len(head.rows) != sentences.numel() or made.shape[1] != outputs.shape[2]:
        raise NotApplicable("the last dense layer does not give the scores of each token.")
    off = outputs.flatten(0, 1) - made
    if float((off - off[:1]).norm()) > ALIKE_TO * float(outputs.norm() + off.norm()):
        raise NotApplicable("the last dense layer does not give the scores of each token.")
    return head.rows[there.flatten()], outputs.softmax(2)[there], head.gradient(reader.view.update)


def _first_alike(rows: Tensor) -> Tensor:
    """For each row [q, d] the number of the first one that is the same."""
    far = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    found: Tensor = (far <= ALIKE_TO * rows.norm(dim=1, keepdim=True)).int().argmax(1)
    return found
