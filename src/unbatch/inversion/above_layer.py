"""What the part of a model above a dense layer sends back to that layer, and how the client's precision changes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.label_form import completed
from unbatch.loss import LossForm
from unbatch.network.dense import Call, Dense, LinearCalls, in_mode
from unbatch.network.precision import loss_value, outputs_of
from unbatch.observation import Observation


class Tail:
    """The part of a model above one of its dense layers, which says what gradient flows back to the layer's output.

    tail(before [g, m], labels [g, ...]) = dL/d(before) [g, m]: the deltas of examples whose output of the layer (before its
    activation) is `before`, in a batch of n. `check` makes sure that each row depends on its own example alone.

    `targets` is the number of entries of one example's label (of probabilities, all but the last), `classes` the number of
    class labels (0: labels are real targets), `m` the layer's width.

    >>> import unbatch
    >>> from unbatch.inversion.view import View
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> view = View.of(seen)
    >>> tail = Tail(seen, view.first, view.form, n=1)
    >>> delta = tail(model.dense1(x).double(), y)  # of one example: the gradient of the layer's bias
    >>> torch.allclose(delta[0].float(), seen.update["dense1.bias"], atol=1e-7), tail.classes
    (True, 3)
    """

    def __init__(
        self, obs: Observation, layer: Dense, form: LossForm, n: int, dtype: torch.dtype = torch.float64
    ) -> None:
        self.obs, self.form, self.n, self.weight = obs, form, n, layer.weight
        tensors = (
            dict(obs.model.named_parameters())
            | dict(obs.model.named_buffers())
            | dict(obs.knowledge.get("buffers", {}))
        )
        kinds = {k: dtype if t.is_floating_point() else t.dtype for k, t in tensors.items()}
        self.state = {k: t.detach().to(kinds[k], copy=True) for k, t in tensors.items()}  # batch norm writes into them
        self.m = len(self.state[layer.weight])
        self.shape: tuple[int, ...] = obs.knowledge.input_shape
        probe = self.outputs(torch.zeros(2, self.m, dtype=dtype, device=obs.device))
        self.targets = probe[0].numel() - (form.labels.kind == "probabilities")  # they add up to 1
        self.output = tuple(probe.shape[1:])
        binary = form.labels.kind == "binary" and self.targets == 1
        self.classes = self.targets if form.classes else 2 if binary else 0
        told = obs.knowledge.get("labels")
        weighs = form.weights is not None and form.reduction == "mean" and not form.by_count
        known = form.labels.taken(told) if weighs and told is not None else None
        self.mass = float(n) if known is None else float(form.weight_of(known).sum())  # what the mean divides by

    def outputs(self, before: Tensor, inputs: float = 0.0) -> Tensor:
        """The model's outputs [g, ...] where the layer gives `before` [g, m].

        Everything below the layer is run on constant `inputs` and overruled, so that they are of no account.
        """
        if not len(before):  # a forward that reshapes by hand may not take a batch of none
            return before.new_zeros(0, *self.output)
        x = torch.full((1, *self.shape), inputs, dtype=before.dtype, device=before.device)
        x = x.expand(len(before), *self.shape)

        def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            return before + 0 if call["weight"] is self.state[self.weight] else compute()  # in place may be written

        with in_mode(self.obs.model, self.obs.protocol.mode), LinearCalls(hear):
            found: Tensor = outputs_of(self.obs.model, x, self.state, twice=True)
        return found

    def __call__(self, before: Tensor, y: Tensor) -> Tensor:
        """The deltas [g, m] of examples with the layer's outputs `before` [g, m]; with a graph if `before` has one."""
        if not len(before):
            return before
        live = before if before.requires_grad else before.detach().requires_grad_()
        with torch.enable_grad():
            (delta,) = torch.autograd.grad(self.value(live, y), live, create_graph=before.requires_grad)
        return delta.nan_to_num(0.0) if self.form.weights is not None else delta  # a mean over ignored rows alone

    def value(self, before: Tensor, y: Tensor) -> Tensor:
        """The part of the batch's loss that is of examples with the layer's outputs `before` [g, m], with its graph."""
        return loss_value(self.obs.loss, self.outputs(before), self._target(y)) * self._share(y)

    def _share(self, y: Tensor) -> Tensor | float:
        """What the loss of examples alone is multiplied by to be their part of the whole batch's."""
        if self.form.reduction != "mean":
            return 1.0
        own = len(y) if self.form.by_count else self.form.weight_of(y).sum()
        return own / self.mass

    def _target(self, y: Tensor) -> Tensor:
        if self.form.classes:
            return y
        kind = torch.int64 if self.form.labels.whole else self.state[self.weight].dtype
        y = completed(y) if self.form.labels.kind == "probabilities" else y
        return y.to(kind).reshape(-1, *self.form.labels.shape)

    def check(self) -> None:
        """Makes sure that what an example sends back tells it apart from others.

        Raises NotApplicable, saying why: as `check_apart`, or everything above is linear, so that the gradient tells the
        span of the inputs and nothing more.
        """
        self.check_apart()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            before = self._probes()
            line = self.outputs(torch.stack([before[0], before[1], (before[0] + before[1]) / 2]))
        if torch.allclose(line[2], (line[0] + line[1]) / 2, rtol=1e-9, atol=1e-12):
            raise NotApplicable(
                "everything above the layer is linear, so its gradient leaks the span of the inputs and nothing more."
            )

    def _probes(self) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return torch.randn(4, self.m, generator=rng, dtype=torch.float64).to(self.obs.device)

    def check_apart(self) -> None:
        """Makes sure that what an example sends back depends on its own output of the layer and on nothing else.

        Raises NotApplicable, saying why: the model draws at random, examples interact above the layer, or the input
        bypasses it.
        """
        before = self._probes()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole, again = self.outputs(before), self.outputs(before)
            if not torch.allclose(whole, again):
                raise NotApplicable(
                    "the model is random in the client's mode (dropout), so deltas cannot be computed again."
                )
            alone = torch.cat([self.outputs(before[:1].expand(2, -1))[:1], self.outputs(before[1:2].expand(2, -1))[:1]])
            if not torch.allclose(whole[:2], alone, rtol=1e-6, atol=1e-9):
                raise NotApplicable(
                    "examples interact above the layer (batch norm in train mode): none has an equation of its own."
                )
            if not torch.allclose(whole, self.outputs(before, 1.0), rtol=1e-6, atol=1e-9):
                raise NotApplicable(
                    "the input also bypasses the first dense layer, so its deltas depend on more than its own output."
                )


class Rounding:
    """By how much the deltas of given examples change when the client computes in its own precision and not in float64.

    rounding(z [f, n], labels [f, ...]) = deltas in the client's precision - deltas in float64, [f, m], for examples whose
    inputs to the layer are z `rows`; `rows` has d columns, or d + 1, of which the last is the bias's and left out.

    >>> import unbatch
    >>> from unbatch.inversion.view import View
    >>> from unbatch.models.small import build
    >>> rng = torch.Generator().manual_seed(0)
    >>> model, x, y = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, torch.nn.functional.cross_entropy, x, y)
    >>> view = View.of(seen)
    >>> rounding = Rounding(seen, view.first, view.form, torch.eye(4).double(), n=1)
    >>> 0 < float(rounding(x.double(), y).abs().max()) < 1e-6
    True
    """

    def __init__(self, obs: Observation, layer: Dense, form: LossForm, rows: Tensor, n: int) -> None:
        parameters = dict(obs.model.named_parameters(remove_duplicate=False))
        self.rows, self.own = rows, parameters[layer.weight].dtype
        self.W = parameters[layer.weight].detach()
        self.b = parameters[layer.bias].detach() if layer.bias else None
        self.tails = [Tail(obs, layer, form, n, dtype) for dtype in (self.own, torch.float64)]

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        """What the client's precision adds to the deltas [f, m] of examples with coordinates z [f, n]."""

        x = (z @ self.rows)[:, : self.W.shape[1]].to(self.own)  # what such a client would hold
        found = []
        for tail, dtype in zip(self.tails, (self.own, torch.float64), strict=True):
            b = None if self.b is None else self.b.to(dtype)
            found.append(tail(torch.nn.functional.linear(x.to(dtype), self.W.to(dtype), b), y).double())
        return found[0] - found[1]
