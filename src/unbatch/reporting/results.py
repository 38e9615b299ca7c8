"""Results: an audit as JSON with a schema number. Imports no torch, so that a report or a gate needs none."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from unbatch.analysis import Bound, LayerRisk, Verdict
from unbatch.errors import MissingExtra, UnbatchError
from unbatch.files import write_atomically
from unbatch.privacy import Privacy
from unbatch.reporting.thresholds import COPY_ERROR, EXACT
from unbatch.reporting.tiers import Outcome, Tier, tier_of

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA = 1
MOST_EXAMPLES = 100_000  # of one client: a file that claims more is none of an audit's
DERIVED = ("outcome", "counts", "headline")  # written for readers of the JSON; worked out anew when it is read
PICTURE = "data:image/"


class Status(StrEnum):
    """How a run ended.

    >>> Status("cut short")
    <Status.CUT_SHORT: 'cut short'>
    """

    DONE = "done"
    CUT_SHORT = "cut short"  # by its budget or by Ctrl-C: what it had until then
    NOT_APPLICABLE = "not applicable"  # it cannot run here
    FAILED = "failed"  # a defect: what it would have found is not known
    LEFT_OUT = "left out"  # for want of time: what it would have found is not known
    NOT_NEEDED = "not needed"  # everything was recovered exactly and certified before its turn


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    def __str__(self) -> str:
        return repr(self)


class Example(_Record):
    """What one run made of one private example (or, without a truth, one returned example)."""

    index: int  # of the private example in its client's batch
    scores: dict[str, float | None] = {}  # by metric; None where it was not matched
    chance: dict[str, float | None] = {}  # by metric: as many prior draws, matched in the same way
    error: float | None = None  # |recovered - private| / |private|; None where not matched
    bound: float | None = None  # largest relative error that the attack claims; None = no claim
    picture: str | None = None  # the recovered example, rendered
    difference: str | None = None
    pieces: list[str] = []  # of a text: its tokens as they stand in it
    label: str | None = None  # the recovered label in words
    tier: Tier | None = None  # how near it came; None where nothing was matched, or nothing is known of how near

    @model_validator(mode="after")
    def _tiered(self) -> Self:
        """The tier by what else is on record, where none is: of an audit of before there were tiers."""
        if self.tier is None and self.error is not None:
            drawn = (self.picture or "").startswith(PICTURE)
            seen = (self.scores.get("psnr"), self.scores.get("ssim")) if drawn else (None, None)
            self.tier = tier_of(
                self.error,
                chance=self.chance.get("l2-error"),
                psnr=seen[0],
                ssim=seen[1],
                ssim_of_chance=self.chance.get("ssim"),
            )
        elif self.tier is None and self.picture is not None and self.bound is not None:
            self.tier = Tier.EXACT if self.bound <= EXACT else Tier.COPY if self.bound <= COPY_ERROR else None
        return self

    @property
    def recovered(self) -> bool:
        """Exactly, to a relative error of EXACT; without a truth, by the certified bound of a returned example."""
        if self.error is not None:
            return self.error <= EXACT
        return self.picture is not None and self.bound is not None and self.bound <= EXACT

    def __repr__(self) -> str:
        facts = {"error": self.error, "bound": self.bound, **self.scores}
        told = ", ".join(f"{name} {value:.3g}" for name, value in facts.items() if value is not None)
        words = {Tier.EXACT: "recovered exactly", Tier.COPY: "recovered as a copy", Tier.RECOGNISABLE: "recognisable"}
        state = words.get(self.tier or Tier.NONE, "not recovered")
        return f"<Example {self.index}: {state}{', ' * bool(told)}{told}>"


class Run(_Record):
    """One attack on one client with one seed."""

    client: int
    attack: str  # as spelt
    family: str
    guarantee: str
    threat_model: str
    paper: str
    seed: int
    status: Status
    words: str = ""  # the obstacle, or what failed
    seconds: float = 0.0
    guesses: int = 0
    residual: float | None = None  # how well the returned examples explain the update
    explains: bool = False  # as well as the rounding of the update allows
    freedom: float | None = (
        None  # relative: how far from these, to first order, all lies nearby that explains it as well
    )
    layer: str = ""
    up_to: list[str] = []
    knowledge: list[str] = []  # the fields that the attack was handed
    missing: list[str] = []  # the fields it needed and did not have
    adaptive: bool = (
        False  # it was handed the defence's likelihood or earlier rounds; the same attack without is another run
    )
    examples: list[Example] = []
    trace: dict[str, Any] = {}
    unscored: dict[str, str] = {}  # metrics that failed on what it returned, and why

    def __repr__(self) -> str:
        what = f"examples as they enter {self.layer}" if self.layer else "examples"
        hit = f", {sum(e.recovered for e in self.examples)} of {len(self.examples)} {what} exact" if self.ran else ""
        return f"<Run of {self.title} on client {self.client}, seed {self.seed}: {self.status}{hit}>"

    @property
    def title(self) -> str:
        """The attack as people read it: one that knows the defence, or earlier rounds, says so."""
        if not self.adaptive:
            return self.attack
        known = {"log_prob": "the defence", "earlier": "earlier rounds"}
        told = [words for field, words in known.items() if field in self.knowledge] or ["the defence"]
        return f"{self.attack}, knowing {' and '.join(told)}"

    @property
    def key(self) -> tuple[int, str, int]:
        """What tells it from the other runs of its audit: client, attack and seed."""
        return self.client, self.title, self.seed

    @property
    def finished(self) -> bool:
        """Whether a resumed audit can keep it."""
        return self.status in (Status.DONE, Status.NOT_APPLICABLE)

    @property
    def ran(self) -> bool:
        """Whether it came to an answer, its own time or another's ending it."""
        return self.status in (Status.DONE, Status.CUT_SHORT)


class Analysed(_Record):
    """How one analysis of one client's exchange ended; what it found stands in the audit's risks, bounds and verdicts.

    >>> Analysed(analysis="van-trees", status=Status.CUT_SHORT, words="3 of 16 draws were made.").title
    'van-trees'
    """

    analysis: str  # as spelt
    client: int = 0
    status: Status
    words: str = ""  # why it has nothing to say, or what failed
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """The analysis, and of which client where that is not the first one."""
        return f"{self.analysis.partition(':')[0]}{f' of client {self.client}' if self.client else ''}"


class Client(_Record):
    """One client's private batch, rendered for the judge; empty pictures where the truth is not known."""

    index: int
    name: str
    size: int = Field(ge=0, le=MOST_EXAMPLES)
    pictures: list[str] = []
    pieces: list[list[str]] = []  # of texts: the tokens of each as they stand in it
    labels: list[str] = []
    update_hash: str = ""  # sha256 of what it sent; of several clients one each
    reproducible: bool = True  # the same seed gave the same update twice
    residual: float | None = None  # of the truth itself under the known protocol: what an undefended client leaves

    def __repr__(self) -> str:
        return f"<Client {self.index}: {self.size} example{'s' * (self.size != 1)}>"


class MetricInfo(_Record):
    """What the report needs to know of a metric."""

    unit: str
    higher_is_better: bool
    best: float | None  # None: it differs from example to example


class Flag(_Record):
    """Something about the audit itself that its reader must know."""

    name: str
    words: str  # what happened here
    means: str
    do: str

    def __repr__(self) -> str:
        return f"<Flag {self.name}: {_cut(self.words)}>"


class Remedy(_Record):
    """The same attacks on the same clients behind one more defence: measured, and no proof that the defence holds."""

    defence: str
    recovered: int  # exactly
    size: int
    copies: int = 0  # beside those
    psnr: float | None = None  # of the worst example; None where no attack returned a picture
    chance: float | None = None  # of that example


class Audit(_Record):
    """Everything that a report shows: what was audited, every run with its scores, the bounds, and the flags.

    >>> import unbatch
    >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
    >>> audit
    <Audit of digits:width=16: 1 of 1 private image recovered exactly; anyone who sees this update has it.>
    """

    schema_number: int = SCHEMA
    version: str
    created: str
    complete: bool = False
    asked: int = 0  # runs of attacks that were asked for; 0 in files of before they were counted
    case: str
    domain: str
    shape: list[int] = []  # of one example
    truth: bool = True  # False for a captured update
    private: bool = True  # False where examples, labels and tokens were left out, so that scores alone stand here
    attacks: list[str]
    defences: list[str] = []  # outermost first
    effects: dict[str, list[str]] = {}  # by defence, what it says that it does: "adds_noise", "clips", "sums_clients"
    random_defences: list[str] = []  # those of them that draw random numbers
    published: dict[str, list[str]] = {}  # by defence, the fields of knowledge that it makes known
    privacy: Privacy | None = None  # where the client trains with differential privacy
    seeds: list[int] = [0]
    budget: float | None = None
    allowance: float | None = None  # seconds of all attacks on one client, where none was named
    not_audited: str = ""  # why nothing can be said: no reading of the captured update fits its model
    model: str  # printed
    parameters: int
    model_hash: str = Field(
        default="", description="sha256 of its parameters and buffers; another one is another model"
    )
    loss: str
    protocol: str
    threat_model: str = ""  # of who holds a released model; empty where updates are sent
    knowledge: dict[str, str] = {}
    metrics: dict[str, MetricInfo] = {}
    environment: dict[str, str] = {}
    clients: list[Client] = []
    runs: list[Run] = []
    analyses: list[Analysed] = []  # how each one ended; none in files of before they were watched
    risks: list[LayerRisk] = []
    bounds: list[Bound] = []
    verdicts: list[Verdict] = []
    remedies: list[Remedy] = []
    data_notes: list[str] = []  # what was done to read the private data
    notes: list[str] = []  # what a captured update looks like: sign, scale, mode
    flags: list[Flag] = []
    fingerprint: str = Field(default="", description="of model, data and protocol: a resumed audit must match it")

    @property
    def seen(self) -> str:
        """What attackers read: an update, or a released model."""
        return "released model" if self.threat_model else "update"

    def worst(self, metric: str) -> dict[tuple[int, int], tuple[float, Run] | None]:
        """Per private example (client, index): its worst score over all attacks and seeds, and the run that got it.

        Worst is for the owner of the data: the score nearest to the truth; of several runs that recovered it exactly one
        that certified it, since beyond EXACT scores differ by rounding. None where no run matched the example.

        >>> import unbatch
        >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
        >>> score, run = audit.worst("psnr")[0, 0]
        >>> score > 100, run.attack
        (True, 'bias-ratio')
        """
        sign = 1.0 if self.metrics[metric].higher_is_better else -1.0
        best: dict[tuple[int, int], tuple[float, Run] | None] = {
            (client.index, i): None for client in self.clients for i in range(client.size)
        }
        ranks: dict[tuple[int, int], tuple[bool, float]] = {}
        for run in self.runs:
            for example in run.examples:
                score, place = example.scores.get(metric), (run.client, example.index)
                if score is None:
                    continue
                rank = example.recovered and example.bound is not None, sign * score
                if place not in ranks or rank > ranks[place]:
                    best[place], ranks[place] = (score, run), rank
        return best

    def recovered(self) -> set[tuple[int, int]]:
        """Private examples (client, index) that some attack recovered exactly.

        >>> import unbatch
        >>> unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=()).recovered()
        {(0, 0)}
        """
        return {place for place, tier in self.tiers().items() if tier is Tier.EXACT}

    def tiers(self) -> dict[tuple[int, int], Tier]:
        """By private example (client, index), how much of it came back: the worst for its owner over all attacks and seeds.

        Without a truth, the returned examples of each client's run that certifies the most, as far as they are certified:
        one example that two runs return is not counted twice.

        >>> import unbatch
        >>> unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=()).tiers()
        {(0, 0): <Tier.EXACT: 'exact'>}
        """
        runs = [run for run in self.runs if not run.layer]
        if not self.truth:
            best: dict[int, dict[tuple[int, int], Tier]] = {}
            for run in runs:
                sure = {(run.client, e.index): e.tier for e in run.examples if e.tier}
                best[run.client] = max(best.get(run.client, {}), sure, key=_weight)
            return {place: tier for held in best.values() for place, tier in held.items()}
        found = {(client.index, i): Tier.NONE for client in self.clients for i in range(client.size)}
        for run in runs:
            for e in run.examples:
                place = run.client, e.index
                found[place] = max(found.get(place, Tier.NONE), e.tier or Tier.NONE, key=Tier.weight)
        return found

    def explaining(self) -> Run | None:
        """Without a truth, the run whose examples explain the update to its rounding, and of several leave least of it."""
        held = [run for run in self.runs if run.explains and not run.layer] if not self.truth else []
        return min(held, key=lambda run: run.residual or 0.0, default=None)

    def tried(self) -> list[Run]:
        """The runs of attacks on the examples themselves that came to an answer; labels alone are no example."""
        return [run for run in self.runs if run.ran and run.family != "labels"]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def outcome(self) -> Outcome:
        """What the audit comes to: the worst tier of a private example, or why there is none.

        >>> import unbatch
        >>> unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=()).outcome
        <Outcome.EXACT: 'exact'>
        """
        worst = max(self.tiers().values(), key=Tier.weight, default=Tier.NONE)
        if worst is not Tier.NONE:
            return Outcome(worst.value)
        if self.explaining():
            return Outcome.EXPLAINED
        if self.not_audited:
            return Outcome.NOT_AUDITED
        if self.features():
            return Outcome.FEATURES
        return Outcome.NONE if self.tried() else Outcome.NOTHING_RAN

    @computed_field  # type: ignore[prop-decorator]
    @property
    def counts(self) -> dict[str, int]:
        """By tier, how many private examples (without a truth, returned ones that are certified)."""
        held = list(self.tiers().values())
        return {tier.value: held.count(tier) for tier in Tier if self.truth or tier in (Tier.EXACT, Tier.COPY)}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def headline(self) -> str:
        """The finding in one sentence, or a few; `verdict()` gives the same."""
        from unbatch.reporting.verdict import words

        return words(self)

    @model_validator(mode="before")
    @classmethod
    def _without_derived(cls, held: Any) -> Any:
        return {name: value for name, value in held.items() if name not in DERIVED} if isinstance(held, dict) else held

    def features(self) -> dict[str, set[tuple[int, int]]]:
        """By layer, the private examples (client, index) whose exact features there some attack recovered."""
        found: dict[str, set[tuple[int, int]]] = {}
        for run in self.runs:
            hit = {(run.client, e.index) for e in run.examples if run.layer and e.recovered}
            if hit:
                found.setdefault(run.layer, set()).update(hit)
        return found

    def taken(self, layer: str) -> bool:
        """Whether all that entered a layer is known: every private example was recovered, or its exact features there.

        >>> import unbatch
        >>> unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=()).taken("head")
        True
        """
        every = {(client.index, i) for client in self.clients for i in range(client.size)}
        return bool(every) and every <= self.recovered() | self.features().get(layer, set())

    def shortened(self) -> list[Analysed]:
        """The analyses that were cut short: what they found is what they had until then."""
        return [each for each in self.analyses if each.status is Status.CUT_SHORT]

    def silent(self) -> list[Analysed]:
        """The analyses that have nothing to say of this exchange, with the reason."""
        return [each for each in self.analyses if each.status is Status.NOT_APPLICABLE]

    def way(self) -> list[LayerRisk]:
        """The layers that an attacker reads backward, from the network's input to its output."""
        return [risk for risk in self.risks if risk.analysis == "layer-equations"]

    def inner_way(self) -> list[Verdict]:
        """What is said of telling a batch apart at an inner layer."""
        return [verdict for verdict in self.verdicts if verdict.analysis == "separable-layer"]

    def changes(self) -> dict[str, dict[str, Verdict]]:
        """What would make the network safer: by change, the safest first, what each metric says of it."""
        found: dict[str, dict[str, Verdict]] = {}
        for verdict in self.verdicts:
            if verdict.analysis == "safer-design":
                metric, _, change = verdict.name.partition(": ")
                found.setdefault(change, {})[metric] = verdict
        return found

    def numbers(self) -> list[Verdict]:
        """The verdicts on the exchange as it is."""
        return [verdict for verdict in self.verdicts if verdict.analysis != "safer-design"]

    def everyone(self) -> list[Client]:
        """The clients by number; one that only a run names has no examples."""
        clients = {client.index: client for client in self.clients}
        for run in self.runs:
            clients.setdefault(run.client, Client(index=run.client, name="", size=0))
        return [clients[index] for index in sorted(clients)]

    @property
    def size(self) -> int:
        """Private examples in all."""
        return sum(client.size for client in self.clients)

    @property
    def noun(self) -> str:
        """What an example is called; rows are of one dimension, and volumes or series are examples."""
        if self.domain == "table" and len(self.shape) > 1:
            return "example"
        return {"images": "image", "table": "row", "tokens": "text"}.get(self.domain, "example")

    def named(self, n: int) -> str:
        """n of what an example is called: "1 image", "4 rows"."""
        return f"{n} {self.noun}" + "s" * (n != 1)

    def verdict(self) -> str:
        """The finding in one sentence; where attacks were cut short, failed or were left out, another says so."""
        return self.headline

    def __repr__(self) -> str:
        return f"<Audit of {_cut(self.case)}{' (not complete)' * (not self.complete)}: {self.verdict()}>"

    def _repr_html_(self) -> str:
        """The finding, and the examples with what was recovered of them, for a notebook."""
        from unbatch.reporting.html import summary

        return summary(self)

    def rows(self) -> list[dict[str, Any]]:
        """One row an example per run, for a table: who was attacked how, and what it gave.

        A run that failed or could not run has a row for every example as well, with nothing but its status in it: failed
        trials count. A metric's score stands under its name, its chance level under "chance" and its name. `recovered`
        is said of the examples themselves, never of a deeper layer's features.

        >>> import unbatch
        >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
        >>> [(row["attack"], row["example"], row["recovered"]) for row in audit.rows()]
        [('bias-ratio', 0, True)]
        """
        sizes = {client.index: client.size for client in self.clients}
        rows = []
        for run in self.runs:
            blank: list[Example | None] = [Example(index=i) for i in range(sizes.get(run.client, 0))] or [None]
            for example in run.examples or blank:
                rows.append(self._row(run, example))
        return rows

    def _row(self, run: Run, example: Example | None) -> dict[str, Any]:
        row: dict[str, Any] = {
            "client": run.client,
            "example": None if example is None else example.index,
            "attack": run.title,
        }
        row |= {name: getattr(run, name) for name in ("seed", "guarantee", "layer", "seconds", "residual")}
        row |= {"status": run.status.value, "recovered": example is not None and example.recovered and not run.layer}
        row |= {name: getattr(example, name, None) for name in ("error", "bound", "label")}
        row["tier"] = example.tier.value if example is not None and example.tier and not run.layer else None
        for metric in self.metrics:
            row[metric] = None if example is None else example.scores.get(metric)
            row[f"chance {metric}"] = None if example is None else example.chance.get(metric)
        return row

    def to_frame(self) -> DataFrame:
        """`rows` as a pandas DataFrame; what is not known is NaN.

        >>> import unbatch
        >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks=["bias-ratio", "label-count"], analyses=())
        >>> audit.to_frame().groupby("attack")["recovered"].sum().to_dict()
        {'bias-ratio': 1, 'label-count': 0}

        Raises MissingExtra (an UnbatchError): pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise MissingExtra.of("a data frame", "pandas", "pandas") from None
        frame = DataFrame(self.rows())
        scores = [name for metric in self.metrics for name in (metric, f"chance {metric}")]
        numbers = [name for name in ("residual", "error", "bound", *scores) if name in frame]
        return frame.astype(dict.fromkeys(numbers, "float64"))

    def redacted(self) -> Audit:
        """The audit without its private examples, for a reader who may see scores alone (`unbatch.reporting.redaction`)."""
        from unbatch.reporting.redaction import redacted

        return redacted(self)

    def to_html(self, path: str | Path, *, appendix: bool = True) -> Path:
        """Write the report, one page that needs no network, and return its place.

        The appendix says which standards ask for such a test, and what this one says to each.

        Written whole or not at all, and for its owner alone to read, since it shows private examples in the clear.

        >>> import tempfile, unbatch
        >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     audit.to_html(f"{folder}/report.html").name
        'report.html'

        Raises UnbatchError: what the disk said, and what to do.
        """
        from unbatch.reporting.html import write

        write(self, path, appendix=appendix)
        return Path(path)

    def save(self, path: str | Path) -> None:
        """Write JSON whole or not at all, for its owner alone to read, since it holds private examples in the clear.

        >>> import tempfile, unbatch
        >>> audit = unbatch.audit(unbatch.cases.Digits(width=16), attacks="bias-ratio", analyses=())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     audit.save(f"{folder}/audit.json")
        ...     unbatch.Audit.load(f"{folder}/audit.json") == audit
        True

        Raises UnbatchError: what the disk said, and what to do.
        """
        write_atomically(Path(path), self.model_dump_json(indent=1), private=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read JSON. Raises UnbatchError: no such file, no JSON, or another schema; the message says what to do."""
        path = Path(path)
        try:
            audit = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UnbatchError(f"cannot read {path}: {error.strerror}.") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UnbatchError(
                f"{path} is no audit of unbatch (schema {SCHEMA}): {where}: {first['msg']}. Give the audit.json that "
                "`unbatch audit` wrote."
            ) from None
        if audit.schema_number != SCHEMA:
            raise UnbatchError(
                f"{path} has schema {audit.schema_number}; this version reads {SCHEMA}. Run the audit again."
            )
        return audit


def _weight(tiers: dict[tuple[int, int], Tier]) -> int:
    return sum(tier.weight() for tier in tiers.values())


def _cut(words: str, most: int = 80) -> str:
    """On one line, and no longer than `most`."""
    line = " ".join(words.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
