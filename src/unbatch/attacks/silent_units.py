"""silent-units: the training inputs of a network, by the units of its first layer that never fired on each of them."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.margin_cone import WHOLE, ConeAnswer, cone_answers
from unbatch.inversion.trained_span import WHY_FULL, TrainedSpan, start_and_end, trained_span
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS
from unbatch.numerics.search.silent import LIVE, SAME, SHARES, SILENT, different, silent_combinations, silent_on
from unbatch.progress import tick
from unbatch.reconstruction import Reconstruction
from unbatch.threat_model import ThreatModel

DEPENDENT = 1e-6  # least singular value of the combinations, below which they are not n examples'
LEAST_AGREEING = 0.94  # of the units, that move if and only if they fire on an answer at one end of training
ROUNDS = 2 * len(SHARES)
NOT_SILENT = (
    "no units are silent on single examples in a way that shows, for as many as were trained on, and it takes all of them. "
    "So it is where units are not rectified, where nearly all fire on every example at some time, and where they are few."
)
ROUNDED = (
    "the released weights are kept in {dtype}, whose rounding hides a change of exactly nothing: a unit that never fired "
    "on an example is told by zeros of 1e-8 and less, which takes a release in float64."
)
AMBIGUOUS = "the units agree with {others} other answers as well as with the first, so that none is given."


@final
class SilentUnits(Attack):
    """Recovers training inputs from the first layer's change over a whole training by SGD, whatever its length and loss.

    Rectified units leave [W, b] - [W0, b0] = sum_i c_i (x_i, 1)^T with c_i zero on every unit that never fired on x_i: not
    small, zero. So among the combinations of the change's columns those of one example are the ones with hundreds of
    zeros, and the units' weights before and after training say where to look for them. Found for as many as the change
    has rank, their inverse gives all inputs at once, to rounding. Nothing above the first layer plays a part, nor do
    labels, rates, momentum or the order of batches; weight decay leaves one factor of the start, which is found.

    Under one logit of one hidden layer the change lies in a cone besides, as every step of a loss of the margin pushes the
    same way, and its facets are those zeros: linear programmes find them, also where a first step leaves the same entry in
    many columns, so that zeros alone say too little. Such an answer is given if no unit that an example left as it was
    fires on it at either end of training.

    All or nothing: two combinations that are missing leave every input open. A mixture of examples that vanishes where all
    of them are silent is told by not being alone in that, and dropped. Elsewhere an answer is given if 94 of 100 units
    moved exactly where they fire on it at one end of training (`agreeing` in the trace), and no other set of combinations
    that was found agrees as well. It takes float64. Not proven is that entries elsewhere are in general position: no
    claims.

    >>> import unbatch
    >>> spec = "trained:batch=4,width=200,steps=60,start=1,method=sgd,threat=start,centred=true"
    >>> client = unbatch.Case.parse(spec).setting()
    >>> told = {"knowledge": client.knowledge, "training": client.training}
    >>> seen, truth = unbatch.observe(client.model, client.loss, client.inputs, client.labels, **told)
    >>> found = unbatch.attacks.SilentUnits()(seen)
    >>> float(torch.cdist(truth.inputs.flatten(1), found.inputs.flatten(1)).amin(1).max()) < 1e-9
    True
    """

    family: ClassVar[str] = "span"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = "this library"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "initial"})
    uses: ClassVar[frozenset[str]] = frozenset({"recipe", "batch_size"}) | DOMAIN_FIELDS
    demo: ClassVar[Demo] = Demo(
        case="trained:batch=4,width=200,steps=60,start=1,method=sgd,threat=start,centred=true", floors={"psnr": 100.0}
    )
    cost: ClassVar[Cost] = Cost.SOLVES
    threat_model: ClassVar[str] = ThreatModel.START

    starts: Annotated[int, Field(gt=0, description="random guesses for each example")] = 16
    programmes: Annotated[
        int, Field(ge=0, description="linear programmes at most, for the facets of the change's cone under one logit")
    ] = 1000

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        span = trained_span(view)
        if torch.finfo(kind := next(view.model.parameters()).dtype).eps > SILENT:
            raise NotApplicable(ROUNDED.format(dtype=str(kind).removeprefix("torch.")))
        n = len(span.rows)
        if n > int(view.knowledge.get("batch_size", n)):
            raise NotApplicable(WHY_FULL)
        columns = torch.linalg.svd(span.change, full_matrices=False)[0][:, :n]
        ends = start_and_end(view, span.layer)
        before = tuple(end @ span.rows.T for end in ends)
        held, marks, best = columns.new_zeros(0, n), columns.new_zeros(0), -1.0
        chosen = self._by_facets(view, span, columns, ends[1], rng)
        if len(chosen) == n:
            entering, own = _inputs(span, columns, chosen, ends)[0], _silent_where_unmoved(span, columns, chosen, ends)
            if float(own.min()) >= WHOLE:
                return self._answer(view, span, columns, entering, chosen, own, len(chosen))
        for number, (more, agreeing) in enumerate(silent_combinations(columns, before, rng, starts=self.starts * n)):
            held, marks = _merged(torch.cat([held, more]), torch.cat([marks, agreeing]))
            chosen = _independent(held, marks)
            if len(chosen) == n - 1:
                last = silent_on(columns, before, _left_over(span, columns, chosen))
                held, marks = _merged(torch.cat([held, last]), torch.cat([marks, last.new_zeros(len(last))]))
                chosen = _independent(held, marks)
            if len(chosen) == n:
                entering, own = _inputs(span, columns, chosen, ends)
                best = float(own.min())
            if best >= LEAST_AGREEING or not tick(number / ROUNDS, best):
                break
        if best < LEAST_AGREEING:
            raise NotApplicable(NOT_SILENT)
        if others := _others(span, columns, chosen, held, ends):
            raise NotApplicable(AMBIGUOUS.format(others=others))
        return self._answer(view, span, columns, entering, chosen, own, len(held))

    def _answer(
        self,
        view: View,
        span: TrainedSpan,
        columns: Tensor,
        entering: Tensor,
        chosen: Tensor,
        agreeing: Tensor,
        combinations: int,
    ) -> Reconstruction:
        """What entered the layer [n, d + 1] as the network's inputs, and how it was found."""
        n = len(chosen)
        d = span.change.shape[1] - (span.layer.bias is not None)
        x = entering[:, :d]
        inputs, _, name = view.undo(span.layer, x, torch.full((n,), torch.inf, dtype=torch.float64))
        silent = ((columns @ chosen.T).abs() < SILENT * _sizes(columns)).sum(0)
        return Reconstruction(
            inputs=inputs,
            layer=name,
            trace={
                "rank": n,
                "combinations": combinations,
                "silent": silent.tolist(),
                "agreeing": agreeing.tolist(),
                "kept of the start": span.kept,
            },
        )

    def _by_facets(self, view: View, span: TrainedSpan, columns: Tensor, after: Tensor, rng: torch.Generator) -> Tensor:
        """Combinations [n, n] by the facets of the cone that the change lies in under one logit; none [0, n] elsewhere."""
        n, layers = len(span.rows), view.layers
        outward = dict(view.model.named_parameters())[layers[-1].weight].detach().double()
        if len(layers) != 2 or outward.shape != (1, len(after)):
            return columns.new_zeros(0, n)
        answer: ConeAnswer | None = None
        rows = span.change * outward.sign().T
        for answer in cone_answers(rows, after, span.rows, 0.0, rng, programmes=self.programmes):
            if answer is not None and answer.agreeing >= WHOLE:
                break
        if answer is None or answer.agreeing < WHOLE:
            return columns.new_zeros(0, n)
        return torch.nn.functional.normalize(answer.normals @ span.change.T @ columns, dim=1)


def _merged(held: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Combinations [f, n] and their marks [f], each once, with the best of its marks."""
    order = marks.argsort(descending=True, stable=True)
    kept = different(held[order])
    alike = (kept @ held.T).abs() > 1 - SAME
    return kept, torch.where(alike, marks, -1.0).amax(1) if len(kept) else marks[:0]


def _left_over(span: TrainedSpan, columns: Tensor, chosen: Tensor) -> Tensor:
    """Of the example whose combination alone is missing, the input's coordinates up to scale, with either sign [2, n]."""
    away = torch.linalg.svd(chosen, full_matrices=True)[2][-1]
    z: Tensor = away @ columns.T @ span.change @ span.rows.T
    return torch.stack([z, -z])


def _others(span: TrainedSpan, columns: Tensor, chosen: Tensor, held: Tensor, ends: tuple[Tensor, ...]) -> int:
    """How many other whole answers, with one combination exchanged for one of `held`, the units agree with as well."""
    count = 0
    for other in held:
        if float((chosen @ other).abs().max()) > 1 - SAME:
            continue
        for i in range(len(chosen)):
            whole = torch.cat([chosen[:i], other[None], chosen[i + 1 :]])
            if float(torch.linalg.svdvals(whole)[-1]) > DEPENDENT:
                count += float(_inputs(span, columns, whole, ends)[1].min()) >= LEAST_AGREEING
    return count


def _independent(held: Tensor, marks: Tensor) -> Tensor:
    """As many combinations as are independent, those first whose units agree best."""
    chosen = held[:0]
    for i in marks.argsort(descending=True, stable=True).tolist():
        more = torch.cat([chosen, held[i : i + 1]])
        if len(chosen) < held.shape[1] and float(torch.linalg.svdvals(more)[-1]) > DEPENDENT:
            chosen = more
    return chosen


def _sizes(columns: Tensor) -> Tensor:
    """Of each unit's change [m, 1], rounding aside: a unit that never moved has as much as the least that counts."""
    size = columns.norm(dim=1, keepdim=True)
    floored: Tensor = size.clamp_min(LIVE * float(size.max()))
    return floored


def _silent_where_unmoved(span: TrainedSpan, columns: Tensor, chosen: Tensor, ends: tuple[Tensor, ...]) -> Tensor:
    """Of the units that an example did not move, the share [n] that fires on it at neither end."""
    z, _ = _inputs(span, columns, chosen, ends)
    fires = torch.stack([end @ z.T for end in ends]).amax(0) > 0
    size = columns.norm(dim=1, keepdim=True)
    still = ((columns @ chosen.T).abs() <= SILENT * _sizes(columns)) & (size > LIVE * size.max())
    share: Tensor = (still & ~fires).sum(0) / still.sum(0).clamp_min(1)
    return share


def _inputs(span: TrainedSpan, columns: Tensor, chosen: Tensor, ends: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What entered the layer [n, d + 1], and the share of units [n] that changed if and only if they fire at an end.

    Raises NotApplicable: without a bias no scale is told.
    """
    if span.layer.bias is None:
        raise NotApplicable("the first layer has no bias, whose change would tell the size and sign of an input.")
    amounts = columns @ chosen.T  # [m, n]: of each example, up to its scale
    z = torch.linalg.lstsq(amounts, span.change).solution
    z = z / z[:, -1:]
    fires = torch.stack([end @ z.T for end in ends]).amax(0) > 0
    moved = amounts.abs() > SILENT * _sizes(columns)
    return z, (fires == moved).double().mean(0)
