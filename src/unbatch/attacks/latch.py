"""latch: a data trap, a unit that one example of a whole training shuts, and that holds it in the final weights."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from unbatch.attack import NOTHING, ActiveAttack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.closed_units import step_sizes, unsure
from unbatch.inversion.view import View
from unbatch.knowledge import PROTOCOL_FIELDS, Knowledge
from unbatch.network.dense import Dense
from unbatch.network.first_linear import first_linear
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction

SATURATED = 1e-4  # of what the label's entry moved by, that all others may: else the softmax had not settled
AGREES = 16.0  # times what rounding does, by which a unit's output may differ from the one of what was read


@final
class Latch(ActiveAttack):
    """Plants units that the first example to set one off shuts for good, and reads these examples off the final weights.

    A trap is a unit w . x + b with a random w whose entries add up to zero, and b below zero by so much that a share of
    the inputs sets it off: a quantile of public examples where they are known, else the normal law's. It is passed on
    to the class `onto` alone, with weight `strength` = c. An example of another class that sets it off makes the
    softmax certain of the wrong class, so that the unit's gradient is c whatever else the network says: one step of SGD
    takes (rate / batch) c (x, 1) off (w, b), for inputs above zero the unit never fires again, and x = (change of w) /
    (change of b) whatever training follows.

    That one example alone did it shows by the change of b, which is (rate / batch) c for one; by the label's entry of what
    the unit sends on, (rate / batch) (w . x + b) for it; and by all other entries, which are 0. Examples of the class
    `onto` leave no trace: with a trap of another class, those would open traps instead of shutting them.

    Bound: the rounding of the parameters, before and after.

    >>> import torch, unbatch
    >>> from unbatch.models.small import build
    >>> rng, attack = torch.Generator().manual_seed(0), unbatch.attacks.Latch(share=0.05)
    >>> model = attack.plant(build("mlp", (30,), 3, width=40, rng=rng), rng)
    >>> x, y = torch.rand(20, 30, generator=rng), torch.arange(20) % 3
    >>> training = unbatch.Protocol(epochs=3, local_batch_size=2, learning_rate=0.01)
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y, protocol=training)
    >>> found = attack(seen)
    >>> found
    <Reconstruction: 9 examples [30], with labels, bounds up to ...>
    """

    family: ClassVar[str] = "planted rows"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[Cost] = Cost.READS
    paper: ClassVar[str] = "Feng, Tramèr, Privacy Backdoors: Stealing Data with Corrupted Pretrained Models, ICML 2024"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = frozenset({"clients", "public"}) | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="digits:batch=1,width=64",
        floors={"l2-error": 1e-3, "label-accuracy": 1.0},
        options="share=0.5",
        protocol=Protocol(epochs=2, learning_rate=0.05),
    )

    share: Annotated[float, Field(gt=0, lt=1, description="of all inputs, that sets off one trap")] = 0.02
    units: Annotated[
        int | None, Field(gt=0, description="traps; none takes half of the narrowest layer below the head")
    ] = None
    strength: Annotated[float, Field(gt=0, description="weight c by which a trap is passed on to its class")] = 1e4
    onto: Annotated[
        int, Field(ge=0, description="class that traps are passed on to, of which no example is caught")
    ] = 0
    spread: Annotated[
        float,
        Field(gt=0, description="standard deviation of an entry of the inputs, which the attacker knows or guesses"),
    ] = 0.25

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with traps in its first dense layer; the units beside them are left as they were.

        Raises NotApplicable: it is no chain of dense layers with one hidden one or more, or it has no room.
        """
        made = copy.deepcopy(model)
        first, *middle, head = _linears(made)
        narrow = min(layer.out_features for layer in (first, *middle))
        count = narrow // 2 if self.units is None else self.units
        if not 0 < count <= narrow:
            raise NotApplicable(f"{count} traps do not fit a layer of {narrow} units.")
        threshold = NormalDist().inv_cdf(1 - self.share) * self.spread
        with torch.no_grad():
            w = torch.randn(count, first.in_features, generator=rng)
            w = torch.nn.functional.normalize(w - w.mean(1, keepdim=True), dim=1)
            first.weight[:count] = w.to(first.weight)
            first.bias[:count] = -threshold
            if "public" in known:
                scores = known.public.flatten(1).to(w) @ w.T  # [p, count]
                first.bias[:count] = -scores.quantile(1 - self.share, dim=0).to(first.bias)
            for layer in middle:
                layer.weight[:count] = 0.0
                layer.weight[:, :count] = 0.0
                layer.weight[:count, :count] = torch.eye(count).to(layer.weight)
                if layer.bias is not None:
                    layer.bias[:count] = 0.0
            head.weight[:, :count] = 0.0
            if self.onto >= head.out_features:
                raise NotApplicable(f"there is no class {self.onto}: the model has {head.out_features}.")
            head.weight[self.onto, :count] = self.strength
        return made

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        layers = view.layers
        if len(layers) < 2 or not layers[-1].head or layers[0].feeds is None or layers[0].bias is None:
            raise NotApplicable("traps stand in a chain of dense layers with a bias, and this network is none.")
        first, head = layers[0], layers[-1]
        missing = [name for name in (first.weight, first.bias, head.weight) if name not in view.update]
        if missing:
            raise NotApplicable(f"{missing[0]!r} was not sent, and traps are read off it.")
        if view.form is None or view.form.name != "cross-entropy" or not view.form.classes:
            raise NotApplicable("traps are shut by the cross entropy of classes, and this loss is another.")
        traps = _Traps.of(view, layers)
        reads = [trap for size in step_sizes(view) for trap in traps.read(size)]
        once = dict[int, _Read]()
        for one in sorted(reads, key=lambda read: read.bound):
            once.setdefault(one.unit, one)
        kept = _each_example_once(list(once.values()))
        trace: dict[str, Any] = {"traps": len(traps.units), "moved": traps.moved, "shut by one example": len(once)}
        if not kept:
            raise NotApplicable(
                f"of {len(traps.units)} traps {traps.moved} moved, and none by one example alone: a larger or smaller "
                "share of the inputs must set one off."
            )
        x = torch.stack([one.x for one in kept])
        bound = torch.tensor([one.bound for one in kept], dtype=torch.float64)
        inputs, bound, name = view.undo(first, x, bound)
        labels = torch.tensor([one.label for one in kept], device=view.obs.device)
        return Reconstruction(
            inputs=inputs, labels=labels, layer=name, bound=bound, trace=trace | {"layer": first.name}
        )


@dataclass(frozen=True)
class _Read:
    """What one trap holds."""

    x: Tensor  # [d]
    label: int
    bound: float
    unit: int


@dataclass(frozen=True, eq=False)
class _Traps:
    """The traps of a model, and what training did to them."""

    view: View
    first: Dense
    units: Tensor  # [t]
    classes: Tensor  # [t], to which each is passed on
    strength: Tensor  # [t]
    head: str

    @classmethod
    def of(cls, view: View, layers: tuple[Dense, ...]) -> _Traps:
        """Those units that nothing but one class hears of. Raises NotApplicable: there are none."""
        parameters = dict(view.model.named_parameters(remove_duplicate=False))
        first, *middle, last = layers
        head = parameters[last.weight].detach().double()
        alone = torch.ones(len(parameters[first.weight]), dtype=torch.bool)
        for layer in middle:
            W = parameters[layer.weight].detach()
            m = min(len(alone), *W.shape)
            own = torch.zeros_like(alone)
            own[:m] = (W.diagonal()[:m] == 1) & ((W != 0).sum(0)[:m] == 1) & ((W != 0).sum(1)[:m] == 1)
            alone &= own
        heard = torch.zeros_like(alone)
        m = min(len(alone), head.shape[1])
        heard[:m] = (head != 0).sum(0)[:m] == 1
        units = (alone & heard).nonzero().flatten()
        if not len(units):
            raise NotApplicable(
                "no unit is passed on to one class alone: these parameters were not planted by this attack."
            )
        columns = head[:, units]
        classes = columns.abs().argmax(0)
        return cls(view, first, units, classes, columns[classes, torch.arange(len(units))], last.weight)

    @property
    def moved(self) -> int:
        """How many traps training moved."""
        return int((self.view.update[self.first.bias or ""][self.units] != 0).sum())

    def read(self, size: float) -> list[_Read]:
        """What the traps hold that one example shut, in a step in which its gradient was multiplied by `size`."""
        update, model = self.view.update, self.view.model
        W0, b0 = (
            model.get_parameter(n).detach().double()[self.units] for n in (self.first.weight, self.first.bias or "")
        )
        dW, db = (update[n].double()[self.units] for n in (self.first.weight, self.first.bias or ""))
        out = update[self.head].double()[:, self.units].clone()
        sign = -1.0 if self.view.steps else 1.0
        off_W, off_b = unsure(self.view, W0, dW).norm(dim=1), unsure(self.view, b0, db)
        found = list[_Read]()
        for t in db.nonzero().flatten().tolist():
            count = float(sign * db[t] / (size * self.strength[t]))
            bound = 2 * float(off_W[t] / dW[t].norm().clamp_min(1e-300) + off_b[t] / db[t].abs()) + 2 * abs(count - 1)
            x = dW[t] / db[t]
            height = float(W0[t] @ x + b0[t])
            unsure_height = bound * float(W0[t].norm() * x.norm()) + bound * float(b0[t].abs())
            entries = sign * -out[:, t] / size
            entries[self.classes[t]] = 0.0  # beside c its change is lost in rounding
            label = int(entries.argmax())
            told = float(entries[label])
            entries[label] = 0.0
            settled = float(entries.abs().max()) <= SATURATED * told
            agrees = abs(told - height) <= AGREES * unsure_height + AGREES * 1e-6 * height
            if bound < 1e-3 and height > 0 and settled and agrees:
                found.append(_Read(x, label, bound, int(self.units[t])))
        return found


def _each_example_once(reads: list[_Read]) -> list[_Read]:
    """The reads without those of an example that another trap holds as well."""
    kept = list[_Read]()
    for one in reads:
        near = [r for r in kept if float((r.x - one.x).norm()) <= (r.bound + one.bound) * float(one.x.norm())]
        if not near:
            kept.append(one)
    return kept


def _linears(model: nn.Module) -> list[nn.Linear]:
    """The dense layers of a model that has nothing else. Raises NotApplicable: it has, or fewer than two of them."""
    first_linear(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(layers) < 2 or sum(len(list(layer.parameters())) for layer in layers) < len(list(model.parameters())):
        raise NotApplicable(
            "traps are planted in a chain of dense layers, two or more; this model has other parameters."
        )
    if any(a.out_features != b.in_features for a, b in itertools.pairwise(layers)):
        raise NotApplicable("the dense layers do not feed one another in the order in which the model names them.")
    return layers
