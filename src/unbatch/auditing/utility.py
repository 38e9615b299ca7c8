"""Utility: what a model still learns behind a defence, on the data whose leakage the defence is judged by."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from unbatch.auditing.client import published
from unbatch.case import Case, Setting
from unbatch.defence import Defence, Round, Stack
from unbatch.errors import UnbatchError
from unbatch.loss import reduction
from unbatch.network.dense import forward
from unbatch.plugin import OneOrMore
from unbatch.protocol import Update, flatten

TEST = 0.3  # share of the data held out


@dataclass(frozen=True)
class Scene:
    """A model and its data, on which a defence is judged twice: by what its updates leak, and by what the model learns.

    Of the inputs in `setting`, which are all data, the last 30 % are held out; an update is of `n` of the others, and
    training of `rounds` updates.
    """

    setting: Setting  # whose inputs are all data
    n: int  # examples of one update
    rounds: int
    seed: int = 0
    _plain: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def cut(self) -> int:
        return len(self.setting.inputs) - int(TEST * len(self.setting.inputs))

    def client(self, n: int) -> Setting:
        """The client whose update is audited."""
        return replace(self.setting, inputs=self.setting.inputs[:n], labels=self.setting.labels[:n])

    @cached_property
    def reduction(self) -> str:
        s = self.setting
        outputs = forward(s.model, s.inputs[:2])
        return reduction(s.loss, outputs, s.labels[:2].to(outputs.device)) or "mean"

    @cached_property
    def size(self) -> float:
        """The median norm of one example's gradient at the first model."""
        norms = [float(flatten(u, u).norm()) for i in range(8) for u in [self._update(slice(i, i + 1))]]
        return sorted(norms)[len(norms) // 2]

    @cached_property
    def rms(self) -> float:
        """The root mean square of an entry of the undefended update."""
        update = self._update(slice(self.n))
        return float(flatten(update, update).square().mean().sqrt())

    def accuracy(self, n: int, defences: OneOrMore[Defence]) -> float:
        """The share of the held-out data that is classified rightly, after training behind these defences.

        By `rounds` updates of n training examples each, which the server takes by Adam (rate 0.01).

        Adam's steps do not depend on the updates' scale, so that clipping costs no more than what it hides. Which way the
        server goes is what the protocol and the defences make known of the update: local steps send a difference.
        """
        s, rng = self.setting, torch.Generator().manual_seed(self.seed)
        model = copy.deepcopy(s.model)
        stack = Stack.of(defences)
        sign = stack.public(published(s.inputs[:n], s.protocol)).server_sign()
        parameters = dict(model.named_parameters())
        optimiser = torch.optim.Adam(parameters.values(), lr=0.01)
        for _ in range(self.rounds):
            part = torch.randperm(self.cut, generator=rng)[:n]
            for name, u in self._update(part, stack, model, rng).items():
                parameters[name].grad = -sign * u.detach()
            optimiser.step()
        outputs = forward(model, s.inputs[self.cut :])
        labels = s.labels[self.cut :].to(outputs.device)
        found = outputs.argmax(1) if outputs.ndim == 2 and outputs.shape[1] > 1 else (outputs.reshape(-1) > 0)
        return float((found == labels.reshape(found.shape)).double().mean())

    def undefended(self, n: int) -> float:
        """The `accuracy` without any defence; measured once for each n."""
        if n not in self._plain:
            self._plain[n] = self.accuracy(n, [])
        return self._plain[n]

    def _update(
        self,
        part: slice | Tensor,
        stack: Stack = Stack(),  # noqa: B008 (it is frozen)
        model: nn.Module | None = None,
        rng: torch.Generator | None = None,
    ) -> Update:
        s = self.setting
        model = model or s.model
        first = next(model.parameters())
        return stack.step(
            Round(
                model=model,
                loss=s.loss,
                inputs=s.inputs[part].to(first),
                labels=s.labels[part].to(first.device),
                protocol=s.protocol,
                rng=rng or torch.Generator().manual_seed(self.seed),
            )
        )


def scene_of(target: Case | Setting, batch: int, rounds: int, seed: int) -> Scene:
    """The scene of a case, with all of its data and its own batch, or of a setting whose inputs are all the data there is.

    Raises UnbatchError: labels are no classes, inputs are tokens, or there is too little data.
    """
    if isinstance(target, Case):
        pool, setting = target.pool(torch.Generator().manual_seed(target.seed)), target.setting()
        setting = replace(setting, inputs=pool.inputs.to(setting.inputs), labels=pool.labels)
        batch = target.batch
    else:
        setting = target
    if setting.labels.is_floating_point() or setting.domain.name == "tokens":
        raise UnbatchError(
            "utility is test accuracy, and leakage PSNR: harden needs class labels and real-valued inputs."
        )
    scene = Scene(setting, batch, rounds, seed=seed)
    if scene.cut < max(batch, 8) or scene.cut == len(setting.inputs):
        raise UnbatchError(
            f"{len(setting.inputs)} examples are too few: {TEST:.0%} are held out, and {max(batch, 8)} must be left."
        )
    return scene
