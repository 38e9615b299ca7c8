"""Audits built by hand, one of every kind that a report must show."""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

from unbatch.analysis import Bound, LayerRisk, Verdict
from unbatch.reporting.results import Audit, Client, Example, Flag, MetricInfo, Remedy, Run

EVIL = "</script><script>alert(1)</script>&<!-- \" ' -->"
PSNR = MetricInfo(unit="dB", higher_is_better=True, best=300.0)
L2 = MetricInfo(unit="", higher_is_better=False, best=0.0)
LABELS = MetricInfo(unit="", higher_is_better=True, best=1.0)


def png(grey: int) -> str:
    """A picture of 2 x 2 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (2).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    pixels = zlib.compress(bytes([0, grey, grey]) * 2)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def example(index: int, psnr: float | None, error: float | None = None, **more: Any) -> Example:
    """One judged example of pictures; psnr None: not matched."""
    shown = {} if psnr is None else {"picture": png(90), "difference": png(0), "label": "cat"}
    return Example(
        index=index,
        scores={"psnr": psnr, "l2-error": error},
        chance={"psnr": 11.5, "l2-error": 0.71},
        error=error,
        **(shown | more),
    )


def run(attack: str, examples: list[Example], **more: Any) -> Run:
    known = {
        "client": 0,
        "family": "linear",
        "guarantee": "exact",
        "threat_model": "honest but curious server",
        "paper": "Phong et al. 2018",
        "seed": 0,
        "status": "done",
        "seconds": 0.5,
        "guesses": len(examples),
        "residual": 2e-7,
        "knowledge": ["input_shape"],
    }
    return Run(attack=attack, examples=examples, **(known | more))


def an_audit(**more: Any) -> Audit:
    known: dict[str, Any] = {
        "version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "complete": True,
        "case": "photos:batch=2",
        "domain": "images",
        "attacks": ["bias-ratio"],
        "model": "Sequential(\n  (0): Linear()\n)",
        "parameters": 1234567,
        "loss": "cross-entropy (mean)",
        "protocol": "one gradient, model in train mode",
        "knowledge": {"input_shape": "(3, 2, 2)", "batch_size": "2"},
        "metrics": {"l2-error": L2, "psnr": PSNR},
        "environment": {"python": "3.11"},
        "clients": [Client(index=0, name="client 0", size=2, pictures=[png(90), png(10)], labels=["cat", "dog"])],
        "runs": [run("bias-ratio", [example(0, 131.0, 2e-7, bound=3e-7), example(1, 20.0, 0.3)])],
        "risks": [
            LayerRisk(layer="0", kind="Linear", unknowns=24, equations=12, rank=2, words="a span", level="partial"),
            LayerRisk(layer="", kind="Other", unknowns=0, equations=4, rank=1, words="unclear", level="unknown"),
        ],
    }
    return Audit(**(known | more))


def exact() -> Audit:
    return an_audit()


def not_recovered() -> Audit:
    return an_audit(
        attacks=["matching"],
        defences=["noise:sigma=0.1"],
        seeds=[0, 1],
        complete=False,
        runs=[
            run("matching", [example(0, 12.0, 0.8), example(1, None)], guarantee="heuristic"),
            run("matching", [example(0, 9.0, 0.9), example(1, None)], guarantee="heuristic", seed=1),
            run("labels", [Example(index=1, scores={}, chance={}, label="dog", bound=0.0)], guarantee="bounded"),
        ],
        clients=[
            Client(index=0, name="client 0", size=2, pictures=[png(90), png(10)], labels=["cat", "dog"], residual=0.25)
        ],
        bounds=[
            Bound(name="Cramér-Rao", value=0.04, scope="unbiased", assumptions="known noise", source="Rao 1945"),
            Bound(name="vacuous", value=math.inf, scope="any", assumptions="none", source="none"),
        ],
        verdicts=[Verdict(name="security metric", value=-1470.0, words="the more negative, the safer")],
        remedies=[Remedy(defence="prune:share=0.9", recovered=0, size=2, psnr=14.5, chance=11.5)],
        flags=[Flag(name="near-chance", words="at best +0.5 dB", means="no leak shown", do="compare with chance")],
    )


def nothing_ran() -> Audit:
    return an_audit(
        runs=[
            run("bias-ratio", [], status="not applicable", words="there is no dense layer", missing=["labels"]),
            run("matching", [], status="failed", words="RuntimeError: too big"),
        ],
        risks=[],
    )


def table() -> Audit:
    rows = ["age = 39, pay = 7.5", "age = 50, pay = -1", "age = 28, pay = 3"]
    found = [
        Example(index=0, scores={"l2-error": 0.0}, chance={"l2-error": 1.2}, error=0.0, picture=rows[0], label=">50K"),
        Example(index=1, scores={"l2-error": 0.2}, chance={"l2-error": 1.1}, error=0.2, picture="age = 50, pay = -2"),
        Example(index=2, scores={"l2-error": None}, chance={"l2-error": 1.3}),
    ]
    return an_audit(
        domain="table",
        metrics={"l2-error": L2},
        clients=[Client(index=0, name="client 0", size=3, pictures=rows, labels=[">50K"] * 3)],
        runs=[run("bias-ratio", found)],
    )


def captured() -> Audit:
    returned = [Example(index=0, bound=4e-6, picture=png(90), label="3"), Example(index=1, picture=png(80), label="1")]
    return an_audit(
        truth=False,
        case="captured",
        metrics={},
        clients=[Client(index=0, name="captured", size=0)],
        runs=[run("bias-ratio", returned, residual=3.3e-5)],
        notes=["the update points uphill"],
    )


def hostile() -> Audit:
    """Markup and addresses wherever a stranger's strings can stand."""
    return an_audit(
        case=EVIL,
        model=EVIL,
        protocol=EVIL,
        loss=EVIL,
        defences=[EVIL],
        notes=[EVIL],
        knowledge={EVIL: EVIL},
        environment={EVIL: EVIL, "command": EVIL},
        clients=[Client(index=0, name=EVIL, size=1, pictures=["http://tracker.test/a.png"], labels=[EVIL])],
        runs=[
            run(EVIL, [example(0, 15.0, 0.4, picture=f"http://tracker.test/b.png {EVIL}", label=EVIL)], paper=EVIL),
            run("x", [], status="failed", words=EVIL),
        ],
        risks=[LayerRisk(layer=EVIL, kind=EVIL, unknowns=1, equations=1, rank=1, words=EVIL, level="low")],
        flags=[Flag(name=EVIL, words=EVIL, means=EVIL, do=EVIL)],
        bounds=[Bound(name=EVIL, value=1.0, scope="any", assumptions=EVIL, source="https://paper.test")],
    )


def designed() -> Audit:
    """Layers on the way back to the input, and changes that would make the network safer, by two metrics."""

    def layer(name: str, kind: str, unknowns: int, rank: int, level: Any) -> LayerRisk:
        return LayerRisk(
            layer=name,
            kind=kind,
            unknowns=unknowns,
            equations=rank,
            rank=rank,
            words=f"{name} in words",
            level=level,
            analysis="layer-equations",
        )

    def change(name: str, value: float) -> Verdict:
        return Verdict(name=name, value=value, words="Parameters 48,777 -> 12,327.", analysis="safer-design")

    return an_audit(
        risks=[
            LayerRisk(layer="0", kind="Linear", unknowns=24, equations=12, rank=2, words="a span", level="partial"),
            layer("conv1", "Conv2d", 3072, 1476, "low"),
            layer("conv2", "Conv2d", 4704, 4703, "partial"),
            layer("block.conv3", "Conv2d", 65536, 0, "unknown"),
            layer("", "Linear", 100, 100, "exact"),
        ],
        verdicts=[
            Verdict(name="c(M)", value=-1470.0, words="of the network as it is", analysis="security-metric"),
            Verdict(name="examples told apart", value=32.0, words="at 'conv2'", analysis="separable-layer"),
            change("c(M): conv1 at stride 2", -12596.0),
            change("share determined: conv1 at stride 2", 0.25),
            change("c(M): conv2 at stride 2", -1502.0),
        ],
    )


def features() -> Audit:
    """Two clients with one example each; one attack reads a layer's features, one labels alone."""
    return an_audit(
        metrics={"l2-error": L2, "label-accuracy": LABELS, "psnr": PSNR},
        clients=[Client(index=c, name=f"client {c}", size=1, pictures=[png(90)], labels=["cat"]) for c in range(2)],
        runs=[
            run("deep", [Example(index=0, error=1e-7, bound=1e-6)], layer="3.fc"),
            run("labels", [Example(index=0, scores={"label-accuracy": 1.0}, label="cat", bound=0.0)], client=1),
        ],
    )


AUDITS = [exact, not_recovered, nothing_ran, table, captured, hostile, features, designed]
