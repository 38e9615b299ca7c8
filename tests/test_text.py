"""The case text: its corpus and tokenizers, the metrics of texts, and what an audit and a report say of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unbatch
from unbatch import Attack, Case, Guarantee, Metric, Reconstruction
from unbatch.adapters.vocabulary import tokens_of
from unbatch.command.settings import Asked, target_of
from unbatch.data.corpus import prose, sentences, tokenizer
from unbatch.domain import Tokens
from unbatch.errors import UnbatchError
from unbatch.inversion.view import View
from unbatch.models.transformer import Transformer
from unbatch.protocol import local_update
from unbatch.reporting.html import groups, render
from unbatch.reporting.tiers import Tier

SMALL = "text:batch=4,width=16,heads=2,depth=1,length=12"


def test_the_corpus_is_whole_sentences_none_of_them_twice() -> None:
    every = [s for held in sentences().values() for s in held]
    assert len(every) == len(set(every)) > 800
    assert min(len(held) for held in sentences().values()) > 40
    assert all(s[0].isupper() and s[-1] in ".!?" and not set('"*`|') & set(s) for s in every)
    text = "Heads\n=====\n\n- A list is no sentence at all.\n\nToo short. But this one is long enough.\n\n   >>> code = 1\n"
    assert prose(text) == ["But this one is long enough."]


@pytest.mark.parametrize("kind", ["word", "byte-pair"])
def test_a_tokenizer_writes_every_sentence_and_keeps_to_its_size(kind: Any) -> None:
    if kind == "byte-pair":
        pytest.importorskip("tokenizers")
    held = tokenizer(kind, 700)
    assert len(held.vocabulary) == len(held.frequency) == 700
    assert sum(held.frequency) == pytest.approx(1.0)
    assert held.frequency[0] == 0.0
    text = sentences()["debugger"][0]
    numbers = held.written[text]
    domain = Tokens(shape=(len(numbers),), high=699, vocabulary=held.vocabulary, glue="", padding=0)
    shown = domain.render(torch.tensor(numbers))
    if kind == "byte-pair":
        assert shown == text  # nothing is lost
        assert 1 not in {number for each in held.written.values() for number in each}
        with pytest.raises(UnbatchError, match="leaves no pair of bytes"):
            tokenizer("byte-pair", 100)
    else:
        assert "[unknown]" in " ".join(held.vocabulary)
        whole = tokenizer("word", 5000)
        assert domain.shape != (0,)
        said = "".join(whole.vocabulary[number] for number in whole.written[text]).strip()
        assert said.replace(" ", "") == text.lower().replace(" ", "")


@pytest.mark.parametrize("spec", [SMALL, f"{SMALL},model=bert,task=next", f"{SMALL},frozen=true,positions=rotary"])
def test_clients_hold_padded_sentences_of_the_corpus(spec: str) -> None:
    setting = Case.parse(spec).setting()
    assert setting.inputs.shape == (4, 12)
    assert setting.inputs.dtype == torch.int64
    assert isinstance(setting.model, Transformer)
    assert isinstance(setting.domain, Tokens)
    assert setting.domain.vocabulary
    assert int(setting.inputs.max()) <= setting.domain.high == setting.model.tokens.num_embeddings - 1
    corpus = set(tokenizer("word", 4096).written.values())
    for row in setting.inputs.tolist():
        assert tuple(number for number in row if number) in corpus
    assert torch.equal(setting.inputs, Case.parse(spec).setting().inputs)
    known = setting.domain.public()
    assert (known.domain, known.padding, known.input_range) == ("tokens", 0, (0.0, setting.domain.high))
    sent = local_update(setting.model, setting.loss, setting.inputs, setting.labels, setting.protocol)
    assert ("tokens.weight" in sent) is ("frozen" not in spec)
    if "next" in spec:
        told = setting.labels >= 0
        assert torch.equal(setting.labels[:, :-1][told[:, :-1]], setting.inputs[:, 1:][told[:, :-1]])
        assert not told[:, -1].any()
        assert setting.label_name(setting.labels[0]) in setting.domain.render(setting.inputs[0])
    else:
        assert setting.label_name(setting.labels[0]) in sentences()


def test_options_that_a_text_has_no_use_for_are_refused_and_a_model_is_named_beside_the_case() -> None:
    with pytest.raises(UnbatchError, match="gpt takes no norm"):
        Case.parse("text:norm=group")
    with pytest.raises(UnbatchError, match="task=next has the cross entropy"):
        Case.parse("text:task=next,reads=last")
    with pytest.raises(UnbatchError, match="mlp"):
        Case.parse("text:model=mlp")
    settings = target_of(Asked(case="text:batch=2,width=16", model="bert")).what
    assert isinstance(settings, list)
    assert settings[0].name == "text:batch=2,model=bert,width=16"
    assert target_of(Asked(case="digits", model="lenet")).what[0].name == "digits:model=lenet"  # type: ignore[index]
    near = Case.parse(f"{SMALL},near_duplicates=1").setting()
    assert int((near.inputs[0] != near.inputs[3]).sum()) == 1


TRUE = torch.tensor([[4, 9, 2, 7, 0, 0]])
WORDS = ["", "[?]", "is", "a", "this", "it", "b", "test", "was", "only"]


@pytest.mark.parametrize(
    ("found", "accuracy", "exact", "rouge"),
    [
        ([4, 9, 2, 7, 0, 0], 1.0, 1.0, 100.0),
        ([4, 2, 9, 7, 0, 0], 0.5, 0.0, 100.0),  # a bag of the right words
        ([4, 9, 2, 7, 7, 7], 4 / 6, 0.0, 80.0),  # too long
        ([4, 9, 0, 0, 0, 0], 0.5, 0.0, 200 / 3),  # too short
        ([3, 3, 3, 3, 3, 3], 0.0, 0.0, 0.0),
    ],
)
def test_metrics_of_texts(found: list[int], accuracy: float, exact: float, rouge: float) -> None:
    domain = Tokens(shape=(6,), high=9, vocabulary=WORDS, padding=0)
    given = torch.tensor([found])
    for name, score in (("token-accuracy", accuracy), ("exact-sentences", exact), ("rouge", rouge)):
        if name == "rouge":
            pytest.importorskip("rouge_score")
        metric = Metric.parse(name).on(domain)
        assert metric is not None
        assert metric.score(given.double(), TRUE.double()).tolist() == pytest.approx([score]), name
        assert metric.score(given[:0], TRUE[:0]).shape == (0,)
        assert Metric.parse(name).on(unbatch.Table(shape=(6,))) is None
    assert Metric.parse("l2-error").on(domain) is None
    assert float(domain.distance(given, TRUE)) == pytest.approx(1 - accuracy)


@pytest.mark.parametrize(("runs", "score"), [("2", 100 / 3), ("L", 75.0)])
def test_rouge_of_pairs_and_of_the_longest_run(runs: str, score: float) -> None:
    pytest.importorskip("rouge_score")
    domain = Tokens(shape=(4,), high=9, vocabulary=WORDS)
    metric = Metric.parse(f"rouge:runs={runs}").on(domain)
    assert metric is not None
    found = torch.tensor([[4, 9, 7, 2]])
    assert metric.score(found, TRUE[:, :4]).tolist() == pytest.approx([score])


def test_chance_of_a_text_is_drawn_as_often_as_tokens_occur() -> None:
    domain = Tokens(shape=(8,), high=3, frequency=[0.0, 0.9, 0.1, 0.0], padding=0)
    drawn = domain.prior(200, torch.Generator().manual_seed(0))
    counts = drawn.flatten().bincount(minlength=4)
    assert counts[3] == 0
    assert 0.8 < float(counts[1] / counts[1:].sum()) < 0.97
    assert set((drawn != 0).sum(1).tolist()) == set(range(1, 9))
    assert bool(((drawn != 0).int().diff(dim=1) <= 0).all())  # padding at the end alone


class Half(Attack):
    """Returns one text whole, one with a wrong token, one too long, and one of nothing but wrong ones."""

    family = "test"
    guarantee = Guarantee.HEURISTIC
    paper = "none"
    needs = frozenset({"input_shape", "batch_size"})

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        x = Case.parse(SMALL).setting().inputs
        x[1, 0] = 5
        x[2, -1] = 5
        x[3] = torch.where(x[3] == 5, 6, 5)
        bound = torch.tensor([0.0, torch.inf, torch.inf, torch.inf])
        return Reconstruction(inputs=x.flip(0), bound=bound.flip(0))


def test_a_report_shows_texts_side_by_side_with_the_tokens_that_differ_marked() -> None:
    setting = Case.parse(SMALL).setting()
    record = unbatch.audit(setting, attacks=[Half()], analyses=[])
    (run,) = record.runs
    assert run.examples[0].tier is Tier.EXACT
    assert run.examples[3].tier is Tier.NONE
    assert run.examples[0].error == 0.0
    assert run.examples[3].error == 1.0
    assert run.trace["claims"] == {"made": 1, "kept": 0}  # of part of a batch nothing can be recomputed
    assert set(record.metrics) == {"token-accuracy", "exact-sentences", "rouge", "label-accuracy"}
    cards = [card for _, held in groups(record) for card in held]
    assert cards[0].texts is not None
    assert all(piece.same for side in cards[0].texts for piece in side)
    assert cards[1].texts is not None
    assert [[piece.same for piece in side].count(False) for side in cards[1].texts] == [1, 1]
    assert cards[3].texts is not None
    assert not any(piece.same for piece in cards[3].texts[1])
    page = render(record)
    assert "data:image" not in page.partition('id="audit"')[0].partition("<main")[2]
    assert "<mark>" in page
    assert setting.domain.render(setting.inputs[0]) in page
    again = unbatch.Audit.model_validate_json(record.model_dump_json())
    assert (again.runs[0].examples, again.clients) == (run.examples, record.clients)
    empty = unbatch.audit(setting, attacks=["label-count"], analyses=[])
    assert "No attack on 4 private texts could run; that is not safety." in render(empty)


READ_TOKENS = {"token-span", "label-count", "token-bag", "token-capacity"}


@pytest.mark.parametrize(
    ("spec", "defences"),
    [
        (SMALL.replace("batch=4", "batch=1"), ()),
        (f"{SMALL},task=next", ()),
        (f"{SMALL},model=bert", "noise:sigma=0.01"),
        (SMALL, ("dp-sgd:clip=1,noise_multiplier=1", "prune:share=0.5")),
    ],
)
def test_whatever_reads_real_inputs_says_that_these_are_tokens(spec: str, defences: Any) -> None:
    record = unbatch.audit(Case.parse(spec).setting(), defences=defences, metrics=["token-accuracy"])
    for run in record.runs:
        assert run.status != "failed", run.words
        if run.attack not in READ_TOKENS and run.status == "not applicable":
            assert "inputs are tokens" in run.words, run.attack
    for done in record.analyses:
        assert done.status != "failed", (done.analysis, done.words)
        if done.analysis not in READ_TOKENS and done.status == "not applicable":
            assert "inputs are tokens" in done.words, (done.analysis, done.words)
    assert not record.bounds
    assert {verdict.analysis for verdict in record.verdicts} <= READ_TOKENS
    words = " ".join(risk.words for risk in record.risks)
    assert "picture" not in words
    assert "image" not in words


def test_the_rank_of_a_gradient_says_what_it_tells_of_tokens() -> None:
    setting = Case.parse("text:batch=2,width=64,heads=2,depth=1,length=12").setting()
    record = unbatch.audit(setting, attacks=[], analyses=["gradient-rank"])
    risks = {risk.layer: risk for risk in record.risks}
    used = len(set(setting.inputs.flatten().tolist()) - {0})
    assert risks["tokens"].rank == used
    assert risks["tokens"].words.startswith(f"{used} of its")
    assert "they are the tokens of the batch, in no order" in risks["tokens"].words
    assert risks["tokens"].words in record.verdict()
    assert (
        "is public all the same"
        not in unbatch.audit(Case.parse(f"{SMALL},frozen=true").setting(), attacks=[]).verdict()
    )
    assert "whether a guess of one of them lies in it can be tested" in risks["blocks.0.attention.value"].words
    full = unbatch.audit(Case.parse(f"{SMALL},seed=1").setting(), attacks=[], analyses=["gradient-rank"])
    told = {risk.layer: risk for risk in full.risks}["blocks.0.attention.value"]
    assert told.level == "low"
    assert "nearly everything is in its span" in told.words


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tokenizer_s_own_words_are_shown(wrapped: bool) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[PAD]": 0, "play": 1, "##ing": 2, "café": 3}))
    trained.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    if wrapped:
        transformers = pytest.importorskip("transformers")
        trained = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="[PAD]")
    else:
        trained.enable_padding(pad_id=0, pad_token="[PAD]")
    domain = tokens_of(trained, 5)
    assert (domain.shape, domain.high, domain.padding) == ((5,), 3, 0)
    assert domain.render(torch.tensor([3, 1, 2, 1, 0])) == "café playing play"
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE({"Ġ": 0, "a": 1, "Ġa": 2}, [("Ġ", "a")]))
    pairs.decoder = tokenizers.decoders.ByteLevel()
    assert tokens_of(pairs, 3).pieces(torch.tensor([2, 1, 2])) == [" a", "a", " a"]
    assert tokens_of(pairs, 3).padding is None
    with pytest.raises(UnbatchError, match="list is no tokenizer"):
        tokens_of(["a", "b"], 3)
