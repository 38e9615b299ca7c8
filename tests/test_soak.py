"""Longer checks, run by `make slow`: whole batches recovered, and claims held to the truth over many random exchanges."""

from dataclasses import replace

import pytest
import torch

import unbatch
from unbatch import Attack, Case, Knowledge, NotApplicable, observe

pytestmark = pytest.mark.slow
PROTOCOLS = ("", "local-steps:steps=3,learning_rate=0.1,momentum=0.9", "local-steps:epochs=2,batch=2,optimiser=adam")
DEFENCES = ("", "clip:norm=0.1", "secure-aggregation:clients=2")


@pytest.mark.parametrize(
    ("case", "worst"),
    [("photos:batch=16,width=1000,activation=gelu", 1e-4), ("photos:batch=8,width=1000,activation=tanh", 1e-4)],
)
def test_gradient_matching_recovers_whole_batches_of_smooth_networks(case: str, worst: float) -> None:
    setting = Case.parse(case).setting()
    told = replace(setting, knowledge=Knowledge(labels=setting.labels.sort().values))
    record = unbatch.audit(told, attacks=["gradient-matching"], analyses=())
    assert len(record.recovered()) == len(setting.inputs)
    assert max(e.error for e in record.runs[0].examples if e.error is not None) < worst


def exchanges(count: int):
    """Random clients of every case, model family, size and protocol; the seed decides all."""
    rng = torch.Generator().manual_seed(2026)

    def pick(options: tuple) -> object:
        return options[int(torch.randint(len(options), (), generator=rng))]

    for seed in range(count):
        case, n = pick(("digits", "faces", "tables", "tables:dataset=wine")), pick((1, 1, 2, 5, 12))
        activation, double = pick(("relu", "tanh", "gelu", "sigmoid")), pick(("true", "false"))
        joint = "," if ":" in str(case) else ":"
        spec = (
            f"{case}{joint}batch={n},width=24,depth={pick((1, 2))},activation={activation},double={double},seed={seed}"
        )
        setting = Case.parse(spec).setting()
        with torch.no_grad():  # networks far from their initialisation, too
            for p in setting.model.parameters():
                p.mul_(float(pick((1.0, 1.0, 3.0))))
        stack = [d for d in (pick(DEFENCES) if n > 1 else "", pick(PROTOCOLS)) if d]
        yield spec, observe(setting.model, setting.loss, setting.inputs, setting.labels, defences=stack, seed=seed)


def test_label_bounds_are_never_violated() -> None:
    ran = proven = 0
    for spec, (obs, truth) in exchanges(600):
        try:
            found = Attack.parse("label-count")(obs)
        except NotApplicable:
            continue
        ran += 1
        true = torch.bincount(truth.labels.cpu(), minlength=len(found.trace["lower"])).tolist()
        for low, count, high in zip(found.trace["lower"], true, found.trace["upper"], strict=True):
            assert low <= count <= high, spec
        if found.trace["proof"] == "exact":
            proven += 1
            assert sorted(found.labels.tolist()) == sorted(truth.labels.tolist()), spec
    assert ran > 500
    assert proven > 200


def test_bias_ratio_bounds_are_never_violated() -> None:
    ran = 0
    for spec, (obs, truth) in exchanges(600):
        try:
            found = Attack.parse("bias-ratio")(obs)
        except NotApplicable:
            continue
        ran += 1
        error = float((found.inputs - truth.inputs.double()).norm() / found.inputs.norm())
        assert error <= float(found.bound[0]), spec
    assert ran > 100


def test_unmix_bounds_are_never_violated() -> None:
    """Whatever it returns, of clipped and summed updates and of networks with wild weights too, is within its bound."""
    ran = returned = 0
    for spec, (obs, truth) in exchanges(300):
        try:
            found = Attack.parse("unmix:attempts=1")(obs)
        except NotApplicable:
            continue
        ran += 1
        returned += len(found)
        x, true = found.inputs.flatten(1), truth.inputs.double().flatten(1)
        if len(x):
            error = torch.cdist(x, true).min(1).values / x.norm(dim=1)
            assert bool((error <= found.bound).all()), spec
    assert ran > 80
    assert returned > 50
