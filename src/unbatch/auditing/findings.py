"""Findings: what analyses say of each client's exchange, put on record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from unbatch.analysis import Analysis, Bound, Finding, LayerRisk, Verdict
from unbatch.auditing.judge import failure
from unbatch.domain import Domain, Tokens
from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.progress import Watch, watching
from unbatch.reporting.results import Analysed, Audit, Status
from unbatch.truth import Truth

SHARED_SECONDS = 3.0  # of all analyses together that nobody asked for by name, where no budget is given
LARGEST_SHARE = 0.75  # of what is left of them, that one analysis may take


@dataclass(frozen=True)
class Analyst:
    """Runs analyses one after the other under a watch, and puts on record what they say, or why they say nothing.

    Each analysis has `budget` seconds. Without one, analyses that were `named` take what they need, and the others share
    `SHARED_SECONDS`. One that is cut short gives what it has. `kept` is called with the audit after each.
    """

    analyses: Sequence[Analysis]
    named: bool
    budget: float | None
    watch: Watch
    announce: Callable[[str], None] | None = None
    kept: Callable[[Audit], None] | None = None
    domain: Domain | None = None  # of the inputs, which has the words of tokens

    def read(self, record: Audit, view: View, truth: Truth | None, client: int) -> None:
        """Put on record everything about the first client, whose network is everybody's; of each other one its bounds."""
        bounding = {bound.analysis for bound in record.bounds}
        at = (truth.inputs, truth.labels) if truth is not None else None
        end = time.monotonic() + SHARED_SECONDS
        for analysis in self.analyses:
            if self.watch.stop or (client and analysis.name not in bounding):
                continue
            if self.announce:
                self.announce(f"{analysis}, client {client}")
            self.watch.begin(self._seconds(end))
            done, findings = self._one(analysis, view, at, client)
            record.analyses.append(done)
            self._say(record, done)
            _add(record, [each for one in findings for each in self._held(one, truth)], analysis.name, client)
            if self.kept:
                self.kept(record)
        if not client and record.risks and "earlier" in view.knowledge:
            record.notes.append("what each layer gives away, and what it leaves open, is told of the last round alone.")

    def _held(self, finding: Finding, truth: Truth | None) -> Sequence[Finding]:
        """A finding, and of one that names tokens their words, and how many of the batch's it names."""
        if not isinstance(finding, Verdict) or not finding.tokens or not isinstance(self.domain, Tokens):
            return [finding]
        pieces = self.domain.pieces(torch.tensor(finding.tokens))
        named = finding.model_copy(update={"pieces": [piece.strip() or piece for piece in pieces]})
        return [named, *_of_the_batch(named, truth, self.domain.padding)] if truth is not None else [named]

    def _seconds(self, end: float) -> float:
        """That the next analysis has."""
        if self.budget is None:
            return math.inf if self.named else max(end - time.monotonic(), 0.0) * LARGEST_SHARE
        return self.budget or math.inf

    def _one(
        self, analysis: Analysis, view: View, at: tuple[torch.Tensor, torch.Tensor] | None, client: int
    ) -> tuple[Analysed, Sequence[Finding]]:
        """How one analysis ended, and what it found. Its defect must not cost the others their results."""
        findings: Sequence[Finding] = ()
        start, status, words = time.monotonic(), Status.DONE, ""
        try:
            with watching(self.watch):
                findings = tuple(analysis(view, at=at, rng=torch.Generator().manual_seed(0)))
        except NotApplicable as why:
            status, words = Status.NOT_APPLICABLE, str(why)
        except Exception as error:
            status, words = Status.FAILED, failure(error)
        if self.watch.cut_short and status is not Status.FAILED:
            status = Status.CUT_SHORT
        seconds = time.monotonic() - start
        return Analysed(analysis=str(analysis), client=client, status=status, words=words, seconds=seconds), findings

    def _say(self, record: Audit, done: Analysed) -> None:
        """A note, where someone waits for an answer that is not there."""
        if done.status is Status.FAILED or (self.named and done.words):
            record.notes.append(f"{done.title}: {done.words}")


def _of_the_batch(named: Verdict, truth: Truth, padding: int | None) -> Sequence[Verdict]:
    """How many of the batch's tokens a verdict names, and how many of those that it names are the batch's."""
    true, found = set(truth.inputs.flatten().tolist()) - {padding}, set(named.tokens)
    both = len(true & found)
    return [
        Verdict(
            name="bag recall",
            value=both / max(len(true), 1),
            words=f"{both} of the private batch's {len(true)} different tokens are among them.",
        ),
        Verdict(
            name="bag precision",
            value=both / max(len(found), 1),
            words=f"{both} of the {len(found)} tokens that are named are in the private batch.",
        ),
    ]


def _add(record: Audit, findings: Sequence[Finding], name: str, client: int) -> None:
    by = {"analysis": name}
    record.bounds += [f.model_copy(update=by | {"client": client}) for f in findings if isinstance(f, Bound)]
    if not client:
        record.risks += [f.model_copy(update=by) for f in findings if isinstance(f, LayerRisk)]
        record.verdicts += [f.model_copy(update=by) for f in findings if isinstance(f, Verdict)]
