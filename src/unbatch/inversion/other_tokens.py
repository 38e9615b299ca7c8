"""Other tokens: whether an update would have shown it, had one token of a claimed batch been another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unbatch.observation import Observation

Explains = Callable[[Tensor, Tensor], bool]  # (inputs, labels) -> whether these, too, explain the update

WEAKEST = 16  # places of a batch that show least by the first order, of which each is tried with another token
IGNORED = -100  # the label that says that no answer is asked for, where none of the batch's does
DRAWN = 16  # places drawn at random, tried likewise, with their neighbours, and with another sequence's token


def unseen_changes(place: Observation, tokens: Tensor, labels: Tensor, explains: Explains) -> dict[int, str]:
    """The sequences of claimed tokens [n, t] that could be others without its showing in the update, each with a change.

    Tried are other tokens at the places whose embeddings move the update least, at others drawn at random and at the end
    of padded sequences; two tokens of a sequence, or of two sequences at one place, changed for each other; and sequences
    a place on or back or, where the padding is known, with it behind them, a token shorter or longer, or written twice.
    Labels that are the tokens themselves, or the next ones, change with them.

    >>> import unbatch
    >>> from unbatch.models.transformer import build_transformer
    >>> model = build_transformer("gpt", 4, 9, 2, depth=1, width=8, heads=2, rng=torch.Generator().manual_seed(0))
    >>> x, y = torch.tensor([[3, 1, 4, 5]]), torch.tensor([1])
    >>> seen, _ = unbatch.observe(model, F.cross_entropy, x, y)
    >>> unseen_changes(seen, x, y, lambda other, y: seen.residual(other, y) < 1e-5)
    {}
    >>> unseen_changes(seen, x, y, lambda other, y: bool((other[0, 1:] == x[0, 1:]).all()))  # were the first of no matter
    {0: 'another token at place 0 of sequence 0'}
    """
    rng, found, pad = torch.Generator().manual_seed(0), dict[int, str](), place.knowledge.get("padding")
    for words, other in _changes(place, tokens, labels, rng):
        others = (other != tokens).flatten(1).any(1).nonzero().flatten().tolist()
        if found.keys() >= set(others):
            continue
        try:
            seen = not explains(other, _following(tokens, labels, other, pad))
        except (RuntimeError, IndexError, ValueError):  # a loss that takes no such labels: nobody sends this
            seen = True
        if not seen:
            found = dict.fromkeys(others, words) | found
    return found


def _changes(place: Observation, tokens: Tensor, labels: Tensor, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    n, t = len(tokens), tokens[0].numel()
    pad, flat = place.knowledge.get("padding"), tokens.flatten(1)
    there = torch.ones_like(flat, dtype=torch.bool) if pad is None else flat != pad
    spots = there.flatten().nonzero().flatten()
    strength = _strength(place, tokens, labels)
    weakest = spots if strength is None else spots[strength.flatten()[spots].argsort()]
    drawn = spots[torch.randperm(len(spots), generator=rng).to(spots.device)][:DRAWN]
    ends = (~there & there.roll(1, 1)).flatten().nonzero().flatten()[:DRAWN]  # padding right behind a sequence
    choice = _vocabulary(place, flat, pad)
    for spot in dict.fromkeys([*weakest[:WEAKEST].tolist(), *drawn.tolist(), *ends.tolist()]):
        i, j = divmod(spot, t)
        left = [v for v in choice if v != int(flat[i, j])]
        if left:
            other = flat.clone()
            other[i, j] = left[int(torch.randint(len(left), (1,), generator=rng))]
            yield f"another token at place {j} of sequence {i}", other.view_as(tokens)
    yield from _moved(flat, there, pad)
    for spot in drawn.tolist():
        i, j = divmod(spot, t)
        for k, m in ((i, (j + 1) % t), ((i + 1) % n, j)):
            if there[k, m]:
                other = flat.clone()
                other[i, j], other[k, m] = flat[k, m], flat[i, j]
                where = f"the token at place {j} of sequence {i} changed for that at place {m} of sequence {k}"
                yield where, _unless_turned(flat, other).view_as(tokens)


def _moved(flat: Tensor, there: Tensor, pad: int | None) -> Iterator[tuple[str, Tensor]]:
    """Whole sequences a place on or back; where the padding is known, which fills them up behind, with it behind them."""
    if pad is None:
        for i in range(min(len(flat), DRAWN)):
            for step, where in ((1, "on"), (-1, "back")):
                other = flat.clone()
                other[i] = flat[i].roll(step)
                yield f"sequence {i} a place further {where}", _unless_turned(flat, other)
        return
    order = (~there).int().sort(dim=1, stable=True).indices
    yield "the padding behind the tokens", flat.gather(1, order)
    yield from _of_other_lengths(flat, there, pad)


def _of_other_lengths(flat: Tensor, there: Tensor, pad: int) -> Iterator[tuple[str, Tensor]]:
    """Sequences with padding behind them that end a token sooner, say their last token once more, or all of it twice."""
    t = flat.shape[1]
    for i, (words, own) in enumerate(zip(flat, there, strict=True)):
        sequence = words[own]
        longer = {
            f"sequence {i} a token shorter": sequence[:-1],
            f"the last token of sequence {i} once more": torch.cat([sequence, sequence[-1:]]),
            f"sequence {i} written twice": torch.cat([sequence, sequence]),
        }
        for change, tokens in longer.items():
            if 0 < len(tokens) <= t:
                other = flat.clone()
                other[i] = pad
                other[i, : len(tokens)] = tokens
                yield change, _unless_turned(flat, other)


def _unless_turned(flat: Tensor, other: Tensor) -> Tensor:
    """The other batch, or the same one where it differs by the order of its sequences alone, which nothing tells."""
    return flat if sorted(map(tuple, flat.tolist())) == sorted(map(tuple, other.tolist())) else other


def _vocabulary(place: Observation, flat: Tensor, pad: int | None) -> Sequence[int]:
    if "input_range" in place.knowledge:
        low, high = place.knowledge.input_range
        numbers = range(int(low), int(high) + 1)
    else:
        numbers = range(int(flat.min()), int(flat.max()) + 1)
    return [v for v in numbers if v != pad] if len(numbers) <= flat.numel() else _some(numbers, pad)


def _some(numbers: Sequence[int], pad: int | None) -> list[int]:
    drawn = torch.randint(len(numbers), (256,), generator=torch.Generator().manual_seed(1)).tolist()
    return [numbers[k] for k in drawn if numbers[k] != pad]


def _following(tokens: Tensor, labels: Tensor, other: Tensor, pad: int | None) -> Tensor:
    """The labels of other tokens: the tokens themselves or the next ones, where the labels [n, t] were those.

    None is asked for where padding takes a token's place, unless the batch's padding has answers as well.
    """
    if labels.shape != tokens.shape or labels.is_floating_point() or labels.ndim != 2:
        return labels
    asked = labels >= 0  # a negative number says that no answer is asked for
    themselves = bool((labels == tokens)[asked].all())
    following = bool((labels[:, :-1] == tokens[:, 1:])[asked[:, :-1]].all())
    if following and not (themselves and bool(asked[:, -1].any())):
        tokens, other = (torch.cat([x[:, 1:], labels[:, -1:]], 1) for x in (tokens, other))
    elif not themselves:
        return labels
    after = asked.flip(1).cumsum(1).flip(1) == 0  # behind a sequence's last answer
    follows = after & (other != tokens)  # and now a token stands there
    if pad is not None and not bool((labels[tokens == pad] >= 0).any()):
        negative = labels[labels < 0]
        ignored = int(negative[0]) if len(negative) else IGNORED
        gone = (other == pad) & (tokens != pad)
        labels, asked, follows = labels.masked_fill(gone, ignored), asked & ~gone, follows & (other != pad)
    return torch.where(asked | follows, other, labels)


class _Nudged(TorchFunctionMode):
    """Adds `nudge` [n, t, width], zeros made at the first call, to every embedding of these tokens [n, t]."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens, self.nudge = tokens, None

    nudge: Tensor | None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is not F.embedding:
            return found
        numbers = args[0] if args else (kwargs or {})["input"]
        if numbers.shape != self.tokens.shape or not torch.equal(numbers, self.tokens):
            return found
        if self.nudge is None:
            self.nudge = torch.zeros_like(found, requires_grad=True)
        return found + self.nudge


def _strength(place: Observation, tokens: Tensor, labels: Tensor) -> Tensor | None:
    """How strongly each place [n, t] moves the update when its embedding does, by a random sum; None: it cannot be told.

    |d (r . u) / d embedding| with r normal, each tensor of the update u in units of its own size.
    """
    rng = torch.Generator().manual_seed(0)
    try:
        with _Nudged(tokens) as nudged:
            sent = place.simulate(tokens, labels, create_graph=True)
        if nudged.nudge is None:
            return None
        sums = [
            (torch.randn(u.shape, generator=rng).to(u) * u).sum() / (u.detach().norm() or 1.0) for u in sent.values()
        ]
        (slope,) = torch.autograd.grad(torch.stack(sums).sum(), [nudged.nudge])
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ):  # a kernel without second derivatives, or an embedding of its own kind
        return None
    found: Tensor = slope.norm(dim=-1)
    return found
