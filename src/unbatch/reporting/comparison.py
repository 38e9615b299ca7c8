"""Comparison: many audits as one self-contained HTML page of numbers alone; imports no torch.

Like a report it asks nothing of the network and runs no script. It shows no private example: scores and counts only.
"""

from __future__ import annotations

import base64
import csv
import io
from collections import Counter
from pathlib import Path

from unbatch import __version__
from unbatch.files import write_atomically
from unbatch.reporting.change import changes
from unbatch.reporting.curve import HEIGHT, strength_curves
from unbatch.reporting.heat_map import heat_maps
from unbatch.reporting.html import SEVERITY, templates
from unbatch.reporting.spot import Spot, spots
from unbatch.reporting.tiers import Outcome, Tier
from unbatch.reporting.trials import Trials

MOST_ROWS_WITHIN = 20_000  # of the table that the page carries; `unbatch table` writes any number
PRIVATE_COLUMNS = {"label"}  # of the table, which the page leaves out: recovered labels are the clients' own


def comparison_page(trials: Trials) -> str:
    """The page of many audits: recovered shares over batch and defence, scores against strength, and what changed.

    >>> from unbatch.reporting.trial import Trial
    >>> trials = Trials.of([Trial(key="0", configuration={"case": "digits"}, words="no memory was left.")])
    >>> "no memory was left." in comparison_page(trials)
    True
    """
    places = spots(trials)
    compared = changes(trials)
    rows = [{k: v for k, v in row.items() if k not in PRIVATE_COLUMNS} for row in trials.rows()]
    return (
        templates()
        .get_template("compare.html.j2")
        .render(
            trials=trials,
            headline=headline(places),
            severity=_severity(places),
            spots=places,
            maps=heat_maps(places),
            curves=strength_curves(places),
            height=HEIGHT,
            compared=compared,
            changed=[change for change in compared if change.differs],
            counts=_counts(places),
            tested=sum(spot.size for spot in places if spot.share is not None),
            untested=sum(spot.size for spot in places if spot.share is None),
            created=max((trial.created for trial in trials.current), default=""),
            version=__version__,
            download=_csv(rows) if len(rows) <= MOST_ROWS_WITHIN else "",
        )
    )


def write_comparison(trials: Trials, path: Path) -> None:
    """Write the page whole or not at all. Raises UnbatchError: what the disk said, and what to do."""
    write_atomically(path, comparison_page(trials), private=True)


def headline(places: list[Spot]) -> str:
    """What all of it comes to in a sentence.

    >>> headline([])
    'Nothing was audited, so nothing is known.'
    """
    counts = _counts(places)
    tested = [spot for spot in places if spot.share is not None]
    if not tested:
        return "Nothing was audited, so nothing is known."
    hit, size = counts[Tier.EXACT] + counts[Tier.COPY], sum(spot.size for spot in tested)
    open_ = f"{sum(spot.hit > 0 for spot in tested)} of " if hit else ""
    where = f"{open_}{len(tested)} places of the grid that were tested"
    if len(tested) == 1:
        where = "the one place of the grid that was tested"
    return f"{hit or 'None'} of {size} private example{'s' * (size != 1)} came back, at {where}."


def _counts(places: list[Spot]) -> Counter[Tier]:
    return sum((spot.counts for spot in places), Counter())


def _severity(places: list[Spot]) -> tuple[str, str]:
    counts = _counts(places)
    if not any(spot.share is not None for spot in places):
        return SEVERITY[Outcome.NOTHING_RAN]
    worst = max((tier for tier, n in counts.items() if n), key=Tier.weight, default=Tier.NONE)
    return SEVERITY[Outcome(worst.value)]


def _csv(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return "data:text/csv;base64," + base64.b64encode(text.getvalue().encode()).decode()
