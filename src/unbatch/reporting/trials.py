"""Trials: all that a sweep asked for, as it stands in a folder or in several. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from unbatch.errors import UnbatchError
from unbatch.files import write_atomically
from unbatch.reporting.results import Audit
from unbatch.reporting.tiers import Tier
from unbatch.reporting.trial import TRIAL_SCHEMA, Chosen, Trial, trial_at

MANIFEST = "sweep.json"
RUN_FILE = re.compile(r"[0-9a-f]{16}\.json")


class Manifest(BaseModel):
    """What a sweep was asked to run, in order: so that a folder tells which configurations are missing."""

    model_config = ConfigDict(extra="forbid")

    schema_number: int = TRIAL_SCHEMA
    version: str
    code: str  # a hash of unbatch's own source
    created: str
    configurations: dict[str, Chosen]  # by key

    def save(self, folder: Path) -> None:
        """Write it to `folder`/sweep.json, whole or not at all."""
        write_atomically(folder / MANIFEST, self.model_dump_json(indent=1), private=True)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it. Raises UnbatchError: it is none."""
        try:
            return cls.model_validate_json((folder / MANIFEST).read_bytes())
        except (ValidationError, OSError) as error:
            raise UnbatchError(f"{folder / MANIFEST} cannot be read ({error}); run the sweep again.") from None


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Trials of one or several folders: those that stand, older ones of the same questions, and those that are missing.

    >>> held = Trials.of([Trial(key="0", configuration={"case": "digits"}, words="no memory was left.")])
    >>> held
    <Trials: 1 configuration, 1 failed>
    """

    current: Sequence[Trial]
    earlier: Sequence[Trial] = ()  # of the same questions, by older code or older files; oldest first
    missing: Sequence[Trial] = ()  # asked for, and not run: nothing is known of them

    @classmethod
    def of(cls, found: Sequence[Trial], *, before: Sequence[Trial] = (), missing: Sequence[Trial] = ()) -> Trials:
        """Of several trials of one question the newest stands, and of two as old the one that comes later.

        `before`: trials that do not stand whatever comes of their question, since the code or a file has changed since.
        """
        newest: dict[str, Trial] = {}
        for trial in found:
            other = newest.get(trial.identity)
            if other is None or trial.created >= other.created:
                newest[trial.identity] = trial
        current = [trial for trial in found if newest[trial.identity] is trial]
        replaced = [trial for trial in found if newest[trial.identity] is not trial]
        return cls(
            current=current,
            earlier=sorted([*before, *replaced], key=lambda trial: trial.created),
            missing=[trial for trial in missing if trial.identity not in newest],
        )

    @classmethod
    def at(cls, *paths: str | Path, pictures: bool = True) -> Trials:
        """What stands in these files and folders: of a sweep, or of single audits (an audit.json, at any depth).

        Without `pictures` nothing that is drawn is kept, which is enough to count.
        Raises UnbatchError: there is nothing there, or a file cannot be read.
        """
        found, before, missing = list[Trial](), list[Trial](), list[Trial]()
        for path in map(Path, paths):
            if not path.is_dir():
                found.append(_read(path, pictures))
                continue
            folders = sorted(each.parent for each in path.rglob(MANIFEST))
            audits = sorted(path.rglob("audit.json"))
            if not folders and not audits:
                raise UnbatchError(
                    f"{path} holds no sweep and no audit.json; `unbatch sweep PLAN --out {path}` runs one."
                )
            for held in (_swept(folder, pictures) for folder in folders):
                found += held.current
                before += held.earlier
                missing += held.missing
            found += [_read(file, pictures) for file in audits]
        return cls.of(found, before=before, missing=missing)

    def rows(self) -> list[dict[str, Any]]:
        """One row per run of an attack and private example; one row of a configuration that failed or has not run."""
        return [row for trial in self.current for row in trial.rows()] + [
            row | {"status": "not run", "words": ""} for trial in self.missing for row in trial.rows()
        ]

    def outcomes(self) -> Counter[str]:
        """How many private examples, by the worst that any trial of the same exchange made of each."""
        return Counter(tier.value for tier in self.tiers().values())

    def tiers(self) -> dict[tuple[str, int, int], Tier]:
        """By exchange (its fingerprint) and example, the worst for its owner over all trials of that exchange."""
        return worst_tiers(self.current)

    def audits(self) -> Iterator[tuple[Trial, Audit]]:
        """The trials that came to an audit."""
        for trial in self.current:
            if trial.audit is not None:
                yield trial, trial.audit

    @property
    def failed(self) -> list[Trial]:
        """Those that came to no audit."""
        return [trial for trial in self.current if trial.failed]

    def __repr__(self) -> str:
        n = len(self.current) + len(self.missing)
        parts = [f"{n} configuration{'s' * (n != 1)}"]
        parts += [f"{len(self.failed)} failed"] * bool(self.failed)
        parts += [f"{len(self.missing)} not run"] * bool(self.missing)
        parts += [f"{count} {tier}" for tier, count in sorted(self.outcomes().items())]
        return f"<Trials: {', '.join(parts)}>"


def worst_tiers(trials: Sequence[Trial]) -> dict[tuple[str, int, int], Tier]:
    """By exchange (fingerprint, client and example), the worst for its owner: several trials may attack one exchange."""
    found: dict[tuple[str, int, int], Tier] = {}
    for trial in trials:
        if trial.audit is not None:
            for (client, index), tier in trial.audit.tiers().items():
                place = trial.audit.fingerprint or trial.key, client, index
                found[place] = max(found.get(place, Tier.NONE), tier, key=Tier.weight)
    return found


def _read(path: Path, pictures: bool) -> Trial:
    trial = trial_at(path)
    return trial if pictures else trial.without_pictures()


def _swept(folder: Path, pictures: bool) -> Trials:
    """The trials of one sweep's folder in the order in which they were asked for, those of before, and the missing."""
    asked = Manifest.load(folder).configurations
    files = {path.stem: path for path in sorted(folder.glob("*.json")) if RUN_FILE.fullmatch(path.name)}
    missing = [Trial(key=key, configuration=chosen) for key, chosen in asked.items() if key not in files]
    current = [_read(files[key], pictures) for key in asked if key in files]
    identities = {trial.identity for trial in (*current, *missing)}
    before = [_read(path, pictures) for key, path in files.items() if key not in asked]
    earlier = [trial for trial in before if trial.identity in identities]  # others are of plans that were given up
    return Trials(current=current, earlier=earlier, missing=missing)
