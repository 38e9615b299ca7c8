"""Above: the scales of told-apart maps, the labels, and what came back to their layer, from the layers above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbatch.errors import NotApplicable
from unbatch.inversion.descent.places import Place
from unbatch.inversion.descent.separation import Separation
from unbatch.inversion.view import View
from unbatch.network.graph import Graph, Value
from unbatch.network.operations import layer_of
from unbatch.network.precision import loss_value
from unbatch.network.sections import section

SURE_COSINE = 1e-4  # by which the gradient of a label may be turned from what was sent back


@dataclass(frozen=True, eq=False)
class Above:
    """What is known at a layer's input for every example of the batch.

    maps [n, *shape] are the inputs, delta [n, *shape] the gradient that came back to them, deltas that to the outputs of the
    layers that read them, sent [n, k] that to the network's last dense layer's outputs; misfit says how well its weight's
    gradient agrees, relative.
    """

    maps: Tensor
    delta: Tensor
    deltas: dict[Value, Tensor]
    sent: Tensor
    last: Tensor  # those outputs
    misfit: float


def above(
    graph: Graph, readers: Sequence[Place], maps: Tensor, head: Place, update: Mapping[str, Tensor]
) -> Above:
    """Runs the network from what some layers read to its head, and back with what the head's gradient says was sent.

    dL/dW = sum_i sent_i f_i^T and dL/db = sum_i sent_i are linear in what was sent, once the features f are known. No label
    enters. `readers` are the layers that read `maps`.
    """
    given = readers[0].given
    features = maps if head in readers else section(graph, given, head.given)(maps).detach()
    sides, seen = [features], [update[head.weight].T]
    if head.bias in update:
        sides.append(torch.ones_like(features[:, :1]))
        seen.append(update[head.bias][None])  # type: ignore[index]
    sent = torch.linalg.lstsq(torch.cat(sides, 1).T, torch.cat(seen)).solution  # [n, k]
    off = update[head.weight] - sent.T @ features
    misfit = float(off.norm() / update[head.weight].norm().clamp_min(1e-300))
    at, whole, heard = maps.detach().requires_grad_(), section(graph, given, head.gave), dict[Value, Tensor]()
    for reader in readers:
        layer = whole.get_submodule(reader.call.name)
        layer.register_forward_hook(lambda _, __, output, value=reader.gave: heard.update({value: output}))
    with torch.enable_grad():
        last = whole(at)
        delta, *deltas = torch.autograd.grad(last, [at, *heard.values()], sent)
    return Above(maps, delta, dict(zip(heard, deltas, strict=True)), sent, last.detach(), misfit)


def scaled(graph: Graph, found: Separation, update: Mapping[str, Tensor]) -> Tensor:
    """The maps [n, *shape] at their own scale, from the gradient of a shift behind the layer.

    A shift that every window of a channel gets has the gradient sum over examples and windows of delta, and delta is share
    over scale, which is linear in one over the scales. Behind the layer such a shift is its own bias, or that of batch norm with fixed statistics.
    Raises NotApplicable: there is none.
    """
    want = _shift(graph, found.place, update)
    if want is None:
        raise NotApplicable(
            f"behind {found.place.call.where} lies no shift (a bias, or a batch norm with fixed statistics) whose gradient "
            "tells the scales of the examples."
        )
    inverse = torch.linalg.lstsq(found.shares.sum(2).T, want[:, None]).solution[:, 0]
    return (found.maps / inverse.view(-1, 1, 1, 1)).reshape(-1, *found.place.given.shape[1:])


def _shift(graph: Graph, place: Place, update: Mapping[str, Tensor]) -> Tensor | None:
    """The sum of what came back to the layer's outputs [c_out]."""
    if place.bias in update:
        return update[place.bias]  # type: ignore[index]
    for call in graph.calls:
        if place.gave not in call.given or not isinstance(norm := layer_of(call, place.gave), nn.BatchNorm2d | nn.BatchNorm1d):
            continue
        name = f"{call.name}.bias" if isinstance(call.ran, nn.Module) else graph.names().get(id(norm.bias), "")
        if norm.training or norm.running_var is None or name not in update:
            continue
        slope = (norm.running_var + norm.eps).rsqrt()
        slope = slope if norm.weight is None else slope * norm.weight
        return update[name] * slope.detach()
    return None


def labels_sent(view: View, graph: Graph, head: Place, found: Above) -> Tensor | None:
    """The labels [n, ...] with which the loss sends this back to the head's outputs; None where none does.

    Each class is tried for all examples, then rows of probabilities, then real numbers that enter one by one.
    """
    tail = None if head.gave is graph.output else section(graph, head.gave, graph.output)

    def sent(labels: Tensor) -> Tensor:
        at = found.last.detach().requires_grad_()
        with torch.enable_grad():
            outputs = at if tail is None else tail(at)
            (back,) = torch.autograd.grad(loss_value(view.loss, outputs, labels), at)
        return back

    for labels in _candidates(view, found, sent):
        if float((sent(labels) - found.sent).norm()) <= SURE_COSINE * float(found.sent.norm()):
            return labels
    return None


def _candidates(view: View, found: Above, sent: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    last, n, form = found.last, len(found.last), view.labels
    every = form.every(last.new_zeros(()))
    if every:
        turned = [torch.cosine_similarity(sent(y.expand(n, *y.shape[1:])), found.sent) for y in every]
        yield torch.cat([every[int(k)] for k in torch.stack(turned).nan_to_num(-1.0).argmax(0)])
    if form.kind == "class" and form.rows and form.sloped:
        scale = view.form.scale if view.form is not None and view.form.reduction != "mean" else 1 / n
        yield last.softmax(1) - found.sent / scale
    if form.kind != "class" and not form.whole and form.sloped:
        zero, one = (sent(last.new_full((n, *form.shape), value)) for value in (0.0, 1.0))
        yield ((found.sent - zero) / (one - zero)).reshape(n, *form.shape)
