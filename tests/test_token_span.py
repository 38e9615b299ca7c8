"""Sentences out of a transformer's gradients: found whole, proven, and nothing false."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank import Adapted
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation, Reconstruction
from unbatch.benchmarks import text
from unbatch.errors import NotApplicable
from unbatch.inversion.claims import judged
from unbatch.inversion.tokens.bag import bag_read
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.pairs import token_pairs
from unbatch.inversion.tokens.prefixes import sentences_grown
from unbatch.inversion.tokens.reading import sentences_read
from unbatch.inversion.view import View
from unbatch.models.transformer import build_transformer
from unbatch.network.products import multiplied

LENGTH, VOCABULARY = 8, 60


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_sent(n: int = 3, seed: int = 0, name: Any = "gpt", kind: torch.dtype = torch.float32, **more: Any) -> Any:
    """An exchange of n random sentences of several lengths, two of which begin alike, with its batch."""
    r, each = rng(seed), more.get("reads") == "each"
    sizes = {"depth": 2, "width": 64, "heads": 4} | more
    model = build_transformer(name, LENGTH, VOCABULARY, VOCABULARY if each else 3, **sizes, rng=r).to(kind)
    x = torch.randint(1, VOCABULARY, (n, LENGTH), generator=r)
    for i in range(n):
        x[i, int(torch.randint(2, LENGTH + 1, (1,), generator=r)) :] = 0
    if n > 2:
        x[2, :2] = x[0, :2]
    y = torch.randint(3, (n,), generator=r)
    if each:
        y = torch.cat([x[:, 1:], torch.zeros(n, 1, dtype=torch.long)], 1)
        y = y.masked_fill(y == 0, -100)
    obs, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told())
    return obs, x, y


def told() -> Knowledge:
    return Knowledge(padding=0, input_range=(0, VOCABULARY - 1))


def read(obs: Observation) -> Reconstruction:
    view = View.of(obs)
    return judged(view, sentences_read(view, rng(), partial=False))


def rows(x: Tensor, y: Tensor) -> list[tuple[int, ...]]:
    return sorted(map(tuple, torch.cat([x, y.view(len(x), -1)], 1).tolist()))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("reads", ["mean", "last", "each"])
def test_a_decoder_gives_away_every_sentence_its_end_and_its_label(
    kind: torch.dtype, positions: str, reads: str
) -> None:
    obs, x, y = batch_sent(kind=kind, positions=positions, reads=reads)
    found = read(obs)
    assert rows(found.inputs, found.labels) == rows(x, y)  # type: ignore[arg-type]
    assert found.bound is not None
    assert bool(found.bound.isfinite().all()), found.trace
    assert found.trace["bag exact"]


@pytest.mark.slow
def test_a_span_that_is_nearly_full_is_refused_before_thousands_of_sentences_are_run() -> None:
    """64 distinct beginnings in the rank of an adapter of 64: hundreds of sentences fit. They took 20 GB of memory."""
    (row,) = text.run(wanted=[text.TextProblem(n=4, adapter=64, trained=10, seeds=1)], seed=1)
    assert "sentences fit a span of rank" in row["why"]
    assert row["false"] == row["certified"] == 0
    assert row["memory"] < 3


@pytest.mark.parametrize("seed", range(20))
def test_no_pair_and_no_sentence_is_false(seed: int) -> None:
    hold(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_no_pair_and_no_sentence_is_false_on_a_thousand_problems(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        hold(1000 + seed)


def hold(seed: int) -> None:
    """Random sizes, precision and positions: what is proven is true, and what is refused is said."""
    r = rng(seed)

    def one(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=r))]

    obs, x, y = batch_sent(
        n=one(1, 2, 3, 5, 8),
        seed=seed,
        kind=one(torch.float64, torch.float32),
        positions=one("learned", "rotary"),
        reads=one("mean", "last", "each"),
        width=one(32, 48, 64),
        depth=one(1, 2),
    )
    true = {(int(v), i) for s in x for i, v in enumerate(s) if int(v)}
    try:
        pairs = token_pairs(TokenReader.of(View.of(obs)))
    except NotApplicable:
        pairs = None
    if pairs is not None:
        assert {tuple(pair) for pair in pairs.proven().tolist()} <= true
        if pairs.lawful:
            assert set(pairs.tokens.tolist()) <= {v for v, _ in true}
    try:
        found = read(obs)
    except NotApplicable:
        return
    sure = found.bound.isfinite()  # type: ignore[union-attr]
    left = rows(x, y)
    for claim in rows(found.inputs[sure], found.labels[sure]):  # type: ignore[index]
        assert claim in left
        left.remove(claim)


@pytest.mark.parametrize("reads", ["mean", "last"])
def test_how_often_a_lone_word_is_repeated_is_not_claimed_where_nothing_tells_it(reads: str) -> None:
    _, x, y = batch_sent(n=2)
    x[1] = torch.tensor([16, 16, 0, 0, 0, 0, 0, 0])
    sizes = {"depth": 2, "width": 64, "heads": 4, "reads": reads}
    for positions, told_by_position in (("rotary", False), ("learned", True)):
        model = build_transformer("gpt", LENGTH, VOCABULARY, 3, positions=positions, rng=rng(), **sizes).double()  # type: ignore[arg-type]
        obs, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told())
        found = read(obs)
        sure = found.bound.isfinite()  # type: ignore[union-attr]
        claims = rows(found.inputs[sure], found.labels[sure])  # type: ignore[index]
        assert claims == (rows(x, y) if told_by_position else rows(x[:1], y[:1]))
        assert told_by_position or "sequence 1 a token shorter" in found.trace["withdrawn"]


@pytest.mark.parametrize("length", [3, LENGTH])
@pytest.mark.parametrize("shifts", [False, True])
def test_nor_is_it_where_next_tokens_are_foretold(length: int, shifts: bool) -> None:
    x = torch.zeros(1, LENGTH, dtype=torch.long)
    x[0, :length] = 16
    y = x.masked_fill(x == 0, -100) if shifts else following(x)
    sizes = {"depth": 2, "width": 64, "heads": 4, "reads": "each"}
    for positions, told_by_position in (("rotary", False), ("learned", True)):
        model = build_transformer("gpt", LENGTH, VOCABULARY, VOCABULARY, positions=positions, rng=rng(), **sizes)  # type: ignore[arg-type]
        obs, _ = unbatch.observe(model.double(), own_loss if shifts else F.cross_entropy, x, y, knowledge=told())
        claim = Reconstruction(inputs=x, labels=y, bound=torch.zeros(1, dtype=torch.float64))
        kept = judged(View.of(obs), claim)
        assert bool(kept.bound.isfinite()) is told_by_position, kept.trace  # type: ignore[union-attr]


def following(x: Tensor) -> Tensor:
    after = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
    return after.masked_fill(after == 0, -100)


def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """A model's own loss, which shifts the tokens by itself."""
    return F.cross_entropy(outputs[..., :-1], labels[:, 1:])


def test_sentences_that_occur_twice_and_with_two_labels_are_counted() -> None:
    r = rng()
    model = build_transformer("gpt", LENGTH, VOCABULARY, 3, depth=2, width=64, heads=4, rng=r).double()
    x = torch.randint(1, VOCABULARY, (2, LENGTH), generator=r)[[0, 0, 1, 0]]
    y = torch.tensor([0, 2, 1, 0])
    obs, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told())
    found = read(obs)
    assert rows(found.inputs, found.labels) == rows(x, y)  # type: ignore[arg-type]
    assert bool(found.bound.isfinite().all())  # type: ignore[union-attr]


def test_frozen_embeddings_and_an_unknown_batch_size_change_nothing() -> None:
    obs, x, y = batch_sent()
    update = {name: u for name, u in obs.update.items() if name not in ("tokens.weight", "positions.weight")}
    obs = Observation(model=obs.model, loss=obs.loss, update=update, knowledge=obs.knowledge.without("batch_size"))
    found = read(obs)
    assert rows(found.inputs, found.labels) == rows(x, y)  # type: ignore[arg-type]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("which", [("value",), ("query", "value")])
def test_adapters_give_sentences_away_at_their_start_and_later(started: bool, which: tuple[str, ...]) -> None:
    obs, x, y = batch_sent(kind=torch.float64)
    for block in obs.model.blocks:  # type: ignore[union-attr]
        for name in which:
            setattr(block.attention, name, Adapted(getattr(block.attention, name), 40, started=started))
    obs.model.double().requires_grad_(False)
    for name, p in obs.model.named_parameters():
        p.requires_grad_("down" in name or "up" in name or "head" in name)
    seen, _ = unbatch.observe(obs.model, F.cross_entropy, x, y, knowledge=told())
    assert not any("tokens" in name for name in seen.update)
    found = read(seen)
    assert rows(found.inputs, found.labels) == rows(x, y)  # type: ignore[arg-type]
    assert bool(found.bound.isfinite().all()), found.trace  # type: ignore[union-attr]


def adapted(*which: str, kind: torch.dtype, started: bool) -> Any:
    """An exchange whose model is frozen but for its head and adapters of rank 40 at these projections."""
    obs, x, y = batch_sent(kind=kind)
    for block in obs.model.blocks:  # type: ignore[union-attr]
        for name in which:
            setattr(block.attention, name, Adapted(getattr(block.attention, name), 40, started=started))
    obs.model.to(kind).requires_grad_(False)
    for name, p in obs.model.named_parameters():
        p.requires_grad_("down" in name or "up" in name or "head" in name)
    return obs.model, x, y


@pytest.mark.parametrize(("which", "hears"), [("query", False), ("value", True)])
def test_a_bag_is_not_called_whole_where_an_adapter_does_not_hear_from_first_positions(which: str, hears: bool) -> None:
    model, x, y = adapted(which, kind=torch.float64, started=True)
    seen, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told())
    found, true = bag_read(View.of(seen)), set(x.flatten().tolist()) - {0}
    assert (found.exact, set(found.tokens.tolist()) == true) == (hears, hears)
    assert set(found.tokens.tolist()) <= true


@pytest.mark.slow
@pytest.mark.parametrize("which", [("value",), ("query", "value")])
def test_adapters_give_sentences_away_after_training(which: tuple[str, ...]) -> None:
    model, x, y = adapted(*which, kind=torch.float32, started=False)
    adam, r = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3), rng(7)
    for _ in range(100):
        inputs = torch.randint(1, VOCABULARY, (16, LENGTH), generator=r)
        adam.zero_grad()
        F.cross_entropy(model(inputs), inputs[:, 0] % 3).backward()
        adam.step()
    seen, _ = unbatch.observe(model, F.cross_entropy, x, y, knowledge=told())
    found = read(seen)
    assert rows(found.inputs, found.labels) == rows(x, y)  # type: ignore[arg-type]
    assert bool(found.bound.isfinite().all()), found.trace  # type: ignore[union-attr]


def test_too_many_tokens_for_the_width_are_refused_in_words() -> None:
    obs, _, _ = batch_sent(n=40)
    frozen = {name: u for name, u in obs.update.items() if name not in ("tokens.weight", "positions.weight")}
    with pytest.raises(NotApplicable, match="too many different tokens for this width"):
        read(Observation(model=obs.model, loss=obs.loss, update=frozen, knowledge=obs.knowledge))


def test_pairs_follow_the_law_and_the_bag_outlives_the_sentences() -> None:
    r = rng()
    model = build_transformer("gpt", LENGTH, VOCABULARY, 3, depth=1, width=64, heads=4, rng=r)
    x = torch.randint(1, 20, (40, LENGTH), generator=r)  # 320 tokens at width 64, of 19 words
    obs, _ = unbatch.observe(model, F.cross_entropy, x, torch.arange(40) % 3, knowledge=told())
    reader = TokenReader.of(View.of(obs))
    pairs = token_pairs(reader)
    assert pairs.lawful
    assert pairs.front.space.rank == 19 + LENGTH - 1
    assert set(pairs.tokens.tolist()) == set(range(1, 20))
    with pytest.raises(NotApplicable, match="no layer's gradient tells the beginnings of sentences apart"):
        sentences_grown(reader, pairs)


def test_products_are_heard_in_every_way_of_writing_a_dense_layer() -> None:
    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.one = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.turned, self.plain = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))
            self.fused = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(self.table(x))
            h = torch.addmm(torch.zeros(6), h.view(-1, 4), self.turned).view(*h.shape[:2], 6) @ self.plain
            return self.fused(h, h, h)[0].mean(1)  # type: ignore[no-any-return]

    run = multiplied(Ways(), torch.randint(9, (2, 5)))
    assert [(p.weight, p.side) for p in run.products] == [
        ("one.weight", 1),
        ("turned", 0),
        ("plain", 0),
        ("fused.in_proj_weight", 1),
        ("fused.out_proj.weight", 1),
    ]
    assert [look.weight for look in run.lookups] == ["table.weight"]
    assert run.outputs is not None


def test_a_model_of_pictures_and_dropout_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    obs, _ = unbatch.observe(model, F.cross_entropy, torch.rand(1, 6), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="run on token numbers"):
        sentences_read(View.of(obs), rng(), partial=False)
    net = nn.Sequential(nn.Embedding(20, 16), nn.Dropout(0.5), nn.Linear(16, 8), nn.Flatten(), nn.Linear(64, 3)).train()
    obs, _ = unbatch.observe(net, F.cross_entropy, torch.randint(20, (1, 8)), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="draws at random"):
        sentences_read(View.of(obs), rng(), partial=False)


@pytest.mark.parametrize(("n", "seed", "width"), [(1, 0, 64), (2, 1, 64), (4, 3, 128), (6, 0, 128)])
def test_an_encoder_gives_few_sentences_away(n: int, seed: int, width: int) -> None:
    obs, x, y = batch_sent(n=n, seed=seed, name="bert", width=width)
    found = read(obs)
    assert rows(found.inputs, found.labels) == rows(x, y)  # type: ignore[arg-type]
    assert bool(found.bound.isfinite().all())  # type: ignore[union-attr]
    assert found.trace["sentences span the gradient"]
