"""Mixed maps: a batch told apart at a convolution whose input may have any sign, by what the network above sends back.

Behind a smooth activation no window is an extreme ray. But the space of whole maps in the span has n dimensions whatever
made them (`maps_in`): an example's map is sum_a z_a B_a with n unknown numbers z. In the basis of all windows of the B_a
the layer's gradient has coefficients C_a = sum_i z_ia delta_i, one for each output and place, so that
[vec C_1, ..., vec C_n] = sum_i vec(delta_i) z_i^T: a dense layer's gradient with as many neurons as the convolution has
outputs and places, and as many inputs as there are examples. Each example obeys the equation of `unmix` there, and is found
and bounded by it, with its label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.inversion.descent.masks_above import listening
from unbatch.inversion.descent.places import WindowLayer, at_cuts
from unbatch.inversion.descent.separation import MOST_COEFFICIENTS, ToldApart, span, span_error
from unbatch.inversion.view import View
from unbatch.loss import LossForm
from unbatch.network.graph import Graph
from unbatch.network.precision import loss_value
from unbatch.network.sections import section
from unbatch.numerics.bounds.first_order import LARGEST_RADIUS
from unbatch.numerics.unmix.certificate import mixture_radius
from unbatch.numerics.unmix.mixture import Mixture
from unbatch.numerics.unmix.solver import unmix
from unbatch.numerics.windows.maps import maps_in

GUESSES = 32  # of the few numbers that mix an example's map
ATTEMPTS = 2
LARGEST_MISFIT = 1e-6  # of the layer's gradient, relative, that windows of whole maps may leave
LARGEST_ERROR = 1e-5  # of the span, above which examples are not found by it
DELTA_ROUNDINGS = 4  # of the update's type: the relative error of what came back


def mixed_maps(
    view: View, graph: Graph, place: WindowLayer, G: Tensor, eps: float, rng: torch.Generator
) -> ToldApart | None:
    """The maps behind a convolution's gradient G [c_out, c_in k^2] at their own scale; None where it does not tell them.

    The loss is to be a sum or mean of one term an example, of class numbers.
    """
    form = view.form
    windows, rows = place.windows(), span(G, eps)
    n, rest = divmod(len(rows), len(windows))
    if form is None or not form.classes or form.weights is not None:
        return None
    if rest or not n or len(windows) < 2 or len(windows) * len(rows) > MOST_COEFFICIENTS or not windows.overlapping:
        return None
    error = span_error(G, len(rows), eps)
    if error > LARGEST_ERROR or len(rows) == G.shape[1]:
        return None
    basis = maps_in(rows, windows, error=error, most=n)
    if len(basis) != n:
        return None
    patches = windows.rows(basis).flatten(0, 1)  # [n p, d]
    C = torch.linalg.lstsq(patches.T, G.T).solution  # [n p, c_out]
    left = float((G - C.T @ patches).norm() / G.norm())
    if left > LARGEST_MISFIT:
        return None
    mixture, own = _mixture(view, graph, place, form, basis, C, max(error, left), eps)

    def random(mixed: Mixture, rng: torch.Generator) -> Tensor:
        return torch.randn(GUESSES, mixed.n, generator=rng, dtype=torch.float64).to(G)

    found = unmix(mixture, [("random", random)], rng, attempts=ATTEMPTS)
    mixture = mixture if found.weighed else mixture.unweighed()
    reach = mixture_radius(mixture, found.z, found.labels, rng, jointly=found.joint) / found.z.norm(dim=1)
    sure = reach < LARGEST_RADIUS
    z, y = found.z[sure], found.labels[sure]
    maps = torch.tensordot(z, own, 1)
    shares = mixture.sent(z, y).view(len(z), len(G), len(windows))
    most = max([error, *reach[sure].tolist()])
    return ToldApart(place, maps, shares, n - len(z), most)


def _mixture(
    view: View, graph: Graph, place: WindowLayer, form: LossForm, basis: Tensor, C: Tensor, error: float, eps: float
) -> tuple[Mixture, Tensor]:
    """The layer's gradient in coordinates of a basis of whole maps, and that basis [n, *shape] itself."""
    n, layer = len(basis), place.layer
    U, S, V = torch.linalg.svd(C.view(n, -1, C.shape[1]).permute(2, 1, 0).reshape(-1, n), full_matrices=False)
    own = torch.tensordot(V, basis, 1)
    with torch.no_grad():
        made = layer(own.view(n, *place.given.shape[1:]))
        flat = torch.zeros_like(own[:1]).view(1, *place.given.shape[1:])
        offset = layer(flat)
    W, offset = (made - offset).flatten(1), offset.flatten()
    run = _above(graph, place, own, W, offset)

    def deltas(before: Tensor, y: Tensor) -> Tensor:
        live = before if before.requires_grad else before.detach().requires_grad_()
        with torch.enable_grad():
            outputs, gave = run(live)
            loss = loss_value(view.obs.loss, outputs, y)
            loss = loss * (len(y) / n if form.reduction == "mean" else 1.0)
            (delta,) = torch.autograd.grad(loss, gave, create_graph=before.requires_grad)
        return delta.flatten(1)

    classes = int(torch.Size(graph.output.shape[1:]).numel())
    mixture = Mixture(
        U=U,
        S=S,
        W=W,
        offset=offset,
        ones=None,
        deltas=deltas,
        classes=classes,
        targets=classes,
        noise=error * float(S[0]),
        rounding=DELTA_ROUNDINGS * eps,
        basis=torch.eye(n).to(C),
    )
    return mixture, own


def _above(
    graph: Graph, place: WindowLayer, own: Tensor, W: Tensor, offset: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The network above a layer, of its outputs [g, m]: what it gives, and those outputs as it takes them.

    Where a branch leads around the layer its outputs alone do not tell the rest: the layer's maps follow from them, as the
    combination of the maps `own` that gives them.
    """
    if place.gave in at_cuts(graph):
        above = section(graph, place.gave, graph.output)

        def behind(live: Tensor) -> tuple[Tensor, Tensor]:
            return above(live.view(-1, *place.gave.shape[1:])), live

        return behind
    whole, back = section(graph, place.given, graph.output), torch.linalg.pinv(W)

    def around(live: Tensor) -> tuple[Tensor, Tensor]:
        maps = torch.tensordot((live - offset) @ back, own, 1).view(-1, *place.given.shape[1:])
        with listening(whole, [place.call]) as heard:
            return whole(maps), heard.gave[place.gave]

    return around
