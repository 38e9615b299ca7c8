"""The benchmark of texts: a batch that comes back, one that does not, and the table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unbatch.benchmarks import text
from unbatch.errors import UnbatchError


def test_a_row_says_what_came_back_and_what_did_not(tmp_path) -> None:
    small = text.TextProblem(width=64, depth=1, n=2, length=8, vocabulary=300, seeds=1)
    todo = [small, replace(small, n=64, vocabulary=40), replace(small, dictionary=True)]
    deep = replace(small, depth=2, n=1, length=6, vocabulary=60)
    todo += [
        replace(deep, task="next", tied=True, frozen=False),
        replace(deep, adapter=16, trained=2),
        replace(deep, sent="float16"),
        replace(deep, steps=2, local_batch=1),
    ]
    rows = text.run(out=tmp_path, wanted=todo)
    found, lost, words, *others = rows
    for row in others:
        assert (row["exact"], row["certified"], row["false"], row["pairs exact"]) == (1.0, 1.0, 0, 1.0), row["network"]
    assert (found["exact"], found["rouge-1"], found["certified"], found["false"]) == (1.0, 100.0, 1.0, 0)
    assert found["bag exact"] == 1.0
    assert (lost["exact"], lost["certified"], lost["false"]) == (0.0, 0.0, 0)
    assert lost["bag exact"] == 1.0  # 512 tokens at width 64
    assert "not the sentences" in lost["why"]
    assert words["bag exact"] == 1.0
    assert len(text.table(rows).rows) == 7 + sum(map(len, text.PUBLISHED.values()))


def test_a_missing_text_and_too_few_sentences_are_said(tmp_path) -> None:
    with pytest.raises(UnbatchError, match=r"wikitext2_valid_50kB\.txt is missing"):
        text.run(data=tmp_path)
    with pytest.raises(UnbatchError, match="sentences of 200 words"):
        text.run(wanted=[text.TextProblem(length=200, n=10_000, seeds=1)])
