"""Embedding matching: sentences by a search over the vectors that a model would look up, ending at the nearest tokens.

Published peers of `token-span`: Deng et al., TAG, Findings of EMNLP 2021; Balunovic, Dimitrov, Jovanovic, Vechev, LAMP,
NeurIPS 2022.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.search_point import counted_labels, in_precision
from unbatch.inversion.view import View
from unbatch.network.embedded import EmbeddingsFed, adds_tokens_up, token_table
from unbatch.observation import Observation
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction

TokenPreset = Literal["tag", "lamp"]
TokenMatch = Literal["l2-l1", "cosine"]

TOKEN_STEPS = {"tag": 2500, "lamp": 2000}  # of Adam a restart
MATCH_OF = {"tag": "l2-l1", "lamp": "cosine"}
STARTS_LOOKED_AT = 500  # random points, the best of which a search starts from
RATE = 0.2  # of Adam at the start, in units of the table's root mean square
RATE_LEFT = 0.01  # of it, at the end
MOVES_EVERY = 75  # steps
MOVES_TRIED = 200  # at a time
PULL_OF_NORM = (
    0.1  # weight of the squared difference of the vectors' mean length and the table's, in units of the latter
)
SURE_OF_BIGRAM = 5.0  # occurrences of a token from which on those after it count for more than its frequency alone
SOLVED_TO = 1e-3  # relative, what sentences that solve the problem may leave of the update


@dataclass(frozen=True, eq=False)
class Bigrams:
    """How likely sentences are, by which token follows which in texts that anybody can read.

    p(b | a) = (count(a b) + k p(b)) / (count(a) + k), with p(b) = (count(b) + 1) / (all + vocabulary).

    >>> prior = Bigrams.of(torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0]]), vocabulary=4, padding=0)
    >>> prior.surprise([1, 2]) < prior.surprise([2, 1])
    True
    """

    pairs: Counter[tuple[int, int]]
    singles: Counter[int]
    vocabulary: int
    padding: int | None

    @classmethod
    def of(cls, sentences: Tensor, *, vocabulary: int, padding: int | None) -> Bigrams:
        """The counts of sentences [p, t]."""
        pairs, singles = Counter[tuple[int, int]](), Counter[int]()
        for sentence in sentences.tolist():
            said = [token for token in sentence if token != padding]
            singles.update(said)
            pairs.update(pairwise([-1, *said]))
            singles[-1] += 1  # beginnings
        return cls(pairs, singles, vocabulary, padding)

    def surprise(self, sentence: Sequence[int]) -> float:
        """The mean of -log p over the tokens of a sentence: the logarithm of its perplexity."""
        said = [token for token in sentence if token != self.padding]
        spread = self.singles.total() - self.singles[-1] + self.vocabulary
        found = 0.0
        for a, b in pairwise([-1, *said]):
            single = (self.singles[b] + 1) / spread
            found -= math.log((self.pairs[a, b] + SURE_OF_BIGRAM * single) / (self.singles[a] + SURE_OF_BIGRAM))
        return found / max(len(said), 1)


@dataclass(frozen=True, eq=False)
class _Point:
    """A guess on its way: the vectors of a batch, of which those behind a sentence's end are the padding's."""

    vectors: Tensor  # [n, t, d], in units of the table's root mean square
    lengths: Tensor  # [n]


@dataclass(frozen=True, eq=False)
class _TokenProblem:
    """The exchange that is to be explained, with what a point explains of it."""

    obs: Observation
    labels: Tensor
    source: str  # of the labels: "known" or "counted"
    seen: dict[str, Tensor]
    name: str  # of the table
    padding: int | None
    length: int
    n: int

    @classmethod
    def of(cls, view: View) -> _TokenProblem:
        view = view.gradient
        obs, known = view.obs, view.knowledge
        if not view.takes_tokens:
            raise NotApplicable("tag and lamp search for tokens, and the inputs are none: leave the preset out.")
        if len(known.input_shape) != 1:
            raise NotApplicable(
                f"the inputs have the shape {known.input_shape}, and sentences of tokens have one side."
            )
        if view.steps:
            raise NotApplicable(view.no_gradient)
        if known.get("clients", 1) > 1:
            raise NotApplicable("updates of several clients are summed, and these presets match the gradient of one.")
        name = token_table(obs.model, known.input_shape)
        if name is None:
            raise NotApplicable(
                "the model looks its inputs up in no embedding, so there are no vectors to search over."
            )
        if adds_tokens_up(obs.model, known.input_shape):
            raise NotApplicable(
                "the model adds up its tokens' vectors where it looks them up (nn.EmbeddingBag), so none is seen alone."
            )
        labels, source = view.known_labels, "known"
        if labels is None:
            labels, source = counted_labels(view), "counted"
        if labels is None:
            raise NotApplicable("the labels are unknown, and the head's gradient does not count them. Make them known.")
        dtype = torch.float64 if obs.dtype == torch.float64 else torch.float32
        model = copy.deepcopy(obs.model).to(dtype)
        moved = replace(obs, model=model, update={k: t.to(dtype) for k, t in obs.update.items()})
        seen = {k: t for k, t in moved.update.items() if k != name and bool(t.any())}
        if not seen:
            raise NotApplicable("nothing but the embedding sent a gradient, so there is nothing to match.")
        labels = in_precision(labels.to(obs.device), dtype)
        return cls(moved, labels, source, seen, name, known.get("padding"), known.input_shape[0], known.batch_size)

    @cached_property
    def table(self) -> Tensor:
        """The rows [vocabulary, d] that tokens are looked up as, in units of their root mean square."""
        return self.obs.model.get_parameter(self.name).detach() / self.unit

    @cached_property
    def unit(self) -> float:
        return float(self.obs.model.get_parameter(self.name).detach().square().mean().sqrt()) or 1.0

    @cached_property
    def words(self) -> Tensor:
        """Every token number but the padding's."""
        every = torch.arange(len(self.table), device=self.obs.device)
        return every if self.padding is None else every[every != self.padding]

    @cached_property
    def _held(self) -> Tensor:
        """Tokens for the model to look up; two from the middle of the vocabulary, where none is a padding by custom."""
        turns = torch.arange(self.n * self.length, device=self.obs.device) % 2
        return self.words[len(self.words) // 2 - turns]

    @cached_property
    def directions(self) -> Tensor:
        return torch.nn.functional.normalize(self.table[self.words], dim=1)

    @cached_property
    def norms(self) -> dict[str, Tensor]:
        return {name: t.norm() for name, t in self.seen.items()}

    def start(self, rng: torch.Generator) -> _Point:
        """Random vectors, and random lengths where a padding is known."""
        vectors = torch.randn(self.n, self.length, self.table.shape[1], generator=rng).to(self.table)
        lengths = torch.full((self.n,), self.length)
        if self.padding is not None:
            lengths = torch.randint(1, self.length + 1, (self.n,), generator=rng)
        return _Point(vectors, lengths)

    def there(self, lengths: Tensor) -> Tensor:
        """Which places [n, t] are in a sentence."""
        return (torch.arange(self.length) < lengths[:, None]).to(self.obs.device)

    def gradient(self, point: _Point, *, create_graph: bool = False) -> dict[str, Tensor]:
        """What the client would send at a point."""
        there = self.there(point.lengths)
        held = self._held.view(self.n, self.length)
        vectors = point.vectors
        if self.padding is not None:
            held = held.masked_fill(~there, self.padding)
            vectors = torch.where(there[:, :, None], vectors, self.table[self.padding])
        with EmbeddingsFed(held, vectors * self.unit, self.table.shape):
            return self.obs.simulate(held, self.labels, create_graph=create_graph)

    def tokens(self, point: _Point) -> Tensor:
        """The tokens [n, t] nearest to a point's vectors, by the angle between them."""
        near = (torch.nn.functional.normalize(point.vectors, dim=2) @ self.directions.T).argmax(2)
        found = self.words[near]
        return found if self.padding is None else found.masked_fill(~self.there(point.lengths), self.padding)

    def at_tokens(self, point: _Point) -> _Point:
        """The point at the rows of its nearest tokens."""
        return replace(point, vectors=self.table[self.tokens(point)])


@dataclass(frozen=True, kw_only=True)
class TokenMatching:
    """Searches for sentences whose gradient is the one that was sent, over the vectors that the model would look up.

    `preset`: tag (vectors by Adam alone) or lamp (their lengths held near the table's, and every few steps their order
    changed where that explains the gradient better and is likelier a sentence). `match`: *l2-l1*, sum over tensors of
    |g - g'|_2 + alpha |g - g'|_1, or *cosine*, 1 - the mean of their cosines; None for the preset's own. `prior`: weight
    of the mean surprise (`Bigrams`) in choosing between orders, where sentences of the kind are public. `starts`: random
    points, of which the best is gone on from. `moves`: orders that lamp looks at, at a time. The gradient of the table
    itself is not matched: its rows would name the tokens.

    >>> import unbatch
    >>> client = unbatch.cases.Text(width=8, depth=1, length=5, batch=1, vocabulary=20).setting()
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, knowledge=client.knowledge)
    >>> found = TokenMatching(preset="tag", iterations=2, starts=1).run(View.of(seen), torch.Generator().manual_seed(0))
    >>> found.inputs.shape, found.labels == truth.labels, found.bound
    (torch.Size([1, 5]), tensor([True]), tensor([inf]))
    """

    preset: TokenPreset
    match: TokenMatch | None = None
    alpha: float = 0.01
    prior: float = 0.2
    iterations: int | None = None
    restarts: int = 1
    starts: int = STARTS_LOOKED_AT
    moves: int = MOVES_TRIED

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        """Searches until its steps or its time are spent, and returns the sentences that explain the gradient best.

        Every bound is infinite: a sentence that explains a gradient well is a guess.
        Raises NotApplicable: the inputs are no tokens, this is no gradient of one client, or the labels are neither known
        nor counted.
        """
        problem = _TokenProblem.of(view)
        prior = self._prior(problem)
        best, tokens, history = math.inf, problem.tokens(problem.start(rng)), list[float]()
        for count, point in enumerate(self._searched(problem, prior, rng)):
            found = problem.at_tokens(point)
            value = self._value(problem, prior, found)
            if value < best:
                best, tokens = value, problem.tokens(found)
            history.append(best)
            if not tick(min((count + 1) * MOVES_EVERY / (self._steps * self.restarts), 1.0), best):
                break
        residual = problem.obs.residual(tokens, problem.labels)
        return Reconstruction(
            inputs=tokens,
            labels=problem.labels,
            bound=torch.full((len(tokens),), torch.inf),
            trace={
                "preset": self.preset,
                "match": self._match,
                "loss": history,
                "converged": residual < SOLVED_TO,
                "residual": residual,
                "labels": problem.source,
                "prior": "none" if prior is None else f"bigrams of {prior.singles[-1]} public sentences",
            },
        )

    @property
    def _steps(self) -> int:
        return self.iterations or TOKEN_STEPS[self.preset]

    @property
    def _match(self) -> str:
        return self.match or MATCH_OF[self.preset]

    def _prior(self, problem: _TokenProblem) -> Bigrams | None:
        public = problem.obs.knowledge.get("public")
        if self.preset != "lamp" or public is None or not self.prior or not len(public):
            return None
        return Bigrams.of(public.long(), vocabulary=len(problem.table), padding=problem.padding)

    def _searched(self, problem: _TokenProblem, prior: Bigrams | None, rng: torch.Generator) -> Iterator[_Point]:
        """The point every `MOVES_EVERY` steps, where lamp changes the order, and at the end of each restart."""
        for _ in range(self.restarts):
            point = self._first(problem, rng)
            yield point
            vectors = point.vectors.clone().requires_grad_()
            adam = torch.optim.Adam([vectors], lr=RATE)
            for step in range(1, self._steps + 1):
                vectors.grad = torch.autograd.grad(self._objective(problem, replace(point, vectors=vectors)), vectors)[
                    0
                ]
                adam.step()
                adam.param_groups[0]["lr"] = RATE * RATE_LEFT ** (step / self._steps)
                if step % MOVES_EVERY == 0 and step < self._steps:
                    point = replace(point, vectors=vectors.detach().clone())
                    if self.preset == "lamp":
                        point = self._moved(problem, prior, point, rng)
                        with torch.no_grad():
                            vectors.copy_(point.vectors)
                    yield point
                elif not tick(step / (self._steps * self.restarts)):
                    break
            point = replace(point, vectors=vectors.detach().clone())
            point = self._ended(problem, prior, problem.at_tokens(point))
            yield point
            if self.preset == "lamp":
                yield self._moved(problem, prior, point, rng)

    def _first(self, problem: _TokenProblem, rng: torch.Generator) -> _Point:
        """The random point that explains the gradient best."""
        best, value = problem.start(rng), math.inf
        for _ in range(self.starts):
            point = problem.start(rng)
            found = float(self._distance(problem, problem.gradient(point)))
            if found < value:
                best, value = point, found
            if not tick(0.0):
                break
        return best

    def _objective(self, problem: _TokenProblem, point: _Point) -> Tensor:
        """What the steps minimise: the match, and for lamp how far the vectors' mean length is off the table's."""
        found = self._distance(problem, problem.gradient(point, create_graph=True))
        if self.preset == "tag":
            return found
        usual = problem.table.norm(dim=1).mean()
        lengths = point.vectors.norm(dim=2)[problem.there(point.lengths)]
        pull: Tensor = ((lengths.mean() - usual) / usual).square()
        return found + PULL_OF_NORM * pull

    def _distance(self, problem: _TokenProblem, found: dict[str, Tensor]) -> Tensor:
        """The match of a gradient with the one that was sent."""
        each = [(found[name], seen, problem.norms[name]) for name, seen in problem.seen.items()]
        if self._match == "cosine":
            alike = [(g * seen).sum() / (g.norm() * size).clamp_min(1e-30) for g, seen, size in each]
            return 1 - torch.stack(alike).mean()
        off = [(g - seen).norm() + self.alpha * (g - seen).abs().sum() for g, seen, _ in each]
        return torch.stack(off).sum() / torch.stack([size for *_, size in each]).sum()

    def _value(self, problem: _TokenProblem, prior: Bigrams | None, point: _Point) -> float:
        """The match at a point, and how unlikely its nearest tokens are."""
        found = float(self._distance(problem, problem.gradient(point)))
        if prior is None:
            return found
        tokens = problem.tokens(point).tolist()
        return found + self.prior * sum(map(prior.surprise, tokens)) / len(tokens)

    def _moved(self, problem: _TokenProblem, prior: Bigrams | None, point: _Point, rng: torch.Generator) -> _Point:
        """The point with its vectors in the best of many other orders; as it is where none is better."""
        best, value = point, self._value(problem, prior, point)
        for _ in range(self.moves):
            other = reordered(point.vectors, point.lengths, rng)
            moved = _Point(*other)
            found = self._value(problem, prior, moved)
            if found < value:
                best, value = moved, found
            if not tick(0.0):
                break
        return best

    def _ended(self, problem: _TokenProblem, prior: Bigrams | None, point: _Point) -> _Point:
        """The point with each sentence in turn cut where that explains the gradient best.

        Published figures are of known lengths; here they are not told, and a padding that is known says that they differ.
        """
        best, value = point, self._value(problem, prior, point)
        for which in range(problem.n if problem.padding is not None else 0):
            for length in range(1, int(point.lengths[which])):
                lengths = best.lengths.clone()
                lengths[which] = length
                cut = replace(best, lengths=lengths)
                found = self._value(problem, prior, cut)
                if found < value:
                    best, value = cut, found
                if not tick(0.0):
                    return best
        return best


def reordered(vectors: Tensor, lengths: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch [n, t, ...] of sentences of these lengths [n] after one random move, with its lengths.

    Two tokens of one sentence are swapped, a run of its tokens is moved elsewhere in it, its beginning goes to its end, or
    two sentences are cut at one place and change their ends.

    >>> rng, batch = torch.Generator().manual_seed(2), torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    >>> reordered(batch, torch.tensor([3, 4]), rng)
    (tensor([[1, 5, 6, 7],
            [4, 2, 3, 0]]), tensor([4, 3]))
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    n = len(lengths)
    which, kind = draw(0, n), draw(0, 4 if n > 1 else 3)
    size = int(lengths[which])
    vectors, lengths = vectors.clone(), lengths.clone()
    if kind == 3:
        other = (which + draw(1, n)) % n
        cut = draw(1, max(2, int(torch.minimum(lengths[which], lengths[other]))))
        pair, turned = [which, other], [other, which]
        vectors[pair, cut:], lengths[pair] = vectors[turned, cut:], lengths[turned]
        return vectors, lengths
    order = list(range(size))
    i, j = draw(0, size), draw(0, size)
    if kind == 0:
        order[i], order[j] = order[j], order[i]
    elif kind == 1:
        i, j = min(i, j), max(i, j) + 1
        run, rest = order[i:j], order[:i] + order[j:]
        place = draw(0, len(rest) + 1)
        order = rest[:place] + run + rest[place:]
    else:
        order = order[i:] + order[:i]
    vectors[which, :size] = vectors[which, order]
    return vectors, lengths
