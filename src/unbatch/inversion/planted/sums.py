"""Sums: the gradient of a dense layer below a quiet network, as sums over the examples of half spaces and slabs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.above_layer import Tail
from unbatch.inversion.planted.still import whole_sets
from unbatch.inversion.view import View
from unbatch.network.dense import Dense
from unbatch.network.per_client import for_client
from unbatch.numerics.half_spaces import Sums

EVEN = 1e-6  # relative, to which what is sent back is to be told by the label alone
ACCUMULATED = 2.0  # times the rounding of an entry of the gradient, a sum of n products, that is allowed for
REACH = 10.0  # times the norm of an input of typical size, up to which what lies above is looked at


@dataclass(frozen=True)
class Weights:
    """What an example of each label sends back to a layer: weight times the layer's gain, where its unit fires."""

    values: Tensor  # [v], the different ones, two at most
    gains: Tensor  # [m], of the units
    labels: Tensor | None  # [v, ...] the label of each value, where it is one alone


def weights(view: View, layer: Dense) -> Weights:
    """What each label sends back to the units that fire; of a network that is quiet above the layer.

    It is computed again with few and with many units firing, barely and far; and none is to come back where a unit rests.
    Raises NotApplicable: it depends on more than the label, or takes more than two values.
    """
    if view.form is None:
        raise NotApplicable("the loss is of no known form.")
    n, clients = view.knowledge.batch_size, view.knowledge.get("clients", 1)
    if n % clients:
        raise NotApplicable(f"{n} examples are not dealt evenly to {clients} clients, so each weighs otherwise.")
    tail = Tail(view.obs, layer, view.form, n // clients)
    tail.check_apart()
    every = view.only(*set(view.knowledge) - {"labels"}).labels.every(torch.zeros((), dtype=torch.float64))
    if not every:
        raise NotApplicable("the loss takes labels of which there is no finite number.")
    y = torch.cat([one.to(view.obs.device) for one in every])
    W, b = (tail.state[name] for name in (layer.weight, layer.bias or ""))
    reach = float(REACH * W.norm(dim=1).max() * W.shape[1] ** 0.5 + b.abs().max())
    rng = torch.Generator().manual_seed(0)
    some = torch.rand(2, tail.m, generator=rng, dtype=torch.float64).to(W)
    probes = [torch.full_like(some[0], reach * 1e-9), torch.full_like(some[0], reach), *(some - 0.5) * 2 * reach]
    sent = torch.stack([tail(at.expand(len(y), -1), y).detach() for at in probes])  # [4, labels, m]
    firing = torch.stack(probes)[:, None] > 0
    gains = sent[0].abs().amax(0)
    if not bool((gains > 0).all()):
        raise NotApplicable(f"nothing is sent back to some units of {layer.name!r}.")
    scaled = sent / gains
    values = scaled[0].mean(1)
    off = torch.where(firing, scaled - values[None, :, None], scaled).abs().amax()
    if float(off) > EVEN * float(values.abs().max()):
        raise NotApplicable(f"what is sent back to {layer.name!r} depends on more than the label, to {float(off):.1e}.")
    kinds = list[float]()
    for value in values.tolist():
        if all(abs(value - other) > 10 * EVEN for other in kinds):
            kinds.append(value)
    if len(kinds) > 2:
        raise NotApplicable(
            f"what is sent back to {layer.name!r} takes {len(kinds)} values, and two can be told apart."
        )
    held = [[k for k, v in enumerate(values.tolist()) if abs(v - kind) <= 10 * EVEN] for kind in kinds]
    labels = torch.cat([every[each[0]] for each in held]) if all(len(each) == 1 for each in held) else None
    return Weights(torch.tensor(kinds, dtype=torch.float64), gains.cpu(), labels)


def refuse_changed(view: View) -> None:
    """Raises NotApplicable where something changed the update on its way, so that its sums are no longer exact."""
    known = view.knowledge
    if "altered" in known or known.get("noise") or known.get("mixup"):
        raise NotApplicable("what was done to the update on its way, or to the batch, leaves no sum exact.")
    norm = float(torch.stack([u.double().square().sum() for u in view.update.values()]).sum().sqrt())
    if "clip" in known and norm >= known.clip * (1 - 1e-3):
        raise NotApplicable("the update was shortened by a factor that nobody knows.")
    if view.steps:
        raise NotApplicable("the client took several local steps, in which the planted layer moved.")


def sums(view: View, layer: Dense, passes: int = 1) -> tuple[Weights, Sums]:
    """The sums that a layer's gradients hold, of all rounds; and what an example weighs in them.

    Over the half space of each unit, or the slab to the next parallel one: units whose weights are the same, bit by bit,
    are parallel. Where each client of a sum received a model of its own, a unit is of the client for whom it was left as
    it is.
    An entry's rounding is taken as that of n products added up, in each of the `passes` that local steps made over the
    examples; of several, sets in which an example may be for a part of them are left out.
    Raises NotApplicable: the network above is not quiet, or something changed the update.
    """
    found, told = list[Sums](), list[Weights]()
    for each in view.obs.exchanges:
        here = view.on(each).gradient
        refuse_changed(here)
        told.append(weights(here, layer))
        for owner, units in enumerate(_units(here, layer)):
            found.append(_of_units(here, layer, told[-1], units, owner, passes))
    if any(len(one.values) != len(told[0].values) or not torch.allclose(one.values, told[0].values) for one in told):
        raise NotApplicable("an example weighs otherwise from round to round.")
    offsets = torch.tensor([0, *(int(one.group.max()) + 1 for one in found[:-1])]).cumsum(0).tolist()
    held = Sums(
        torch.cat([one.values for one in found]),
        torch.cat([one.error for one in found]),
        torch.cat([one.directions for one in found]),
        torch.cat([one.thresholds for one in found]),
        torch.cat([one.group + offset for one, offset in zip(found, offsets, strict=True)]),
        torch.cat([one.owner for one in found]),
    )
    if passes == 1:
        return told[0], held
    share = int(view.knowledge.batch_size) // int(view.knowledge.get("clients", 1))
    return told[0], held.only(whole_sets(held, told[0].values, passes, share))


def _units(view: View, layer: Dense) -> list[Tensor]:
    """Of each client, the numbers of the units that are on in the model that it received."""
    names, clients = (layer.weight, layer.bias or ""), int(view.knowledge.get("clients", 1))
    own = [view.model.get_parameter(name) for name in names]
    found = list[Tensor]()
    for number in range(clients):
        model = for_client(view.model, number)
        if model is view.model:
            return [torch.arange(len(own[0]))]
        W, b = (model.get_parameter(name) for name in names)
        same = (b == own[1]) if W is own[0] else (b == own[1]) & (W == own[0]).all(1)
        found.append(same.nonzero().flatten().cpu())
    taken = torch.cat(found)
    if len(set(taken.tolist())) < len(taken):
        raise NotApplicable("units are on for more than one client, so that their sums are of several.")
    return found


def _of_units(view: View, layer: Dense, told: Weights, units: Tensor, owner: int, passes: int) -> Sums:
    """The sums of some units of one round."""
    W, b = (view.model.get_parameter(name).detach().cpu()[units] for name in (layer.weight, layer.bias or ""))
    G, g = (view.update[name].cpu()[units].double() for name in (layer.weight, layer.bias or ""))
    kinds = (view.update[layer.weight].dtype, W.dtype)
    rows = dict[bytes, int]()
    group = torch.tensor([rows.setdefault(row.numpy().tobytes(), len(rows)) for row in W.double()])
    wide = torch.cat([G, g[:, None]], 1) / told.gains[units][:, None]  # [m, d + 1]
    W, b = W.double(), b.double()
    size = W.norm(dim=1)
    if not bool((size > 0).all()):
        raise NotApplicable(f"a unit of {layer.name!r} looks at nothing.")
    cuts = -b / size
    order = sorted(range(len(W)), key=lambda k: (int(group[k]), float(cuts[k])))
    following = [j if group[j] == group[i] else -1 for i, j in pairwise([*order, order[0]])]
    following[-1] = -1
    first, second = torch.tensor(order), torch.tensor(following)
    halves = second < 0
    values = wide[first] - torch.where(halves[:, None], 0.0, wide[second])
    upper = torch.where(halves, torch.inf, cuts[second])
    n = int(view.knowledge.batch_size)
    if len(units) < len(told.gains):  # a client's own
        n //= int(view.knowledge.clients)
    eps, largest = max(torch.finfo(kind).eps for kind in kinds), float(told.values.abs().max())
    rounding = ACCUMULATED * passes * eps * n * max(1.0, n**0.5 / 8) * largest
    heavy = values[:, -1].abs() >= float(told.values.abs().min()) / 2
    typical = (values[heavy, :-1].norm(dim=1) / values[heavy, -1].abs()).amax() if bool(heavy.any()) else torch.ones(())
    error = torch.stack([rounding * typical.expand(len(values)), torch.full((len(values),), rounding)], 1).double()
    cut, whose = torch.stack([cuts[first], upper], 1), torch.full((len(values),), owner)
    return Sums(values, error, (W / size[:, None])[first], cut, group[first], whose)
