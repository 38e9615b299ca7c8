"""token-span on gradients that were sent in half precision or with noise: found, proven, and nothing false."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation, Reconstruction
from unbatch.errors import NotApplicable
from unbatch.inversion.claims import judged
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.pairs import token_pairs
from unbatch.inversion.tokens.reading import sentences_read
from unbatch.inversion.view import View
from unbatch.models.transformer import build_transformer
from unbatch.protocol import Protocol

LENGTH, VOCABULARY = 8, 60


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_sent(how: str | float, n: int = 3, seed: int = 0, **more: Any) -> Any:
    """An exchange of n random sentences, its update sent in a type or with noise, and its batch."""
    r, each = rng(seed), more.get("reads") == "each"
    sizes = {"depth": 2, "width": 64, "heads": 4, "name": "gpt"} | more
    name = sizes.pop("name")
    computes = str(sizes.pop("computes", "float32"))
    model = build_transformer(name, LENGTH, VOCABULARY, VOCABULARY if each else 3, **sizes, rng=r)  # type: ignore[arg-type]
    model = model.to(getattr(torch, computes))
    x = torch.randint(1, VOCABULARY, (n, LENGTH), generator=r)
    for i in range(n):
        x[i, int(torch.randint(2, LENGTH + 1, (1,), generator=r)) :] = 0
    y = torch.randint(3, (n,), generator=r)
    if each:
        y = torch.cat([x[:, 1:], torch.zeros(n, 1, dtype=torch.long)], 1)
        y = y.masked_fill(y == 0, -100)
    told = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    obs, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told)
    if how == computes:
        return obs, x, y
    if isinstance(how, str):
        return replace(obs, update={k: u.to(getattr(torch, how)) for k, u in obs.update.items()}), x, y
    noisy = {k: u + how * torch.randn(u.shape, generator=r) for k, u in obs.update.items()}
    return replace(obs, update=noisy, knowledge=obs.knowledge | Knowledge(noise=how)), x, y


def read(obs: Observation) -> Reconstruction:
    view = View.of(obs)
    return judged(view, sentences_read(view, rng(), partial=False))


def rows(x: Any, y: Any) -> list[tuple[int, ...]]:
    return sorted(map(tuple, torch.cat([x, y if y.ndim > 1 else y[:, None]], 1).tolist()))


@pytest.mark.parametrize(
    ("how", "more"),
    [
        ("bfloat16", {}),
        ("float16", {"positions": "rotary"}),
        ("float16", {"reads": "each"}),
        (1e-6, {}),
        (1e-5, {"n": 1}),
        ("float16", {"computes": "float16", "n": 4}),
        ("bfloat16", {"computes": "bfloat16", "n": 2}),
        ("float16", {"computes": "float16", "name": "bert"}),
    ],
)
def test_sentences_come_back_proven_from_coarse_gradients(how: str | float, more: dict[str, Any]) -> None:
    obs, x, y = batch_sent(how, **more)
    found = read(obs)
    assert rows(found.inputs, found.labels) == rows(x, y)
    assert bool(found.bound.isfinite().all()), found.trace  # type: ignore[union-attr]


@pytest.mark.parametrize("local_batch_size", [None, 1])
def test_sentences_come_back_from_a_difference_of_parameters_after_local_steps(local_batch_size: int | None) -> None:
    r = rng()
    model = build_transformer("gpt", LENGTH, VOCABULARY, 3, depth=1, width=64, heads=4, rng=r)
    x, y = torch.randint(1, VOCABULARY, (2, LENGTH), generator=r), torch.randint(3, (2,), generator=r)
    steps = Protocol(local_steps=4, learning_rate=1e-3, local_batch_size=local_batch_size)
    told = Knowledge(padding=0, input_range=(0, VOCABULARY - 1))
    obs, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told, protocol=steps)
    found = read(obs)
    assert rows(found.inputs, found.labels) == rows(x, y)
    assert bool(found.bound.isfinite().all()), found.trace  # type: ignore[union-attr]
    assert not found.trace["bag exact"]


@pytest.mark.parametrize("how", ["bfloat16", 1e-5])
def test_what_noise_or_rounding_may_hide_is_not_called_a_proven_bag(how: str | float) -> None:
    obs, _, _ = batch_sent(how, n=2)
    frozen = {k: u for k, u in obs.update.items() if not k.startswith(("tokens", "positions"))}
    pairs = token_pairs(TokenReader.of(View.of(replace(obs, update=frozen))))
    assert not pairs.lawful
    assert not len(pairs.proven())


@pytest.mark.parametrize(
    ("how", "computes"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        (1e-5, "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ],
)
def test_a_token_that_is_another_is_withdrawn_by_the_judge(how: str | float, computes: str) -> None:
    obs, x, y = batch_sent(how, computes=computes)
    other = x.clone()
    other[0, 1] = other[0, 1] % (VOCABULARY - 1) + 1
    claim = Reconstruction(inputs=other, labels=y, bound=torch.zeros(len(x), dtype=torch.float64))
    assert bool(judged(View.of(obs), claim).bound.isinf().all())  # type: ignore[union-attr]
    true = judged(View.of(obs), replace(claim, inputs=x))
    assert bool(true.bound.isfinite().all()), true.trace  # type: ignore[union-attr]


def test_noise_as_large_as_the_gradient_is_refused_or_claims_nothing() -> None:
    obs, _, _ = batch_sent(0.1)
    try:
        found = read(obs)
    except NotApplicable:
        return
    assert bool(found.bound.isinf().all())  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_no_sentence_is_false_on_many_problems(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        r = rng(seed)

        def one(*choices: Any, r: torch.Generator = r) -> Any:
            return choices[int(torch.randint(len(choices), (1,), generator=r))]

        obs, x, y = batch_sent(
            one("float16", "bfloat16", 1e-6, 1e-5, 1e-4),
            n=one(1, 2, 3, 5),
            seed=seed,
            positions=one("learned", "rotary"),
            reads=one("mean", "last", "each"),
            width=one(32, 48, 64),
            depth=one(1, 2, 3),
        )
        try:
            found = read(obs)
        except NotApplicable:
            continue
        left = rows(x, y)
        for claim in rows(found.inputs[found.bound.isfinite()], found.labels[found.bound.isfinite()]):  # type: ignore[index, union-attr]
            assert claim in left, seed
            left.remove(claim)


@pytest.mark.slow
@pytest.mark.parametrize("computes", ["float16", "bfloat16"])
def test_no_sentence_is_false_behind_models_that_compute_in_half_precision(computes: str) -> None:
    for seed in range(100):
        r = rng(seed)

        def one(*choices: Any, r: torch.Generator = r) -> Any:
            return choices[int(torch.randint(len(choices), (1,), generator=r))]

        sizes = {"n": one(1, 2, 3, 5), "width": one(32, 64, 128), "depth": one(1, 2, 3), "reads": one("mean", "last")}
        sizes |= {"positions": one("learned", "rotary"), "name": one("gpt", "gpt", "bert")}
        obs, x, y = batch_sent(computes, seed=seed, computes=computes, **sizes)
        other = x.clone()
        where = (other[0] != 0).nonzero().flatten()
        place = int(where[int(torch.randint(len(where), (1,), generator=r))])
        other[0, place] = other[0, place] % (VOCABULARY - 1) + 1
        claim = Reconstruction(inputs=other, labels=y, bound=torch.zeros(len(x), dtype=torch.float64))
        claims = [judged(View.of(obs), claim)]
        with contextlib.suppress(NotApplicable):
            claims.append(read(obs))
        for found in claims:
            left, sure = rows(x, y), found.bound.isfinite()  # type: ignore[union-attr]
            for sentence in rows(found.inputs[sure], found.labels[sure]):  # type: ignore[index]
                assert sentence in left, (seed, sizes)
                left.remove(sentence)
