"""Models of tokens, and what passes between client, server and judge where the inputs are whole numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation, Protocol, Reconstruction
from unbatch.attacks import GradientMatching
from unbatch.auditing.certify import certify
from unbatch.auditing.diagnosis import explanations
from unbatch.domain import Tokens, domain_told
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.claims import judged
from unbatch.inversion.view import View
from unbatch.models.transformer import Transformer, build_transformer
from unbatch.network.embedded import token_table
from unbatch.protocol import local_update

LENGTH, VOCABULARY = 7, 30


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(name: Any = "gpt", outputs: int = 3, **more: Any) -> Transformer:
    sizes = {"depth": 2, "width": 16, "heads": 2} | more
    return build_transformer(name, LENGTH, VOCABULARY, outputs, **sizes, rng=rng())


def batch(n: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(1, VOCABULARY, (n, LENGTH), generator=rng(seed))
    for i in range(1, n):
        x[i, LENGTH - i :] = 0
    return x, torch.randint(3, (n,), generator=rng(seed))


def sent(net: nn.Module, n: int = 3, **told: Any) -> tuple[Observation, torch.Tensor, torch.Tensor]:
    x, y = batch(n)
    known = Knowledge(padding=0, input_range=(0, VOCABULARY - 1), **told)
    obs, _ = unbatch.observe(net, F.cross_entropy, x, y, knowledge=known)
    return obs, x, y


@pytest.mark.parametrize("name", ["gpt", "bert"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("reads", ["mean", "last", "first"])
def test_padding_is_seen_by_nothing(name: str, positions: str, reads: str) -> None:
    net = model(name, positions=positions, reads=reads).double()
    whole = torch.randint(1, VOCABULARY, (1, LENGTH), generator=rng())
    padded = whole.clone()
    padded[0, 4:] = 0
    assert torch.allclose(net(padded), net(whole[:, :4]), atol=1e-12)
    assert not torch.allclose(net(whole), net(padded), atol=1e-3) or (name, reads) == ("gpt", "first")
    update = local_update(net, F.cross_entropy, padded, torch.tensor([1]), Protocol())
    assert all(bool(u.isfinite().all()) for u in update.values())
    assert not update["tokens.weight"][0].any()
    if positions == "learned":
        assert not update["positions.weight"][4:].any()
    assert bool(net(torch.zeros(2, LENGTH, dtype=torch.int64)).isfinite().all())  # nothing but padding


def test_a_decoder_sees_no_later_token_and_an_encoder_all() -> None:
    x = torch.randint(1, VOCABULARY, (1, LENGTH), generator=rng())
    other = x.clone()
    other[0, -1] = x[0, -1] % (VOCABULARY - 1) + 1
    for name, same in (("gpt", True), ("bert", False)):
        net = model(name, outputs=VOCABULARY, reads="each")
        assert net(x).shape == (1, VOCABULARY, LENGTH)
        before = torch.allclose(net(x)[:, :, :-1], net(other)[:, :, :-1], atol=1e-6)
        assert before is same


def test_rotary_scores_depend_on_the_distance_of_tokens_alone() -> None:
    net = model("gpt", positions="rotary", depth=1, reads="last").double()
    assert net.positions is None
    run = torch.tensor([[5, 9, 4, 0, 0, 0, 0]])
    moved = torch.tensor([[0, 0, 0, 5, 9, 4, 0]])
    assert torch.allclose(net(run), net(moved), atol=1e-12)
    assert not torch.allclose(net(run), net(torch.tensor([[9, 5, 4, 0, 0, 0, 0]])), atol=1e-3)


def test_the_same_generator_draws_the_same_transformer_and_a_tied_head_is_one_tensor() -> None:
    one, other = model(), model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    tied = model(outputs=VOCABULARY, reads="each", tied=True)
    assert tied.head.weight is tied.tokens.weight
    assert "head.weight" not in dict(tied.named_parameters())
    x = torch.randint(1, VOCABULARY, (2, LENGTH), generator=rng())
    labels = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    seen, _ = unbatch.observe(tied, F.cross_entropy, x, labels)
    assert seen.residual(x, labels) < 1e-6


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"heads": 3}, "no head a whole number"),
        ({"heads": 16, "positions": "rotary"}, "even"),
        ({"tied": True}, "tied"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnbatchError, match=words):
        model(**sizes)
    with pytest.raises(UnbatchError, match="unknown transformer 'mlp'; known: gpt, bert"):
        model("mlp")


@pytest.mark.parametrize(
    "protocol", [Protocol(), Protocol(local_steps=2, learning_rate=0.1), Protocol(epochs=1, local_batch_size=2)]
)
def test_an_exchange_of_tokens_is_explained_by_its_own_tokens_alone(protocol: Protocol, tmp_path) -> None:
    net = model("bert")
    x, y = batch()
    obs, truth = unbatch.observe(net, F.cross_entropy, x, y, protocol=protocol)
    assert obs.knowledge.domain == "tokens"
    assert truth.inputs.dtype == torch.int64
    other = x.clone()
    other[0, 2] = x[0, 2] % (VOCABULARY - 1) + 1
    assert obs.residual(x, y) < 1e-6
    assert obs.residual(other, y) > 1e-3
    assert isinstance(domain_told(obs.only("domain", "input_shape").knowledge), Tokens)
    obs.save(tmp_path / "seen.safetensors")
    again = Observation.load(tmp_path / "seen.safetensors", model=net, loss=F.cross_entropy)
    assert again.residual(x, y) < 1e-6
    assert again.knowledge.domain == "tokens"


def test_a_view_of_a_token_model_knows_its_head_and_no_layer_that_reads_real_inputs() -> None:
    obs, _, _ = sent(model())
    view = View.of(obs)
    assert view.outputs == (3,)
    assert view.head is not None
    assert view.head.name == "head"
    assert str(view.form) == "cross-entropy (mean)"
    with pytest.raises(NotApplicable, match="tokens"):
        _ = view.layers
    labels = unbatch.Attack.parse("label-count")(obs).labels
    assert labels is not None


def test_claims_of_tokens_are_kept_where_they_are_true_and_withdrawn_where_one_token_is_not() -> None:
    obs, x, y = sent(model("bert"))
    claim = Reconstruction(inputs=x.flip(0), labels=y.flip(0), bound=torch.zeros(3))
    kept = certify(obs, claim)
    assert kept.bound is not None
    assert kept.bound.tolist() == [0.0, 0.0, 0.0]
    assert kept.trace["residual"] < 1e-6
    for i, j, v in ((0, 3, x[0, 3] % (VOCABULARY - 1) + 1), (1, 6, 5), (2, 0, 0)):  # changed, longer, shorter
        other = x.clone()
        other[i, j] = v
        found = judged(View.of(obs), Reconstruction(inputs=other, labels=y, bound=torch.zeros(3)))
        assert found.bound is not None
        assert not found.bound.isfinite().any()
    swapped = x[:, [1, 0, *range(2, LENGTH)]]
    assert not judged(View.of(obs), replace(claim, inputs=swapped, labels=y)).bound.isfinite().any()  # type: ignore[union-attr]


def test_a_token_that_does_not_show_in_the_update_is_not_certified() -> None:
    obs, x, y = sent(model("gpt", reads="first"))  # no token but the first one of a decoder reaches its head
    found = judged(View.of(obs), Reconstruction(inputs=x, labels=y, bound=torch.zeros(3)))
    assert found.bound is not None
    assert not found.bound.isfinite().any()
    assert "does not show in it" in found.trace["withdrawn"]


def test_the_next_tokens_as_labels_change_with_the_tokens() -> None:
    net = model(outputs=VOCABULARY, reads="each")
    x = torch.randint(1, VOCABULARY, (2, LENGTH), generator=rng())
    labels = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    obs, _ = unbatch.observe(net, F.cross_entropy, x, labels)
    found = judged(View.of(obs), Reconstruction(inputs=x, labels=labels, bound=torch.zeros(2)))
    assert found.bound is not None
    assert bool(found.bound.isfinite().all()), found.trace
    other = x.clone()
    other[1, -1] = x[1, -1] % (VOCABULARY - 1) + 1  # nothing but a label tells the last token
    labels = torch.cat([other[:, 1:], labels[:, -1:]], 1)
    assert not judged(View.of(obs), replace(found, inputs=other, labels=labels)).bound.isfinite().any()  # type: ignore[union-attr]


def test_a_vocabulary_is_as_large_as_the_model_s_table_whether_told_or_not() -> None:
    net, (x, y) = model(), batch()
    guessed = unbatch.Setting(model=net, loss=F.cross_entropy, inputs=x % 7, labels=y).domain
    assert (guessed.name, guessed.high, guessed.public().input_range) == ("tokens", VOCABULARY - 1, (0, VOCABULARY - 1))
    assert token_table(net, (LENGTH,)) == "tokens.weight"
    assert token_table(model(outputs=VOCABULARY, reads="each", tied=True), (LENGTH,)) == "tokens.weight"
    seen, truth = unbatch.observe(net, F.cross_entropy, x, y)
    assert View.of(seen).domain.high == VOCABULARY - 1
    record = unbatch.audit(seen, attacks="label-count", analyses=(), truth=truth)
    assert record.domain == "tokens"
    assert record.clients[0].pieces[0] == [f" {number}" for number in x[0].tolist()]


def test_a_captured_update_of_tokens_is_explained_by_the_reading_that_it_has() -> None:
    obs, x, y = sent(model("bert"))
    flipped = replace(obs, update={name: -u for name, u in obs.update.items()})
    for captured, factor in ((obs, 1.0), (flipped, -1.0)):
        best = explanations(captured, x, y)[0]
        assert (round(best.factor, 4), best.fits) == (factor, True)


def test_an_attack_must_return_tokens_as_whole_numbers() -> None:
    class Real(unbatch.Attack):
        """Returns real numbers."""

        family = "test"
        guarantee = unbatch.Guarantee.HEURISTIC
        needs = frozenset({"input_shape"})

        def run(self, view: View, rng: torch.Generator) -> Reconstruction:
            return Reconstruction(inputs=torch.zeros(1, *view.knowledge.input_shape))

    obs, _, _ = sent(model())
    with pytest.raises(RuntimeError, match="examples of real numbers where the inputs are tokens"):
        Real()(obs)


def test_a_model_that_adds_its_tokens_vectors_up_tells_which_there_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(VOCABULARY, 8), nn.Linear(8, 3))
    x = torch.tensor([[4, 4, 9, 1, 2, 6, 6], [7, 9, 9, 3, 3, 3, 8]])
    seen, truth = unbatch.observe(net, F.cross_entropy, x, torch.tensor([0, 2]))
    record = unbatch.audit(seen, truth=truth, attacks="token-span", analyses="gradient-rank")
    assert "8 of its 30 rows are not zero: they are the tokens of the batch" in record.verdict()
    assert "adds up the vectors of a text's tokens" in record.runs[0].words
    for preset in ("tag", "lamp"):
        with pytest.raises(NotApplicable, match="adds up its tokens' vectors"):
            GradientMatching(preset=preset)(seen)
