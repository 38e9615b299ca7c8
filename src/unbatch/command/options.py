"""Options: those that several commands take, each declared once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

MOST_SEED = 2**63 - 1  # that a random generator takes

Attacks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="An attack, e.g. unmix or unmix:attempts=5; repeatable; default: all that only look, cheapest first.",
    ),
]
Defences = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="The client's defence, e.g. noise:sigma=0.01; repeatable, the first outermost."),
]
Metrics = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="A metric; repeatable; default: all that apply.")
]
Analyses = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="An analysis; repeatable; default: all that apply.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: where the model is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON, nothing else.")]
Model = Annotated[
    str | None,
    typer.Option(help="Your model: package.module:factory, a function that returns it; called with the random seed 0."),
]
Weights = Annotated[
    Path | None, typer.Option(help="The model's parameters: .safetensors, or a state_dict that torch.save wrote.")
]
DataPath = Annotated[
    Path | None,
    typer.Option(
        help="Your data: an .npz file (inputs, labels), a .csv file, a folder of images, or package.module:name of a torch "
        "Dataset or DataLoader; the truth of an --observation."
    ),
]
LossName = Annotated[
    str | None,
    typer.Option(
        help="cross-entropy (the default), binary-cross-entropy, squared-error, or package.module:loss. A case has its own."
    ),
]
Reduction = Annotated[str | None, typer.Option(help="mean (the default) or sum, for a loss given by name.")]
Size = Annotated[int | None, typer.Option(min=1, help="Resize pictures of a folder to SIZE x SIZE.")]
ClassNames = Annotated[
    str | None,
    typer.Option(metavar="N|NAMES", help="How many classes the model has, or cat,dog,...: their names in its order."),
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1, help="Use only the first BATCH examples of --data; of a captured update, how many are behind it."
    ),
]
Shape = Annotated[str | None, typer.Option(metavar="3,32,32", help="Of one example, where no --data are given.")]
Capture = Annotated[
    Path | None,
    typer.Option(
        "--observation",
        help="A captured update, with --model: a bundle, or a file as `unbatch bundle` takes it (npz, safetensors, pt).",
    ),
]
Before = Annotated[
    Path | None, typer.Option(help="The model before the client trained, where the captured file holds it after.")
]
SentAs = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="gradient|weights|delta",
        help="What the captured file holds; default: what it shows itself to be.",
    ),
]
Scale = Annotated[
    float | None, typer.Option(help="Multiply a captured update by it: -1 where it is before minus after.")
]
Knows = Annotated[list[str] | None, typer.Option(help="What the attacker knows besides: labels, or FIELD=VALUE.")]
Rules = Annotated[str | None, typer.Option("--protocol", help="local_steps=4,learning_rate=0.1,mode=eval ...")]
NoPrivate = Annotated[
    bool, typer.Option("--no-private", help="Leave out examples, labels and tokens; keep scores, bounds and reasons.")
]
NoAppendix = Annotated[bool, typer.Option("--no-appendix", help="Leave out which standards ask for such a test.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what an earlier run left in --out.")]


def seconds_above_0(value: float | None) -> float | None:
    """A time that can be kept; nan passes every comparison."""
    if value is not None and (math.isnan(value) or value <= 0):
        raise typer.BadParameter(f"{value:g} is no time; give seconds above 0, or leave it out.")
    return value


Budget = Annotated[
    float | None,
    typer.Option(callback=seconds_above_0, help="Seconds for each run of an attack, and for each analysis."),
]
