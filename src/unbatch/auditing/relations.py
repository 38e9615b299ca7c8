"""Relations: what every true update of a network obeys, whatever batch is behind it; an update that does not is none.

They are found by running model and loss on stand-ins, never by names of layers.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unbatch.auditing.explained import rounding, rounding_of_tensors
from unbatch.errors import UnbatchError
from unbatch.inversion.view import View
from unbatch.network.dense import Dense, in_mode
from unbatch.observation import Observation
from unbatch.protocol import Update, fit, flatten

LARGEST_BREACH = 0.05  # of a relation: rounding to 8 bits leaves 1e-2, an update that is none about 1
ROUNDINGS_OF_A_RELATION = 8.0  # of the tensors as sent, by which a relation may be off besides
LARGEST_SPAN_ROUNDING = 0.1  # of the least direction of a span, which rounding would turn
EXACT_SYMMETRY = 1e-9  # relative, to which a stand-in's outputs must stay, in float64
FEWEST_ENTRIES = 64  # of an update whose entries' sizes are compared
LARGE_SHARE = (
    0.2  # of the entries of an update, that an optimiser which makes them equal leaves at half the largest or more
)
EQUAL_SIZE, EQUAL_SHARE = 0.05, 0.9  # how near their median so many of those lie
LEAST_COMMON_TOP = 0.7  # of the largest entry of all, that each tensor's own is where an optimiser bounds them
MOST_ORDERS = 24  # of tensors of one shape that are tried
LEAST_LIKENESS = 0.3  # relative: what the parameters may leave of an update that is taken for them


@dataclass(frozen=True)
class Relation:
    """One equation that every true update obeys, and how far off this one is, relative to what stands on its sides."""

    words: str
    breach: float
    rounding: float  # relative, of the tensors in it

    @property
    def holds(self) -> bool:
        return self.breach <= LARGEST_BREACH + ROUNDINGS_OF_A_RELATION * self.rounding


@dataclass(frozen=True)
class Relations:
    """The equations that every gradient of a network and loss obeys, and every plain step of SGD, by trying them out.

    Cross entropy does not see a number that is added to all outputs, so the head's gradient sums to 0 over the outputs.
    Where scaling one layer up and the next one down leaves the outputs as they are (relu), <W, dW> + <b, db> of
    the one is <W, dW> of the other. Where a dense layer reads one vector an example, dW of a batch of n has rank n, and db
    lies in the span of its columns.

    >>> import unbatch
    >>> net, loss = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8)), nn.functional.cross_entropy
    >>> seen, truth = unbatch.observe(net, loss, torch.rand(2, 6), torch.tensor([0, 5]))
    >>> relations = Relations.of(seen)
    >>> all(relation.holds for relation in relations.on(seen.update))
    True
    >>> any(relation.holds for relation in relations.on(dict(net.named_parameters())))
    False
    """

    head: Dense | None  # whose outputs' common shift the loss does not see
    scalings: tuple[tuple[tuple[str, ...], str], ...]  # parameters scaled up, and the weight scaled down
    dense: tuple[Dense, ...]
    rank: int | None  # of every dense layer's gradient at most
    parameters: Mapping[str, Tensor]
    rounding: Mapping[str, float]  # of each tensor as sent, relative

    @classmethod
    def of(cls, obs: Observation) -> Relations:
        """Those of an exchange; none where the inputs' shape is not known, and few where steps lie in between."""
        own = {name: p.detach().double() for name, p in obs.model.named_parameters()}
        nothing = cls(None, (), (), None, own, rounding_of_tensors(obs, int(obs.knowledge.get("batch_size", 1))))
        protocol, known = obs.protocol, obs.knowledge
        n = int(known.get("batch_size", 0))
        steps = protocol.steps(n or 1)
        if "input_shape" not in known or (steps and (protocol.optimiser != "sgd" or protocol.weight_decay)):
            return nothing
        view = View.of(obs)
        try:
            layers, form = view.layers, view.form
        except (UnbatchError, RuntimeError, ValueError):
            return nothing
        head = view.head if form is not None and form.name == "cross-entropy" else None
        if steps > 1:  # its gradients are those of several weights, each of which obeys the first relation
            return replace(nothing, head=head)
        return cls(head, tuple(_scalings(view)), layers, n or None, own, nothing.rounding)

    def on(self, update: Update) -> Iterator[Relation]:
        """Each of them that concerns what was sent, with how far this update is from it."""
        sent = {name: tensor.detach().double() for name, tensor in update.items()}
        if self.head:
            for name in (self.head.weight, self.head.bias):
                if name in sent and bool(sent[name].any()):
                    off = float(sent[name].sum(0).norm() / sent[name].norm())
                    yield Relation(f"the gradient of {name!r} sums to 0 over the outputs", off, self.rounding[name])
        for scaled, weight in self.scalings:
            if weight in sent and all(name in sent for name in scaled):
                up = torch.cat([(self.parameters[name] * sent[name]).flatten() for name in scaled])
                down = (self.parameters[weight] * sent[weight]).flatten()
                size = float(torch.cat([up, down]).norm() + up.sum().abs() + down.sum().abs())
                if size:
                    words = f"{scaled[0]!r} and {weight!r} balance, as scaling one against the other changes nothing"
                    off = abs(float(up.sum() - down.sum())) / size
                    yield Relation(words, off, max(self.rounding[name] for name in (*scaled, weight)))
        for layer in self.dense:
            yield from self._of_dense(layer, sent)

    def _of_dense(self, layer: Dense, sent: Mapping[str, Tensor]) -> Iterator[Relation]:
        if layer.weight not in sent or self.rank is None or not bool(sent[layer.weight].any()):
            return
        weight, n = sent[layer.weight], self.rank
        if n >= min(weight.shape):
            return
        columns, sizes, _ = torch.linalg.svd(weight, full_matrices=False)
        off, coarse = float(sizes[n:].norm() / sizes.norm()), self.rounding[layer.weight]
        yield Relation(f"the gradient of {layer.weight!r} has rank {n} at most, one for each example", off, coarse)
        bias = sent.get(layer.bias or "")
        if bias is None or not bool(bias.any()) or n >= len(weight):
            return
        if coarse * float(sizes.norm()) > LARGEST_SPAN_ROUNDING * float(sizes[n - 1]):
            return
        left = float((bias - columns[:, :n] @ (columns[:, :n].T @ bias)).norm() / bias.norm())
        words = f"the gradient of {layer.bias!r} lies in the span of that of {layer.weight!r}"
        yield Relation(words, left, max(coarse, self.rounding[layer.bias or ""]))


def worst(relations: Relations, update: Update) -> Relation | None:
    """The relation that an update breaks the most; None where it breaks none.

    >>> worst(Relations(None, (), (), None, {}, {}), {"weight": torch.ones(2, 2)}) is None
    True
    """
    broken = [relation for relation in relations.on(update) if not relation.holds]
    return max(broken, key=lambda relation: relation.breach, default=None)


def wrong_sign(obs: Observation) -> str:
    """Whether the head's bias shows that the update points the other way, in words; empty where it does not.

    The gradient of cross entropy in the bias of an output is the mean of p_j - [y = j]: below 0 for classes of the batch
    alone, of which there are no more than examples. A difference of parameters points the other way.

    >>> import unbatch
    >>> net, loss = nn.Linear(6, 8), nn.functional.cross_entropy
    >>> seen, truth = unbatch.observe(net, loss, torch.rand(2, 6), torch.tensor([0, 5]))
    >>> wrong_sign(seen) == ""
    True
    >>> wrong_sign(replace(seen, update={name: -tensor for name, tensor in seen.update.items()}))
    "6 of 8 entries of 'bias' have the sign that a class has which is in the batch, and the batch holds 2 examples"
    """
    n, view = obs.knowledge.get("batch_size"), View.of(obs)
    try:
        head, form = view.head, view.form
    except (UnbatchError, RuntimeError, ValueError):
        return ""
    if n is None or head is None or head.bias is None or head.bias not in obs.update or form is None:
        return ""
    if form.name != "cross-entropy" or not form.classes or form.smoothing or obs.protocol.optimiser != "sgd":
        return ""
    bias = obs.update[head.bias].detach().double() * (-1 if obs.protocol.steps(n) else 1)
    noise = LARGEST_BREACH * float(bias.abs().max())
    present, absent = int((bias < -noise).sum()), int((bias > noise).sum())
    if present <= n or absent > n:
        return ""
    return (
        f"{present} of {len(bias)} entries of {head.bias!r} have the sign that a class has which is in the batch, and the "
        f"batch holds {n} examples"
    )


def too_large(obs: Observation) -> str:
    """Whether the head's bias shows that the update is larger than any batch's, in words; empty where it does not.

    The entries above 0 of cross entropy's gradient in the head's bias, the mean of p_j - [y = j], sum to 1 at most.

    >>> import unbatch
    >>> net, loss = nn.Linear(6, 8), nn.functional.cross_entropy
    >>> seen, truth = unbatch.observe(net, loss, torch.rand(2, 6), torch.tensor([0, 5]))
    >>> too_large(seen) == ""
    True
    >>> too_large(replace(seen, update={name: 128 * tensor for name, tensor in seen.update.items()})).partition(":")[0]
    "the head's bias is moved ... times as far as any batch could"
    """
    known, protocol = obs.knowledge, obs.protocol
    n, view = known.get("batch_size"), View.of(obs)
    try:
        head, form = view.head, view.form
    except (UnbatchError, RuntimeError, ValueError):
        return ""
    if n is None or head is None or head.bias is None or head.bias not in obs.update:
        return ""
    if form is None or form.name != "cross-entropy":
        return ""
    if protocol.optimiser != "sgd" or protocol.momentum or protocol.weight_decay or not form.classes:
        return ""
    if protocol.steps(n) and "learning_rate" not in known:
        return ""
    bias = obs.update[head.bias].detach().double()
    most = abs(form.scale) * (n if form.reduction == "sum" else known.get("clients", 1))
    most *= protocol.learning_rate * protocol.steps(n) if protocol.steps(n) else 1.0
    factor = float(bias.clamp_min(0).sum().maximum((-bias).clamp_min(0).sum())) / most
    if factor <= 1 + LARGEST_BREACH:
        return ""
    return (
        f"the head's bias is moved {factor:.3g} times as far as any batch could: a sum where the loss takes the mean, a "
        "scaled loss, or another learning rate"
    )


def parameters_themselves(obs: Observation) -> str:
    """Whether the update is the model's parameters and no difference of them, in words; empty where it is not.

    >>> net = nn.Linear(6, 8)
    >>> seen = Observation(model=net, loss=nn.functional.cross_entropy, update=dict(net.named_parameters()))
    >>> parameters_themselves(seen)
    "it is the model's own parameters to 0%, and no difference of them: subtract the model's state from it"
    """
    own = {name: p.detach() for name, p in obs.model.named_parameters()}
    factor, left = fit(flatten(obs.update, obs.update), flatten(own, obs.update))
    if left > LEAST_LIKENESS or not 0.5 < abs(factor) < 2:
        return ""
    negative = " with the sign flipped" if factor < 0 else ""
    return (
        f"it is the model's own parameters to {left:.0%}{negative}, and no difference of them: subtract the model's state "
        "from it"
    )


def equal_sizes(obs: Observation) -> str:
    """Whether an optimiser that divides by the gradient's size made the update, in words; empty where it did not.

    The first step of Adam, AdamW or of signSGD moves every entry by the learning rate; a gradient's entries differ.

    >>> net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    >>> step = {name: 1e-3 * p.detach().sign() for name, p in net.named_parameters()}
    >>> equal_sizes(Observation(model=net, loss=nn.functional.cross_entropy, update=step))
    '100% of its entries have the size 0.001: a step of Adam, or signs, where a gradient or SGD is declared'
    """
    if obs.protocol.optimiser != "sgd" or len(obs.update) < 2:
        return ""
    if (
        rounding(obs, int(obs.knowledge.get("batch_size", 1))) > LARGEST_BREACH
    ):  # units in the last place are alike, too
        return ""
    each = [tensor.detach().double().flatten().abs() for tensor in obs.update.values()]
    sizes = torch.cat([tensor[tensor > 0] for tensor in each])
    if len(sizes) < FEWEST_ENTRIES or any(not bool(tensor.any()) for tensor in each):
        return ""
    tops = torch.stack([tensor.max() for tensor in each])
    if float(tops.min() / tops.max()) < LEAST_COMMON_TOP:  # an optimiser bounds the entries of all tensors alike
        return ""
    large = sizes[sizes >= tops.max() / 2]
    share, middle = len(large) / len(sizes), float(large.median())
    near = float(((large - middle).abs() <= EQUAL_SIZE * middle).double().mean())
    if share >= LARGE_SHARE and near >= EQUAL_SHARE:
        return (
            f"{share * near:.0%} of its entries have the size {middle:.2g}: a step of Adam, or signs, where a gradient or "
            "SGD is declared"
        )
    if share >= 0.5:
        return (
            f"{share:.0%} of its entries are at least half as large as the largest, {float(tops.max()):.2g}: steps of "
            "Adam, where a gradient or SGD is declared"
        )
    return ""


def orders(obs: Observation) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The update with tensors of one shape exchanged or transposed, as if they had been mixed up, and how, in words.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    >>> seen = Observation(model=net, loss=nn.functional.cross_entropy, update=dict(net.named_parameters()))
    >>> [words for words, _ in orders(seen)][:2]
    ['1.weight transposed', '2.weight transposed']
    """
    update = dict(obs.update)
    square = [name for name, tensor in update.items() if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] > 1]
    for name in square:
        yield f"{name} transposed", update | {name: update[name].T}
    if len(square) > 1:
        yield "square tensors transposed", update | {name: update[name].T for name in square}
    shapes = dict.fromkeys(tuple(tensor.shape) for tensor in update.values())
    for shape in shapes:
        names = [name for name, tensor in update.items() if tuple(tensor.shape) == shape]
        for order in itertools.islice(itertools.permutations(names), 1, MOST_ORDERS if len(names) > 1 else 1):
            moved = [f"{at} holds {name}" for at, name in zip(names, order, strict=True) if at != name]
            yield ", ".join(moved), update | {name: update[at] for at, name in zip(names, order, strict=True)}
    several = [[name for name, t in update.items() if tuple(t.shape) == shape] for shape in shapes]
    if sum(len(names) > 1 for names in several) > 1:
        back = {name: update[at] for names in several for at, name in zip(names, reversed(names), strict=True)}
        yield "tensors of one shape in the opposite order", back


def _scalings(view: View) -> Iterator[tuple[tuple[str, ...], str]]:
    """Pairs of consecutive layers of which the first can be scaled up and the next one down without a change of outputs."""
    model = copy.deepcopy(view.model).double()
    own = {name: p.detach() for name, p in model.named_parameters()}
    state = {name: b.detach().clone() for name, b in model.named_buffers()}
    weighed = [
        name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    weighed = [name for name in weighed if own.get(_in(name, "weight"), torch.zeros(0)).ndim > 1]
    x = view.stand_in(2, torch.Generator().manual_seed(0)).double()

    def outputs(changed: Mapping[str, Tensor]) -> Tensor:
        held: Tensor = functional_call(model, {**own, **changed, **{k: b.clone() for k, b in state.items()}}, (x,))
        return held

    with torch.no_grad(), in_mode(model, view.protocol.mode), torch.random.fork_rng(devices=[]):
        try:
            plain = outputs({})
            for first, second in itertools.pairwise(weighed):
                scaled = tuple(name for name in (_in(first, "weight"), _in(first, "bias")) if name in own)
                weight = _in(second, "weight")
                again = outputs({name: 2 * own[name] for name in scaled} | {weight: own[weight] / 2})
                if torch.allclose(plain, again, rtol=EXACT_SYMMETRY, atol=EXACT_SYMMETRY):
                    yield scaled, weight
        except (RuntimeError, ValueError, TypeError):  # the model does not run on stand-ins in that mode
            return


def _in(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
