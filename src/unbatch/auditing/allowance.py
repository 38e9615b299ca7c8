"""Allowance: the seconds that the attacks of an audit may take where none was named, cheapest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from unbatch.attack import Attack, Cost
from unbatch.reporting.results import Audit, Run, Status
from unbatch.reporting.tiers import Tier

# Of all attacks on one client with one seed, where none was named. What solves ends by itself, mostly at once: a picture
# behind six convolutions takes 15 CPU seconds, a batch of 256 pictures 55 to 233.
DEFAULT_SECONDS = 300.0
SEARCH_SECONDS = 10.0  # of all searches among them, which go on for ever: a report within a quarter of a minute
LARGEST_SHARE = 0.75  # of what is left, that one attack which ends by itself may take
LEAST_SECONDS = 0.2  # with which an attack is begun

Turn = tuple[Attack, Run]


@dataclass
class Allowance:
    """How long each run of an audit may take, and which need not or cannot have their turn.

    `queue`: every run in order. `budget`: seconds of each; None: no limit, or where there is a `total` for all runs on one
    client with one seed, three quarters of what is left of it. Searches have even shares of `searching` seconds instead:
    what solves equations ends by itself, a search does not. With `stops`, once every example of a client is recovered
    exactly and certified, only what costs nothing still runs.

    >>> from unbatch.attacks import BiasRatio, GradientMatching, Unmix
    >>> def turn(attack):
    ...     told = {"family": "", "guarantee": "", "threat_model": "", "paper": "", "seed": 0, "status": "done"}
    ...     return attack, Run(client=0, attack=attack.name, **told)
    >>> turns = [turn(attack) for attack in (BiasRatio(), Unmix(), GradientMatching())]
    >>> allowance = Allowance(queue=turns, total=120.0, searching=10.0)
    >>> [allowance.seconds(*turn) for turn in turns]
    [90.0, 90.0, 10.0]
    """

    queue: Sequence[Turn]
    budget: float | None = None
    total: float | None = None
    searching: float = math.inf
    stops: bool = False
    spent: dict[tuple[int, int, bool], float] = field(default_factory=dict)  # by client, seed, and whether in searches

    def seconds(self, attack: Attack, blank: Run) -> float:
        """That this run may take: infinite where nothing limits it, 0 where nothing is left."""
        if self.budget is not None or self.total is None:
            return self.budget or math.inf
        at = blank.client, blank.seed
        solving, searched = (self.spent.get((*at, which), 0.0) for which in (False, True))
        left = max(self.total - solving - searched, 0.0)
        if attack.cost is not Cost.SEARCHES:
            return LARGEST_SHARE * left
        later = self.queue[next(i for i, (_, run) in enumerate(self.queue) if run is blank) :]
        searches = sum(a.cost is Cost.SEARCHES for a, run in later if (run.client, run.seed) == at)
        return min(left, max(self.searching - searched, 0.0)) / max(searches, 1)

    def spend(self, attack: Attack, run: Run) -> None:
        """Note how long a run took."""
        place = run.client, run.seed, attack.cost is Cost.SEARCHES
        self.spent[place] = self.spent.get(place, 0.0) + run.seconds

    def refused(self, record: Audit, attack: Attack, blank: Run) -> Run | None:
        """The run with the reason why it does not have its turn; None: it has."""
        if self.stops and attack.cost is not Cost.READS and (by := settled(record, blank.client)):
            words = f"every example was recovered exactly and certified before, by {by}."
            return blank.model_copy(update={"status": Status.NOT_NEEDED, "words": words})
        if self.seconds(attack, blank) >= LEAST_SECONDS or self.total is None or self.budget is not None:
            return None
        spent = sum(self.spent.get((blank.client, blank.seed, which), 0.0) for which in (False, True))
        words = (
            f"the attacks before it took {spent:.1f} s of {self.total:g} s that all have; name it, or give a budget."
        )
        return blank.model_copy(update={"status": Status.LEFT_OUT, "words": words})


def settled(record: Audit, client: int) -> str:
    """The attacks that recovered every example of a client exactly, with a certificate; empty where one is left.

    Without a truth, the attack whose certified examples are as many as the batch is known to hold.
    """
    runs = [run for run in record.runs if run.client == client and not run.layer]
    if not record.truth:
        size = int(record.knowledge.get("batch_size", 0))
        sure = (Tier.EXACT, Tier.COPY)
        whole = [run.title for run in runs if size and sum(e.tier in sure for e in run.examples) >= size]
        return next(iter(whole), "")
    by = {
        e.index: run.title
        for run in reversed(runs)
        for e in run.examples
        if e.tier is Tier.EXACT and e.bound is not None
    }
    sizes = {held.index: held.size for held in record.clients}
    return ", ".join(dict.fromkeys(by.values())) if len(by) == sizes.get(client, 0) else ""
