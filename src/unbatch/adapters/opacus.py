"""Opacus: DP-SGD as its users run it, and its accountants. The package is an extra: pip install 'unbatch[opacus]'."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unbatch.defence import Round
from unbatch.errors import MissingExtra, UnbatchError
from unbatch.loss import Loss
from unbatch.loss import reduction as reduction_of
from unbatch.protocol import Update

Accountant = Literal["rdp", "prv"]


def private_update(round_: Round, *, clip: float, noise_multiplier: float, reduction: Literal["mean", "sum"]) -> Update:
    """The update that a differentially private client sends: each example's gradient clipped, noise added, by Opacus.

    One gradient: (sum_i g_i min(1, clip / |g_i|) + noise_multiplier clip z) / b with z standard normal in every entry and
    b the batch size for a mean loss, 1 for a sum. Local steps take that gradient in place of the plain one; b is then the
    protocol's local batch size. (Opacus shortens by clip / (|g_i| + 1e-6).) The client's model is left as it was.
    Raises UnbatchError: Opacus is missing, or cannot treat the model, in its own words; the loss has another `reduction`.
    """
    with _quiet():
        engine = _opacus().PrivacyEngine()
        model, protocol = _prepared(round_), round_.protocol
        start = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
        steps, n = protocol.steps(len(round_.inputs)), len(round_.inputs)
        size = min(protocol.local_batch_size or n, n) if steps else n
        trained = [p for p in model.parameters() if p.requires_grad]
        lr, decay = protocol.learning_rate, protocol.weight_decay
        optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(trained, lr=lr, weight_decay=decay, momentum=protocol.momentum)
            if protocol.optimiser == "sgd"
            else torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
            if protocol.optimiser == "adamw"
            else torch.optim.Adam(trained, lr=lr, weight_decay=decay)
        )
        loader = DataLoader(TensorDataset(torch.zeros(size)), batch_size=size)  # says the expected batch size, no more
        device = trained[0].device
        seed = int(torch.randint(2**62, (), generator=round_.rng))
        try:
            private, optimiser, _ = engine.make_private(
                module=model,
                optimizer=optimiser,
                data_loader=loader,
                noise_multiplier=noise_multiplier,
                max_grad_norm=clip,
                loss_reduction=reduction,
                poisson_sampling=False,  # the batch is given
                noise_generator=torch.Generator(device).manual_seed(seed),
            )
            for step in range(max(steps, 1)):
                first = step % -(-n // size) * size if steps else 0
                part = slice(first, first + size) if steps else slice(None)
                optimiser.zero_grad()
                outputs = private(round_.inputs[part])
                labels = round_.labels[part]
                if step == 0:
                    _agree(round_.loss, outputs.detach(), labels, reduction)
                with torch.enable_grad():
                    round_.loss(outputs, labels).backward()  # type: ignore[no-untyped-call]
                for p in trained:
                    if getattr(p, "grad_sample", None) is None:  # unused: its gradient is zero for every example
                        p.grad_sample = torch.zeros(len(labels), *p.shape, dtype=p.dtype, device=device)  # type: ignore[attr-defined]
                if not steps:
                    optimiser.pre_step()  # type: ignore[attr-defined]
                    return {k: p.grad.detach() for k, p in model.named_parameters() if p.grad is not None}
                optimiser.step()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise UnbatchError(f"Opacus cannot train this model privately: {' '.join(str(error).split())}") from error
        return {k: p.detach() - start[k] for k, p in model.named_parameters() if k in start}


def epsilon(
    *, noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: Accountant
) -> float:
    """How much privacy a training has spent: epsilon after so many noisy steps, by Opacus' accountant of that name.

    Of (epsilon, delta)-differential privacy.

    Neighbouring data sets differ by one example added or removed, batches are Poisson samples. inf without noise.
    Raises UnbatchError: Opacus is missing, or its accountant fails at these numbers.
    """
    if not noise_multiplier:
        return math.inf
    with _quiet():
        made = _opacus().accountants.create_accountant(accountant)
        made.history = [(noise_multiplier, sampling_rate, steps)]
        warnings.filterwarnings("error", "overflow encountered", module="opacus")
        try:
            return float(made.get_epsilon(delta))
        except (RuntimeWarning, RuntimeError, ArithmeticError, MemoryError, IndexError) as error:
            raise UnbatchError(
                f"Opacus' accountant {accountant!r} fails at noise multiplier {noise_multiplier:g}, sampling rate "
                f"{sampling_rate:g}, {steps} steps, delta {delta:g} ({error}); take accountant=rdp, or more noise."
            ) from error


@dataclass
class PrivateStep:
    """What an optimiser of Opacus does to the gradient in its step: each example's clipped, noise added, divided.

    >>> step = PrivateStep(optimiser=None, clip=1.0, noise_multiplier=2.0, reduction="mean", expected=8)
    >>> step.told(4)  # the sum was divided by 8, and the batch had 4: as a mean it is twice what was sent
    (2.0, 'dp-sgd:clip=1.0,noise_multiplier=2.0,reduction=mean', '')
    """

    optimiser: Any
    clip: float
    noise_multiplier: float
    reduction: str
    expected: int  # batch size by which a mean is divided
    layers: bool = False  # each parameter's gradient is clipped by itself
    adaptive: bool = False  # the clipping norm follows the share of examples that it shortens
    backwards: int = 1  # backward passes of one batch; ghost clipping takes two
    passes: int = 1  # batches in the step, by which a mean is divided as well

    def at_the_step(self) -> None:
        """Look at what only the step itself tells: over how many batches the examples' gradients were accumulated."""
        self.passes = int(self.optimiser.accumulated_iterations)

    def told(self, n: int | None) -> tuple[float, str, str]:
        """The factor that makes it a mean over n examples, the defence that it is, and what no defence of ours does."""
        factor = self.expected * self.passes / n if self.reduction == "mean" and n else 1.0
        spelt = f"dp-sgd:clip={self.clip},noise_multiplier={self.noise_multiplier},reduction={self.reduction}"
        return factor, spelt, "clipping of each layer of each example's gradient" if self.layers else ""

    @property
    def notes(self) -> list[str]:
        """What there is to know of it, in sentences."""
        how = ", each parameter by itself" if self.layers else ""
        said = [
            f"Opacus clipped each example's gradient to {self.clip:.4g}{how}, and added noise of {self.noise_multiplier:g} "
            "times that to their sum. Without dp-sgd among the defences, epsilon is that of this one step on all data."
        ]
        if self.adaptive:
            said.append(
                "The clipping is adaptive: the noise on the gradient is larger than its multiplier says, and a noisy count "
                "of the examples that were not shortened is public as well. Epsilon is that of both together; bounds take "
                "the smaller noise, and hold."
            )
        return said


def private_step(optimiser: Any) -> PrivateStep | None:
    """What an optimiser of Opacus does in its next step; None of any other optimiser. Opacus is not imported for it.

    >>> private_step(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    """
    kinds = {kind.__name__ for kind in type(optimiser).__mro__ if kind.__module__.partition(".")[0] == "opacus"}
    if "DPOptimizer" not in kinds:
        return None
    return PrivateStep(
        optimiser=optimiser,
        clip=float(optimiser.max_grad_norm),  # of clipping per layer, the norm of all layers' norms
        noise_multiplier=float(optimiser.noise_multiplier),
        reduction=str(optimiser.loss_reduction),
        expected=int(optimiser.expected_batch_size or 1),
        layers=bool(kinds & {"DPPerLayerOptimizer", "SimpleDistributedPerLayerOptimizer"}),
        adaptive="AdaClipDPOptimizer" in kinds,
        backwards=2 if any("FastGradientClipping" in kind for kind in kinds) else 1,
    )


def without_opacus_hooks(model: nn.Module) -> nn.Module:
    """The same model, off which the hooks are taken by which Opacus keeps each example's gradient (wrap_model=False).

    >>> without_opacus_hooks(nn.Linear(1, 1))
    Linear(in_features=1, out_features=1, bias=True)
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for key, hook in list(hooks.items()):
                made = getattr(hook, "func", hook)  # a partial's function
                if str(getattr(made, "__module__", "")).partition(".")[0] == "opacus":
                    del hooks[key]
    return model


def _opacus() -> Any:
    try:
        import opacus
    except ImportError as error:
        raise MissingExtra.of("dp-sgd", "opacus", "opacus") from error
    return opacus


def _prepared(round_: Round) -> nn.Module:
    """A copy that Opacus takes: its per-example hooks run in train mode only, so dropout is set by itself."""
    model = copy.deepcopy(round_.model).train()
    found = _opacus().validators.ModuleValidator.validate(model)
    said = [" ".join(str(error).split()) for error in found]
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not list(module.parameters()):
            said.append(
                f"{name} ({type(module).__name__}) mixes the examples of a batch, so no gradient is one example's."
            )
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.training = round_.protocol.mode == "train"
    if said:
        raise UnbatchError(
            f"Opacus cannot train this model privately: {' '.join(dict.fromkeys(said))} Put nn.GroupNorm in its place "
            "(opacus.validators.ModuleValidator.fix does), or leave dp-sgd out."
        )
    return model


def _agree(loss: Loss, outputs: Tensor, labels: Tensor, told: str) -> None:
    found = reduction_of(loss, outputs, labels)
    if found != told:
        really = f"it is a {found}" if found else "it is neither a mean nor a sum of one term an example"
        mend = f"set dp-sgd:reduction={found}." if found else "which per-example gradients need; use another loss."
        raise UnbatchError(f"dp-sgd is told that the loss is a {told} over the batch, but {really}; {mend}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that Opacus and the parts of torch that it calls give on every sound run."""
    with warnings.catch_warnings():
        for words in (
            "Secure RNG turned off",  # audits are to be repeated
            "Full backward hook is firing when gradients are computed with respect to module outputs",
            "Optimal order is the (largest|smallest) alpha",  # epsilon is then larger than it need be, and still holds
        ):
            warnings.filterwarnings("ignore", message=words)
        warnings.filterwarnings(
            "ignore", "divide by zero encountered in log", module="opacus"
        )  # prv at sampling_rate 1
        yield
