"""Trial: one configuration of a sweep and what its audit came to, as JSON. Imports no torch."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unbatch.errors import UnbatchError
from unbatch.files import write_atomically
from unbatch.reporting.results import SCHEMA, Audit, Example

TRIAL_SCHEMA = 1
FAILED = "failed"  # the status of a configuration that came to no audit

Chosen = dict[str, str | list[str]]  # option of `unbatch audit` -> its value, or its values; without those not given


class Trial(BaseModel):
    """One configuration of a sweep, with its audit or with the reason why there is none.

    >>> trial = Trial(key="0", configuration={"case": "digits:batch=4", "defence": ["clip"]}, words="no memory was left.")
    >>> trial
    <Trial of digits:batch=4, defence clip: failed: no memory was left.>
    >>> trial.command
    'unbatch audit digits:batch=4 --defence clip'
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    schema_number: int = TRIAL_SCHEMA
    key: str = Field(description="a hash of the configuration, of the files it names and of the code")
    configuration: Chosen
    code: str = ""  # a hash of unbatch's own source
    created: str = ""
    engine: str = ""
    threads: int = 0  # of the job; 0: not said
    seconds: float = 0.0
    words: str = ""  # why there is no audit
    audit: Audit | None = None

    @classmethod
    def of(cls, audit: Audit) -> Self:
        """An audit that no sweep ran, with the configuration that can be told of it."""
        told: Chosen = {"case": audit.case, "attack": audit.attacks if audit.allowance is None else []}
        told |= {"defence": audit.defences, "seed": [str(seed) for seed in audit.seeds], "protocol": audit.protocol}
        chosen = {name: value for name, value in told.items() if value}
        key = audit.fingerprint[:16] or audit.created
        return cls(key=key, configuration=chosen, created=audit.created, audit=audit)

    @property
    def failed(self) -> bool:
        """Whether it came to no audit at all."""
        return self.audit is None

    @property
    def identity(self) -> str:
        """What it asks, whatever the code and the files were then: trials of one identity are runs of one question."""
        return json.dumps(self.configuration, sort_keys=True)

    @property
    def command(self) -> str:
        """The command line that runs it alone."""
        return shlex.join(["unbatch", "audit", *command_words(self.configuration)])

    @property
    def title(self) -> str:
        """The configuration in words."""
        named = {
            name: value if isinstance(value, str) else " ".join(value) for name, value in self.configuration.items()
        }
        first = named.pop("case", "")
        return ", ".join([*([first] if first else []), *(f"{name} {value}" for name, value in named.items())])

    @property
    def defence(self) -> str:
        """The client's defences as they were asked for, outermost first; "none" without one."""
        told = self.configuration.get("defence", [])
        return ", ".join([told] if isinstance(told, str) else told) or "none"

    @property
    def batch(self) -> int | None:
        """The largest number of private examples that one client's update holds; None where that is not known."""
        sizes = [client.size for client in self.audit.clients] if self.audit else []
        return max(sizes, default=0) or None

    def rows(self) -> list[dict[str, Any]]:
        """One row per run of an attack and private example, as `Audit.rows` has them, with what was asked beside.

        A configuration that came to no audit is one row with the status "failed": failed trials count.
        `setting` is the case, or the model and its data (`case` is a word of SQL's own). `bound_psnr` is the PSNR in dB
        that a lower bound lets any attacker on that client's update reach.
        """
        audit = self.audit
        named = self.configuration.get("case") or " on ".join(
            str(self.configuration[name]) for name in ("model", "data", "observation") if name in self.configuration
        )
        asked: dict[str, Any] = {"key": self.key, "setting": audit.case if audit else named}
        asked |= {"defence": self.defence, "batch": self.batch, "protocol": audit.protocol if audit else ""}
        asked |= {
            name: value if isinstance(value, str) else " ".join(value)
            for name, value in self.configuration.items()
            if name not in {"case", "attack", "seed", *asked}
        }
        if audit is None:
            return [asked | {"status": FAILED, "recovered": False, "words": self.words}]
        limits = bound_psnrs(audit)
        words = {run.key: run.words for run in audit.runs}
        return [
            asked
            | {"bound_psnr": limits.get(row["client"])}
            | row
            | {"words": words.get((row["client"], row["attack"], row["seed"]), "")}
            for row in audit.rows()
        ]

    def without_pictures(self) -> Trial:
        """The same with nothing drawn, for what only counts: pictures are most of a file, and of many files too much."""
        audit = self.audit
        if audit is None:
            return self
        runs = [
            run.model_copy(
                update={"examples": [example.model_copy(update=_undrawn(example)) for example in run.examples]}
            )
            for run in audit.runs
        ]
        clients = [client.model_copy(update={"pictures": [], "pieces": []}) for client in audit.clients]
        bounds = [bound.model_copy(update={"picture": ""}) for bound in audit.bounds]
        return self.model_copy(
            update={"audit": audit.model_copy(update={"runs": runs, "clients": clients, "bounds": bounds})}
        )

    def save(self, folder: Path) -> None:
        """Write JSON named by its key, for its owner alone to read: the audit in it holds private examples in the clear."""
        write_atomically(folder / f"{self.key}.json", self.model_dump_json(indent=1), private=True)

    def __repr__(self) -> str:
        said = f"{FAILED}: {self.words}" if self.audit is None else self.audit.verdict()
        return f"<Trial of {self.title}: {said}>"

    def __str__(self) -> str:
        return repr(self)


def _undrawn(example: Example) -> dict[str, Any]:
    """Without what is drawn of it; that something was returned stays known."""
    return {"picture": None if example.picture is None else "", "difference": None, "pieces": []}


def command_words(configuration: Chosen) -> list[str]:
    """The words of a configuration after `unbatch audit`: the case alone, all else by option.

    >>> command_words({"case": "digits", "seed": ["0", "1"], "budget": "2"})
    ['digits', '--seed', '0', '--seed', '1', '--budget', '2']
    """
    words = [value for name, value in configuration.items() if name == "case" and isinstance(value, str)]
    for name, value in configuration.items():
        if name != "case":
            words += [word for one in ([value] if isinstance(value, str) else value) for word in (f"--{name}", one)]
    return words


def bound_psnrs(audit: Audit) -> dict[int, float]:
    """By client, the least PSNR in dB that a lower bound for any attacker allows; clients without a bound are left out."""
    least: dict[int, float] = {}
    for bound in audit.bounds:
        if bound.scope == "any" and bound.covers == "update" and not math.isnan(bound.value):
            least[bound.client] = min(bound.psnr, least.get(bound.client, math.inf))
    return least


def trial_at(path: str | Path) -> Trial:
    """The trial in a file of a sweep, or the audit in an audit.json as a trial.

    Raises UnbatchError: no such file, no JSON of either kind, or another schema; the message says what to do.
    """
    path = Path(path)
    try:
        held = json.loads(path.read_bytes())
    except OSError as error:
        raise UnbatchError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or "configuration" not in held:
        return Trial.of(Audit.load(path))
    if held.get("schema_number") != TRIAL_SCHEMA or (held.get("audit") or {}).get("schema_number", SCHEMA) != SCHEMA:
        raise UnbatchError(f"{path} was written by another version of unbatch; run the sweep again with this one.")
    try:
        return Trial.model_validate(held)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UnbatchError(f"{path} is no trial of a sweep: {where}: {first['msg']}. Run the sweep again.") from None


def audit_at(path: str | Path) -> Audit:
    """The audit in an audit.json, or in a file of a sweep. Raises UnbatchError: see `trial_at`, or it came to no audit."""
    trial = trial_at(path)
    if trial.audit is None:
        raise UnbatchError(f"{path} holds no audit: {trial.title} failed: {trial.words}")
    return trial.audit
