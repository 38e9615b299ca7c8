"""Draws: exchanges as people make them, at random: networks x losses x label forms x things done to an update.

A draw is a handful of words, so that a failing one is read at a glance and shrinks; all tensors come from its seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Knowledge, Observation, Protocol, Setting
from unbatch.truth import Truth

ACTIVATIONS = ("ReLU", "GELU", "Tanh", "Sigmoid", "ELU", "LeakyReLU", "SiLU", "Softplus")
CLASSES = 4


class Functional(nn.Module):
    """A network as people write it: functions in `forward`, a reshape by hand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(inputs, 12), nn.Linear(12, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x.reshape(len(x), -1))))


class Recurrent(nn.Module):
    """The last output of a GRU over rows of a picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(inputs, 6, batch_first=True), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.flatten(1, -2))[0][:, -1])


class Attention(nn.Module):
    """One head over the rows of a picture, and their mean."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = *(nn.Linear(inputs, 6) for _ in range(3)), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2)
        return self.out(F.scaled_dot_product_attention(self.q(rows), self.k(rows), self.v(rows)).mean(1))


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(inputs, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight, self.out = self.a.weight, nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.first(x.flatten(1))))))))


class Skip(nn.Module):
    """Convolutions with an addition in `forward`."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(48, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.out(torch.flatten(F.relu(x + self.b(x)), 1))


def _mlp(act: str, k: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 14), getattr(nn, act)(), nn.Linear(14, k))


# by name: (activation, outputs) -> a network of pictures [1, 4, 4]
NETWORKS: dict[str, Callable[[str, int], nn.Module]] = {
    "dense": _mlp,
    "deep": lambda act, k: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 14), getattr(nn, act)(), nn.Linear(14, 9), getattr(nn, act)(), nn.Linear(9, k)
    ),
    "no bias": lambda act, k: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 14, bias=False), getattr(nn, act)(), nn.Linear(14, k, bias=False)
    ),
    "bottleneck": lambda act, k: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), getattr(nn, act)(), nn.Linear(3, k)),
    "linear": lambda act, k: nn.Sequential(nn.Flatten(), nn.Linear(16, k)),
    "scaled": lambda act, k: nn.Sequential(nn.Flatten(), nn.LayerNorm(16), *list(_mlp(act, k))[1:]),
    "batch norm": lambda act, k: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), getattr(nn, act)(), nn.Linear(12, k)
    ),
    "convolutional": lambda act, k: nn.Sequential(
        nn.Conv2d(1, 4, 3), getattr(nn, act)(), nn.Flatten(), nn.Linear(16, k)
    ),
    "pooled": lambda act, k: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), getattr(nn, act)(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, k)
    ),
    "group norm": lambda act, k: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), getattr(nn, act)(), nn.Flatten(), nn.Linear(16, k)
    ),
    "dropout": lambda act, k: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, k)
    ),
    "functional": lambda act, k: Functional(16, k),
    "recurrent": lambda act, k: Recurrent(4, k),
    "attention": lambda act, k: Attention(4, k),
    "tied": lambda act, k: Tied(16, k),
    "skip": lambda act, k: Skip(k),
    "frozen first": lambda act, k: _frozen(_mlp(act, k)),
}

# how the training code holds it: what is handed to unbatch, from the bare network
HOLDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": lambda net: net,
    "data parallel": nn.DataParallel,
    "grad sample": lambda net: GradSampleModule(net, strict=False),
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
    "double": lambda net: net.double(),
    "bfloat16": lambda net: net.bfloat16(),
}


def _frozen(net: nn.Module) -> nn.Module:
    next(p for p in net.parameters()).requires_grad_(False)
    return net


def classes(n: int, rng: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (n,), generator=rng)


def one_hot(n: int, rng: torch.Generator) -> Tensor:
    return F.one_hot(classes(n, rng), CLASSES).float()


def bits(n: int, rng: torch.Generator) -> Tensor:
    return torch.randint(2, (n,), generator=rng)


def ignored(n: int, rng: torch.Generator) -> Tensor:
    labels = classes(n, rng)
    return torch.where(torch.arange(n) > 0, -100, labels)


BCE = F.binary_cross_entropy_with_logits

# by name: the loss, the number of outputs, labels (n, rng)
LOSSES: dict[str, tuple[Any, int, Callable[[int, torch.Generator], Tensor]]] = {
    "cross entropy": (F.cross_entropy, CLASSES, classes),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), CLASSES, classes),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES, classes),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 2.0])), CLASSES, classes),
    "one class ignored": (nn.CrossEntropyLoss(ignore_index=2), CLASSES, lambda n, rng: (2 * torch.arange(n) + 1) % 4),
    "some rows ignored": (F.cross_entropy, CLASSES, ignored),
    "one-hot rows": (F.cross_entropy, CLASSES, one_hot),
    "soft rows": (F.cross_entropy, CLASSES, lambda n, rng: torch.rand(n, CLASSES, generator=rng).softmax(1)),
    "squares of one-hot rows": (F.mse_loss, CLASSES, one_hot),
    "squares of numbers": (F.mse_loss, CLASSES, lambda n, rng: torch.randn(n, CLASSES, generator=rng)),
    "absolute errors": (F.l1_loss, CLASSES, lambda n, rng: torch.randn(n, CLASSES, generator=rng)),
    "binary, squeezed": (lambda o, y: BCE(o.squeeze(1), y.to(o)), 1, bits),
    "binary, a column": (lambda o, y: BCE(o[:, 0], y), 1, lambda n, rng: bits(n, rng).float()),
    "binary, unsqueezed": (lambda o, y: BCE(o, y.to(o).unsqueeze(1)), 1, bits),
    "binary, targets [n, 1]": (BCE, 1, lambda n, rng: bits(n, rng).float()[:, None]),
    "many labels": (BCE, CLASSES, lambda n, rng: torch.randint(2, (n, CLASSES), generator=rng).float()),
    "many labels, weighted": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 1.0, 1.0, 2.0])),
        CLASSES,
        lambda n, rng: torch.randint(2, (n, CLASSES), generator=rng).float(),
    ),
    "focal": (
        lambda o, y: (
            (1 - o.softmax(1).gather(1, y[:, None])) ** 2 * F.cross_entropy(o, y, reduction="none")[:, None]
        ).mean(),
        CLASSES,
        classes,
    ),
    "hinge": (nn.MultiMarginLoss(), CLASSES, classes),
    "small integers": (
        lambda o, y: F.cross_entropy(o, y.long()),
        CLASSES,
        lambda n, rng: classes(n, rng).to(torch.uint8),
    ),
}

Tensors = dict[str, Tensor]


def _each(change: Callable[[str, Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda update: {name: change(name, u) for name, u in update.items()}


def _largest(u: Tensor, share: float) -> Tensor:
    least = u.abs().flatten().kthvalue(max(1, int((1 - share) * u.numel()))).values
    return torch.where(u.abs() >= least, u, 0)


# things that change no number: every verdict stays
HARMLESS: dict[str, Callable[[Tensors], Any]] = {
    "other order": lambda update: dict(reversed(list(update.items()))),
    "other strides": _each(lambda name, u: torch.stack([u, u], -1)[..., 0]),
    "numpy": _each(lambda name, u: u.float().numpy()),  # type: ignore[arg-type,return-value]
    "a prefix": lambda update: {f"module.{name}": u for name, u in update.items()},
    "a list": lambda update: list(update.values()),
    "sparse": _each(lambda name, u: u.to_sparse()),
    "with its graph": _each(lambda name, u: u.clone().requires_grad_()),
}

# things that a client or the way to the server did to it: no claim may become false
HARMFUL: dict[str, Callable[[Tensors], Tensors]] = {
    "twice": _each(lambda name, u: 2 * u),
    "half": _each(lambda name, u: u / 2),
    "sign flipped": _each(lambda name, u: -u),
    "a step": _each(lambda name, u: -0.05 * u),
    "loss scaling": _each(lambda name, u: 1024 * u),
    "signs": _each(lambda name, u: u.sign()),
    "each clipped": _each(lambda name, u: u * min(1.0, 0.1 / max(float(u.norm()), 1e-12))),
    "clipped": lambda update: unbatch.protocol.shortened(update, 0.1),
    "largest entries": _each(lambda name, u: _largest(u, 0.2)),
    "two learning rates": _each(lambda name, u: u * (2 if "bias" in name else 1)),
    "rates by layer": _each(lambda name, u: u * (1 + len(name) % 3)),
    "half precision": _each(lambda name, u: u.half().to(u)),
    "bfloat16 on the way": _each(lambda name, u: u.bfloat16()),
    "without biases": lambda update: {name: u for name, u in update.items() if "bias" not in name} or update,
    "only the last": lambda update: dict(list(update.items())[-2:]),
    "rounded": _each(lambda name, u: (u / u.abs().max().clamp_min(1e-12) * 127).round() * u.abs().max() / 127),
    "noisy": _each(
        lambda name, u: (
            u + 1e-3 * u.abs().mean() * torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u)
        )
    ),
    "adam": _each(lambda name, u: -1e-3 * u / (u.abs() + 1e-8)),
}

# what the client does itself, and says so: its defences and its protocol
CLIENTS: dict[str, tuple[tuple[str, ...], Protocol]] = {
    **{
        spec: ((spec,), Protocol())
        for spec in (
            "clip:norm=0.1",
            "prune:share=0.9",
            "quantise:bits=4",
            "quantise:bits=2,stochastic=false",
            "noise:sigma=0.001",
            "label-smoothing:epsilon=0.1",
            "secure-aggregation:clients=2",
            "mixup:alpha=0.4",
            "dp-sgd:clip=1,noise_multiplier=0.5",
        )
    },
    "clipped and pruned": (("prune:share=0.5", "clip:norm=0.1"), Protocol()),
    "one step": ((), Protocol(local_steps=1, learning_rate=0.1)),
    "one step with decay": ((), Protocol(local_steps=1, learning_rate=0.1, weight_decay=0.01)),
    "three steps": ((), Protocol(local_steps=3, learning_rate=0.05)),
    "three steps with momentum and decay": (
        (),
        Protocol(local_steps=3, learning_rate=0.05, momentum=0.9, weight_decay=0.01),
    ),
    "two epochs of single examples": ((), Protocol(epochs=2, local_batch_size=1, learning_rate=0.05)),
    "a step of Adam": ((), Protocol(local_steps=1, optimiser="adam", learning_rate=0.001)),
    "eval mode": ((), Protocol(mode="eval")),
}


@dataclass(frozen=True)
class Draw:
    """One exchange in words."""

    network: str
    activation: str
    hold: str
    loss: str
    n: int
    normal: bool
    done: str  # to the update, on its way
    client: str  # what it does itself
    seed: int

    def setting(self) -> Setting:
        """The client's network and private batch."""
        torch.manual_seed(self.seed)
        rng = torch.Generator().manual_seed(self.seed)
        loss, outputs, labelled = LOSSES[self.loss]
        net = NETWORKS[self.network](self.activation, outputs)
        held = self.hold if not (self.hold == "grad sample" and list(net.buffers())) else ""  # Opacus refuses buffers
        net = HOLDS[held](net)
        dtype = next(net.parameters()).dtype
        x = (torch.randn if self.normal else torch.rand)(self.n, 1, 4, 4, generator=rng).to(dtype)
        y = labelled(self.n, rng)
        if self.hold in ("double", "bfloat16"):
            y = y.to(dtype) if y.is_floating_point() else y
            loss = copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss
        return Setting(model=net, loss=loss, inputs=x, labels=y)

    def observed(self, setting: Setting) -> tuple[Observation, Truth]:
        """What the server sees, and what is behind it: the honest client's update, or what became of it on its way."""
        defences, protocol = CLIENTS[self.client] if self.client else ((), Protocol())

        def sent(model: nn.Module, x: Tensor, y: Tensor) -> Observation:
            return unbatch.observe(model, setting.loss, x, y, defences=defences, protocol=protocol, seed=self.seed)[0]

        x, y = setting.inputs, setting.labels
        obs, truth = sent(setting.model, x, y), Truth(inputs=x, labels=y)
        update: Any = dict(obs.update)
        if self.done == "two batches added up":
            rng = torch.Generator().manual_seed(self.seed + 1)
            more, theirs = torch.rand(x.shape, generator=rng).to(x), y.flip(0)
            update = {name: u + update[name] for name, u in sent(setting.model, more, theirs).update.items()}
            truth = Truth(inputs=torch.cat([x, more]), labels=torch.cat([y, theirs]))
        elif self.done == "of another model":
            other = copy.deepcopy(setting.model)
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(0.3 * p.flip(0))
            update = sent(other, x, y).update
        elif self.done == "of the model itself":
            update = {name: p.detach().clone() for name, p in obs.model.named_parameters() if name in update}
        elif self.done:
            update = (HARMLESS.get(self.done) or HARMFUL[self.done])(update)
        else:
            return obs, truth
        told = obs.knowledge.only("input_shape", "input_range", "domain") | Knowledge(batch_size=len(truth))
        return Observation(model=obs.model, loss=obs.loss, update=update, knowledge=told), truth


WHOLE = ("two batches added up", "of another model", "of the model itself")


def draws(
    *, done: tuple[str, ...] = (*HARMLESS, *HARMFUL, *WHOLE), clients: tuple[str, ...] = tuple(CLIENTS)
) -> st.SearchStrategy[Draw]:
    """Draws of everything above; what is done on the way and what the client does itself do not meet."""
    ways = [("", ""), *((each, "") for each in done), *(("", each) for each in clients)]
    return st.builds(
        lambda way, **words: Draw(done=way[0], client=way[1], **words),
        way=st.sampled_from(ways),
        network=st.sampled_from(list(NETWORKS)),
        activation=st.sampled_from(ACTIVATIONS),
        hold=st.one_of(st.just(""), st.sampled_from(list(HOLDS))),
        loss=st.one_of(st.just("cross entropy"), st.sampled_from(list(LOSSES))),
        n=st.sampled_from((1, 1, 2, 3)),
        normal=st.booleans(),
        seed=st.integers(0, 9999),
    )
