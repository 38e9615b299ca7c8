"""Hardening view: leakage against utility, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unbatch.auditing.harden import SCOPES, Hardening

COLOURS = {"leaks": "red", "no bound excludes it": "yellow", "excluded": "green", "not possible": "dim"}


def show_hardening(found: Hardening, console: Console) -> None:
    """Print the table and the answer for one update and for the whole training."""
    console.print(rows(found))
    for scope in SCOPES:
        console.print(found.answer(scope), style="bold", markup=False)
    if not found.complete:
        console.print("The search ended with its time; --seconds gives it more.", markup=False)


def rows(found: Hardening) -> Table:
    """Every setting tried, family by family; PSNR in dB."""
    heads = (
        "family",
        "strength",
        "batch",
        "attack",
        "chance",
        "bound",
        "bound, training",
        "epsilon",
        "accuracy",
        "finding",
    )
    table = Table(*heads, box=None, pad_edge=False, title=f"{found.case}: PSNR in dB, at most {found.target:g} wanted")
    families = list(dict.fromkeys(t.family for t in found.tried))
    for t in sorted(found.tried, key=lambda t: (families.index(t.family), t.strength)):
        numbers = [_short(value, ".1f") for value in (t.psnr, t.chance, t.bound, t.training)]
        epsilon, accuracy = _short(t.epsilon, ".3g"), _short(t.accuracy, ".1%")
        said = t.words if t.verdict == "not possible" else t.verdict
        said = "excluded for the whole training" if "whole training" in t.excluded else said
        finding = Text(said, style=COLOURS[t.verdict])
        table.add_row(Text(t.family), f"{t.strength:.3g} {t.unit}", str(t.batch), *numbers, epsilon, accuracy, finding)
    return table


def plot(found: Hardening, path: Path) -> None:
    """Leakage against test accuracy, the attack's and the bound's; nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    for k, family in enumerate(dict.fromkeys(t.family for t in found.tried)):
        held = sorted((t for t in found.tried if t.family == family), key=lambda t: t.accuracy or 0.0)
        for kind, marker, style in (("psnr", "o", "-"), ("bound", "v", "--")):
            pairs = [
                (t.accuracy, getattr(t, kind)) for t in held if t.accuracy is not None and getattr(t, kind) is not None
            ]
            if pairs:
                label = f"{family}: {'attack' if kind == 'psnr' else 'bound, one update'}"
                panel.plot(*zip(*pairs, strict=True), marker=marker, ls=style, color=f"C{k}", label=label)
    panel.axhline(found.target, color="grey", lw=0.8, label="wanted at most")
    panel.set(xlabel="test accuracy", ylabel="PSNR (dB)", ylim=(0, 60), title=found.case)
    figure.legend(loc="outside right upper", fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _short(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
