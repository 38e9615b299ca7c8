"""The benchmark of servers that choose the model: its rows, and that they hold what they are for."""

import pytest
from rich.console import Console

from unbatch.attack import ActiveAttack, Attack
from unbatch.benchmarks import malicious


def test_every_row_is_of_an_attack_that_chooses_the_model() -> None:
    names = [problem.name for problem in malicious.PROBLEMS]
    assert len(set(names)) == len(names)
    assert all(isinstance(Attack.parse(problem.attack), ActiveAttack) for problem in malicious.PROBLEMS)
    assert set(malicious.MEASURES) <= {problem.name.partition(",")[0] for problem in malicious.PROBLEMS}


@pytest.mark.slow
def test_a_row_counts_what_came_back(capsys: pytest.CaptureFixture[str]) -> None:
    rows = malicious.run(wanted=lambda name: name.startswith("hyperplane"))
    assert [(row["exact"], row["certified"], row["false"]) for row in rows] == [(64, 64, 0)]
    assert rows[0]["rounds"] <= 20
    Console(width=200).print(malicious.table(rows))
    assert "64 in 20 rounds" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_that_count_otherwise() -> None:
    """Tokens of sentences, and examples out of a whole training."""
    rows = malicious.run(wanted=lambda name: name.startswith(("decepticon, one", "latch")))
    latch, text = rows
    assert latch["false"] == 0
    assert latch["certified"] >= 10
    assert (text["tokens"], text["certified"], text["why"].partition(" of ")[0]) == (1.0, 1, "100.0%")
