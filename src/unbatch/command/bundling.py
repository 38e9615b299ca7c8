"""Bundling: files as a server or a client kept them, made one bundle, with what is off with them in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unbatch.command.options import (
    Before,
    Force,
    Knows,
    LossName,
    Model,
    Reduction,
    Rules,
    Scale,
    SentAs,
    Weights,
)
from unbatch.errors import UnbatchError

OTHER_FORMATS = (".npz", ".npy", ".pt", ".pth", ".json")  # which the name of a bundle must not promise


def bundle_command(
    to: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The bundle to write.")],
    after: Annotated[
        Path,
        typer.Option(
            help="What was sent: .npz (arrays by name, or in order as Flower sends them), .safetensors, .pt or .json; a "
            ".pt is opened by weights_only in a process of its own."
        ),
    ],
    model: Model = None,
    weights: Weights = None,
    before: Before = None,
    as_: SentAs = None,
    scale: Scale = None,
    shape: Annotated[str | None, typer.Option(metavar="3,32,32", help="Of one private example.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="How many private examples are behind it.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the client; short for --protocol.")] = None,
    protocol: Rules = None,
    knows: Knows = None,
    loss: LossName = None,
    reduction: Reduction = None,
    force: Force = False,
) -> None:
    """Make a bundle of a captured file: what was sent, the model before it, what is known besides.

    Exits with 1 where the update fits its model in no reading that is declared; what is off stands there in words.
    """
    from unbatch.auditing.diagnosis import unreadable
    from unbatch.command.settings import Asked, observation_of

    if to.exists() and not force:
        raise UnbatchError(f"{to} is there already; --force overwrites it. Nothing was written.")
    if to.suffix in OTHER_FORMATS:
        named = to.with_suffix(".safetensors")
        raise UnbatchError(f"a bundle is a safetensors file; name it {named}. Nothing was written.")
    told = [*(knows or ()), *_told("input_shape", shape), *_told("batch_size", batch)]
    rules = ",".join(words for words in (protocol, *_told("learning_rate", learning_rate)) if words)
    asked = Asked(
        model=model,
        weights=weights,
        observation=after,
        before=before,
        as_=as_,
        scale=scale,
        loss=loss,
        reduction=reduction,
        protocol=rules or None,
        knows=told,
    )
    seen = observation_of(asked, after)
    seen.save(to)
    for note in seen.notes:
        typer.echo(note)
    typer.echo(f"wrote {to}: {seen!r}")
    if words := unreadable(seen):
        typer.echo(f"but as it stands it cannot be audited: {words}", err=True)
        raise typer.Exit(1)
    if missing := [name for name in ("input_shape", "batch_size") if name not in seen.knowledge]:
        typer.echo(f"{' and '.join(missing)}, which most attacks need, can be told by --shape and --batch.")


def _told(name: str, value: object) -> list[str]:
    return [] if value is None else [f"{name}={value}"]
