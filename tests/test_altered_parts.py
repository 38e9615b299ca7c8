"""Kinked networks of which some examples are missing, and updates to which something was done: no claim in part is false.

The search begins beside the truth, so that what an alteration makes of an example is met at once; all the rest, the
second judge among it, is what a user gets.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
import unbatch.attack
from unbatch import Knowledge, Observation
from unbatch.case import Case
from unbatch.inversion import unmixing
from unbatch.inversion.unmixing import Unmixing
from unbatch.loss import Loss
from unbatch.numerics.unmix.mixture import Mixture
from unbatch.numerics.unmix.solver import Separation, in_part
from unbatch.reconstruction import Reconstruction
from unbatch.reporting.results import Audit
from unbatch.truth import Truth

Update = dict[str, Tensor]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "prelu": nn.PReLU}
FLAGS = {"exact-claim-fails", "bound-violated", "label-claim-fails", "label-proof-fails"}


@dataclass
class Client:
    """A small kinked network and photographs, of which a group of `missing` + 1 depends linearly on each other."""

    classes: int
    missing: int
    n: int = 8
    activation: str = "relu"
    depth: int = 2
    width: int = 100
    twins: float = 0.0  # how far the last two are from each other
    dtype: torch.dtype = torch.float64
    told: bool = True  # the size of the batch
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = rng = torch.Generator().manual_seed(self.seed)
        pool = Case.parse("photos:batch=40,size=8").setting().inputs.double()
        x = pool[torch.randperm(len(pool), generator=rng)[: self.n]]
        share = torch.rand(self.missing, generator=rng).double() + 0.2
        x[0] = torch.einsum("i,ichw->chw", share / share.sum(), x[1 : self.missing + 1])
        if self.twins:
            x[-1] = x[-2] + self.twins * torch.randn(x[0].shape, generator=rng).double()
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(self.depth - 1):
            layers += [nn.Linear(self.width if i else 192, self.width), ACTIVATIONS[self.activation]()]
        self.net = nn.Sequential(*layers, nn.Linear(self.width, self.classes)).to(self.dtype)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                for p in layer.parameters():
                    p.data = (2 * torch.rand(p.shape, generator=rng).to(p) - 1) / layer.in_features**0.5
        self.x, self.y = x.to(self.dtype), torch.randint(self.classes, (self.n,), generator=rng)

    def pick(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.rng))]

    def gradient(self, loss: Loss = F.cross_entropy, net: nn.Module | None = None, x: Tensor | None = None) -> Update:
        net = net or self.net
        names, parameters = zip(*net.named_parameters(), strict=True)
        value = loss(net(self.x if x is None else x), self.y)
        return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))

    def moved(self, by: float, *, above: bool = False) -> nn.Module:
        net = copy.deepcopy(self.net)
        with torch.no_grad():
            for p in list(net.parameters())[2 * above :]:
                p.add_(by * p.abs().mean() * torch.randn(p.shape, generator=self.rng).to(p))
        return net

    def rates(self, of: Callable[[str], float]) -> Update:
        return {name: of(name) * u for name, u in self.gradient().items()}


def focal(outputs: Tensor, y: Tensor) -> Tensor:
    sure = outputs.softmax(1).gather(1, y[:, None])[:, 0]
    return ((1 - sure) ** 2 * F.cross_entropy(outputs, y, reduction="none")).mean()


def uneven(client: Client) -> Update:
    weights = 1 + client.pick(0.5, 0.01) * torch.rand(client.n, generator=client.rng).to(client.dtype)
    return client.gradient(lambda o, y: (weights * F.cross_entropy(o, y, reduction="none")).mean())


def softened(client: Client) -> Update:
    share = client.pick(0.3, 0.01)
    other = torch.rand(client.n, client.classes, generator=client.rng).softmax(1).to(client.dtype)
    rows = (1 - share) * F.one_hot(client.y, client.classes) + share * other
    return client.gradient(lambda o, y: F.cross_entropy(o, rows))


def tempered(client: Client) -> Update:
    warm = client.pick(2.0, 1.01)
    return client.gradient(lambda o, y: F.cross_entropy(o / warm, y))


def at_rates(names: str, *factors: float) -> Callable[[Client], Update]:
    """Tensors whose names begin so, at one of the factors."""

    def way(client: Client) -> Update:
        factor = client.pick(*factors)
        return client.rates(lambda name: factor if name.startswith(names) else 1.0)

    return way


def by_class(client: Client) -> Update:
    weight = 0.5 + torch.rand(client.classes, generator=client.rng).to(client.dtype)
    return client.gradient(nn.CrossEntropyLoss(weight=weight))


def blended(client: Client) -> Update:
    """Of examples that are mixed into each other on the way to the client."""
    return client.gradient(x=client.x + client.pick(0.1, 1e-3) * client.x.flip(0))


def two_steps(client: Client) -> Update:
    first, later = client.gradient(), copy.deepcopy(client.net)
    rate = client.pick(0.1, 1e-3)
    with torch.no_grad():
        for name, p in later.named_parameters():
            p.sub_(rate * first[name])
    return {name: (first[name] + u) / 2 for name, u in client.gradient(net=later).items()}


def noisy(client: Client) -> Update:
    size = client.pick(1e-8, 1e-5, 1e-2)
    draw = lambda u: torch.randn(u.shape, generator=client.rng).to(u)  # noqa: E731
    return {name: u + size * u.abs().mean() * draw(u) for name, u in client.gradient().items()}


WAYS: dict[str, Callable[[Client], Update]] = {
    "nothing": lambda c: c.gradient(),
    "scaled": at_rates("", 1.001, 1.1, 0.5, 2.0, -1.0),
    "bias scaled": at_rates("1.bias", 1.001, 1.1, 0.5, 2.0),
    "layer scaled": at_rates("1.", 1.001, 1.1, 0.5),
    "rates by layer": lambda c: c.rates(lambda name: 0.9 + int(name[0]) / 10),
    "smoothed": lambda c: c.gradient(nn.CrossEntropyLoss(label_smoothing=c.pick(0.1, 0.001))),
    "temperature": tempered,
    "focal": lambda c: c.gradient(focal),
    "class weights": by_class,
    "example weights": uneven,
    "soft labels": softened,
    "blended": blended,
    "two steps": two_steps,
    "another model": lambda c: c.gradient(net=c.moved(c.pick(1e-5, 1e-2))),
    "another head": lambda c: c.gradient(net=c.moved(c.pick(1e-5, 1e-2), above=True)),
    "centralised": lambda c: {
        name: u - u.mean(1, keepdim=True) if u.ndim == 2 else u for name, u in c.gradient().items()
    },
    "half precision": lambda c: {name: u.half() for name, u in c.gradient().items()},
    "noise": noisy,
}


@contextmanager
def begun_beside(client: Client) -> Iterator[list[tuple[Reconstruction, Reconstruction]]]:
    """Searches of unmix begin beside those examples that are no part of the group; claims before and after the judge."""
    claims = list[tuple[Reconstruction, Reconstruction]]()
    posed, judged = unmixing.Unmixing.of, unbatch.attack.judged
    problems = list[Unmixing]()

    def of(view, rng):
        problems.append(posed(view, rng))
        return problems[-1]

    def found(mixture: Mixture, ways, rng: torch.Generator, **how) -> Separation:
        if not mixture.classes:  # the same for rows of probabilities
            return Separation(mixture.U.new_zeros(0, mixture.n), mixture.U.new_zeros(0, mixture.targets))
        layer, rows, apart = problems[-1].layer, problems[-1].span.rows, slice(client.missing + 1, None)
        x = client.x[apart].double().flatten(1) * layer.feeds.scale + layer.feeds.shift
        z = mixture.scaled(torch.cat([x, torch.ones(len(x), 1).double()], 1) @ rows.T)
        q = mixture.dual(mixture.F(z, client.y[apart]))
        off = torch.randn(z.shape, generator=rng, dtype=torch.float64) * z.norm(dim=1, keepdim=True) / mixture.n**0.5
        return in_part(mixture, q, mixture.scaled(z + 1e-3 * off), torch.arange(mixture.classes), [])

    def heard(view, claim: Reconstruction) -> Reconstruction:
        claims.append((claim, judged(view, claim)))
        return claims[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unmixing.Unmixing, "of", of)
        patch.setattr(unmixing, "unmix", found)
        patch.setattr(unbatch.attack, "judged", heard)
        yield claims


def audited(client: Client, way: str) -> tuple[Counter[str], Audit]:
    """How many claims the attack made and the judge kept, how many of each are false, and the audit."""
    told = {"batch_size": client.n} if client.told else {}
    seen = Observation(
        model=client.net,
        loss=F.cross_entropy,
        update=WAYS[way](client),
        knowledge=Knowledge(input_shape=(3, 8, 8), **told),
    )
    count = Counter[str]()
    with begun_beside(client) as claims:
        truth = Truth(inputs=client.x, labels=client.y)
        record = unbatch.audit(seen, truth=truth, attacks=["unmix"], analyses=())
    for stage, found in zip(("made", "kept"), claims[-1] if claims else (), strict=False):
        if found.inputs is None or found.bound is None or not len(found):
            continue
        flat, true = found.inputs.flatten(1), client.x.double().flatten(1)
        error = torch.cdist(flat, true, compute_mode="donot_use_mm_for_euclid_dist").amin(1) / flat.norm(dim=1)
        count[stage] += int(found.bound.isfinite().sum())
        count[f"{stage}, false"] += int((found.bound.isfinite() & (error > found.bound)).sum())
    count["flags"] += len({flag.name for flag in record.flags} & FLAGS)
    return count, record


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("missing", [2, 3])
def test_no_claim_in_part_is_false(missing: int, way: str) -> None:
    """Of four classes; with three missing any residual has a solution, with two one number is left that must agree."""
    count, _ = audited(Client(4, missing, seed=1), way)
    assert not count["made, false"]
    assert not count["flags"]
    assert count["kept"] == (5 if missing == 2 and way in ("nothing", "rates by layer") else count["kept"])
    if missing == 3 or way in ("scaled", "bias scaled", "smoothed", "temperature", "focal"):
        assert not count["made"]


@pytest.mark.parametrize("told", [True, False])
def test_a_batch_of_another_size_is_not_told_from_a_part_of_it(told: bool) -> None:
    """Without its size the batch is taken for one of as many as the rank, so that every example counts less."""
    for classes in (3, 4, 5):
        count, _ = audited(Client(classes, 2, told=told, seed=2), "nothing")
        assert not count["made, false"]
        assert count["kept"] == (5 if told and classes > 3 else 0)


def drawn(seed: int) -> tuple[Client, str]:
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    classes = pick(3, 3, 4, 5, 6, 9)
    missing = max(1, classes - pick(0, 1, 2, 2, 3, 4))
    client = Client(
        classes,
        missing,
        n=missing + pick(2, 3, 5),
        activation=pick(*ACTIVATIONS),
        depth=pick(2, 2, 3, 4),
        width=pick(80, 120, 160),
        twins=pick(0.0, 0.0, 1e-3, 1e-5),
        dtype=pick(torch.float64, torch.float64, torch.float32),
        told=pick(True, True, False),
        seed=seed,
    )
    return client, list(WAYS)[seed % len(WAYS)]


@pytest.mark.slow
def test_no_claim_in_part_is_false_in_hundreds_of_altered_problems(capsys: pytest.CaptureFixture[str]) -> None:
    count, wrong = Counter[str](), list[str]()
    for seed in range(30 * len(WAYS)):
        client, way = drawn(seed)
        one, _ = audited(client, way)
        count += one + Counter({"problems": 1, "with claims": int(one["made"] > 0)})
        count["made of altered ones"] += one["made"] if way != "nothing" else 0
        if one["made, false"] or one["flags"]:
            wrong.append(f"{way}, {client}: {dict(one)}")
    with capsys.disabled():
        names = ("problems", "with claims", "made", "made of altered ones", "made, false", "kept", "kept, false")
        print("", "; ".join(f"{name} {count[name]}" for name in names), *wrong, sep="\n  ")
    assert not wrong
    assert count["kept"] > 30
