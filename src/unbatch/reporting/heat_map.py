"""Heat map: the share of private examples that came back, by batch size and defence, a map for each setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from unbatch.reporting.spot import Spot


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One setting's spots: a row a defence, a column a batch size; None where the grid has no such place."""

    setting: str
    batches: Sequence[int | None]
    rows: Sequence[tuple[str, Sequence[Spot | None]]]  # the defence, and its spots

    @property
    def untold(self) -> str:
        """Why nothing is known of any of its places, in words; empty where something is."""
        held = [spot for _, row in self.rows for spot in row if spot is not None]
        if any(spot.share is not None for spot in held):
            return ""
        counts = Counter(spot.words for spot in held)
        n = len(held)
        said = ", ".join(f"{count} {words}" if len(counts) > 1 else words for words, count in counts.items())
        return f"Nothing is known of {f'these {n} places' if n > 1 else 'this place'} of the grid: {said}."


def heat_maps(held: Sequence[Spot]) -> list[HeatMap]:
    """A map for each setting, in the order of the sweep; batch sizes ascend, and one that is not known comes last.

    >>> spots = [Spot(setting="digits", defence=name, batch=n, trials=[]) for name in ("none", "clip") for n in (4, 1)]
    >>> (drawn,) = heat_maps(spots)
    >>> drawn.batches, [defence for defence, _ in drawn.rows]
    ([1, 4], ['none', 'clip'])
    """
    maps = []
    for setting in dict.fromkeys(spot.setting for spot in held):
        own = {(spot.defence, spot.batch): spot for spot in held if spot.setting == setting}
        batches = sorted({batch for _, batch in own}, key=lambda batch: (batch is None, batch or 0))
        defences = dict.fromkeys(defence for defence, _ in own)
        rows = [(defence, [own.get((defence, batch)) for batch in batches]) for defence in defences]
        maps.append(HeatMap(setting=setting, batches=batches, rows=rows))
    return maps
