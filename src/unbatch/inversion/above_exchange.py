"""Above exchange: what a model sends from one dense layer upwards, as an exchange whose inputs are that layer's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unbatch.errors import NotApplicable
from unbatch.knowledge import Knowledge
from unbatch.network.dense import Call, Dense, LinearCalls, in_mode
from unbatch.observation import Observation


class FromLayer(nn.Module):
    """A model as a function of what one of its dense layers receives, [n, d] -> [n, ...], or with `output` gives, [n, m].

    What lies below the layer runs on a constant input and is overruled. The model itself is its one module, called `whole`.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> above = FromLayer(model, "3.weight", (1, 4, 4))
    >>> features = torch.rand(5, 8)
    >>> torch.equal(above(features), model[3](features))
    True
    """

    def __init__(
        self,
        model: nn.Module,
        weight: str,
        input_shape: tuple[int, ...],
        *,
        constant: float = 0.0,
        output: bool = False,
    ) -> None:
        super().__init__()
        self.whole, self.weight, self.input_shape = model, weight, input_shape
        self.constant, self.output = constant, output
        self.training = model.training

    def forward(self, features: Tensor) -> Tensor:
        """The model's outputs [n, ...] for what the layer receives [n, d], or gives [n, m]."""
        own = attrgetter(self.weight)(self.whole)  # the one in use, which functional_call may have put there
        shape = (len(features), *self.input_shape)
        x = torch.full(shape, self.constant, dtype=features.dtype, device=features.device)

        def hear(call: Call, compute: Callable[[], Tensor]) -> Tensor:
            if call["weight"] is not own:
                return compute()
            if self.output:
                return features + 0  # in place may be written
            return nn.functional.linear(features, call["weight"], call.get("bias"))

        with LinearCalls(hear):
            found: Tensor = self.whole(x)
        return found


def exchange_above(obs: Observation, layer: Dense) -> Observation:
    """The exchange between the layer and everything above it: its inputs are the layer's, its update what those move.

    It holds the tensors of the update that depend on the layer's input, keyed `whole.NAME`, and all that is known but for
    what is said of the network's own inputs. Raises NotApplicable: the outputs depend on more than the layer's input.

    >>> import unbatch
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> x, y = torch.rand(1, 1, 4, 4), torch.tensor([2])
    >>> seen, truth = unbatch.observe(model, nn.functional.cross_entropy, x, y)
    >>> above = exchange_above(seen, Dense("3", "3.weight", "3.bias", None, True))
    >>> list(above.update), above.residual(model[:3](x), y) < 1e-6
    (['whole.3.weight', 'whole.3.bias'], True)
    """
    shape, d = obs.knowledge.input_shape, obs.model.get_parameter(layer.weight).shape[1]
    above, other = (FromLayer(obs.model, layer.weight, shape, constant=constant) for constant in (0.0, 1.0))
    live = {name: p.detach().requires_grad_() for name, p in above.named_parameters()}
    features = torch.randn(2, d, generator=torch.Generator().manual_seed(0)).to(live[f"whole.{layer.weight}"])
    with in_mode(obs.model, obs.protocol.mode), torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs, again = (
            functional_call(model, live | {k: b.detach().clone() for k, b in model.named_buffers()}, (features,))
            for model in (above, other)
        )
        used = torch.autograd.grad(outputs.sum(), list(live.values()), allow_unused=True)
    if not torch.allclose(outputs, again, rtol=1e-4, atol=1e-6):
        raise NotApplicable(f"the outputs depend on more than what {layer.name!r} receives, or are random.")
    moved = {name.removeprefix("whole.") for name, slope in zip(live, used, strict=True) if slope is not None}
    names = {f"whole.{name}": name for name in obs.update if name in moved}
    if not names:
        raise NotApplicable(f"no tensor from {layer.name!r} upwards was sent.")
    kept = [
        name for name in obs.knowledge if name not in ("input_shape", "input_range", "domain", "earlier", "buffers")
    ]
    known = obs.knowledge.only(*kept) | Knowledge(input_shape=(d,))
    if "buffers" in obs.knowledge:
        known = known | Knowledge(buffers={f"whole.{k}": b for k, b in obs.knowledge.buffers.items()})
    update = {new: obs.update[name] for new, name in names.items()}
    return replace(obs, model=above, update=update, knowledge=known)
