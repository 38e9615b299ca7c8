"""Explained: whether returned examples explain an update to its rounding, and whether others near them do as well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unbatch.errors import NotApplicable
from unbatch.inversion.fisher import Information
from unbatch.observation import Observation
from unbatch.progress import Watch, watching
from unbatch.protocol import flatten

SOLVED_RESIDUAL = 3e-5  # relative: above the rounding of a float32 computation, far below what a wrong batch leaves
ROUNDINGS = 4.0  # of the update as sent, by which what explains it may be off: computing it rounds as well
LARGEST_ROUNDING = (
    0.1  # relative; where rounding leaves more of the update than this, nothing shows that it is explained
)
MOST_UNKNOWNS = 4096  # of which the Jacobian of the update is formed
FREEDOM_SECONDS = 3.0


def rounding_of_tensors(obs: Observation, examples: int) -> dict[str, float]:
    """What rounding alone leaves of each tensor of the update, relative: half a unit in the last place of every entry.

    A difference of parameters is also off by half a unit of those, in each of its steps: sqrt(sum of squares) / |tensor|,
    infinite where a tensor is zero.

    >>> import torch
    >>> net, loss = torch.nn.Linear(2, 2, bias=False), torch.nn.functional.mse_loss
    >>> seen = Observation(model=net, loss=loss, update={"weight": torch.ones(2, 2)})
    >>> f"{rounding_of_tensors(seen, 1)['weight']:.1e}"
    '6.0e-08'
    """
    own, steps = dict(obs.model.named_parameters()), obs.protocol.steps(examples)
    found = {}
    for name, tensor in obs.update.items():
        size = float(tensor.detach().double().norm())
        square = (size * torch.finfo(tensor.dtype).eps / 2) ** 2
        if steps:
            coarse = max(torch.finfo(t.dtype).eps for t in (own[name], tensor))
            square += steps * (float(own[name].detach().double().norm()) * coarse / 2) ** 2
        found[name] = math.sqrt(square) / size if size else math.inf
    return found


def rounding(obs: Observation, examples: int) -> float:
    """The same of the update as a whole.

    >>> import torch
    >>> net, loss = torch.nn.Linear(2, 2, bias=False), torch.nn.functional.mse_loss
    >>> seen = Observation(model=net, loss=loss, update={"weight": torch.ones(2, 2)})
    >>> f"{rounding(seen, 1):.1e}"
    '6.0e-08'
    """
    sizes = {name: float(tensor.detach().double().norm()) for name, tensor in obs.update.items()}
    each = rounding_of_tensors(obs, examples)
    whole = math.hypot(*sizes.values())
    return math.hypot(*(each[name] * size for name, size in sizes.items() if size)) / whole if whole else math.inf


def explains(obs: Observation, residual: float | None, examples: int) -> bool:
    """Whether so small a residual |update - simulated| / |update| is no more than rounding leaves.

    >>> import torch
    >>> net, loss = torch.nn.Linear(2, 2, bias=False), torch.nn.functional.mse_loss
    >>> seen = Observation(model=net, loss=loss, update={"weight": torch.ones(2, 2)})
    >>> coarse = Observation(model=net.bfloat16(), loss=loss, update={"weight": torch.ones(2, 2).bfloat16()})
    >>> explains(seen, 1e-6, 1), explains(seen, 1e-3, 1), explains(coarse, 1e-3, 1)
    (True, False, True)
    """
    if residual is None or not math.isfinite(residual):
        return False
    least = rounding(obs, examples)
    return least <= LARGEST_ROUNDING and residual <= max(SOLVED_RESIDUAL, ROUNDINGS * least)


def freedom(obs: Observation, inputs: Tensor, labels: Tensor, residual: float, watch: Watch) -> float | None:
    """How far from these inputs [n, ...] others may lie that explain the update as well, relative and to first order.

    max(residual, rounding) |update| / (s |inputs|), s the least singular value of the Jacobian of the update with respect
    to the inputs (`fisher`), for these labels. None where it is too large to be formed in a few seconds, or has none.

    >>> import torch, unbatch
    >>> net, loss = torch.nn.Linear(4, 3), torch.nn.functional.cross_entropy
    >>> x, y = torch.rand(1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2])
    >>> seen, truth = unbatch.observe(net, loss, x, y)
    >>> freedom(seen, x, y, 1e-7, Watch()) < 1e-5
    True
    """
    if inputs.numel() > MOST_UNKNOWNS or not inputs.is_floating_point():
        return None
    watch.begin(FREEDOM_SECONDS)
    try:
        with watching(watch):
            device = obs.device
            squares = Information(obs, inputs.to(device), labels.to(device)).matrix()
            least = float(torch.linalg.eigvalsh(squares)[0].clamp_min(0).sqrt())
    except (NotApplicable, RuntimeError, ValueError, TypeError):  # it was cut short, or cannot be differentiated twice
        return None
    off = max(residual, rounding(obs, len(inputs))) * float(flatten(obs.update, obs.update).norm())
    size = float(inputs.double().norm())
    return off / (least * size) if least * size > 0 else math.inf
