"""Fisher information: what the update as sent says of the batch's inputs to first order, behind Gaussian noise."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.mean_round import mean_round, still
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge, shares
from unbatch.loss import reduction
from unbatch.network.dense import forward, in_mode
from unbatch.network.precision import in_double, loss_value, outputs_of
from unbatch.numerics.bounds.prior import GaussianPrior
from unbatch.numerics.search.softening import has_kinks
from unbatch.observation import Observation
from unbatch.progress import tick_or_leave
from unbatch.protocol import shortened

LEAST_NOISE = 1e-100  # noise whose square is a number
SAMPLING_CONFIDENCE = 0.975  # with which the sampling error that an average over draws is given suffices
FEWEST_DRAWS = 4  # whose spread has three degrees of freedom, or one where labels are drawn
NOISE_LENGTH_SIGMAS = 6.0  # of the noise's length, by which an update may be off
OPACUS_NORM_ROOM = 1e-6  # that Opacus adds to the norm of a gradient that it clips
BATCHED_ENTRIES, SMALL_UPDATE = (
    2**22,
    2**16,
)  # of a batch of products; of an update whose products are quicker all at once
JUMP_LINE, BEND_FALL = (
    0.1,
    5.0,
)  # of a line on which jumps are looked for; what a bend's second difference falls by, at least
JUMPING_OPERATIONS = re.compile(
    r"Relu|Hardtanh|MaxPool|Threshold|Clamp|Abs|shrink|L1Loss|Hardsigmoid|Hardswish|^(Max|Min|Amax|Amin|Prelu|Sgn)"
)


class Information:
    """J, the Jacobian [e, n d] of the updates as sent (without their noise) with respect to all inputs of a batch.

    Of all rounds that are known, one after the other. F = J^T J / sigma^2 is the Fisher information of inputs [n, d] whose
    labels are known. In float64; J is known by its products, two backward passes each way.
    """

    def __init__(self, obs: Observation, x: Tensor, y: Tensor) -> None:
        self.obs = doubled(obs)
        y = y.double() if y.is_floating_point() else y
        self.x = x.detach().double().requires_grad_()
        self.sent = torch.cat([sent(one, self.x, y, create_graph=True) for one in self.obs.exchanges])  # [e]
        self.free = torch.zeros_like(self.sent).requires_grad_()
        (self.back,) = torch.autograd.grad(self.sent, self.x, self.free, create_graph=True, materialize_grads=True)

    def push(self, v: Tensor) -> Tensor:
        """J v [e] of v [n, d]."""
        if not self.back.requires_grad:
            return torch.zeros_like(self.sent)
        direction = v.view_as(self.x)
        return torch.autograd.grad(self.back, self.free, direction, retain_graph=True, materialize_grads=True)[0]

    def pull(self, u: Tensor) -> Tensor:
        """J^T u [n, d] of u [e]."""
        found = torch.autograd.grad(self.sent, self.x, u, retain_graph=True, materialize_grads=True)[0]
        return found.flatten(1)

    def fisher(self, v: Tensor) -> Tensor:
        """J^T J v [n, d]."""
        return self.pull(self.push(v))

    def matrix(self) -> Tensor:
        """J^T J [n d, n d]. Raises NotApplicable: it was cut short."""
        p, e = self.x.numel(), len(self.sent)
        if not self.back.requires_grad:
            return torch.zeros(p, p).to(self.sent)
        rows, eye = list[Tensor](), torch.eye(p).to(self.sent)
        for part in torch.split(eye, max(1, BATCHED_ENTRIES // e) if e <= SMALL_UPDATE else 1):
            tick_or_leave(len(rows) * len(part) / p, f"the information of all {p:,} unknowns was formed")
            if len(part) == 1:
                rows.append(self.fisher(part[0]).view(1, -1))
                continue
            u = _batched(self.back, self.free, part.view(-1, *self.x.shape))
            rows.append(_batched(self.sent, self.x, u).flatten(1))
        F = torch.cat(rows)
        return (F + F.T) / 2


def sent(obs: Observation, x: Tensor, y: Tensor, *, create_graph: bool = False) -> Tensor:
    """The update [e] without its noise, in one gradient or step of private clients each example's gradient clipped."""
    known, protocol = obs.knowledge, obs.protocol
    if "privacy" not in known:
        return _flat(obs, x, y, create_graph, known.get("clip", known.get("clip_within")))
    form = reduction(obs.loss, forward(obs.model, x.detach()), y)
    if form is None:
        raise NotApplicable(
            "the loss is neither a mean nor a sum of one term an example, so no gradient is one example's."
        )
    one = replace(obs, knowledge=known.only(*(set(known) - {"local_steps", "epochs", "local_batch_size", "clients"})))
    whole = list[Tensor]()
    for size in shares(len(x), known.get("clients", 1)):
        own, labels, x, y = x[:size], y[:size], x[size:], y[size:]
        taken = min(protocol.local_batch_size or size, size) if protocol.steps(size) else size
        clip, rows = known.privacy.clip, range(taken)
        each = [_flat(one, own[i : i + 1], labels[i : i + 1], create_graph, clip, OPACUS_NORM_ROOM) for i in rows]
        clipped = torch.stack(each).sum(0)
        step = -protocol.learning_rate if protocol.steps(size) else 1.0
        whole.append(step * clipped / (1 if form == "sum" else taken))
    return torch.stack(whole).sum(0)


def deviation(obs: Observation) -> float:
    """Standard deviation of the noise in every entry of the update, before what changed the noisy update; 0: none known."""
    return float(obs.knowledge.get("noise_within", obs.knowledge.get("noise", 0.0)))


def joined(obs: Observation) -> Observation:
    """What tells as much as T rounds at the same parameters under Gaussian noise: their mean, with noise / sqrt(T).

    `obs` as it is where the parameters moved.
    """
    rounds = obs.exchanges
    if len(rounds) == 1 or not still(obs):
        return obs
    mean = {name: u.to(obs.update[name]) for name, u in mean_round(obs).items()}
    known = obs.knowledge.only(*(set(obs.knowledge) - {"earlier"}))
    told = "noise_within" if "noise_within" in known else "noise"
    return replace(obs, update=mean, knowledge=known | Knowledge(**{told: deviation(obs) / len(rounds) ** 0.5}))


def statistics(obs: Observation) -> list[Tensor]:
    """Buffers, such as batch norm statistics, that differ from round to round: what moved them tells of the batch."""
    states = [dict(one.model.named_buffers()) for one in obs.exchanges]
    moved = [(b, states[0][name]) for one in states[1:] for name, b in one.items() if b.is_floating_point()]
    return [b for b, first in moved if not torch.equal(b, first)]


def uncounted(obs: Observation) -> str | None:
    """Rounds of the same batch that are not here, and without which no bound counts what was told; in words."""
    held, rounds = 1 + len(obs.knowledge.get("earlier", ())), obs.knowledge.get("rounds", 1)
    if held < rounds:
        return f"the batch was sent in {rounds} rounds, and the updates of {rounds - held} are not here to be counted."
    return None


def check_noise(obs: Observation, *, follows: bool = False) -> None:
    """Raise NotApplicable unless the update carries Gaussian noise of known size, and nothing else that hides or tells.

    What was made of a noisy update without another look at the batch is bounded as that update (data processing). With
    `follows` rounds at parameters that moved are taken as given.
    """
    if why := uncounted(obs):
        raise NotApplicable(why)
    if not deviation(obs) > 0:
        raise NotApplicable(
            "the update carries no Gaussian noise of known size, and without noise nothing bounds an attacker."
        )
    if deviation(obs) < LEAST_NOISE:
        raise NotApplicable(f"noise of standard deviation {deviation(obs):.3g} is lost in rounding, and bounds nobody.")
    known, protocol = obs.knowledge, obs.protocol
    missing = [name for name in ("input_shape", "batch_size") if name not in known]
    if missing:
        raise NotApplicable(f"{' and '.join(missing)} must be known, to simulate the client.")
    if known.get("buffers") or statistics(obs):
        raise NotApplicable("batch norm statistics are sent without noise, and nothing bounds what they tell.")
    if not follows and not still(obs):
        raise NotApplicable(
            "the parameters moved between the rounds by what was sent in them: with other batches of the prior they "
            "would have moved elsewhere, and nothing simulates the server."
        )
    if "mixup" in known:
        raise NotApplicable("the client trains on blends of its examples (mixup), which are drawn and not simulated.")
    if "altered" in known and "noise_within" not in known:
        raise NotApplicable(f"the update was changed by {known.altered}, and the bound is one for noise alone.")
    steps = max(protocol.steps(size) for size in shares(known.batch_size, known.get("clients", 1)))
    if "privacy" in known and steps and (steps > 1 or protocol.optimiser != "sgd" or protocol.weight_decay):
        raise NotApplicable("private training of more than one plain step mixes its noise into the steps that follow.")


def premise(obs: Observation) -> str:
    """What every such bound assumes, in words."""
    rounds = len(obs.exchanges)
    where = "sent"
    between = "nothing but noise between the batch and the update" + "s" * (rounds > 1)
    if "noise_within" in obs.knowledge:
        made = f"before {obs.knowledge.altered} made of it what was sent, without another look at the batch"
        where = f"of the update {made}"
        between = "nothing but noise between the batch and that update"
    moved = "the same parameters" if still(obs) else "the parameters that they had, taken as given"
    again = f", drawn anew in each of {rounds} rounds at {moved}" if rounds > 1 else ""
    size = f"Gaussian noise of standard deviation {deviation(obs):.3g} in every entry"
    return f"{size} {where}{again}, {between}; labels and protocol known to the attacker"


def fitted(obs: Observation, x: Tensor, y: Tensor) -> None:
    """Check that the inputs explain the update but for noise of the size that is told, no more and no less.

    What else changes an update may tell more of the inputs than its Fisher information knows. So in each round. A noisy
    update that was changed afterwards is not seen, so there is nothing to compare. Raises NotApplicable: they do not.
    """
    if "noise_within" in obs.knowledge:
        return
    for one in obs.exchanges:
        _fitted(one, x, y)


def _fitted(obs: Observation, x: Tensor, y: Tensor) -> None:
    seen = torch.cat([obs.update[k].detach().double().flatten() for k in obs.update])
    double = doubled(obs)
    clean = sent(double, x.double(), y.double() if y.is_floating_point() else y).detach()
    sigma, e = deviation(obs), len(seen)
    rounding = 4 * torch.finfo(obs.dtype).eps * float(seen.norm())
    spread = NOISE_LENGTH_SIGMAS * (2 * e) ** 0.5  # of |noise|^2 / sigma^2, whose mean is e
    least, most = sigma * max(e - x.numel() - spread, 0.0) ** 0.5 - rounding, sigma * (e + spread) ** 0.5 + rounding
    off = float((seen - clean).norm())
    if not least <= off <= most:
        raise NotApplicable(
            f"the batch explains the update to {off:.2g}, and its noise to between {max(least, 0.0):.2g} and {most:.2g}: "
            "another defence changed it, or the noise is not of the size that is told. The bound is one for noise alone."
        )


@dataclass(frozen=True)
class Imagined:
    """A Gaussian prior, and batches drawn from it with their labels: what a bound on average over inputs looks at.

    The prior is one of pictures, or independent entries about the middle of the range, for a table as well: bounds need its
    density, which a domain's own draws do not have. `words` say which.
    """

    prior: GaussianPrior
    batches: list[tuple[Tensor, Tensor]]  # inputs [n, *shape], labels [n]
    over: str  # what the average over them is of, without how many they are

    def words(self, draws: int) -> str:
        """What the average over the first `draws` of them is of."""
        return f"{self.over}, from {draws} prior draws without the truth"

    @classmethod
    def of(
        cls,
        view: View,
        at: tuple[Tensor, Tensor] | None,
        rng: torch.Generator,
        draws: int,
        *,
        alike: int = 1,
    ) -> Imagined:
        """Labels are the truth's or the known ones, else drawn anew for every `alike` batches.

        Raises NotApplicable: as `fitted`, of the truth `at`.
        """
        obs, known = view.obs, view.knowledge
        prior = GaussianPrior(known.input_shape, known.get("input_range", (0.0, 1.0)))
        if at is not None:
            fitted(obs, at[0].to(obs.device), at[1].to(obs.device))
        told = view.known_labels if at is None else at[1]
        batches = list[tuple[Tensor, Tensor]]()
        for k in range(draws):
            x = prior.draw(known.batch_size, rng).to(obs.device)
            if told is not None:
                y = told.to(obs.device)
            elif k % alike == 0:
                y = view.labels.draw(len(x), rng, next(obs.model.parameters()))
            batches.append((x, y))
        over = "over labels drawn at random" if told is None else "for these labels"
        guess = " (the range is not known, and a table's rows may well lie elsewhere)"
        unsure = not view.domain.bounded
        return cls(prior, batches, f"on average over {prior}{guess if unsure else ''}, {over}")


def jumps(obs: Observation, x: Tensor, y: Tensor, rng: torch.Generator) -> str | None:
    """Where the update jumps as inputs move, which Fisher information does not see; in words."""
    double = doubled(obs)
    with in_mode(double.model, double.protocol.mode), torch.enable_grad():
        state = {k: b.clone() for k, b in double.model.named_buffers()}
        outputs = outputs_of(double.model, x.double(), dict(double.model.named_parameters()) | state)
        value = loss_value(double.loss, outputs, y.double() if y.is_floating_point() else y)
    seen, todo, found = set(), [value.grad_fn], set[str]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = re.sub(r"(With\w+)?Backward\d*$", "", node.name().rpartition("::")[2])
        slopes = [float(getattr(node, f"_saved_{of}", 1.0)) for of in ("alpha", "input_scale")]
        bent = name == "Elu" and slopes[0] * slopes[1] != 1
        found |= {name} if bent or JUMPING_OPERATIONS.search(name) else set()
        todo += [after for after, _ in node.next_functions]
    if not found:
        low, high = obs.knowledge.get("input_range", (0.0, 1.0))
        at = x.detach().double()

        def update(v: Tensor) -> list[Tensor]:
            return [sent(double, v, y.double() if y.is_floating_point() else y).detach()]

        if has_kinks(update, at, rng, reach=JUMP_LINE * (high - low), fall=BEND_FALL):
            found = {"the network"}
    if not found:
        return None
    return (
        f"the update jumps where inputs cross a kink ({', '.join(sorted(found))}); Fisher information does not see jumps, "
        "which tell more. See noise-information, or use a smooth activation."
    )


def _batched(of: Tensor, at: Tensor, v: Tensor) -> Tensor:
    """Gradients [k, *at] for each of v [k, *of], all at once where every operation allows it."""
    try:
        return torch.autograd.grad(of, at, v, retain_graph=True, materialize_grads=True, is_grads_batched=True)[0]
    except RuntimeError:
        each = [torch.autograd.grad(of, at, row, retain_graph=True, materialize_grads=True)[0] for row in v]
        return torch.stack(each)


def doubled(obs: Observation) -> Observation:
    """The same exchange in float64."""
    if next(obs.model.parameters()).dtype == torch.float64:
        return obs
    return replace(obs, model=in_double(obs.model), update={k: u.double() for k, u in obs.update.items()})


def _flat(
    obs: Observation, x: Tensor, y: Tensor, create_graph: bool, clip: float | None = None, room: float = 0.0
) -> Tensor:
    found = obs.simulate(x, y, create_graph=create_graph)
    sent = {name: found[name] for name in obs.update}
    if clip is not None:
        sent = shortened(sent, clip, room)
    return torch.cat([tensor.flatten() for tensor in sent.values()])
