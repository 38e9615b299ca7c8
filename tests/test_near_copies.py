"""Near copies of an example in a batch: what is claimed of them holds, down to those that no update tells from a copy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation
from unbatch.attacks import Descend
from unbatch.case import Case
from unbatch.reporting.results import Audit
from unbatch.truth import Truth

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}
FALSE = {"exact-claim-fails", "bound-violated", "label-claim-fails", "label-proof-fails"}


@dataclass
class Crowd:
    """Photographs of which the last `copies` are near each other, behind a small dense network."""

    apart: float  # how far from each other, in the spread of white noise
    how: str = "white"
    activation: str = "gelu"
    classes: int = 5
    n: int = 4
    copies: int = 2
    depth: int = 2
    width: int = 120
    dtype: torch.dtype = torch.float64
    told: bool = True  # the size of the batch
    factor: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)
        pool = Case.parse("photos:batch=40,size=8").setting().inputs.double()
        x = pool[torch.randperm(len(pool), generator=rng)[: self.n + self.copies - 1]]
        first = x[-self.copies].clone()
        way = {"bright": torch.ones_like(first), "blend": x[0] - first}.get(self.how)
        for i in range(1, self.copies):
            step = torch.randn(first.shape, generator=rng).double() if way is None else way
            x[-i] = first + self.apart * (0.3 + float(torch.rand((), generator=rng))) * step
        y = torch.randint(self.classes, (len(x),), generator=rng)
        y[-self.copies :] = y[-1]
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(self.depth - 1):
            layers += [nn.Linear(self.width if i else 192, self.width), ACTIVATIONS[self.activation]()]
        self.net = nn.Sequential(*layers, nn.Linear(self.width, self.classes)).to(self.dtype)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                for p in layer.parameters():
                    p.data = (2 * torch.rand(p.shape, generator=rng).to(p) - 1) / layer.in_features**0.5
        self.x, self.y = x.to(self.dtype), y

    def audit(self) -> Audit:
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        gradient = torch.autograd.grad(self.factor * F.cross_entropy(self.net(self.x), self.y), parameters)
        told = {"batch_size": len(self.x)} if self.told else {}
        seen = Observation(
            model=self.net,
            loss=F.cross_entropy,
            update=dict(zip(names, gradient, strict=True)),
            knowledge=Knowledge(input_shape=(3, 8, 8), **told),
        )
        truth = Truth(inputs=self.x, labels=self.y)
        return unbatch.audit(seen, truth=truth, attacks=["unmix:attempts=1"], analyses=())


def bounds(record: Audit) -> list[float]:
    """The bounds of what is claimed, the largest first."""
    return sorted((each.bound for each in record.runs[0].examples if each.bound is not None), reverse=True)


@pytest.mark.parametrize(
    ("crowd", "claims"),
    [
        (Crowd(1e-6), 3),
        (Crowd(1e-4, "bright", copies=3, factor=0.7), 3),
        (Crowd(3e-3, "blend", "tanh", n=3, dtype=torch.float32), 4),
        (Crowd(1e-4, "white", "silu", n=3, copies=3, dtype=torch.float32), 5),
        (Crowd(1e-4, "blend", "prelu", classes=3, copies=3, dtype=torch.float32), 3),
        (Crowd(3e-3, "blend", "relu", classes=4, n=3, dtype=torch.float32, told=False), 2),
        (Crowd(1e-6, "bright", "leaky", classes=2, n=3, factor=0.7), 0),
        (Crowd(1e-6, "bright", "silu", classes=2, n=3, told=False, seed=42), 2),
        (Crowd(3e-3, "bright", "leaky", classes=4, n=3, told=False, seed=135), 2),
        (Crowd(1e-2, "blend", classes=2, width=160, dtype=torch.float32, seed=32), 2),
        (Crowd(1e-4, "white", "relu", classes=4, n=6, width=80, factor=0.7, seed=89), 0),
    ],
    ids=str,
)
def test_no_claim_on_near_copies_is_false(crowd: Crowd, claims: int) -> None:
    record = crowd.audit()
    assert len(bounds(record)) >= claims
    assert not {flag.name for flag in record.flags} & FALSE


def test_copies_are_claimed_as_far_as_they_are_told_from_near_ones() -> None:
    """All of the batch; those that occur twice to the root of the rounding, the others to the rounding itself."""
    record = Crowd(0.0).audit()
    found = bounds(record)
    assert len(found) == 5
    assert 1e-8 < found[1] <= found[0] < 1e-3
    assert found[2] < 1e-9


def convolutional(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 20, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(20, 40, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(40, 60, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(60, 4),
    ).to(dtype)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-4, 1.0])
def test_descend_claims_no_example_that_counts_several_times(apart: float, told: bool) -> None:
    torch.manual_seed(0)
    net = convolutional(torch.float64)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    x[2] = x[1] + apart * torch.randn(2, 8, 8, dtype=torch.float64)
    seen, _ = unbatch.observe(net, F.cross_entropy, x, torch.tensor([0, 1, 1]))
    found = Descend(attempts=1)(seen.only("input_shape", *["batch_size"] * told))
    assert int(found.bound.isfinite().sum()) == (3 if apart == 1.0 else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_near_copies_of_different_labels_are_no_example_of_a_label_between(dtype: torch.dtype) -> None:
    """One example of a row of which an entry is below zero sends what they send."""
    torch.manual_seed(0)
    net = convolutional(dtype)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    x[2] = x[1] + 1e-6 * torch.randn(2, 8, 8, dtype=torch.float64)
    seen, _ = unbatch.observe(net, F.cross_entropy, x.to(dtype), torch.tensor([0, 1, 2]))
    found = Descend(steps=60, attempts=1)(seen.only("input_shape"))
    assert not bool(found.bound.isfinite().any())


def drawn(seed: int) -> Crowd:
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    return Crowd(
        pick(1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6, 0.0),
        pick("white", "bright", "blend"),
        pick(*ACTIVATIONS),
        classes=pick(2, 3, 3, 4, 5, 10),
        n=pick(3, 4, 6),
        copies=pick(2, 2, 3),
        depth=pick(2, 2, 3, 4),
        width=pick(80, 120, 160),
        dtype=pick(torch.float64, torch.float64, torch.float32),
        told=pick(True, True, False),
        factor=pick(1.0, 1.0, 0.7),
        seed=seed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", range(5))
def test_no_claim_on_near_copies_is_false_in_hundreds_of_batches(
    block: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, claims = list[str](), 0
    for seed in range(40 * block, 40 * block + 40):
        crowd = drawn(seed)
        record = crowd.audit()
        claims += len(bounds(record))
        flags = {flag.name for flag in record.flags} & FALSE
        wrong += [f"{crowd}: {flags}"] * bool(flags)
    with capsys.disabled():
        print(f"\n  {claims} claims of 40 batches with near copies; false ones:", *wrong, sep="\n  ")
    assert not wrong
    assert claims > 40
