"""Table rows: one sentence out of the rows of two tables, its tokens' and its positions', whatever the optimiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unbatch.errors import NotApplicable
from unbatch.inversion.label_fit import explaining_label, possible_labels
from unbatch.inversion.tokens.assembly import EXPLAINED_TO, WHOLE_TO, Batch
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.network.dense import in_mode
from unbatch.network.precision import outputs_of
from unbatch.progress import tick

SAME_ROWS_TO = 1e-9  # relative, of gradients of two runs in float64
ROW_MOVE_ROUNDINGS = 4.0  # by which a step that was worked out of a difference of parameters may be off
SETTLED = 2  # times that the label is asked for once more
MOST_OPEN = 24  # places whose tokens are searched for
MOST_SWEEPS = 4  # over the places whose tokens are no more than likely


def sentence_by_rows(reader: TokenReader) -> Batch:
    """The one sentence of the batch, with its label, where tokens and positions are both looked up in trained tables.

    A place i sends back one vector to the row of its token and to the row of its position, so that for one sentence

        dL/d(token v) = sum over i with x_i = v of dL/d(position i):

    a token that occurs once has the row of its place. Optimisers that treat every entry by itself, such as AdamW, step
    alike where gradients are alike, in every local step, so that their steps are equal too, less the decay of each row's
    own weights. Tokens that occur several times are sums (least squares); after AdamW they, and those whose rows are alike
    to rounding, are tried at the places that are left, by what explains the update. Neither width nor depth matters, nor
    what follows the tables. What was read is held to the whole update.
    Raises NotApplicable: one of the tables was not sent, the batch is of more than one sentence, or nothing is explained.
    """
    view = reader.view
    if view.knowledge.get("batch_size", 1) != 1:
        raise NotApplicable("rows of tables are sums over the sentences of a batch.")
    if len(view.outputs) > 1:
        raise NotApplicable("each token has a label of its own.")
    name, places = _positions(reader)
    if reader.tied or reader.embedding not in view.update or name not in view.update:
        raise NotApplicable("a table of tokens or of positions was not sent, or the head is tied to it.")
    tokens, stands = _Rows.of(reader, reader.embedding), _Rows.of(reader, name).at(places)
    used = tokens.moved.nonzero().flatten()
    used = used[used != reader.padding] if reader.padding is not None else used
    heard = stands.moved.nonzero().flatten()
    if not len(heard) or not 0 < len(used) <= len(heard):
        raise NotApplicable(f"{len(used)} tokens at {len(heard)} places are not those of one sentence.")
    if reader.padding is None and len(heard) < reader.length:
        raise NotApplicable("nothing comes back to some places, and the padding is not known.")
    sentence = torch.full((reader.length,), reader.padding or 0, device=view.obs.device)
    owner, open_ = _owners(tokens.at(used), stands.at(heard), linear=view.protocol.optimiser == "sgd")
    sentence[heard] = used[owner]
    x = sentence[None]
    x, label = _searched(reader, x, heard[open_])
    if label is not None and view.protocol.optimiser != "sgd" and view.obs.fit(x, label)[1] > EXPLAINED_TO:
        x, label = _searched(reader, x, heard)  # a sum's signs may be by chance those of one place
    if label is None or view.obs.fit(x, label)[1] > EXPLAINED_TO:
        raise NotApplicable("the sentence that the tables' rows add up to does not explain the update.")
    return Batch(x, label)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a table's update without the decay of its own weights, and how far each entry may be off."""

    values: Tensor  # [rows, width]
    off: Tensor

    @classmethod
    def of(cls, reader: TokenReader, name: str) -> _Rows:
        """Raises NotApplicable: the optimiser mixes the gradient with the weights."""
        obs, protocol = reader.view.obs, reader.view.protocol
        u, w = obs.update[name].double(), reader.view.model.get_parameter(name).detach().double()
        eps, steps = torch.finfo(obs.update[name].dtype).eps, reader.view.steps
        off = ROW_MOVE_ROUNDINGS * (eps * u.abs() + obs.rounding(name) + float(obs.knowledge.get("noise", 0.0)))
        if steps:
            mixes = protocol.optimiser == "adam" or (protocol.optimiser == "sgd" and protocol.momentum)
            if protocol.weight_decay and mixes:
                raise NotApplicable("weight decay is part of what the optimiser rescales, and differs from row to row.")
            u = u - ((1 - protocol.learning_rate * protocol.weight_decay) ** steps - 1) * w
            off = off + ROW_MOVE_ROUNDINGS * eps * steps * w.abs()
        return cls(u.reshape(-1, u.shape[-1]), off.reshape(-1, u.shape[-1]))

    def at(self, rows: Tensor) -> _Rows:
        """Some of the rows."""
        return _Rows(self.values[rows], self.off[rows])

    @property
    def moved(self) -> Tensor:
        """Which rows anything was sent back to."""
        return (self.values.abs() > self.off).any(1)


def _owners(tokens: _Rows, places: _Rows, *, linear: bool) -> tuple[Tensor, Tensor]:
    """Which of the tokens [a] stands at each of the places [t], and at which places that is no more than likely.

    Raises NotApplicable: the rows are no sums of one sentence.
    """
    gap = (tokens.values[:, None] - places.values).abs()
    same = (gap <= tokens.off[:, None] + places.off).all(2)  # [a, t]
    sure = same & (same.sum(0) == 1) & (same.sum(1, keepdim=True) == 1)
    owner = torch.where(sure.any(0), sure.double().argmax(0), -1)
    several, open_ = (~sure.any(1)).nonzero().flatten(), (owner < 0).nonzero().flatten()
    if len(open_) < len(several) or (len(open_) and not len(several)):
        raise NotApplicable("the rows of tokens and of positions are not those of one sentence.")
    if len(several) == 1:
        owner[open_] = several
    elif len(several):
        pick = _whole_shares if linear else _likely_shares
        owner[open_] = several[pick(tokens.values[several], places.values[open_])]
    return owner, open_ if len(several) > 1 and not linear else open_[:0]


def _whole_shares(sums: Tensor, places: Tensor) -> Tensor:
    """Which of the sums [b, width] each place's row [t, width] is a term of.

    Raises NotApplicable: rows are no sums of these.
    """
    shares = torch.linalg.lstsq(places.T, sums.T).solution  # [t, b]
    best: Tensor = shares.argmax(1)
    if float((shares - F.one_hot(best, len(sums))).abs().max()) > WHOLE_TO:
        raise NotApplicable("the rows of tokens are no sums of those of positions: more than one sentence.")
    return best


def _likely_shares(sums: Tensor, places: Tensor) -> Tensor:
    """The same by signs that agree: each of the sums has one place at least, and every place its likeliest."""
    from scipy.optimize import linear_sum_assignment

    agree = sums.sign() @ places.sign().T  # [b, t]
    found = agree.argmax(0)
    rows, columns = linear_sum_assignment(-agree.cpu().numpy())
    found[torch.as_tensor(columns, device=found.device)] = torch.as_tensor(rows, device=found.device)
    return found


def _searched(reader: TokenReader, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor | None]:
    """The sentence [1, t], searched for at these places where they are few, and the label that explains it best."""
    obs, labels = reader.view.obs, possible_labels(reader.view)
    label = explaining_label(obs, x, labels)
    for _ in range(SETTLED if 0 < len(places) <= MOST_OPEN else 0):
        if label is not None:
            x = _settled(reader, x, label, places)
            label = explaining_label(obs, x, labels)
    return x, label


def _settled(reader: TokenReader, x: Tensor, label: Tensor, places: Tensor) -> Tensor:
    """The sentence [1, t] whose tokens at these places explain the update best: exchanged, or set to another of them."""
    obs, tokens = reader.view.obs, torch.unique(x[0, places]).tolist()
    at = places.tolist()
    best = obs.residual(x, label)
    for sweep in range(MOST_SWEEPS):
        before = best
        for k, i in enumerate(at):
            ways = [{i: x[0, j], j: x[0, i]} for j in at[k + 1 :]] + [{i: token} for token in tokens]
            for way in ways:
                new = x.clone()
                for j, token in way.items():
                    new[0, j] = token
                left = best if torch.equal(new, x) else obs.residual(new, label)
                if left < best:
                    best, x = left, new
            if not tick((sweep + k / len(at)) / MOST_SWEEPS):
                return x
        if best in (before, 0.0):
            break
    return x


def _positions(reader: TokenReader) -> tuple[str, Tensor]:
    """The table whose rows hear what tokens hear, by its place in the sentence, and the row of each place [t].

    Found by running two random sentences of different tokens: no name is looked at.
    Raises NotApplicable: there is none.
    """
    rng, t = torch.Generator().manual_seed(0), reader.length
    if len(reader.words) < t:
        raise NotApplicable("the vocabulary is smaller than a sentence is long.")
    found: list[tuple[str, Tensor]] = []
    for number in range(2):
        sentence = reader.words[torch.randperm(len(reader.words), generator=rng)[:t].to(reader.words.device)]
        held = {k: p.detach().requires_grad_() for k, p in reader.model.named_parameters() if k in reader.view.update}
        if reader.embedding not in held:
            raise NotApplicable("the tokens' table was not sent.")
        with torch.enable_grad(), in_mode(reader.model, reader.mode):
            outputs = outputs_of(reader.model, sentence[None], held, twice=True)
            slope = torch.randn(outputs.shape, generator=rng, dtype=torch.float64).to(outputs)
            sent = torch.autograd.grad((outputs * slope).sum(), list(held.values()), materialize_grads=True)
        gradients = dict(zip(held, sent, strict=True))
        back = gradients.pop(reader.embedding)[sentence]  # [t, width]
        each = [(k, _where(back, g)) for k, g in gradients.items()] if not number else found
        found = [
            (k, at) for k, at in each if at is not None and _equal(gradients[k].reshape(-1, back.shape[1])[at], back)
        ]
    if not found:
        raise NotApplicable("no table that was sent holds one row for each place.")
    return found[0]


def _where(back: Tensor, gradient: Tensor) -> Tensor | None:
    """The rows of a gradient that are the vectors [t, width], each once; None where it has no such rows."""
    if not gradient.ndim or gradient.shape[-1] != back.shape[1] or gradient.numel() < back.numel():
        return None
    rows = gradient.reshape(-1, back.shape[1])
    nearest = torch.cdist(back, rows, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    return nearest if len(torch.unique(nearest)) == len(nearest) and _equal(rows[nearest], back) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME_ROWS_TO * b.abs().max())
