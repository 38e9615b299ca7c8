"""Last tokens: how the sentences of a language model's batch end where its head sent no gradient of its own.

A head that is tied to the embedding sends the sum of two gradients, and a frozen one none. But the whole gradient is linear
in how often each token follows each beginning: sum_u J_u^T (c_u p_u - m_u), J_u the derivative of the scores behind the
beginning u by the parameters. All tokens but the last one of a sentence are known, as they are beginnings themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.tokens.assembly import WHOLE_TO
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.next_tokens import repeats
from unbatch.inversion.tokens.prefixes import Grown
from unbatch.network.dense import in_mode
from unbatch.network.precision import loss_value, outputs_of
from unbatch.network.products import multiplied

IGNORED = -100  # the label that says that no answer is asked for
MOST_COMPARED = 2**17  # entries of the update that are compared, drawn from all of its tensors
LEAST_SHARE = 256  # of them that each tensor has
ROUNDS = 24  # of trying more words
WORDS_A_ROUND = 4  # that are tried behind each beginning that ends a sentence, and a sentence
NUMBERS_AT_ONCE = 2**20  # of the outputs of one run over beginnings
RIGHT_TO = 1e3  # roundings of the whole update, below which a tensor may be nothing else
FORGOTTEN = 0.02  # times that a word follows, below which it is tried no more
EXPLAINED = 1e-2  # of what the last tokens send, relative, that may be left: the judge asks for all
SLOPE_TO = 1e-6  # relative, to which a loss has cross entropy's derivative


def last_tokens(reader: TokenReader, found: Grown) -> list[list[int]]:
    """The sentences of a language model's batch, from their beginnings, by least squares of the whole gradient.

    Which words come last is found by pursuit: what is left of the gradient is held against the derivative of every word's
    score behind every beginning at once, the likeliest words are fitted together, and so on until none is left.
    Where there are fewer beginnings that nothing extends than sentences, how often each occurs is fitted as well.
    Raises NotApplicable: the outputs or the loss are no language model's, or no words end the sentences.
    """
    ends, lengths, leaves = _distinct(reader, found)
    n = reader.view.knowledge.get("batch_size", leaves)
    if n < leaves or not leaves:
        raise NotApplicable(f"{leaves} beginnings are extended by none, of {n} sentences.")
    if n == leaves:
        ends, lengths = ends[:leaves], lengths[:leaves]
    fit = _Fit(reader, ends, lengths, n, leaves)
    times, follows = fit.pursued()
    sentences = list[list[int]]()
    for k, row in enumerate(ends.tolist()):
        begun, count = row[: int(fit.lengths[k])], 0
        for word, often in follows.get(k, {}).items():
            sentences += [[*begun, word]] * often
            count += often
        if count != int(times[k]):
            raise NotApplicable("the words that follow beginnings are more, or fewer, than the beginnings.")
    return sentences


def _distinct(reader: TokenReader, found: Grown) -> tuple[Tensor, Tensor, int]:
    """Beginnings [k, t] with their lengths [k], and how many of them nothing extends, which come first.

    Without those whose scores are a shorter one's: where positions do not enter, a lone word may be said twice.
    """
    every = torch.cat([found.leaves, found.inner])
    outputs = multiplied(reader.model, every, reader.mode).outputs
    if outputs is None or outputs.ndim != 3 or outputs.shape[2] != every.shape[1]:
        raise NotApplicable("the outputs are no scores of next tokens [n, vocabulary, length].")
    scores = outputs.double()[torch.arange(len(every), device=every.device), :, found.lengths - 1]
    order = found.lengths.argsort(stable=True)
    kept = torch.ones_like(order, dtype=torch.bool)
    kept[order] = ~repeats(scores[order])
    leaves = int(kept[: len(found.leaves)].sum())
    return every[kept], found.lengths[kept], leaves


@dataclass(frozen=True, eq=False)
class _Fit:
    """The gradient as a sum over beginnings that end sentences, in a sample of its entries."""

    reader: TokenReader
    ends: Tensor  # [k, t], padded
    lengths: Tensor  # [k]
    n: int  # sentences
    sure: int  # the first ones, each of which ends a sentence

    @cached_property
    def sample(self) -> dict[str, tuple[Tensor, float]]:
        """Of each tensor of the update which entries are compared, and by what they are divided.

        By its size, so that each counts alike; but a tensor of rounding alone, such as a key's bias has, counts for little.
        """
        update, rng = self.reader.view.update, torch.Generator().manual_seed(0)
        total = sum(u.numel() for u in update.values())
        least = RIGHT_TO * torch.finfo(self.reader.view.obs.dtype).eps
        least *= float(torch.stack([u.double().norm() for u in update.values()]).norm())
        found = {}
        for name, u in update.items():
            most = min(u.numel(), max(LEAST_SHARE, MOST_COMPARED * u.numel() // total))
            size = float(u.double().norm())
            if size:
                which = torch.randperm(u.numel(), generator=rng)[:most] if most < u.numel() else torch.arange(most)
                found[name] = (which.to(u.device), max(size, least) * (most / u.numel()) ** 0.5)
        return found

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Those of the tensors that are compared, as they can be differentiated by."""
        held = dict(self.reader.model.named_parameters())
        return {name: held[name].detach().requires_grad_() for name in self.sample}

    @cached_property
    def seen(self) -> Tensor:
        """The update's entries that are compared."""
        update = self.reader.view.update
        return self._sampled([update[name].double() for name in self.sample])

    def _sampled(self, tensors: list[Tensor]) -> Tensor:
        pairs = zip(tensors, self.sample.values(), strict=True)
        return torch.cat([tensor.flatten()[which] / size for tensor, (which, size) in pairs])

    def outputs(self, inputs: Tensor) -> Tensor:
        """The scores [k, v, t] of the next word at each position, in float64. Raises NotApplicable: they are none."""
        model = self.reader.model
        with torch.enable_grad(), in_mode(model, self.reader.mode):
            found: Tensor = outputs_of(model, inputs, self.parameters, twice=True)
        if found.shape != (len(inputs), self.reader.vocabulary, inputs.shape[1]):
            raise NotApplicable("the outputs are no scores of next tokens [n, vocabulary, length].")
        return found

    def sent(self, k: int, slopes: Tensor) -> Tensor:
        """The compared entries [s, D] of J^T slope for slopes [s, v, t] at the outputs of the beginning `k`, run once."""
        outputs, wanted = self.outputs(self.ends[k : k + 1]), list(self.parameters.values())
        found = []
        for slope in slopes:
            sent = torch.autograd.grad(outputs, wanted, slope[None], retain_graph=True, materialize_grads=True)
            found.append(self._sampled(list(sent)))
        return torch.stack(found)

    @cached_property
    def _at_once(self) -> list[Tensor]:
        """The numbers of the beginnings, as many at once as one run holds."""
        most = max(1, NUMBERS_AT_ONCE // (self.reader.vocabulary * self.ends.shape[1]))
        return list(torch.split(torch.arange(len(self.ends), device=self.ends.device), most))

    def scores(self, left: Tensor) -> Tensor:
        """The products [k, v] of what is left with the gradient of every word's score behind every beginning.

        Each beginning's outputs depend on its own words alone, so that one derivative of all of them gives every row.
        """
        start, ways = 0, list[Tensor]()
        for (which, size), p in zip(self.sample.values(), self.parameters.values(), strict=True):
            way = torch.zeros(p.numel(), dtype=torch.float64, device=p.device)
            way[which] = left[start : start + len(which)] / size
            ways.append(way.view(p.shape))
            start += len(which)
        wanted, found = list(self.parameters.values()), list[Tensor]()
        for rows in self._at_once:
            outputs = self.outputs(self.ends[rows])
            slope = torch.zeros_like(outputs, requires_grad=True)
            sent = torch.autograd.grad(outputs, wanted, slope, create_graph=True, allow_unused=True)
            along = torch.stack([(g * way).sum() for g, way in zip(sent, ways, strict=True) if g is not None]).sum()
            (turned,) = torch.autograd.grad(along, slope)
            found.append(turned[torch.arange(len(rows), device=rows.device), :, self.lengths[rows] - 1])
        return torch.cat(found)

    @cached_property
    def begun(self) -> Tensor:
        """What each beginning sends [k, D] without the word that follows it: over its places p, less its own words."""
        found = []
        for rows in self._at_once:
            slopes = self.outputs(self.ends[rows]).detach().softmax(1)
            for k, slope in zip(rows.tolist(), slopes, strict=True):
                row, length = self.ends[k], int(self.lengths[k])
                slope[:, length:] = 0
                slope[row[1:length], torch.arange(length - 1, device=row.device)] -= 1
                found.append(self.sent(k, slope[None]))
        return torch.cat(found)

    @cached_property
    def unit(self) -> float | None:
        """What the loss multiplies each label's part by; None where it is one over the number of labels.

        Raises NotApplicable: the loss is no cross entropy over next tokens.
        """
        probe = self.reader.draw(2, torch.Generator().manual_seed(2))
        outputs = self.outputs(probe).detach().requires_grad_()
        expected = outputs.detach().softmax(1)
        expected.scatter_add_(1, probe[:, None, 1:], -torch.ones_like(expected[:, :1, 1:]))
        expected[:, :, -1] = 0
        shifted = torch.cat([probe[:, 1:], torch.full_like(probe[:, :1], IGNORED)], 1)
        for labels in (shifted, probe):  # the model's own loss shifts them
            try:
                with torch.enable_grad():
                    (slope,) = torch.autograd.grad(loss_value(self.reader.view.loss, outputs, labels), outputs)
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue
            ratio = float((slope * expected).sum() / expected.square().sum())
            if float((slope - ratio * expected).norm()) <= SLOPE_TO * float(slope.norm()):
                return None if abs(ratio * 2 * (probe.shape[1] - 1) - 1) < SLOPE_TO else ratio
        raise NotApplicable("the loss is no cross entropy over next tokens.")

    def pursued(self) -> tuple[Tensor, dict[int, dict[int, int]]]:
        """How often a sentence ends behind each beginning [k], and which words do, how often."""
        columns = dict[tuple[int, int], Tensor]()
        times = torch.zeros(len(self.ends), dtype=torch.float64)
        times[: self.sure] = 1
        follows, left = torch.zeros(0), self._begun_beside(times)
        for _ in range(ROUNDS):
            for k, words in self._likely(left).items():
                new = [word for word in words if (k, word) not in columns]
                columns |= {(k, word): column for word, column in zip(new, self._words(k, new), strict=True)}
            times, follows = self._fitted(columns)
            kept = follows.abs() > FORGOTTEN
            columns = {key: c for (key, c), keep in zip(columns.items(), kept.tolist(), strict=True) if keep}
            follows = follows[kept]
            left = self._left(times, follows, columns)
            whole, counts = times.round(), follows.round()
            near = torch.cat([times - whole, follows - counts]).abs() < WHOLE_TO
            if bool(near.all()) and int(whole.sum()) == self.n and int(counts.sum()) == self.n:
                rest = self._left(whole, counts, columns)
                if float(rest.norm()) <= EXPLAINED * float(self._begun_beside(whole).norm()):
                    break
        else:
            raise NotApplicable("no words behind the beginnings that were found add up to the gradient.")
        found = dict[int, dict[int, int]]()
        for (k, word), often in zip(columns, counts.tolist(), strict=True):
            if often > 0:
                found.setdefault(k, {})[word] = int(often)
        return whole, found

    def _likely(self, left: Tensor) -> dict[int, list[int]]:
        """The words tried behind beginnings: the likeliest behind each that is sure to end a sentence, and of all."""
        scores = self.scores(left)
        found: dict[int, list[int]] = dict(enumerate(scores[: self.sure].topk(WORDS_A_ROUND).indices.tolist()))
        if self.n > self.sure:
            most = min(WORDS_A_ROUND * self.n, scores.numel())
            for place in scores.flatten().topk(most).indices.tolist():
                k, word = divmod(place, scores.shape[1])
                if word not in found.setdefault(k, []):
                    found[k].append(word)
        return found

    def _words(self, k: int, words: list[int]) -> Tensor:
        """The gradient of each word's score behind a beginning [w, D], in the entries that are compared."""
        if not words:
            return self.seen.new_zeros(0, len(self.seen))
        slopes = torch.zeros(len(words), self.reader.vocabulary, self.ends.shape[1], dtype=torch.float64)
        slopes[torch.arange(len(words)), words, int(self.lengths[k]) - 1] = 1
        return self.sent(k, slopes.to(self.ends.device))

    @cached_property
    def _each(self) -> Tensor:
        """What each beginning sends less its share of the update [k, D]: with the words that follow, they add up to 0."""
        if self.unit is None:
            return self.begun - self.lengths.double()[:, None].to(self.begun) * self.seen
        return self.begun - self.seen / self.unit / self.n

    def _begun_beside(self, times: Tensor) -> Tensor:
        return times.to(self._each) @ self._each

    def _left(self, times: Tensor, follows: Tensor, columns: dict[tuple[int, int], Tensor]) -> Tensor:
        left = self._begun_beside(times)
        for often, column in zip(follows.tolist(), columns.values(), strict=True):
            left = left - often * column
        return left

    def _fitted(self, columns: dict[tuple[int, int], Tensor]) -> tuple[Tensor, Tensor]:
        """How often each beginning ends a sentence [k] and each word follows, by least squares."""
        words = torch.stack(list(columns.values()), 1)
        times = torch.zeros(len(self.ends), dtype=torch.float64)
        times[: self.sure] = 1
        extra = self.n - self.sure
        if not extra:
            follows = torch.linalg.lstsq(words, self._begun_beside(times)[:, None]).solution[:, 0]
            return times, follows.cpu()
        weight = float(words.norm(dim=0).max())  # as many in all as there are sentences
        some = torch.cat([self._each.T, -words], 1)
        ones = torch.cat([some.new_full((len(times),), weight), some.new_zeros(words.shape[1])])
        ones_of_words = weight - ones
        known = torch.cat([self._begun_beside(times), some.new_tensor([-weight * extra, -weight * self.n])])
        solved = torch.linalg.lstsq(torch.cat([some, ones[None], ones_of_words[None]]), -known[:, None]).solution[:, 0]
        return (times.to(solved) + solved[: len(times)]).cpu(), solved[len(times) :].cpu()
