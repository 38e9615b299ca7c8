"""Demo: what `unbatch demo` audits, each of its parts in under two minutes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """One audit of the demo, written to a folder of its own within the demo's, or to that itself."""

    words: str
    case: str
    protocol: str | None = None  # as on the command line; by default the case's own
    attacks: tuple[str, ...]
    remedies: tuple[str, ...] = ()
    analyses: tuple[str, ...] | None = None  # all that apply
    budget: float  # seconds for each run of an attack, and for each analysis
    folder: str = ""


PARTS = (
    Part(
        words="eight photographs behind a network that begins with a dense layer",
        case="photos:batch=8,width=512,activation=gelu",
        attacks=("unmix", "gradient-matching"),
        remedies=("clip:norm=0.1", "noise:sigma=0.01", "noise:sigma=0.1"),
        budget=5.0,
    ),
    Part(
        words="four photographs behind a ResNet-18",
        case="photos:batch=4,model=resnet18,double=true",
        protocol="mode=eval",  # batch norm by its running averages
        attacks=("descend",),
        analyses=("separable-layer",),
        budget=300.0,
        folder="resnet18",
    ),
    Part(
        words="eight texts behind a small GPT",
        case="text:batch=8,model=gpt",
        attacks=("token-span",),
        budget=60.0,
        folder="text",
    ),
)
