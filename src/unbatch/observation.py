"""Observation: what the server sees of one exchange."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbatch import bundle
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.knowledge import PROTOCOL_FIELDS, Earlier, Knowledge, shares
from unbatch.likelihood import Likelihood
from unbatch.loss import Loss
from unbatch.network.per_client import for_client
from unbatch.network.unwrapped import unwrapped
from unbatch.numerics.linear.span import rounding_noise
from unbatch.protocol import Protocol, Update, fit, flatten, gradient_of_adam, local_update
from unbatch.update import as_rounded, as_update, check_update, named_values, some

CHANGES = frozenset(
    {"noise", "noise_within", "clip", "clip_within", "altered", "privacy", "mixup", "log_prob", "earlier"}
)
LARGEST_ADAM_ERROR = 1e-3  # relative, of the gradient behind a step of Adam, up to which it is taken for a gradient
ROUNDING_OF_ADAM_ERROR = 0.5  # of the error allowed, which is twice that to first order: taken for a standard deviation


@dataclass(frozen=True, kw_only=True, repr=False)
class Observation:
    """One exchange between a client and its server, as the server sees it: all that an attack is given.

    `model` is the global model before the client's step; what wraps it (DataParallel, torch.compile) is taken off.
    `update` may hold any subset of its parameters (frozen layers send nothing): the gradient, or after local steps the
    difference of parameters. It is given in any form that `as_update` takes, and kept by the names of `named_parameters()`.
    An empty mapping says that nothing was sent: a *release*, of which `model` is the trained one (`released`).
    Earlier rounds of the same batch are knowledge (`earlier`), and each an exchange of its own in `exchanges`.
    Raises UnbatchError where an update does not belong to the model.

    >>> model, loss = nn.Linear(2, 3), nn.functional.cross_entropy
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    >>> weight, bias = torch.autograd.grad(loss(model(x), y), [model.weight, model.bias])
    >>> seen = Observation(model=model, loss=loss, update={"weight": weight, "bias": bias})
    >>> seen
    <Observation of Linear: 9 entries; known besides: nothing>
    >>> seen.residual(x, y) < 1e-6, seen.residual(x, torch.tensor([1])) < 1e-6  # only the right label explains it
    (True, False)
    """

    model: nn.Module
    loss: Loss
    update: Update
    knowledge: Knowledge = field(default_factory=Knowledge)
    grain: Mapping[str, float] = field(default_factory=dict)  # error of a tensor's entries that is not relative to them
    notes: Sequence[str] = ()  # how it was captured and read, for the report

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", unwrapped(self.model))
        nothing = isinstance(self.update, Mapping) and not len(self.update)
        object.__setattr__(self, "update", {} if nothing else as_update(self.model, self.update))
        told = Knowledge()
        if "initial" in self.knowledge:
            told |= Knowledge(initial=_initial(self.model, self.knowledge.initial))
        if "buffers" in self.knowledge:
            told |= Knowledge(buffers=_buffers(self.model, self.knowledge.buffers))
        if "earlier" in self.knowledge:
            told |= Knowledge(earlier=self._rounds())
        if set(told):
            object.__setattr__(self, "knowledge", self.knowledge | told)

    def _rounds(self) -> list[Earlier]:
        """The earlier rounds, with their updates and states as tensors by the model's names."""
        found = list[Earlier]()
        for number, past in enumerate(self.knowledge.earlier, 1):
            try:
                update = as_update(self.model, past.update)
                found.append(
                    Earlier(state=named_values(self.model, past.state, "its state", whole=True), update=update)
                )
                check_round(self.model, self.update, found[-1])
            except ValueError as error:
                raise UnbatchError(f"earlier round {number}: {error}") from None
        return found

    def __repr__(self) -> str:
        entries = sum(tensor.numel() for tensor in self.update.values())
        known = ", ".join(self.knowledge) or "nothing"
        what = "a released model" if self.released else f"{entries:,} entries"
        return f"<Observation of {type(self.model).__name__}: {what}; known besides: {known}>"

    @property
    def released(self) -> bool:
        """Whether nothing was sent: `model` is what training ended with, and all that there is to read.

        >>> Observation(model=nn.Linear(2, 3), loss=nn.functional.cross_entropy, update={}).released
        True
        """
        return not self.update

    @property
    def protocol(self) -> Protocol:
        """The client's protocol as far as it is known; the rest at its defaults, batch norm as the model's own mode."""
        known = {name: self.knowledge.get(name) for name in PROTOCOL_FIELDS if name in self.knowledge}
        return Protocol(**({"mode": "train" if self.model.training else "eval"} | known))

    @property
    def device(self) -> torch.device:
        """The device that the update lies on."""

        return next(iter(self._read.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The least precise floating type in the update, which says how finely it was rounded."""
        return max((t.dtype for t in self._read.values()), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def _read(self) -> Mapping[str, Tensor]:
        """What an attacker reads: the update, or of a release the parameters."""
        return self.update or {name: p.detach() for name, p in self.model.named_parameters()}

    @property
    def exchanges(self) -> tuple[Observation, ...]:
        """The known rounds in which this batch was sent, each as an exchange of its own; this one comes last.

        Rounds at one state share a model. Buffers that are known besides the model's are those of this round's step.
        """
        known = set(self.knowledge) - {"earlier"}
        found, last = list[Observation](), self.only(*known)
        for past in self.knowledge.get("earlier", ()):
            like = [o for o in (last, *found[-1:]) if _at(o.model, past.state) and "buffers" not in o.knowledge]
            model = like[0].model if like else copy.deepcopy(self.model)
            if not like:
                model.load_state_dict(dict(past.state))
            update = {name: past.update[name].to(self.device) for name in self.update}
            found.append(replace(last, model=model, update=update, knowledge=self.knowledge.only(*known - {"buffers"})))
        return (*found, last)

    def rounding(self, name: str) -> float:
        """Standard deviation of the rounding of each entry of a tensor that does not shrink with the entry.

        Of `grain`, where the update was worked out of a difference of parameters, and of the type's smallest numbers.

        >>> model = nn.Linear(2, 3).half()
        >>> update = {name: p.detach() for name, p in model.named_parameters()}
        >>> seen = Observation(model=model, loss=nn.functional.cross_entropy, update=update)
        >>> f"{seen.rounding('bias'):.1e}"
        '1.7e-08'
        """
        return float(self.grain.get(name, 0.0)) + rounding_noise(self.update[name].dtype)

    def as_gradient(self) -> Observation:
        """The same exchange as one of a gradient, where the client took one step that tells it; else the exchange itself.

        A step sends -lr (g + weight_decay w): what it adds for the weights is known, and with lr the gradient g is, too.
        Without a known learning rate the update is turned round alone, and stays a multiple of the gradient. A first step
        of Adam or AdamW tells it where it was kept finely enough, as in float64 (`gradient_of_adam`). A difference of
        parameters was rounded as they are: `grain` says how coarse g is. Noise, clipping and likelihoods are told in the
        gradient's unit. Each client's step takes the first `local_batch_size` examples of its share.

        >>> model, loss = nn.Linear(2, 2), nn.functional.cross_entropy
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
        >>> g = torch.autograd.grad(loss(model(x), y), [model.weight])[0]
        >>> known = Knowledge(local_steps=1, learning_rate=0.1)
        >>> step = Observation(model=model, loss=loss, update={"weight": -0.1 * g}, knowledge=known).as_gradient()
        >>> torch.allclose(step.update["weight"], g), step.knowledge
        (True, Knowledge())
        """
        known, protocol = self.knowledge, self.protocol
        n, clients = known.get("batch_size"), known.get("clients", 1)
        each = shares(n, clients) if n is not None else [1]
        if protocol.optimiser != "sgd":
            return self._gradient_of_adam()
        steps = all(protocol.first_step_alone(share) for share in each if share)
        if not steps or (n is None and "epochs" in known and "local_batch_size" in known):
            return self
        if protocol.weight_decay and "learning_rate" not in known:
            return self
        rate = protocol.learning_rate if "learning_rate" in known else 1.0
        told = _of_a_step(known, rate, n, clients)
        state = {name: p.detach() for name, p in self.model.named_parameters(remove_duplicate=False)}
        held = known.get("log_prob")
        if held is not None:
            law = held if isinstance(held, Likelihood) else Likelihood(held)
            told |= Knowledge(log_prob=_law_of_gradient(law, state, rate, protocol.weight_decay))
        if "earlier" in known:
            told |= Knowledge(
                earlier=[
                    Earlier(state=past.state, update=_gradient(past.update, past.state, rate, protocol.weight_decay))
                    for past in known.earlier
                ]
            )
        eps = {name: torch.finfo(state[name].dtype).eps for name in self.update}
        grain = {
            name: eps[name] * float(state[name].double().square().mean().sqrt()) / rate / 12**0.5 * clients**0.5
            for name in self.update
        }
        update = _gradient(self.update, state, rate, protocol.weight_decay)
        return replace(self, update=update, knowledge=told, grain=grain)

    def _gradient_of_adam(self) -> Observation:
        """The gradient behind one step of Adam or AdamW, if every entry of it is told; else the exchange itself."""
        known, n = self.knowledge, self.knowledge.get("batch_size")
        read = self._read_of_adam()
        if read is None or known.get("clients", 1) > 1 or CHANGES & set(known):
            return self
        update, errors = read
        off, size = flatten(errors, errors).norm(), flatten(update, update).norm()
        if not float(off) <= LARGEST_ADAM_ERROR * float(size):
            return self
        grain = {name: ROUNDING_OF_ADAM_ERROR * float(e.square().mean().sqrt()) for name, e in errors.items()}
        return replace(self, update=update, knowledge=_of_a_step(known, 1.0, n, 1), grain=grain)

    def _read_of_adam(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The gradient that a first step of Adam or AdamW tells, and its errors; None where this is no such step."""
        known, protocol = self.knowledge, self.protocol
        n = known.get("batch_size")
        one = protocol.local_steps == 1 or (protocol.epochs == 1 and n is not None and protocol.steps(n) == 1)
        if protocol.optimiser == "sgd" or not one or "learning_rate" not in known or self.released:
            return None
        first = protocol.model_copy(update={"local_steps": 1, "epochs": None})
        before = {name: p.detach() for name, p in self.model.named_parameters(remove_duplicate=False)}
        return gradient_of_adam(self.update, before, first)

    @property
    def signs_alone(self) -> float | None:
        """The share of entries of a first step of Adam or AdamW that tell a sign and no size; None where it is none.

        The step is lr g / (|g| + eps): near lr for all but the smallest g, by less than parameters in float32 can hold.

        >>> model = nn.Linear(2, 1)
        >>> known = Knowledge(local_steps=1, optimiser="adamw", learning_rate=0.001)
        >>> step = {"weight": torch.tensor([[0.001, 0.0]]), "bias": torch.tensor([-0.001])}
        >>> seen = Observation(model=model, loss=nn.functional.mse_loss, update=step, knowledge=known)
        >>> f"{seen.signs_alone:.0%}"
        '67%'
        """
        read = self._read_of_adam()
        return None if read is None else float(flatten(read[1], read[1]).isinf().double().mean())

    def as_rounded(self) -> Observation:
        """The same exchange with its update in the coarsest type that holds its numbers, which is how they were rounded.

        >>> model = nn.Linear(10, 10, bias=False)
        >>> sent = {"weight": torch.linspace(0, 1, 100).reshape(10, 10).bfloat16().float()}
        >>> Observation(model=model, loss=nn.functional.mse_loss, update=sent).as_rounded().dtype
        torch.bfloat16
        """
        update = {} if self.released else as_rounded(self.update)
        same = all(tensor.dtype == self.update[name].dtype for name, tensor in update.items())
        return self if same else replace(self, update=update)

    def only(self, *names: str) -> Observation:
        """The same exchange for an attacker who knows only the named fields."""
        return replace(self, knowledge=self.knowledge.only(*names))

    def simulate(self, inputs: Tensor, labels: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """The update that this protocol's honest client would have sent for these inputs and labels.

        Raises NotApplicable: nothing was sent, since this is a release.
        """
        if self.released:
            raise NotApplicable("nothing was sent: this is a released model, and no update can be computed again.")
        shares = self.knowledge.get("clients", 1)  # under secure aggregation, the sum over the clients' shares
        each = [
            local_update(
                for_client(self.model, number),
                self.loss,
                x,
                y,
                self.protocol,
                trained=list(self.update),
                buffers=self.knowledge.get("buffers"),
                create_graph=create_graph,
            )
            for number, (x, y) in enumerate(zip(inputs.tensor_split(shares), labels.tensor_split(shares), strict=True))
            if len(x)
        ]
        return each[0] if len(each) == 1 else {k: torch.stack([u[k] for u in each]).sum(0) for k in each[0]}

    def residual(self, inputs: Tensor, labels: Tensor) -> float:
        """How far these inputs and labels are from explaining the update: 0 where they do.

        |update - simulated| / |update|, l2 over all entries, summed in float64.
        """
        u, s = self._flat(inputs, labels)
        size = float(u.norm())
        return float((u - s).norm()) / size if size else float(s.any())

    def fit(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """The `residual` up to scale: the factor c that fits best, and |update - c simulated| / |update|.

        Clipping, a learning rate and a sign are such factors.
        """
        return fit(*self._flat(inputs, labels))

    def _flat(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        dtype = next(self.model.parameters()).dtype if inputs.is_floating_point() else inputs.dtype  # tokens stay whole
        again = self.simulate(inputs.to(self.device, dtype), labels.to(self.device))
        return flatten(self.update, self.update), flatten(again, self.update)

    def save(self, path: str | Path) -> None:
        """Writes the exchange to a file, a bundle (docs/bundle-format.md).

        Callables, such as a likelihood, are left out.
        """
        bundle.write_bundle(Path(path), self.model, self.update, self.knowledge, self.notes)

    @classmethod
    def load(cls, path: str | Path, *, model: nn.Module, loss: Loss) -> Observation:
        """Reads an exchange from a bundle; the parameters and buffers in it are loaded into a copy of `model`.

        Raises UnbatchError: no bundle, or one that was captured from another model.
        """
        held, update, known = bundle.read_bundle(Path(path), model)
        return cls(model=held, loss=loss, update=update, knowledge=known, notes=bundle.bundle_notes(Path(path)))


def _initial(model: nn.Module, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters before training by the model's names. Raises UnbatchError: some are missing, or of another shape."""
    own = dict(model.named_parameters())
    found = {name: tensor for name, tensor in named_values(model, initial, "initial").items() if name in own}
    missing = [name for name in own if name not in found]
    if missing:
        raise UnbatchError(
            f"initial lacks {some(missing)}; give the parameters before training as dict(model.named_parameters()) does."
        )
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise UnbatchError(
                f"initial's {name!r} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}."
            )
    return found


def _gradient(step: Update, state: Mapping[str, Tensor], rate: float, weight_decay: float) -> dict[str, Tensor]:
    """The gradient behind one step of SGD from the parameters in `state`."""
    if not weight_decay:
        return {name: tensor / -rate for name, tensor in step.items()}
    return {name: tensor / -rate - weight_decay * state[name].to(tensor) for name, tensor in step.items()}


def _law_of_gradient(law: Likelihood, state: Mapping[str, Tensor], rate: float, weight_decay: float) -> Likelihood:
    """The law of a step, as one of the gradient that it is."""

    def step(gradient: Update) -> dict[str, Tensor]:
        return {name: -rate * (g + weight_decay * state[name].to(g)) for name, g in gradient.items()}

    return Likelihood(
        lambda seen, clean: law.log_prob(step(seen), step(clean)),
        lambda clean: _gradient(law.expected(step(clean)), state, rate, weight_decay),
        lambda seen: {name: spread / rate for name, spread in law.spread(step(seen)).items()},
    )


def _of_a_step(known: Knowledge, rate: float, n: int | None, clients: int) -> Knowledge:
    """What is known of a step of SGD, as knowledge of its gradient: in its unit, of the examples that it took."""
    lengths = ("noise", "noise_within", "clip", "clip_within")
    told = known | Knowledge(**{name: known.get(name) / rate for name in lengths if known.get(name) is not None})
    if known.get("server_rate") is not None:
        told |= Knowledge(server_rate=known.server_rate * rate)
    taken = known.get("local_batch_size")
    if n is not None and taken:
        rows = [part[:taken] for part in torch.arange(n).tensor_split(clients)]
        which = torch.cat(rows)
        labels = {"labels": known.labels[which.to(known.labels.device)]} if "labels" in known else {}
        told = told.without("labels") | Knowledge(batch_size=len(which), **labels)
    steps = ("local_steps", "epochs", "local_batch_size", "optimiser", "learning_rate", "momentum", "weight_decay")
    return told.without(*steps)


def check_round(model: nn.Module, update: Update, past: Earlier) -> None:
    """Raises UnbatchError, saying what is off, unless an earlier round fits the model and what was sent in this one.

    Its state must be one of `model`, and its update hold the tensors that `update` holds.

    >>> model = nn.Linear(2, 3)
    >>> past = Earlier(state=model.state_dict(), update={"bias": torch.zeros(3)})
    >>> try:
    ...     check_round(model, {"weight": torch.zeros(3, 2)}, past)
    ... except UnbatchError as error:
    ...     print(error)
    it holds the tensors 'bias', this round 'weight'.
    """
    check_update(model, past.update)
    if set(past.update) != set(update):
        raise UnbatchError(f"it holds the tensors {some(list(past.update))}, this round {some(list(update))}.")
    own = model.state_dict()
    if set(past.state) != set(own):
        odd = sorted(set(past.state) ^ set(own))
        raise UnbatchError(f"its state and the model's differ in {some(odd)}; give the model's whole state_dict().")
    for name, tensor in past.state.items():
        if tensor.shape != own[name].shape:
            raise UnbatchError(
                f"its state's {name!r} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}."
            )
        if not tensor.isfinite().all():
            raise UnbatchError(f"its state's {name!r} holds NaN or infinite entries.")


def _buffers(model: nn.Module, held: Any) -> dict[str, Tensor]:
    """Buffers that were sent, as tensors by the model's names. Raises UnbatchError: they are not the model's."""
    own, found = dict(model.named_buffers(remove_duplicate=False)), named_values(model, held, "knowledge of buffers")
    extra = [name for name in found if name not in own]
    if extra:
        raise UnbatchError(
            f"knowledge of buffers names {some(extra)}, and the model has the buffers {some(list(own))}; name them as "
            "dict(model.named_buffers()) does."
        )
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            raise UnbatchError(
                f"the buffer {name!r} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}."
            )
    return found


def _at(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name].to(tensor)) for name, tensor in model.state_dict().items())
