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
from dataclasses import replace

import torch
from torch import Tensor

from unbatch.inversion.descent.masks_above import listening
from unbatch.inversion.descent.places import WindowLayer, at_cuts
from unbatch.inversion.descent.separation import MOST_COEFFICIENTS, ToldApart, span, span_error
from unbatch.inversion.descent.walk import told_by
from unbatch.inversion.view import View
from unbatch.loss import LossForm
from unbatch.network.graph import Graph
from unbatch.network.precision import loss_value
from unbatch.network.sections import section
from unbatch.numerics.bounds.first_order import ERROR_SIGMAS, LARGEST_RADIUS
from unbatch.numerics.unmix.certificate import mixture_radius
from unbatch.numerics.unmix.mixture import Mixture
from unbatch.numerics.unmix.solver import unmix
from unbatch.numerics.windows.maps import maps_in

GUESSES = 32  # of the few numbers that mix an example's map
ATTEMPTS = 2
LARGEST_MISFIT = 1e-6  # of the layer's gradient, relative, that windows of whole maps may leave
LARGEST_ERROR = 1e-5  # of the span, above which examples are not found by it
SHARED = 0.5  # of a basis's error that its coefficients have as well, at most
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
    known = max(left, DELTA_ROUNDINGS * eps, _basis_error(place, basis, C, G, eps, error))
    mixture = replace(mixture, noise=known * float(mixture.S[0]))

    def wrong(z: Tensor, y: Tensor) -> Tensor:
        return _moved(mixture, place, z @ own.flatten(1), z, y, known, rng)

    reach = mixture_radius(mixture, found.z, found.labels, rng, rounding=wrong, jointly=found.joint)
    reach = reach / found.z.norm(dim=1)
    sure = reach < LARGEST_RADIUS
    z, y = found.z[sure], found.labels[sure]
    maps = torch.tensordot(z, own, 1)
    shares = mixture.sent(z, y).view(len(z), len(G), len(windows))
    sigma = max([known, *(reach[sure] / ERROR_SIGMAS).tolist()])
    return ToldApart(place, maps, shares, n - len(z), sigma)


def _basis_error(place: WindowLayer, basis: Tensor, C: Tensor, G: Tensor, eps: float, error: float) -> float:
    """How far the basis of whole maps [n, *shape] is known, relative: one sigma, by what the layer's gradient leaves over.

    The span's `error` is that of its weakest direction, in which hardly any of a map lies. With the coefficients C
    [n p, c_out] held the gradient is linear in the basis: least squares move it by its error, but for the share that is
    in C as well.
    """
    sent = {place.gave: C.view(len(basis), -1, len(G)).transpose(1, 2)}
    told = told_by(place.given, [place], sent, {place.weight: G.view_as(place.layer.weight)}, eps, 0.0)
    if told is None or told.rows is not None:
        return error
    moved = float((told.seen.reshape(basis.shape) - basis).norm() / basis.norm())
    return float(told.noise.norm() / told.seen.norm()) + moved / (1 - SHARED)


def _moved(
    mixture: Mixture, place: WindowLayer, maps: Tensor, z: Tensor, y: Tensor, error: float, rng: torch.Generator
) -> Tensor:
    """How far deltas [f, m] move if maps [f, e] are off by a relative error, in a random direction."""
    off = torch.randn(maps.shape, generator=rng, dtype=torch.float64).to(maps)
    off = error * off * (maps.norm(dim=1) / off.norm(dim=1))[:, None]
    with torch.no_grad():
        layer, shape = place.layer, place.given.shape[1:]
        outputs = (layer((maps + off).view(-1, *shape)) - layer(maps.view(-1, *shape))).flatten(1)
    return mixture.deltas(mixture.before(z) + outputs, y).detach() - mixture.F(z, y)


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
