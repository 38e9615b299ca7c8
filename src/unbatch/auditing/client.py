"""Client: the honest client's step, with defences wrapped round it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from unbatch.auditing.misstep import misstep
from unbatch.case import Setting
from unbatch.defence import Defence, Round, Stack, Step, plain_update
from unbatch.errors import UnbatchError
from unbatch.knowledge import Earlier, Knowledge
from unbatch.loss import Loss
from unbatch.network.dense import forward
from unbatch.observation import Observation
from unbatch.plugin import OneOrMore
from unbatch.protocol import Protocol, Update, buffers_after
from unbatch.training import Training, margins, trained
from unbatch.truth import Truth


def observe(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    knowledge: Knowledge | None = None,
    protocol: Protocol | None = None,
    training: Training | None = None,
    defences: OneOrMore[Defence] = (),
    seed: int = 0,
    replant: Callable[[Observation], nn.Module | None] | None = None,
) -> tuple[Observation, Truth]:
    """Run one honest client's step on the private batch; return what the server sees, and the truth for the judge.

    With several rounds in the `protocol` it is run in each, with fresh draws, and what the server saw before is `earlier`.
    With a `training` there are no rounds: the client trains to the end on the private batch, and on the examples that the
    attacker knows (`known_inputs`), and the model that comes out is released.

    Where the protocol `sends_buffers`, what is told holds those after the step as well (batch norm's running averages).
    `knowledge` comes on top of what the round itself makes public: input_shape, batch_size, the protocol's numbers and
    what each defence publishes, its likelihood among it. Defences are applied in order, the first one outermost.
    `replant` is a server that chooses the model of the next round from what it has seen so far, or ends with None.
    Raises UnbatchError: inputs, labels and model do not fit together.

    >>> model, x, y = nn.Linear(2, 2), torch.zeros(3, 2), torch.tensor([0, 1, 1])
    >>> seen, truth = observe(model, nn.functional.cross_entropy, x, y, defences="clip:norm=0.5")
    >>> list(seen.update), seen.knowledge.only("batch_size", "clip"), len(truth)
    (['weight', 'bias'], Knowledge(batch_size=3, clip=0.5), 3)
    """
    own = Setting(model=model, loss=loss, inputs=x, labels=y)  # refuses what does not fit
    model, y = own.model, own.labels  # unwrapped, and as the loss takes them
    protocol, stack = protocol or Protocol(), Stack.of(defences)
    _refuse_what_excludes_itself(protocol, training, stack, x)
    first = next(model.parameters())
    inputs = x.to(first.device, first.dtype) if x.is_floating_point() else x.to(first.device)
    labels = y.to(first.device)
    if training is not None:
        return _released(model, loss, inputs, labels, training, knowledge or Knowledge(), stack, seed)
    bare, step = published(x, protocol), stack.step
    rng, earlier = torch.Generator().manual_seed(seed), list[Earlier]()
    while True:
        before = copy.deepcopy(model)
        turns = list[Round]()
        turn = Round(model=model, loss=loss, inputs=inputs, labels=labels, protocol=protocol, rng=rng)
        update = _stepped(step, replace(turn, train=_kept(turns)) if protocol.sends_buffers else turn)
        seen = {name: tensor.detach().clone() for name, tensor in update.items()}
        public = stack.told(bare, seen)
        past = Knowledge(earlier=tuple(earlier)) if earlier else Knowledge()
        sent = _buffers(turns) if protocol.sends_buffers else Knowledge()
        told = public | past | sent | (knowledge or Knowledge())
        observation = Observation(model=before, loss=stack.loss(loss), update=seen, knowledge=told)
        if len(earlier) + 1 >= (protocol.rounds or 1):
            break
        following = replant(observation) if replant else moved(before, seen, protocol.server_rate or 0.0, public)
        if following is None:
            break
        earlier.append(Earlier(state=before.state_dict(), update=seen))
        model = following
    return observation, Truth(inputs=inputs.detach().clone(), labels=labels.clone())


def _refuse_what_excludes_itself(protocol: Protocol, training: Training | None, stack: Stack, x: Tensor) -> None:
    """Raises UnbatchError: rounds of a model that is released, or batch statistics of private training."""
    if training is not None and protocol != Protocol():
        raise UnbatchError(f"a released model has no rounds, and the protocol says {protocol}; leave one of both out.")
    if protocol.sends_buffers and "privacy" in stack.public(published(x, protocol)):
        raise UnbatchError(
            "private training goes example by example and has no batch statistics; leave sends_buffers or the defence out."
        )


def _kept(turns: list[Round]) -> Callable[[Round], Update]:
    """Plain training that puts down what it trained on."""

    def train(turn: Round) -> Update:
        turns.append(turn)
        return plain_update(turn)

    return train


def _buffers(turns: list[Round]) -> Knowledge:
    """The buffers after the one training behind an update. Raises UnbatchError: there is none, or there are several."""
    if len(turns) != 1:
        raise UnbatchError(
            f"the protocol sends buffers, and {len(turns)} trainings stand behind the update; leave sends_buffers or the "
            "defence out."
        )
    (turn,) = turns
    sent = buffers_after(turn.model, turn.loss, turn.inputs, turn.labels, turn.protocol)
    if not sent:
        raise UnbatchError("the protocol sends buffers, and the model has none; leave sends_buffers out.")
    return Knowledge(buffers=sent)


OF_A_RELEASE = ("input_shape", "batch_size", "domain", "privacy", "altered", "mixup", "clients")  # that still holds


def _released(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    labels: Tensor,
    training: Training,
    knowledge: Knowledge,
    stack: Stack,
    seed: int,
) -> tuple[Observation, Truth]:
    """The model after a training to the end, and the private part of what it was trained on."""
    public = stack.public(published(inputs, Protocol()))
    privacy = public.get("privacy")
    if privacy is not None and (privacy.steps != training.steps or privacy.sampling_rate < 1):
        raise UnbatchError(
            f"every step of the training takes all examples, {training.steps} times, and the privacy declared is of "
            f"{privacy.steps} at rate {privacy.sampling_rate:g}; give dp-sgd:steps={training.steps},sampling_rate=1."
        )
    x, y = inputs, labels
    if "known_inputs" in knowledge:
        if "known_labels" not in knowledge:
            raise UnbatchError("known_inputs are trained on as well, and there are no known_labels; give them.")
        x = torch.cat([knowledge.known_inputs.to(inputs), inputs])
        y = torch.cat([knowledge.known_labels.to(labels), labels])
    rng = torch.Generator().manual_seed(seed)

    def gradient(held: nn.Module) -> Update:
        return _stepped(stack.step, Round(model=held, loss=loss, inputs=x, labels=y, protocol=Protocol(), rng=rng))

    final = trained(model, loss, x, y, training, gradient=gradient if stack.defences else None)
    told = public.only(*OF_A_RELEASE) | knowledge
    seen = Observation(model=final, loss=stack.loss(loss), update={}, knowledge=told)
    return seen, Truth(inputs=inputs.detach().clone(), labels=labels.clone(), notes=_fitted(seen, x, y))


def _fitted(seen: Observation, x: Tensor, y: Tensor) -> list[str]:
    """How well the model fits what it was trained on, for the report."""
    outputs = forward(seen.model, x)
    value = float(seen.loss(outputs, y))
    if y.is_floating_point() or y.ndim != 1 or outputs.ndim != 2:
        return [f"the training ended at a loss of {value:.2g}."]
    ahead = margins(outputs, y).amin(1)
    right = int((ahead > 0).sum())
    least = f"the least margin is {float(ahead.min()):.3g}"
    return [f"the training ended at a loss of {value:.2g}, with {right} of {len(y)} examples right; {least}."]


def declared(obs: Observation, defences: OneOrMore[Defence]) -> Observation:
    """A captured exchange of a client that is said to have had these defences: with what they make known, law and loss.

    The update is left as it was seen. Raises UnbatchError: the capture says already what was done to it.

    >>> model, x, y = nn.Linear(2, 2), torch.zeros(3, 2), torch.tensor([0, 1, 1])
    >>> seen, truth = observe(model, nn.functional.cross_entropy, x, y)
    >>> declared(seen, "noise:sigma=0.1").knowledge.noise
    0.1
    """
    stack = Stack.of(defences)
    told = sorted(_DONE & set(obs.knowledge))
    if told:
        raise UnbatchError(
            f"the capture says already what was done to its update ({', '.join(told)}); leave the defences out, or capture "
            "it without."
        )
    return replace(obs, loss=stack.loss(obs.loss), knowledge=stack.told(obs.knowledge, obs.update))


_DONE = {"noise", "noise_within", "clip", "clip_within", "altered", "privacy", "mixup", "log_prob"}


def _stepped(step: Step, turn: Round) -> Update:
    """What the client sends. Raises UnbatchError, saying which part of the step fails, where the user's own objects do."""
    try:
        update = step(turn)
        whole = all(bool(tensor.isfinite().all()) for tensor in update.values())
        whole &= any(bool(tensor.any()) for tensor in update.values())
    except (UnbatchError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = _misstep(turn, 1)  # a share of the batch may be one example
        if words is None:
            raise
        raise words from error
    words = None if whole else _misstep(turn)
    if words is not None:
        raise words
    return update


def _misstep(turn: Round, *more: int) -> UnbatchError | None:
    """Why the step fails, on a batch of a size that the protocol takes, or of `more`; None where it does not."""
    n, size = len(turn.inputs), min(turn.protocol.local_batch_size or len(turn.inputs), len(turn.inputs))
    for k in dict.fromkeys((n, size, n % size or size, *more)):
        words = misstep(turn.model, turn.loss, turn.inputs[:k], turn.labels[:k], turn.protocol.mode)
        if words is not None:
            return words
    return None


def moved(model: nn.Module, update: Update, rate: float, known: Knowledge) -> nn.Module:
    """A copy of `model` as the server moves it: w + sign rate u, down a gradient or along a difference of parameters.

    The sign is that of what is `known` of the update (`Knowledge.server_sign`); `rate` is at least 0.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, u in update.items():
            model.get_parameter(name).add_(u, alpha=known.server_sign() * rate)
    return model


def published(inputs: Tensor, protocol: Protocol) -> Knowledge:
    """What a bare round makes known: shape and number of its inputs [n, ...], that they are tokens, the protocol's numbers.

    >>> published(torch.zeros(4, 3, 8, 8), Protocol(local_steps=2)).only("input_shape", "batch_size", "local_steps")
    Knowledge(input_shape=(3, 8, 8), batch_size=4, local_steps=2)
    """
    numbers = {name: value for name, value in protocol if value is not None}
    kind = {} if inputs.is_floating_point() else {"domain": "tokens"}
    return Knowledge(input_shape=tuple(inputs.shape[1:]), batch_size=len(inputs), **kind, **numbers)
