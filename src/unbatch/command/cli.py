"""The command line. Torch is imported by the commands that need it, when they need it."""

from __future__ import annotations

import json
import math
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from unbatch import __version__
from unbatch.command.blame import said
from unbatch.command.bundling import bundle_command
from unbatch.command.comparing import compare_command
from unbatch.command.inspecting import inspect_command
from unbatch.command.options import (
    MOST_SEED,
    Analyses,
    AsJson,
    Attacks,
    Batch,
    Before,
    Budget,
    Capture,
    ClassNames,
    DataPath,
    Defences,
    Device,
    Force,
    Knows,
    LossName,
    Metrics,
    Model,
    NoAppendix,
    NoPrivate,
    Quiet,
    Reduction,
    Rules,
    Scale,
    SentAs,
    Shape,
    Size,
    Weights,
    seconds_above_0,
)
from unbatch.command.sweeping import sweep_command
from unbatch.command.tabulating import table_command
from unbatch.errors import MissingExtra, UnbatchError

if TYPE_CHECKING:
    from unbatch.reporting.results import Audit

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="What a shared gradient gives away: recover the batch behind it and prove it, or prove how badly any attacker "
    "must do. Use it on gradients that you are entitled to inspect.",
)
out, WIDE = Console(emoji=False), 200  # columns of a table in a file or a pipe
err = Console(stderr=True, emoji=False)  # a model is called nets:a, and no letter in a box


def _version(value: bool) -> None:
    if value:
        typer.echo(f"unbatch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Works after any command.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--out", help="Where report.html and audit.json go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the attacks' draws.")] = 0,
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Audit gradients of photographs, also behind a ResNet-18, and of texts; write a report of each."""
    from unbatch.case import Case
    from unbatch.command.console import run_audit
    from unbatch.command.demo import PARTS
    from unbatch.command.settings import Asked, target_of

    for part in PARTS:
        if not quiet:
            out.print(f"{part.words}: {part.case}", markup=False, style="bold")
        record = run_audit(
            target_of(Asked(case=part.case, protocol=part.protocol)).what,
            folder=folder / part.folder,
            command=_again(context.obj, folder),
            quiet=quiet,
            force=force,
            own=str(Case.parse(part.case)),
            device=_usable(device),
            seeds=(seed,),
            attacks=part.attacks,
            remedies=part.remedies,
            analyses=part.analyses,
            budget=part.budget,
        )
        _summary(record, folder / part.folder, quiet)
        if not record.complete:
            raise typer.Exit(130)


@app.command("audit")
def audit_command(
    context: typer.Context,
    case: Annotated[
        str | None, typer.Argument(help="A built-in case, e.g. photos:batch=4 (see `unbatch list cases`).")
    ] = None,
    model: Model = None,
    weights: Weights = None,
    data: DataPath = None,
    loss: LossName = None,
    reduction: Reduction = None,
    size: Size = None,
    classes: ClassNames = None,
    batch: Batch = None,
    observation: Capture = None,
    before: Before = None,
    as_: SentAs = None,
    scale: Scale = None,
    shape: Shape = None,
    attack: Attacks = None,
    suite: Annotated[str | None, typer.Option(help="A fixed set of attacks, instead of --attack.")] = None,
    defence: Defences = None,
    remedy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A defence to try beside, for comparison; repeatable.")
    ] = None,
    metric: Metrics = None,
    analysis: Analyses = None,
    protocol: Rules = None,
    knows: Knows = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=MOST_SEED, help="Of the attacks; give several times for several runs."),
    ] = None,
    budget: Budget = None,
    folder: Annotated[Path, typer.Option("--out", help="Where report.html and audit.json go.")] = Path("audit"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the finished runs of the audit.json in --out.")
    ] = False,
    force: Force = False,
    save_images: Annotated[Path | None, typer.Option(help="Write every recovered picture as a PNG there.")] = None,
    no_private: NoPrivate = False,
    no_appendix: NoAppendix = False,
    auditor: Annotated[str, typer.Option(help="Who audits, for the report.")] = "",
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Attack a client's update, judge the result, write a report."""
    from unbatch.command.console import run_audit
    from unbatch.command.settings import Asked, Output, Ways, target_of

    asked, ways, output = Asked.of(locals()), Ways.of(locals()), Output.of(locals())
    ways.of_use_to(asked)
    target = target_of(asked)
    _usable(device)
    again = _again(context.obj, folder)
    record = run_audit(target.what, truth=target.truth, command=again, **ways.arguments(), **output.arguments())
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        _summary(record, folder, quiet)
    _exit_if_stopped(record)


def _exit_if_stopped(record: Audit) -> None:
    """Where an audit was stopped, say how far it came and how to go on with it, and exit as a stopped program does."""
    if record.complete:
        return
    said = f"stopped after {len(record.runs)} of {record.asked} runs; go on with the same command and --resume."
    err.print(said, soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(130)


@app.command()
def risk(
    case: Annotated[str | None, typer.Argument(help="A built-in case, or --model, with or without --data.")] = None,
    model: Model = None,
    weights: Weights = None,
    data: DataPath = None,
    loss: LossName = None,
    reduction: Reduction = None,
    size: Size = None,
    classes: ClassNames = None,
    batch: Batch = None,
    observation: Capture = None,
    before: Before = None,
    as_: SentAs = None,
    scale: Scale = None,
    analysis: Analyses = None,
    defence: Defences = None,
    shape: Shape = None,
    protocol: Rules = None,
    knows: Knows = None,
    budget: Annotated[
        float | None, typer.Option(callback=seconds_above_0, help="Seconds for each analysis; default: no limit.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Say what each layer's gradient gives away, without attacking it."""
    from unbatch.auditing.run import audit as run
    from unbatch.command.settings import Asked, refuse_unused, target_of

    asked = Asked.of(locals() | {"may_draw": True})
    refuse_unused(asked, defence=defence)
    target = target_of(asked)
    record = run(
        target.what,
        truth=target.truth,
        attacks=(),
        defences=defence or (),
        metrics=(),
        analyses=analysis,
        budget=math.inf if budget is None else budget,
        device=_usable(device),
    )
    if as_json:
        shown = {"risks", "bounds", "verdicts", "analyses"}
        typer.echo(json.dumps(record.model_dump(mode="json", include=shown), indent=1))
    else:
        _risks(record)


app.command("bundle")(bundle_command)


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="attacks, defences, analyses, signs, metrics, cases or layers.")
    ] = None,
) -> None:
    """Name everything that is installed, with a sentence on each.

    Off a terminal, in a pipe or a file, one name a line.
    """
    from unbatch.command.catalogue import KINDS, PURPOSES, first_sentence, mark

    if kind is not None and kind not in KINDS:
        raise UnbatchError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}.")
    for folder, plugins in KINDS.items():
        if kind not in (None, folder):
            continue
        if not out.is_terminal:
            for name in plugins():
                typer.echo(name)
            continue
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for plugin in plugins().values():
            table.add_row(Text(f"  {plugin.name}"), Text(mark(plugin), style="dim"), Text(first_sentence(plugin)))
        out.print(Text(folder.upper(), style="bold") + Text(f"  {PURPOSES[folder]}", style="default not bold"))
        out.print(table)
        out.print()
    if out.is_terminal:
        out.print("unbatch show NAME  prints all about one: how it works, what it needs, its options.")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A name that `unbatch list` prints.")]) -> None:
    """Print all about one: how it works, its source, its options."""
    from unbatch.command.catalogue import page

    typer.echo(page(name))


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="AUDIT.JSON|FOLDER", help="An audit, or the folder that it is in.")],
    to: Annotated[Path | None, typer.Option("--out", help="Default: report.html beside it.")] = None,
    no_private: NoPrivate = False,
    no_appendix: NoAppendix = False,
) -> None:
    """Write the HTML page of a finished audit: for its owner, or with --no-private for a reviewer."""
    from unbatch.reporting.html import write
    from unbatch.reporting.trial import audit_at

    path = path / "audit.json" if path.is_dir() else path
    audit = audit_at(path)
    target = to or path.with_name("report.html")
    write(audit.redacted() if no_private else audit, target, appendix=not no_appendix)
    out.print(f"wrote {target}", soft_wrap=True)


@app.command()
def gate(
    path: Annotated[
        Path, typer.Argument(metavar="AUDIT.JSON|FOLDER", help="Of a sweep or of audits: each is held to it.")
    ],
    max_recovered: Annotated[
        int | None, typer.Option(min=0, help="Most examples that may be recovered exactly or as copies.")
    ] = None,
    max_psnr: Annotated[float | None, typer.Option(help="Highest PSNR that any example may reach, in dB.")] = None,
    require_bound_psnr: Annotated[
        float | None, typer.Option(help="PSNR in dB that a bound valid for any attacker must exclude exceeding.")
    ] = None,
) -> None:
    """Exit with 1 where an audit, or any of a folder's, breaches a limit, for CI."""
    from unbatch.reporting.gate import breaches, folder_breaches
    from unbatch.reporting.trial import audit_at
    from unbatch.reporting.trials import Trials

    limits: dict[str, Any] = {
        "max_recovered": max_recovered,
        "max_psnr": max_psnr,
        "require_bound_psnr": require_bound_psnr,
    }
    found = (
        folder_breaches(Trials.at(path, pictures=False), **limits)
        if path.is_dir()
        else breaches(audit_at(path), **limits)
    )
    for words in found:
        err.print(f"breach: {words}", soft_wrap=True, markup=False)
    if found:
        raise typer.Exit(1)
    out.print("within the limits")


@app.command("harden")
def harden_command(
    case: Annotated[str | None, typer.Argument(help="A built-in case, or give --model and --data.")] = None,
    target_psnr: Annotated[float, typer.Option(help="What no attacker may exceed, in dB.")] = 15.0,
    model: Model = None,
    weights: Weights = None,
    data: DataPath = None,
    loss: LossName = None,
    reduction: Reduction = None,
    size: Size = None,
    classes: ClassNames = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples of one update of your data, 4 by default; a case has its own.")
    ] = None,
    attack: Attacks = None,
    analysis: Analyses = None,
    family: Annotated[list[str] | None, typer.Option(help="Search only dp-sgd, noise, prune, clip ...")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Updates of the training whose accuracy is measured.")] = 200,
    seconds: Annotated[float, typer.Option(min=0, help="For the whole search.")] = 180.0,
    folder: Annotated[Path, typer.Option("--out", help="Where harden.json and harden.png go.")] = Path("harden"),
    force: Force = False,
) -> None:
    """Search for the cheapest defence that keeps attackers below a PSNR.

    A defence counts as safe where neither an attack nor a bound for any attacker allows more.
    """
    from unbatch.auditing.harden import harden as run
    from unbatch.command.hardening_view import plot, show_hardening
    from unbatch.command.settings import Asked, case_or_data
    from unbatch.files import claimed

    asked = Asked.of(locals())
    with claimed(folder, "harden.json"):
        if (folder / "harden.json").exists() and not force:
            raise UnbatchError(
                f"{folder} holds a search already (harden.json); --force overwrites it, --out NAME writes elsewhere."
            )
        found = run(
            case_or_data(asked),
            psnr=target_psnr,
            batch=4 if batch is None else batch,
            seconds=seconds,
            rounds=rounds,
            attacks=attack,
            analyses=analysis,
            only=family or (),
            sink=lambda record: record.save(folder / "harden.json"),
        )
        plot(found, folder / "harden.png")
    _say_if_not_drawn()
    show_hardening(found, out)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="adaptive, bounds, claims, defences, descend, inspect, layers, matching, metric, tensor, unmix, vit or "
            "weights"
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="A folder with real data sets; default: bundled pictures.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(callback=seconds_above_0, help="For each attack on each problem; default: the benchmark's own."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems and the attacks.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    to: Annotated[Path | None, typer.Option("--out", help="Folder for JSON and plots.")] = Path("benchmarks/results"),
) -> None:
    """Measure, print and store a benchmark."""
    from unbatch import benchmarks
    from unbatch.files import claimed

    module = benchmarks.find(name)
    given: dict[str, Any] = {} if seconds is None else {"seconds": seconds}
    if data is not None and not data.is_dir():
        raise UnbatchError(f"--data {data} is no folder; name the one that holds the data sets.")
    if data is not None and "data" not in signature(module.run).parameters:
        raise UnbatchError(f"--data would not be used: the data of the benchmark {name} come with unbatch.")
    given |= {} if data is None else {"data": data}
    with claimed(to) if to is not None else nullcontext():
        rows = module.run(seed=seed, device=_usable(device), out=to, **given)
    (out if out.is_terminal else Console(width=WIDE)).print(module.table(rows))
    if to is not None:
        _say_if_not_drawn()


app.command("sweep")(sweep_command)
app.command("table")(table_command)
app.command("compare")(compare_command)
app.command("inspect")(inspect_command)


_NOT_AGAIN = {"--resume", "--force", "--debug", "--quiet", "--json"}  # what a command that is run again does without


def _again(words: Sequence[str], folder: Path) -> str:
    """The command line that runs the same once more, into a folder beside this one, so that the two can be compared."""
    kept, skip = [], False
    for word in words:
        if not skip and word not in _NOT_AGAIN and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return shlex.join(["unbatch", *kept, "--out", f"{folder}-again"])


def _usable(device: str | None) -> str | None:
    """A device that something can be computed on. Raises UnbatchError: there is none of that name here."""
    import torch

    if device is not None:
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            words = " ".join(str(error).split()[:30]).rstrip(".")
            raise UnbatchError(
                f"--device {device} cannot be used here: {words}. Leave it out to compute where the model is, or give cpu."
            ) from None
    return device


def _say_if_not_drawn() -> None:
    if find_spec("matplotlib") is None:
        err.print(f"No picture was drawn: {MissingExtra.of('it', 'matplotlib', 'bench')}", soft_wrap=True, markup=False)


def _summary(record: Audit, folder: Path, quiet: bool) -> None:
    if not quiet:
        table = Table("client", "example", "finding", "attack", "score", "chance", box=None, pad_edge=False)
        tiers = record.tiers()
        metric = next((m for m in ("psnr", "l2-error", *record.metrics) if m in record.metrics), None)
        if metric is not None:
            info = record.metrics[metric]
            for (client, index), best in record.worst(metric).items():
                chance = best and next(e.chance.get(metric) for e in best[1].examples if e.index == index)
                cells = (best[1].title, f"{best[0]:.4g} {info.unit}") if best else ("", "not recovered")
                tier = str(tiers.get((client, index), ""))
                table.add_row(
                    str(client), str(index), tier, *cells, "" if chance is None else f"{chance:.4g} {info.unit}"
                )
            out.print(table)
        for run in record.runs:
            if run.words and not run.ran:  # what those that ran say is among the notes
                out.print(f"{run.title}, client {run.client}: {run.status}: {run.words}", markup=False)
        _cut_short(record)
        for note in (*(f"data: {note}" for note in record.data_notes), *record.notes):
            out.print(note, markup=False)
        for flag in record.flags:
            out.print(f"flag {flag.name}: {flag.words}", markup=False)
    if record.privacy:
        out.print(f"differential privacy: {record.privacy.words()}", markup=False)
    out.print(record.verdict(), style="bold", markup=False)
    out.print(f"{folder / 'report.html'}  {folder / 'audit.json'}", soft_wrap=True, markup=False)


SHOWN_TOKENS = 60  # of those that a verdict names
COLOURS = {"exact": "red", "partial": "yellow", "low": "green", "unknown": "dim"}


def _risks(record: Audit) -> None:
    for name in dict.fromkeys(r.analysis for r in record.risks):
        table = Table("layer", "kind", "rank", "equations", "unknowns", "verdict", box=None, pad_edge=False, title=name)
        for r in record.risks:
            if r.analysis == name:
                layer = Text(r.layer or "(model)", style=COLOURS[r.level])
                table.add_row(layer, r.kind, str(r.rank), f"{r.equations:,}", f"{r.unknowns:,}", r.words)
        out.print(table)
    if record.way():
        parts = [Text(f" {r.layer} {r.percent} ", style=f"black on {COLOURS[r.level]}") for r in record.way()]
        out.print(Text("input <-") + Text("<-").join(parts) + Text("<- gradient"))
    changes = record.changes()
    if changes:
        metrics = dict.fromkeys(metric for values in changes.values() for metric in values)
        table = Table("change", *metrics, "price", box=None, pad_edge=False, title="what would make it safer")
        for change, values in changes.items():
            cells = [f"{values[m].value:,.6g}" if m in values else "" for m in metrics]
            table.add_row(Text(change), *cells, Text(next(iter(values.values())).words))
        out.print(table)
    for b in record.bounds:
        whose = f", client {b.client}" if len(record.clients) > 1 else ""
        least = f"{b.name}{whose} >= {b.value:.4g}{b.spread} for {b.scope} attackers"
        out.print(f"{least}; {b.assumptions} ({b.source})", markup=False)
    for v in record.numbers():
        out.print(f"{v.name} = {v.value:.4g}: {v.words}", markup=False)
        if v.tokens:
            named = [piece.strip() for piece in v.pieces] or [str(token) for token in v.tokens]
            out.print(f"  {' '.join(named[:SHOWN_TOKENS])}{' ...' * (len(named) > SHOWN_TOKENS)}", markup=False)
    _cut_short(record)
    if record.silent():
        out.print(f"Nothing to say here: {', '.join(each.title for each in record.silent())}.", markup=False)
    for note in (*(f"data: {note}" for note in record.data_notes), *record.notes):
        out.print(note, markup=False)
    if record.privacy:
        out.print(f"differential privacy: {record.privacy.words()}", markup=False)


def _cut_short(record: Audit) -> None:
    for each in record.shortened():
        why = each.words or "what it says is what it had until then."
        out.print(f"{each.title}: cut short after {each.seconds:.1f} s (more with --budget): {why}", markup=False)


_GOES_ON = {  # what is left of a command that was stopped at once
    "audit": "finished runs are kept, and the same command goes on from them with --resume",
    "sweep": "finished configurations are kept, and the same command goes on from them",
    "harden": "what was tried until then is in harden.json",
}


class UnescapedCommand(TyperCommand):
    """A command whose help has no backslashes before brackets: typer before 0.21 escapes them as if for rich."""

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")


for registered in app.registered_commands:
    registered.cls = UnescapedCommand


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; every error the user can mend is one message and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    command = typer.main.get_command(app)
    try:
        code = command.main(
            args=[word for word in words if word != "--debug"],
            prog_name="unbatch",
            standalone_mode=False,
            obj=words,  # for the record
        )
    except KeyboardInterrupt:
        kept = _GOES_ON.get(next(iter(words), ""))
        err.print(f"stopped; {kept}." if kept else "stopped.", soft_wrap=True, markup=False)
        sys.exit(130)
    except Exception as error:  # the one place where an error becomes a message
        if debug:
            traceback.print_exc()
        err.print(f"error: {said(error)}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(2)
    sys.exit(code or 0)
