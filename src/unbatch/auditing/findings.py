"""Findings: what analyses say of each client's exchange, put on record."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unbatch.analysis import Analysis, Bound, LayerRisk, Verdict
from unbatch.errors import NotApplicable
from unbatch.observation import Observation
from unbatch.reporting.results import Audit
from unbatch.truth import Truth


def analyse(
    analyses: Sequence[Analysis], obs: Observation, truth: Truth | None, record: Audit, *, client: int, named: bool
) -> None:
    """Everything of the first client, whose network is everybody's; of each other one its bounds.

    What an analysis cannot say of an update is a note, if it was `named`, and left out if it was not.
    """
    bounding = {bound.analysis for bound in record.bounds}
    at = (truth.inputs, truth.labels) if truth is not None else None
    of = f" of client {client}" if client else ""
    for analysis in analyses:
        if client and analysis.name not in bounding:
            continue
        try:
            findings = analysis(obs, at=at, rng=torch.Generator().manual_seed(0))
        except NotApplicable as why:
            if named:
                record.notes.append(f"{analysis.name}{of}: {why}")
            continue
        except ValueError as error:
            record.notes.append(f"{analysis.name}{of}: {error}")
            continue
        by = {"analysis": analysis.name}
        record.bounds += [f.model_copy(update=by | {"client": client}) for f in findings if isinstance(f, Bound)]
        if not client:
            record.risks += [f.model_copy(update=by) for f in findings if isinstance(f, LayerRisk)]
            record.verdicts += [f.model_copy(update=by) for f in findings if isinstance(f, Verdict)]
    if not client and record.risks and "earlier" in obs.knowledge:
        record.notes.append("what each layer gives away, and what it leaves open, is told of the last round alone.")
