"""Trained: pictures behind a model that was trained on them to the end, and is then released."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unbatch.case import Case, Examples, Setting
from unbatch.data.arrays import named_arrays
from unbatch.domain import Images
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge
from unbatch.loss import Loss, loss_named
from unbatch.training import Method, Training

FILES = {"mnist": "mnist_test500.npz", "cifar10": "cifar10_test600.npz"}
VEHICLES = (0, 1, 8, 9)  # of CIFAR-10: aeroplane, car, ship, lorry
LOSSES: Mapping[str, Literal["cross-entropy", "binary-cross-entropy", "squared-error"]] = {
    "classes": "cross-entropy",
    "binary": "binary-cross-entropy",
    "regression": "squared-error",
}


@final
class Trained(Case):
    """Pictures behind a model that was trained on them to the end, and is then released: no update is sent.

    Digits that scikit-learn bundles, or MNIST or CIFAR-10 out of a folder (`files`). The task is odd against even (vehicles
    against animals) as one logit, as many of the one as of the other; all classes; or targets of +-1 under the squared
    error. The client trains on its batch and on `known` further examples; of the training it tells what `threat` says. The
    first layer starts at `start` times PyTorch's law, and `biases=first` leaves the others out, as the published attacks on
    trained weights have it.

    >>> import unbatch
    >>> client = unbatch.cases.Trained(batch=4, width=16, steps=50).setting()
    >>> client
    <Setting trained:batch=4,width=16,steps=50: 4 images [1, 8, 8], Sequential of 1,056 parameters>
    >>> [client.label_name(label) for label in client.labels], client.training.method
    (['odd', 'even', 'odd', 'even'], 'margin')
    """

    source: ClassVar[str] = (
        "digits as in the case digits; out of a folder of the user's, MNIST: Y. LeCun and C. Cortes; CIFAR-10: "
        "A. Krizhevsky, 2009"
    )

    data: Annotated[
        Literal["digits", "mnist", "cifar10"], Field(description="pictures; all but digits out of files")
    ] = "digits"
    files: Annotated[str | None, Field(description="folder with mnist_test500.npz, cifar10_test600.npz")] = None
    task: Annotated[
        Literal["binary", "classes", "regression"], Field(description="odd or even, which class, or +-1 as a number")
    ] = "binary"
    threat: Annotated[
        Literal["release", "start", "informed"],
        Field(description="what is told besides the weights: nothing; where they started and how; all but the batch"),
    ] = "release"
    known: Annotated[int, Field(ge=0, description="examples that an informed adversary holds besides the batch")] = 0
    outsiders: Annotated[
        int, Field(ge=0, description="examples not trained on; with the batch, the candidates for membership")
    ] = 0
    public: Annotated[int, Field(ge=0, description="examples not trained on, which anybody has")] = 0
    centred: Annotated[bool, Field(description="the mean of the training examples is taken off them")] = False
    method: Annotated[Method | None, Field(description="of the training; none: margin, or stationary")] = None
    steps: Annotated[int, Field(gt=0, description="of the training, at most")] = 2000
    rate: Annotated[float, Field(gt=0, description="learning rate of the training")] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, description="of all parameters")] = 0.0
    part: Annotated[int | None, Field(ge=1, description="examples that a step of sgd or adam takes; none: all")] = None
    start: Annotated[float, Field(gt=0, description="the first layer's size before training, of PyTorch's law")] = 1e-4
    biases: Annotated[Literal["first", "all"], Field(description="layers that have one")] = "first"
    depth: Annotated[int, Field(ge=0, description="hidden layers; 0 is a generalised linear model")] = 1
    width: Annotated[int, Field(gt=0, description="hidden units of a layer")] = 200
    double: Annotated[bool, Field(description="training in float64")] = True
    loss: Annotated[
        Literal["cross-entropy", "binary-cross-entropy", "squared-error"], Field(description="follows from task")
    ] = "cross-entropy"

    @model_validator(mode="after")
    def _of_a_kind(self) -> Self:
        if "loss" in self.model_fields_set or self.reduction != "mean":
            raise UnbatchError("the loss follows from task, and is a mean; leave loss and reduction out")
        if self.adapter is not None:
            raise UnbatchError("a released model is trained whole, and no adapters beside it; leave adapter out")
        if bool(self.known) != (self.threat == "informed"):
            raise UnbatchError("an informed adversary knows examples, and no other does; give threat=informed,known=N")
        if (self.data == "digits") != (self.files is None):
            raise UnbatchError(
                "digits are bundled, and all other data are read from a folder; give files=DIR with them"
            )
        return self

    def pool(self, rng: torch.Generator) -> Examples:
        pictures, numbers, names = _bundled() if self.data == "digits" else _read(self.data, Path(self.files or "."))
        order = torch.randperm(len(pictures), generator=rng)
        pictures, numbers = pictures[order], numbers[order]
        if self.task != "classes":
            one = torch.isin(numbers, torch.tensor(VEHICLES)) if self.data == "cifar10" else numbers % 2 == 1
            turn = torch.stack(
                [side.nonzero().flatten()[: int(min(one.sum(), (~one).sum()))] for side in (one, ~one)], 1
            )
            pictures, one = pictures[turn.flatten()], one[turn.flatten()]
            numbers = one.long() if self.task == "binary" else 2 * one.double() - 1
            names = ["animal", "vehicle"] if self.data == "cifar10" else ["even", "odd"]
        low = -1.0 if self.centred else 0.0
        domain = Images(shape=tuple(pictures.shape[1:]), low=low)
        return Examples(inputs=pictures, labels=numbers, classes=names, domain=domain)

    def outputs(self, classes: int) -> int:
        return classes if self.task == "classes" else 1

    def training_loss(self) -> Loss:
        return loss_named(LOSSES[self.task])

    def global_model(self, examples: Examples, outputs: int, rng: torch.Generator) -> nn.Module:
        model = super().global_model(examples, outputs, rng)
        layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        with torch.no_grad():
            for parameter in layers[0].parameters(recurse=False):
                parameter.mul_(self.start)
        for layer in layers[1:]:
            if self.biases == "first" and getattr(layer, "bias", None) is not None:
                layer.register_parameter("bias", None)
        return model

    def training(self) -> Training:
        """How its client trains."""
        chosen = self.method or ("stationary" if self.threat == "informed" or self.task == "regression" else "margin")
        return Training(
            method=chosen,
            steps=self.steps,
            learning_rate=self.rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.part,
        )

    def completed(self, setting: Setting, pool: Examples, chosen: Tensor) -> Setting:
        rest = chosen[self.clients * self.batch :]
        asked = {"known": self.known, "outsiders": self.outsiders, "public": self.public}
        if sum(asked.values()) > len(rest):
            told = ", ".join(f"{name}={count}" for name, count in asked.items() if count)
            raise UnbatchError(
                f"{self}: {told} want more than the {len(rest)} examples that no client has; lower them."
            )
        x, y = pool.inputs[rest].to(setting.inputs), pool.labels[rest].to(setting.labels)
        ends = list(accumulate(asked.values()))
        parts = {
            name: (x[end - asked[name] : end], y[end - asked[name] : end])
            for name, end in zip(asked, ends, strict=True)
        }
        known_inputs, known_labels = parts["known"]
        shift = torch.cat([setting.inputs, known_inputs]).mean(0) if self.centred else torch.zeros_like(x[0])
        training = self.training()
        facts: dict[str, Any] = {}
        if self.threat != "release":
            facts |= {"initial": {name: p.detach().clone() for name, p in setting.model.named_parameters()}}
            facts |= {"recipe": training.recipe()}
        if self.known:
            facts |= {"known_inputs": known_inputs - shift, "known_labels": known_labels}
        if self.outsiders:
            asked_of = torch.cat([setting.inputs, parts["outsiders"][0]]) - shift
            order = torch.randperm(len(asked_of), generator=torch.Generator().manual_seed(self.seed + 3))
            facts |= {"candidates": asked_of[order]}
        if self.public:
            facts |= {"public": parts["public"][0] - shift, "public_labels": parts["public"][1]}
        return replace(setting, inputs=setting.inputs - shift, training=training, knowledge=Knowledge(**facts))


def _bundled() -> tuple[Tensor, Tensor, list[str]]:
    from sklearn.datasets import load_digits

    held = load_digits()
    pictures = torch.as_tensor(held.images, dtype=torch.float32).unsqueeze(1) / 16
    return pictures, torch.as_tensor(held.target, dtype=torch.int64), [str(digit) for digit in range(10)]


def _read(name: str, folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures [n, c, h, w] in [0, 1], their classes [n] and the names of these, out of a folder."""
    path = folder / FILES[name]
    held = named_arrays(path)
    if not {"images", "labels"} <= set(held):
        raise UnbatchError(f"{path} holds {', '.join(held)}; it is to hold images (uint8) and labels.")
    pictures = torch.as_tensor(held["images"]).float() / 255
    pictures = pictures.unsqueeze(1) if pictures.ndim == 3 else pictures.permute(0, 3, 1, 2).contiguous()
    names = [str(each) for each in held["classes"]] if "classes" in held else [str(k) for k in range(10)]
    return pictures, torch.as_tensor(held["labels"], dtype=torch.int64), [re.sub(r"^b'|'$", "", n) for n in names]
