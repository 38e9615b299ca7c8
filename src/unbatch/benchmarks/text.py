"""text: sentences behind small transformers, recovered from one gradient, and the time of testing a whole vocabulary.

Real sentences, as words: each different word is a token of its own, the most frequent ones first; where a row has a smaller
vocabulary the others are one token, the unknown word. A decoder (gpt) or encoder (bert) of this library at its default
initialisation, mean of the last layer, four classes at random, cross entropy. Labels and lengths are not told, the size of
the batch is. A sentence counts as recovered where every token is right and it comes with a bound; ROUGE-1 is the
F-measure in words of each private sentence and the one returned for it, none twice; a missing one has 0. A seed draws
sentences, labels and network anew; a row is the mean over its seeds. The bag is exact where the tokens that pass are those
of the batch and no others.

Rows of *next words* are language models: labels are the next tokens, embeddings have GPT-2's size (.02), and a tied head
is their embedding; a sentence's last word is only a label, and counts for neither bag nor pairs. Rows of adapters train
one of rank r beside the value layer of every block, and the head, nothing else, from B = 0 or after steps of AdamW on
other sentences. Rows of local steps send the difference of parameters. Noise and half precision are put on what is sent,
entry by entry.

Rows of *tag* and *lamp* are these published searches on the same gradients, by the presets of `gradient-matching`, lamp
with the text's other sentences as its prior. They return guesses: what is exact counts as recovered without a bound.

Rows of a dictionary test every word of a large vocabulary at every position. Pairs are exact where the (token, position)
pairs that pass are the batch's and those that follow from them, and no others. Memory is the most that the process held at
once, with the network and the update. What others published stands in PUBLISHED.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.attack import Attack
from unbatch.auditing.client import observe
from unbatch.benchmarks import allowance, clock, resumed
from unbatch.cases.text import following
from unbatch.data.corpus import sentences
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.tokens.fronts import TokenReader
from unbatch.inversion.tokens.pairs import TokenPairs, token_pairs
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.models.transformer import PositionName, Transformer, TransformerName, build_transformer
from unbatch.numerics.dictionary.bipartite import components
from unbatch.observation import Observation
from unbatch.progress import watching
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction, certified

Row = dict[str, Any]
Half = Literal["bfloat16", "float16"]
FILE = "wikitext2_valid_50kB.txt"
LIMIT = 1800.0  # seconds of one run
CLASSES = 4
SMALL = 0.02  # of the embeddings of language models, as GPT-2 is initialised
ADAPTER_RATE = 3e-3  # of AdamW on adapters
LOCAL_RATE = 1e-3  # of local steps
UNKNOWN = 1  # the token of words that a vocabulary leaves out; 0 is the padding
# ROUGE-1, mean of 100 batches, pretrained models; Petrov et al., DAGER, NeurIPS 2024, tables 1 and 2.
PUBLISHED = {
    "DAGER, GPT-2, width 768, Rotten Tomatoes": {1: 100.0, 8: 100.0, 32: 98.0, 64: 2.8, 128: 0.0},
    "DAGER, GPT-2, width 768, SST-2": {1: 100.0, 8: 100.0, 32: 100.0, 64: 92.9, 128: 13.7},
    "DAGER, BERT, width 768, SST-2": {1: 100.0, 2: 99.3, 4: 95.6, 8: 74.1},
    "DAGER, BERT, width 768, Rotten Tomatoes": {1: 100.0, 2: 98.1, 4: 66.8, 8: 37.1},
    "LAMP, GPT-2, width 768, Rotten Tomatoes": {1: 31.4, 8: 6.8},
    "DAGER, GPT-2, width 768, noise of 1e-5": {1: 74.0},
    "DAGER, GPT-2, width 768, 10 epochs of local batches of 4, Rotten Tomatoes": {16: 95.4},
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
    task: Literal["classify", "next"] = "classify"
    tied: bool = False  # the head is the embedding, which is trained
    adapter: int = 0  # rank of what is trained beside each value layer, with the head; 0: all is trained
    trained: int = 0  # steps that adapters have been trained before
    computes: Half | None = None  # half precision that all parameters are held in
    sent: Half | None = None  # and the one that what is sent is rounded to
    noise: float = 0.0  # standard deviation of what is added to each entry
    steps: int = 0  # local ones of SGD; 0: a gradient
    local_batch: int = 0  # sentences of each; 0: all

    @property
    def name(self) -> str:
        layers = f"{self.depth} layer{'s' * (self.depth > 1)}"
        parts = [self.model, f"width {self.width}", layers, f"n={self.n} x {self.length}", self.precision]
        parts += [f"{self.positions} positions"] * (self.positions != "learned")
        parts += [f"{self.vocabulary:,} words"] * bool(self.vocabulary)
        parts += ["embeddings trained"] * (not self.frozen and not self.tied) + ["dictionary"] * self.dictionary
        parts += [f"next words, {'tied' if self.tied else 'own'} head"] * (self.task == "next")
        parts += [f"adapters of rank {self.adapter}, {self.trained} steps old"] * bool(self.adapter)
        parts += [f"sent in {self.sent}"] * bool(self.sent) + [f"noise {self.noise:g}"] * bool(self.noise)
        parts += [f"computed in {self.computes}"] * bool(self.computes)
        of = f" of {self.local_batch}" if self.local_batch else ""
        return ", ".join(parts + [f"{self.steps} local steps{of}"] * bool(self.steps))

    @property
    def asked(self) -> str:
        """The attack that is measured, as it is spelt."""
        return "token-span:partial=true"

    @property
    def protocol(self) -> Protocol:
        """What the round asks of the client."""
        if not self.steps:
            return Protocol()
        return Protocol(local_steps=self.steps, local_batch_size=self.local_batch or None, learning_rate=LOCAL_RATE)


@dataclass(frozen=True, kw_only=True)
class PeerProblem(TextProblem):
    """A setting in which a published search is measured.

    >>> PeerProblem(peer="tag", width=128, n=1).name
    'tag: gpt, width 128, 4 layers, n=1 x 16, float32'
    """

    peer: Literal["tag", "lamp"]

    @property
    def name(self) -> str:
        return f"{self.peer}: {super().name}"

    @property
    def asked(self) -> str:
        return f"gradient-matching:preset={self.peer}"


def text_problems() -> list[TextProblem]:
    """What is recovered, and the next that is not, the cheapest first.

    >>> text_problems()[0].name
    'gpt, width 128, 4 layers, n=1 x 16, float32'
    """
    base = TextProblem()
    found = [replace(base, width=128, n=n) for n in (1, 2, 4, 8, 16)]
    found += [PeerProblem(peer=peer, width=128, n=1, seeds=1) for peer in ("tag", "lamp")]
    found += [replace(base, n=n) for n in (1, 2, 4, 8, 16, 32)]
    found += [replace(base, n=4, precision="float64"), replace(base, n=8, frozen=False)]
    found += [replace(base, n=8, positions="rotary"), replace(base, n=4, length=32), replace(base, n=2, length=64)]
    found += [replace(base, depth=1, n=128, vocabulary=180)]
    found += [replace(base, model="bert", n=n, width=256, depth=2) for n in (1, 2, 4, 8)]
    words = replace(base, task="next")
    found += [replace(words, n=8), *(replace(words, n=n, tied=True, frozen=False) for n in (1, 4, 8, 16))]
    found += [replace(base, n=n, adapter=64, trained=old) for n in (1, 2, 3, 4) for old in (0, 10)]
    found += [replace(base, n=n, sent=kind) for n in (1, 2, 4, 8) for kind in ("float16", "bfloat16")]
    found += [replace(base, n=n, computes=kind) for n in (1, 4) for kind in ("float16", "bfloat16")]
    found += [replace(base, n=n, noise=1e-5) for n in (1, 2, 4)]
    found += [replace(base, depth=2, n=4, steps=4, local_batch=1), replace(base, depth=2, n=8, steps=10)]
    wide = replace(base, width=768, depth=12, seeds=1)
    words_of = replace(wide, n=4, length=64, vocabulary=50_257, dictionary=True)
    found += [replace(words_of, depth=1), words_of]
    found += [replace(wide, depth=2, n=64, length=8), replace(wide, depth=2, n=32), replace(wide, depth=2, n=64)]
    return [*found, *(replace(wide, n=n) for n in (1, 8, 16, 32))]


class _Adapted(nn.Module):
    """A dense layer that is frozen, with an adapter W + B A beside it (Hu et al., LoRA, 2022), B = 0 at the start."""

    def __init__(self, layer: nn.Linear, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(layer.in_features, rank, bias=False),
            nn.Linear(rank, layer.out_features, bias=False),
        )
        with torch.no_grad():
            self.down.weight.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=rng)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + self.up(self.down(x))
        return found


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
        "pairs exact",
        "tokens",
        "rank",
        "prefixes",
        "exact",
        "ROUGE-1",
        "certified",
        "false",
        "seconds",
        "GB",
        "why",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("network", "why") else "right")
    for row in rows:
        shown.add_row(
            row["network"],
            f"{row['bag exact']:.2f}",
            "" if row["pairs exact"] is None else f"{row['pairs exact']:.2f}",  # of rows from before they were counted
            f"{row['tokens']:.0f}",
            f"{row['rank']:.0f}",
            f"{row['prefixes']:.0f} of {row['settings']['width'] - 1}",
            *([""] * 4 if row["settings"]["dictionary"] else _sentences_told(row)),
            f"{row['seconds']:.1f}",
            "" if row["memory"] is None else f"{row['memory']:.1f}",
            row["why"],
        )
    for name, published in PUBLISHED.items():
        for n, rouge in published.items():
            shown.add_row(f"published: {name}, n={n}", *[""] * 6, f"{rouge:.1f}", *[""] * 5)
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


def _batch(problem: TextProblem, data: Path | None, rng: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """The private sentences [n, t], others [m, t], and the number of tokens. Raises UnbatchError: too few sentences."""
    texts = _texts(data)
    counted = Counter(word for text in texts for word in text)
    known = [word for word, _ in counted.most_common(problem.vocabulary - 2 if problem.vocabulary else None)]
    numbers = {word: k + 2 for k, word in enumerate(known)}
    pool = [text[: problem.length] for text in texts if len(text) >= problem.length]
    if len(pool) < problem.n:
        raise UnbatchError(f"the text has {len(pool)} sentences of {problem.length} words, and n={problem.n}.")
    order = torch.randperm(len(pool), generator=rng).tolist()
    every = torch.tensor([[numbers.get(word, UNKNOWN) for word in pool[i]] for i in order])
    return every[: problem.n], every[problem.n :], problem.vocabulary or len(known) + 2


def _exchange(problem: TextProblem, data: Path | None, seed: int, device: str) -> tuple[Observation, Tensor, Tensor]:
    """What the server sees, and the sentences and labels behind it."""
    rng = torch.Generator().manual_seed(seed)
    x, others, size = _batch(problem, data, rng)
    y = torch.randint(CLASSES, (problem.n,), generator=rng)
    foretells = problem.task == "next"
    shape: dict[str, Any] = {"depth": problem.depth, "width": problem.width, "heads": max(4, problem.width // 64)}
    shape |= {"positions": problem.positions, "tied": problem.tied, "reads": "each" if foretells else "mean"}
    net = build_transformer(problem.model, problem.length, size, size if foretells else CLASSES, **shape, rng=rng)
    if foretells:
        y = following(x)
        with torch.no_grad():
            net.tokens.weight.mul_(SMALL)
    tables = [table for table in (net.tokens, net.positions) if table is not None and problem.frozen]
    for table in tables:
        table.requires_grad_(False)
    if problem.adapter:
        _adapt(net, problem, others, rng)
    kind: torch.dtype = getattr(torch, problem.computes or problem.precision)
    told = Knowledge(padding=0, input_range=(0, size - 1))
    if isinstance(problem, PeerProblem):
        told |= Knowledge(public=others.to(device))
    noise = f"noise:sigma={problem.noise}" if problem.noise else ()
    x, y, net = x.to(device), y.to(device), net.to(device, kind)
    obs, _ = observe(net, F.cross_entropy, x, y, knowledge=told, protocol=problem.protocol, defences=noise, seed=seed)
    if problem.sent is not None:
        obs = replace(obs, update={name: u.to(getattr(torch, problem.sent)) for name, u in obs.update.items()})
    return obs, x, y


def _adapt(net: Transformer, problem: TextProblem, others: Tensor, rng: torch.Generator) -> None:
    """Puts adapters beside the value layers, freezes all but them and the head, and trains them on other sentences."""
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    for block in net.blocks:
        block.attention.value = _Adapted(block.attention.value, problem.adapter, rng)  # type: ignore[union-attr, arg-type]
    adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=ADAPTER_RATE)
    for _ in range(problem.trained):
        which = torch.randint(len(others), (16,), generator=rng)
        adam.zero_grad()
        F.cross_entropy(net(others[which]), torch.randint(CLASSES, (16,), generator=rng)).backward()  # type: ignore[no-untyped-call]
        adam.step()
    net.zero_grad()


def _measure(problem: TextProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    tries = [_try(problem, data, seed + k, device, seconds) for k in range(problem.seeds)]
    means = ("bag exact", "pairs exact", "tokens", "rank", "prefixes", "exact", "rouge-1", "certified", "seconds")
    return {
        "network": problem.name,
        "settings": asdict(problem),
        **{name: statistics.fmean(each[name] for each in tries) for name in means},
        "false": sum(each["false"] for each in tries),
        "memory": max(each["memory"] for each in tries),
        "why": next((each["why"] for each in tries if each["why"]), ""),
        "tries": tries,
    }


def _try(problem: TextProblem, data: Path | None, seed: int, device: str, seconds: float) -> Row:
    """How much of one batch comes back."""
    _forget_peak()
    obs, x, y = _exchange(problem, data, seed, device)
    begun, why, found = clock(), "", Reconstruction(inputs=x[:0], bound=torch.zeros(0))
    row: Row = {"bag exact": 0.0, "pairs exact": 0.0, "tokens": 0, "rank": 0}
    with watching(allowance(seconds)):
        try:
            pairs = token_pairs(TokenReader.of(View.of(obs)))
            heard = x if problem.task == "classify" else torch.cat([x[:, :-1], torch.zeros_like(x[:, :1])], 1)
            row = {
                "bag exact": float(set(pairs.tokens.tolist()) == set(heard.flatten().tolist()) - {0}),
                "pairs exact": float(_follow(pairs, heard)),
                "tokens": len(pairs.tokens),
                "rank": pairs.front.space.rank,
            }
            if problem.dictionary:
                row |= {"seconds": clock() - begun}
            else:
                begun = clock()
                found = Attack.parse(problem.asked)(obs, seed=seed)
                why = str(found.trace.get("open", found.trace.get("withdrawn", "")))
        except NotApplicable as error:
            why = str(error)
    row = {"seconds": clock() - begun} | row
    prefixes = {tuple(s[: k + 1]) for s in x.tolist() for k in range(len(s))}
    private, claimed = _with_labels(x, y), _with_labels(certified(found).inputs, certified(found).labels)
    returned = _with_labels(found.inputs, found.labels) if isinstance(problem, PeerProblem) else claimed
    right = sum((private & returned).values())
    return row | {
        "prefixes": len(prefixes),
        "exact": right / problem.n,
        "rouge-1": _rouge(x, found.inputs if found.inputs is not None else x[:0]),
        "certified": sum(claimed.values()) / problem.n,
        "false": sum((claimed - private).values()),
        "memory": _peak(),
        "why": why,
    }


def _with_labels(x: Tensor | None, y: Tensor | None) -> Counter[tuple[int, ...]]:
    if x is None or y is None:
        return Counter()
    return Counter(
        (*s, *label)
        for s, label in zip(x.tolist(), y.flatten(1).tolist() if y.ndim > 1 else y[:, None].tolist(), strict=True)
    )


def _follow(pairs: TokenPairs, x: Tensor) -> bool:
    """Whether the pairs that passed are those of the batch [n, t], with what follows from them, and no others."""
    if set(pairs.tokens.tolist()) != set(x.flatten().tolist()) - {0}:
        return False
    if not pairs.front.positioned:
        return True
    used = torch.stack([(x.cpu() == token).any(0) for token in pairs.tokens.cpu()])  # [a, t]
    parts = components(used)
    return bool(torch.equal(parts.left[:, None] == parts.right, pairs.allowed.cpu()))


def _forget_peak() -> None:
    """Lets Linux forget the most memory that this process has held, and glibc give back what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """The most memory that this process has held since, in GB; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        told = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(told[1]) / 1e6 if told else 0.0
    return 0.0


def _rouge(true: Tensor, found: Tensor) -> float:
    """The mean over private sentences of the F-measure of words with the sentence returned for it, each given once."""
    from scipy.optimize import linear_sum_assignment  # on use, as in metric

    if not len(found):
        return 0.0
    bags = [[Counter(token for token in s if token) for s in each.tolist()] for each in (true, found)]
    scores = [[2 * sum((a & b).values()) / max(sum(a.values()) + sum(b.values()), 1) for b in bags[1]] for a in bags[0]]
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return float(100 * sum(scores[i][j] for i, j in zip(rows, columns, strict=True)) / len(true))
