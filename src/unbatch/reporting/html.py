"""Report: an audit as one self-contained HTML page, evidence for people; imports no torch.

The page asks nothing of the network (its own content security policy forbids it) and runs no script. It carries the
audit's JSON in the element with the id ``audit``, so that the page alone can be checked by a program.
"""

from __future__ import annotations

import base64
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from unbatch.files import write_atomically
from unbatch.reporting.chart import Chart, by_attack, known, number, score, title
from unbatch.reporting.controls import assessment, controls
from unbatch.reporting.thresholds import NEAR_CHANCE
from unbatch.reporting.tiers import Outcome, Tier
from unbatch.reporting.verdict import amounts

if TYPE_CHECKING:
    from unbatch.reporting.results import Audit, Client, Example, MetricInfo, Run

PNG = "data:image/png;base64,"
PROTOCOL = (
    "local_steps",
    "epochs",
    "local_batch_size",
    "optimiser",
    "learning_rate",
    "momentum",
    "weight_decay",
    "mode",
    "rounds",
    "server_rate",
    "sends_buffers",
)


MOST = 12  # examples that a notebook shows


def render(audit: Audit, *, appendix: bool = True) -> str:
    """The page of an audit, with or without the appendix on which standards ask for such a test.

    >>> import unbatch
    >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
    >>> audit.verdict() in render(audit)
    True
    """
    metric = primary(audit)
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            audit=audit,
            metric=metric,
            severity=severity(audit),
            groups=groups(audit),
            runs=by_attack(audit),
            best=best_score(audit, metric),
            chart=Chart.of(audit, metric) if metric else None,
            command=command(audit),
            embedded=embedded(audit),
            controls=controls(audit) if appendix else [],
            assessment=assessment(audit),
            download="data:application/json;base64," + base64.b64encode(audit.model_dump_json().encode()).decode(),
        )
    )


def summary(audit: Audit) -> str:
    """The finding and the first examples, as a piece of HTML for a notebook: it needs no network, style sheet or script."""
    cards = [card for _, held in groups(audit) for card in held]
    page = templates().get_template("summary.html.j2")
    return page.render(audit=audit, severity=severity(audit), cards=cards[:MOST], left=len(cards[MOST:]))


def templates() -> Environment:
    """The pages of this folder, with what they call on: how numbers and findings are written."""
    environment = Environment(
        loader=PackageLoader("unbatch.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "score": score,
        "side": side,
        "title": title,
        "amounts": amounts,
        "finding": finding,
        "breakable": breakable,
    }
    environment.tests["is_picture"] = is_picture
    return environment


def write(audit: Audit, path: str | Path, *, appendix: bool = True) -> None:
    """Write the page whole or not at all, for its owner alone to read: it shows private examples in the clear.

    Raises UnbatchError: what the disk said, and what to do.
    """
    write_atomically(Path(path), render(audit, appendix=appendix), private=True)


def is_picture(text: str | None) -> bool:
    """Whether a rendered example is a picture; anything else, an address above all, is shown as text.

    >>> is_picture("data:image/png;base64,iVBORw0KGgo="), is_picture("http://elsewhere/a.png")
    (True, False)
    """
    return text is not None and text.startswith(PNG)


def breakable(text: str) -> Markup:
    """Words with places to break a line where a spelling has its joints.

    >>> breakable("noise:sigma=1 & clip")
    Markup('noise:<wbr>sigma=<wbr>1 &amp; clip')
    """
    return Markup(re.sub(r"([:=,/])(?=\S)", r"\1<wbr>", str(escape(text))))


def side(picture: str) -> int:
    """Width in pixels, from the PNG's header; 0 where it cannot be read."""
    try:
        return int.from_bytes(base64.b64decode(picture.removeprefix(PNG)[:32])[16:20], "big")
    except ValueError:
        return 0


def primary(audit: Audit) -> str:
    """What cards and chart are labelled with: psnr for images, token-accuracy for texts, else l2-error or the first."""
    first = {"images": "psnr", "tokens": "token-accuracy"}.get(audit.domain, "l2-error")
    return first if first in audit.metrics else next(iter(audit.metrics), "")


SEVERITY = {
    Outcome.EXACT: ("found", "Recovered exactly"),
    Outcome.COPY: ("found", "Recovered as copies"),
    Outcome.RECOGNISABLE: ("open", "Recognisable"),
    Outcome.EXPLAINED: ("found", "Explained"),
    Outcome.FEATURES: ("open", "Features recovered"),
    Outcome.NONE: ("open", "None found"),
    Outcome.NOTHING_RAN: ("untested", "Not tested"),
    Outcome.NOT_AUDITED: ("untested", "Not audited"),
}
FINDINGS = {
    Tier.EXACT: ("found", "recovered exactly"),
    Tier.COPY: ("found", "a copy"),
    Tier.RECOGNISABLE: ("open", "recognisable"),
}


def severity(audit: Audit) -> tuple[str, str]:
    """A style and the words that say the same: never colour alone."""
    return SEVERITY[audit.outcome]


def finding(run: Run, example: Example) -> tuple[str, str]:
    """Style and words of what one run made of one example."""
    if run.layer:
        return "open", f"features of {run.layer}"
    if example.tier in FINDINGS:
        return FINDINGS[example.tier][0], str(example.tier)
    if example.picture is None and example.label is not None:
        return "open", f"label {example.label}"
    return "open", "guess"


class Piece(NamedTuple):
    """A token as it stands in a text, and whether the other text has the same one at its place.

    >>> Piece(" to be", same=False).space, Piece(" to be", same=False).words
    (' ', 'to be')
    """

    text: str
    same: bool = True

    @property
    def words(self) -> str:
        """The token without the spaces before it; what cannot be seen is named."""
        return self.text.lstrip(" ") or "[space]"

    @property
    def space(self) -> str:
        """The spaces before it."""
        return self.text[: len(self.text) - len(self.text.lstrip(" "))]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One example as the page shows it: the private one beside the best that any attack made of it."""

    client: Client
    index: int
    private: str = ""
    true_label: str = ""
    metric: str = ""
    info: MetricInfo | None = None
    run: Run | None = None
    example: Example | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        client = self.client.name or f"client {self.client.index}"
        return client if self.client.size == 1 else f"{client}, example {self.index}"

    @property
    def score(self) -> float | None:
        return known(self.example.scores.get(self.metric)) if self.example else None

    @property
    def chance(self) -> float | None:
        return known(self.example.chance.get(self.metric)) if self.example else None

    @property
    def fields(self) -> list[tuple[str, str, str]] | None:
        """Name, private and recovered value of each column, where both render as ``name = value, ...``."""
        found = (self.example and self.example.picture) or self.private
        sides = [[part.partition(" = ") for part in text.split(", ")] for text in (self.private or found, found)]
        names = [[name for name, equals, _ in parts if equals] for parts in sides]
        if not names[0] or names[0] != names[1] or any(len(names[0]) != len(parts) for parts in sides):
            return None
        return [(name, true, got) for (name, _, true), (_, _, got) in zip(*sides, strict=True)]

    @staticmethod
    def alike(one: str, other: str) -> bool:
        """Whether two values in words are one, to a unit in the last of the four digits that are shown.

        >>> Card.alike("0.1235", "0.1234"), Card.alike("39", "38"), Card.alike("cook", "clerk")
        (True, False, False)
        """
        try:
            a, b = float(one), float(other)
        except ValueError:
            return one == other
        largest = max(abs(a), abs(b))
        return a == b or (largest > 0 and abs(a - b) <= 1.01 * 10.0 ** (math.floor(math.log10(largest)) - 3))

    @property
    def texts(self) -> tuple[list[Piece], list[Piece]] | None:
        """The private and the recovered text, token by token; None where the examples are no texts."""
        held = self.client.pieces[self.index] if self.index < len(self.client.pieces) else []
        found = self.example.pieces if self.example else []
        if not held and not found:
            return None
        if not held or not found:
            return [Piece(text) for text in held], [Piece(text) for text in found]
        pairs = [
            (held[i : i + 1], found[i : i + 1], held[i : i + 1] == found[i : i + 1])
            for i in range(max(len(held), len(found)))
        ]
        private = [Piece(text, same) for true, _, same in pairs for text in true]
        return private, [Piece(text, same) for _, got, same in pairs for text in got]

    @property
    def badges(self) -> list[tuple[str, str]]:
        """Style and words."""
        example, run = self.example, self.run
        if example is None or run is None:
            return [("untested", "not recovered")]
        if example.picture is None:
            shown = [("open", "label only")]
        else:
            guessed = ("open", "explains the update" if run.explains and example.error is None else "nearest guess")
            shown = [FINDINGS.get(example.tier or Tier.NONE, guessed)]
        if example.picture is not None and example.bound is not None and math.isfinite(example.bound):
            holds = example.error is None or example.error <= example.bound
            words = f"certified to {number(example.bound)}" if holds else f"claim of {number(example.bound)} fails"
            if not example.bound:  # of tokens, which are right or wrong
                words = "certified to the last token" if holds else "the claim of every token fails"
            shown.append(("sure" if holds else "open", words))
        near = example.tier in (Tier.EXACT, Tier.COPY)
        if self.info and self.score is not None and self.chance is not None and not near:
            gain = (self.score - self.chance) * (1 if self.info.higher_is_better else -1)
            if gain <= 0:
                shown.append(("untested", "no better than chance"))
            elif self.info.unit == "dB" and gain <= NEAR_CHANCE:
                shown.append(("untested", f"within {NEAR_CHANCE:g} dB of chance"))
        return shown


def groups(audit: Audit) -> list[tuple[str, list[Card]]]:
    """Cards under the name of their client; in one nameless group where every client holds one example.

    Without a truth, the examples that the run with the least bound, then the least residual, returned.
    """
    order = audit.everyone()
    if audit.truth:
        first = primary(audit)
        worst = {name: audit.worst(name) for name in sorted(audit.metrics, key=lambda name: name != first)}
        labels = {(r.client, e.index): e.label for r in reversed(audit.runs) for e in r.examples if e.label is not None}
        cards = [[_card(audit, client, i, worst, labels) for i in range(client.size)] for client in order]
    else:
        cards = [_returned(audit, client) for client in order]
    if all(client.size == 1 for client in order):
        return [("", [card for held in cards for card in held])]
    return [(client.name or f"client {client.index}", held) for client, held in zip(order, cards, strict=True)]


def _returned(audit: Audit, client: Client) -> list[Card]:
    def key(run: Run) -> tuple[float, float]:
        bounds = [example.bound for example in run.examples if example.bound is not None]
        return min(bounds, default=math.inf), math.inf if run.residual is None else run.residual

    held = [run for run in audit.runs if run.client == client.index and any(e.picture for e in run.examples)]
    run = min(held, key=key, default=None)
    return [Card(client=client, index=e.index, run=run, example=e, label=e.label) for e in run.examples] if run else []


def _card(
    audit: Audit,
    client: Client,
    i: int,
    worst: Mapping[str, Mapping[tuple[int, int], tuple[float, Run] | None]],
    labels: Mapping[tuple[int, int], str],
) -> Card:
    place = client.index, i
    metric, run = next(((name, hit[1]) for name, best in worst.items() if (hit := best.get(place))), ("", None))
    held = [e for e in run.examples if e.index == i] if run else []
    example = max(held, key=lambda e: known(e.scores.get(metric)) is not None, default=None)
    return Card(
        client=client,
        index=i,
        private=client.pictures[i] if i < len(client.pictures) else "",
        true_label=client.labels[i] if i < len(client.labels) else "",
        metric=metric,
        info=audit.metrics.get(metric),
        run=run,
        example=example,
        label=example.label if example and example.label is not None else labels.get(place),
    )


def best_score(audit: Audit, metric: str) -> tuple[float, float | None] | None:
    """The score nearest to the truth over all private examples, with its chance level."""
    if not metric:
        return None
    sign = 1 if audit.metrics[metric].higher_is_better else -1
    every = [e for run in audit.runs for e in run.examples]
    pairs = [(s, known(e.chance.get(metric))) for e in every if (s := known(e.scores.get(metric))) is not None]
    return max(pairs, key=lambda pair: sign * pair[0], default=None)


def command(audit: Audit) -> str:
    """The command line that runs this audit again; empty where its data did not come from a named case.

    >>> import unbatch
    >>> command(unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=()))
    'unbatch audit digits:width=16 --attack bias-ratio --seed 0'
    """
    if "command" in audit.environment:
        return audit.environment["command"]
    if not audit.truth or audit.case == "custom" or " " in audit.case:
        return ""
    words = ["unbatch", "audit", audit.case]
    for option, values in (
        ("--attack", audit.attacks if audit.allowance is None else []),
        ("--defence", audit.defences),
        ("--remedy", [remedy.defence for remedy in audit.remedies]),
        ("--seed", [str(seed) for seed in audit.seeds]),
    ):
        words += [word for value in values for word in (option, value)]
    rules = [f"{name}={audit.knowledge[name]}" for name in PROTOCOL if name in audit.knowledge]
    if rules and audit.protocol != "one gradient, model in train mode":
        words += ["--protocol", ",".join(rules)]
    if "labels" in audit.knowledge:
        words += ["--knows", "labels"]
    return shlex.join(words + (["--budget", f"{audit.budget:g}"] if audit.budget is not None else []))


def embedded(audit: Audit) -> Markup:
    """The audit's JSON for a script element: no character in it can end the element or open a comment."""
    text = audit.model_dump_json()
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))
