"""Inspection: what a client found in a model that it received, as data, in words and as a page; imports no torch."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from unbatch.analysis import LayerRisk, Verdict
from unbatch.files import write_atomically

UNSEEN = (
    "What this cannot see: a server that knows these signs can avoid each of them, at some cost to its attack, and a "
    "model that was trained to leak needs none. A model without signs still gives away what any honest one does."
)


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    def __str__(self) -> str:
        return repr(self)


class SignRead(_Kept):
    """One sign as it was read off the model, raised or not."""

    sign: str
    layer: str  # with the largest value
    value: float
    limit: float  # beyond which it is raised
    honest: float  # the largest value of honest models that set the limit
    words: str
    weights: list[str] = []  # the parameters of the layers beyond the limit

    @property
    def raised(self) -> bool:
        """Whether the value is beyond the limit."""
        return self.value > self.limit

    def __str__(self) -> str:
        return f"{self.sign} at {self.layer!r}: {self.words} ({self.value:.3g}; honest models up to {self.honest:g})"


class PrivateExample(_Kept):
    """One of the client's own examples that a layer's gradient would hold alone."""

    index: int  # in the batch
    layer: str
    unit: int
    picture: str = Field(default="", repr=False)  # the example, rendered: a PNG as a data URI, or words


class Inspection(_Kept):
    """What was found in a received model: signs of planting, and what it would give away of a batch.

    >>> import torch, unbatch
    >>> found = unbatch.inspect(torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3)))
    >>> found.planted, found.verdict()
    ([], 'No sign of planting.')
    """

    schema_number: Literal[1] = 1
    model: str
    parameters: int
    created: str
    version: str
    batch: int  # examples of one update, for which leaks are counted
    examples: int  # that signs were read on
    own: bool  # whether these are the client's, or draws in their place
    before: bool  # whether the model of the round before was known
    signs: list[SignRead]
    unread: list[str] = []  # signs that could not be read here
    leaks: list[LayerRisk] = []
    verdicts: list[Verdict] = []
    alone: list[PrivateExample] = []
    notes: list[str] = []

    @property
    def planted(self) -> list[SignRead]:
        """The signs that are raised; empty for a model that looks honest."""
        return [sign for sign in self.signs if sign.raised]

    @property
    def weights(self) -> list[str]:
        """The parameters of the layers that raised a sign, in the model's order: those to leave frozen."""
        return list(dict.fromkeys(weight for sign in self.planted for weight in sign.weights))

    @property
    def exit_code(self) -> int:
        """1 where a sign is raised, else 0."""
        return int(bool(self.planted))

    def verdict(self) -> str:
        """What it comes to, in a sentence or two; what of the client's own batch it would give away where that is known."""
        if self.planted:
            first = self.planted[0]
            more = f", and {len(self.planted) - 1} more" if len(self.planted) > 1 else ""
            words = (
                f"This model looks planted: {first.sign} at {first.layer!r}, {first.words}{more}. Do not train on it."
            )
        else:
            words = "No sign of planting."
        if not self.own:
            return words
        alone = len({each.index for each in self.alone})
        return f"{words} Of a batch of {self.batch:,} it would hand over {alone or 'none'} by a division alone."

    def without_private(self) -> Inspection:
        """The same without the client's examples."""
        return self.model_copy(update={"alone": [each.model_copy(update={"picture": ""}) for each in self.alone]})

    def save(self, path: str | Path) -> None:
        """Write it as JSON, for its owner alone to read. Raises UnbatchError: what the disk said."""
        write_atomically(Path(path), self.model_dump_json(indent=1), private=True)

    def to_html(self, path: str | Path) -> None:
        """Write its page, for its owner alone to read: it shows the client's examples. Raises UnbatchError as `save`."""
        write_atomically(Path(path), inspection_page(self), private=True)

    def __repr__(self) -> str:
        return f"<Inspection of {self.model}: {self.verdict()}>"


def inspection_page(inspection: Inspection) -> str:
    """The page: the verdict, every sign with its value and limit, the layers that leak, and the examples that stand alone.

    >>> import torch, unbatch
    >>> page = inspection_page(unbatch.inspect(torch.nn.Linear(30, 3)))
    >>> "No sign of planting." in page, "<script src" in page
    (True, False)
    """
    from unbatch.reporting.html import templates

    whole = base64.b64encode(inspection.model_dump_json().encode()).decode()
    page = templates().get_template("inspection.html.j2")
    return page.render(found=inspection, unseen=UNSEEN, download=f"data:application/json;base64,{whole}")
