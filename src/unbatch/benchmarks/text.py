"""text: sentences behind small transformers, recovered from one gradient, and the time of testing a whole vocabulary.

Real sentences, as words: each different word is a token of its own, the most frequent ones first; where a row has a smaller
vocabulary the others are one token, the unknown word. A decoder (gpt) or encoder (bert) of this library at its default
initialisation, mean of the last layer, four classes at random, cross entropy. Labels and lengths are not told, the size of
the batch is. A sentence counts as recovered where every token is right and it comes with a bound; ROUGE-1 is the
F-measure in words of each private sentence and the one returned for it, none twice; a missing one has 0. A seed draws
sentences, labels and network anew; a row is the mean over its seeds. The bag is exact where the tokens that pass are those
of the batch and no others.

The last rows test every word of a large vocabulary at every position. What others published stands in PUBLISHED.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, resumed
from unbatch.data.corpus import sentences
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.pairs import token_pairs
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.models.transformer import PositionName, TransformerName, build_transformer
from unbatch.observation import Observation
from unbatch.progress import watching
from unbatch.reconstruction import Reconstruction, certified

Row = dict[str, Any]
FILE = "wikitext2_valid_50kB.txt"
LIMIT = 1800.0  # seconds of one run
CLASSES = 4
UNKNOWN = 1  # the token of words that a vocabulary leaves out; 0 is the padding
# ROUGE-1, mean of 100 batches, pretrained models; Petrov et al., DAGER, NeurIPS 2024, tables 1 and 2.
PUBLISHED = {
    "DAGER, GPT-2, width 768, Rotten Tomatoes": {1: 100.0, 8: 100.0, 32: 98.0, 64: 2.8, 128: 0.0},
    "DAGER, GPT-2, width 768, SST-2": {1: 100.0, 8: 100.0, 32: 100.0, 64: 92.9, 128: 13.7},
    "DAGER, BERT, width 768, SST-2": {1: 100.0, 2: 99.3, 4: 95.6, 8: 74.1},
    "DAGER, BERT, width 768, Rotten Tomatoes": {1: 100.0, 2: 98.1, 4: 66.8, 8: 37.1},
    "LAMP, GPT-2, width 768, Rotten Tomatoes": {1: 31.4, 8: 6.8},
}


@dataclass(frozen=True, kw_only=True)
class TextProblem:
    """One setting whose batches are to be recovered; its gradients differ by the seed.

    >>> TextProblem(width=768, depth=12, n=16).name
    'gpt, width 768, 12 layers, n=16 x 16, float32'
    """

    model: TransformerName = "gpt"
    width: int = 256
    depth: int = 4
    n: int = 8
    length: int = 16
    vocabulary: int = 0  # words; 0: as many as the text has
    positions: PositionName = "learned"
    frozen: bool = True  # embeddings send nothing
    precision: Literal["float32", "float64"] = "float32"
    dictionary: bool = False  # the first stage alone
    seeds: int = 3

    @property
    def name(self) -> str:
        layers = f"{self.depth} layer{'s' * (self.depth > 1)}"
        parts = [self.model, f"width {self.width}", layers, f"n={self.n} x {self.length}", self.precision]
        parts += [f"{self.positions} positions"] * (self.positions != "learned")
        parts += [f"{self.vocabulary:,} words"] * bool(self.vocabulary)
        return ", ".join(parts + ["embeddings trained"] * (not self.frozen) + ["dictionary"] * self.dictionary)


def text_problems() -> list[TextProblem]:
    """What is recovered, and the next that is not, the cheapest first.

    >>> text_problems()[0].name
    'gpt, width 128, 4 layers, n=1 x 16, float32'
    """
    base = TextProblem()
    found = [replace(base, width=128, n=n) for n in (1, 2, 4, 8, 16)]
    found += [replace(base, n=n) for n in (1, 2, 4, 8, 16, 32)]
    found += [replace(base, n=4, precision="float64"), replace(base, n=8, frozen=False)]
    found += [replace(base, n=8, positions="rotary"), replace(base, n=4, length=32), replace(base, n=2, length=64)]
    found += [replace(base, depth=1, n=128, vocabulary=180)]
    found += [replace(base, model="bert", n=n, width=256, depth=2) for n in (1, 2, 4, 8)]
    wide = replace(base, width=768, depth=12, seeds=1)
    found += [replace(wide, n=n) for n in (1, 8, 16, 32)]
    return [*found, replace(wide, depth=1, n=4, length=64, vocabulary=50_257, dictionary=True)]


def run(
    data: Path | None = None,
    seconds: float = LIMIT,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    wanted: Sequence[TextProblem] | None = None,
) -> list[Row]:
    """One row a problem, saved in `out` as they come; a run that was cut short goes on where it stopped.

    `data` is a folder with wikitext2_valid_50kB.txt; without it the sentences of the case `text` are used. `seconds` is the
    time of one recovery. Raises UnbatchError: no such file there.
    """
    _texts(data)  # what is missing is said before anything runs
    todo = list(text_problems() if wanted is None else wanted)
    how: dict[str, Any] = {"seconds": seconds, "seed": seed, "device": device, "data": data is not None}
    measure = partial(_measure, data=data, seed=seed, device=device, seconds=seconds)
    return resumed("text", todo, measure, out, whole=wanted is None, **how)


def table(rows: list[Row]) -> Table:
    """The bag, the pairs, the sentences, ROUGE-1, what is certified and false, and the time; then what was published."""
    shown = Table(title="text: sentences of a batch out of one gradient, mean over seeds")
    columns = (
        "network",
        "bag exact",
        "tokens",
        "rank",
        "prefixes",
        "exact",
        "ROUGE-1",
        "certified",
        "false",
        "seconds",
        "why",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("network", "why") else "right")
    for row in rows:
        shown.add_row(
            row["network"],
            f"{row['bag exact']:.2f}",
            f"{row['tokens']:.0f}",
            f"{row['rank']:.0f}",
            f"{row['prefixes']:.0f} of {row['settings']['width'] - 1}",
            *([""] * 4 if row["settings"]["dictionary"] else _sentences_told(row)),
            f"{row['seconds']:.1f}",
            row["why"],
        )
    for name, published in PUBLISHED.items():
        for n, rouge in published.items():
            shown.add_row(f"published: {name}, n={n}", *[""] * 5, f"{rouge:.1f}", *[""] * 4)
    return shown


def _sentences_told(row: Row) -> list[str]:
    return [f"{row['exact']:.2f}", f"{row['rouge-1']:.1f}", f"{row['certified']:.2f}", str(row["false"])]


def _texts(data: Path | None) -> list[list[str]]:
    """The sentences of the text, as words in lower case."""
    if data is None:
        texts = [text for texts in sentences().values() for text in texts]
    else:
        path = data / FILE
        if not path.is_file():
            raise UnbatchError(f"{path} is missing; give the folder (--data) that holds {FILE}.")
        texts = re.split(r" \. |\n", path.read_text())
    return [text.lower().split() for text in texts]


def _exchange(problem: TextProblem, data: Path | None, seed: int, device: str) -> tuple[Observation, Tensor, Tensor]:
    """What the server sees, and the sentences and labels behind it."""
    rng = torch.Generator().manual_seed(seed)
    texts = _texts(data)
    counted = Counter(word for text in texts for word in text)
    known = [word for word, _ in counted.most_common(problem.vocabulary - 2 if problem.vocabulary else None)]
    numbers = {word: k + 2 for k, word in enumerate(known)}
    pool = [text[: problem.length] for text in texts if len(text) >= problem.length]
    if len(pool) < problem.n:
        raise UnbatchError(f"the text has {len(pool)} sentences of {problem.length} words, and n={problem.n}.")
    chosen = [pool[i] for i in torch.randperm(len(pool), generator=rng)[: problem.n].tolist()]
    x = torch.tensor([[numbers.get(word, UNKNOWN) for word in sentence] for sentence in chosen], device=device)
    y = torch.randint(CLASSES, (problem.n,), generator=rng).to(device)
    size = problem.vocabulary or len(known) + 2
    heads = max(4, problem.width // 64)
    kind = torch.float64 if problem.precision == "float64" else torch.float32
    shape = {"depth": problem.depth, "width": problem.width, "heads": heads, "positions": problem.positions}
    net = build_transformer(problem.model, problem.length, size, CLASSES, **shape, rng=rng).to(device, kind)  # type: ignore[arg-type]
    if problem.frozen:
        for part in (net.tokens, net.positions):
            if part is not None:
                part.requires_grad_(False)
    told = Knowledge(padding=0, input_range=(0, size - 1))
    return observe(net, F.cross_entropy, x, y, knowledge=told)[0], x, y


def _measure(problem: TextProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    tries = [_try(problem, data, seed + k, device, seconds) for k in range(problem.seeds)]
    means = ("bag exact", "tokens", "rank", "prefixes", "exact", "rouge-1", "certified", "seconds")
    return {
        "network": problem.name,
        "settings": asdict(problem),
        **{name: statistics.fmean(each[name] for each in tries) for name in means},
        "false": sum(each["false"] for each in tries),
        "why": next((each["why"] for each in tries if each["why"]), ""),
        "tries": tries,
    }


def _try(problem: TextProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    """How much of one batch comes back."""
    obs, x, y = _exchange(problem, data, seed, device)
    true = set(x.flatten().tolist())
    begun, why, found = clock(), "", Reconstruction(inputs=x[:0], bound=torch.zeros(0))
    row: Row = {"bag exact": 0.0, "tokens": 0, "rank": 0}
    with watching(allowance(seconds)):
        try:
            pairs = token_pairs(TokenReader.of(View.of(obs)))
            bag = set(pairs.tokens.tolist())
            row = {"bag exact": float(bag == true), "tokens": len(bag), "rank": pairs.front.space.rank}
            if problem.dictionary:
                row |= {"seconds": clock() - begun}
            else:
                begun = clock()
                found = Attack.parse("token-span:partial=true")(obs, seed=seed)
                why = str(found.trace.get("open", found.trace.get("withdrawn", "")))
        except NotApplicable as error:
            why = str(error)
    row = {"seconds": clock() - begun} | row
    prefixes = {tuple(s[: k + 1]) for s in x.tolist() for k in range(len(s))}
    private = Counter((*s, label) for s, label in zip(map(tuple, x.tolist()), y.tolist(), strict=True))
    sure = certified(found)
    claimed = _with_labels(sure)
    right = sum((private & claimed).values())
    return row | {
        "prefixes": len(prefixes),
        "exact": right / problem.n,
        "rouge-1": _rouge(x, found.inputs if found.inputs is not None else x[:0]),
        "certified": sum(claimed.values()) / problem.n,
        "false": sum((claimed - private).values()),
        "why": why,
    }


def _with_labels(found: Reconstruction) -> Counter[tuple[int, ...]]:
    if found.inputs is None or found.labels is None:
        return Counter()
    return Counter((*s, int(label)) for s, label in zip(found.inputs.tolist(), found.labels.tolist(), strict=True))


def _rouge(true: Tensor, found: Tensor) -> float:
    """The mean over private sentences of the F-measure of words with the sentence returned for it, each given once."""
    from scipy.optimize import linear_sum_assignment  # on use, as in metric

    if not len(found):
        return 0.0
    bags = [[Counter(token for token in s if token) for s in each.tolist()] for each in (true, found)]
    scores = [[2 * sum((a & b).values()) / max(sum(a.values()) + sum(b.values()), 1) for b in bags[1]] for a in bags[0]]
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return float(100 * sum(scores[i][j] for i, j in zip(rows, columns, strict=True)) / len(true))
