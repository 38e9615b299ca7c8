"""The network inside what training code wraps round it: data parallel, compiled, private training."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.parameter import is_lazy

from unbatch.errors import UnbatchError

WRAPPERS = {  # name of a wrapper's class -> the attribute that holds the network
    "DataParallel": "module",  # torch.nn
    "DistributedDataParallel": "module",  # torch.nn.parallel, and Apex
    "DifferentiallyPrivateDistributedDataParallel": "module",  # Opacus
    "AveragedModel": "module",  # torch.optim.swa_utils
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "AbstractGradSampleModule": "_module",  # Opacus
}
SHARDING = {"FullyShardedDataParallel", "FSDPModule"}
PREFIXES = tuple(f"{attribute}." for attribute in ("module", "_orig_mod", "_module"))  # of names that wrappers give


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that runs inside DataParallel, DistributedDataParallel, torch.compile or Opacus' GradSampleModule.

    Its parameters go by the network's own names, without `module.`, `_orig_mod.` or `_module.`. A model without wrappers is
    returned as it is; the network inside one is the same object wherever nothing in it has to be changed, else a copy.
    Raises UnbatchError: no nn.Module, or one that cannot be run on a guess: sharded over machines, scripted, without
    values (on the meta device, or lazy and not yet run).

    >>> network = nn.Sequential(nn.Linear(2, 3))
    >>> unwrapped(nn.DataParallel(network)) is network
    True
    >>> try:
    ...     unwrapped(nn.LazyLinear(3))
    ... except UnbatchError as error:
    ...     print(str(error).partition(":")[0])
    the model's 'weight' is not initialised
    """
    if not isinstance(model, nn.Module):
        raise UnbatchError(f"the model is {_kind(model)}; give an nn.Module.")
    while attribute := _wrapper(model):
        model = _without_hooks(model) if attribute == "_module" else getattr(model, attribute)
    if any(_wrapper(module) for module in model.modules()):
        model = copy.deepcopy(model)
        _unwrap_children(model)
    elif any(module._compiled_call_impl is not None for module in model.modules()):
        model = copy.deepcopy(model)  # copies are not compiled
    _check_runnable(model)
    return model


def _wrapper(module: nn.Module) -> str | None:
    """The attribute in which a wrapper holds the network; None of a module that is no wrapper."""
    found = (WRAPPERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in WRAPPERS)
    attribute = next(found, None)
    return attribute if attribute is not None and isinstance(getattr(module, attribute, None), nn.Module) else None


def _without_hooks(model: nn.Module) -> nn.Module:
    """The network in Opacus' wrapper, in a copy without the hooks that keep each example's gradients."""
    held: nn.Module = copy.deepcopy(model).to_standard_module()  # type: ignore[operator] # Opacus' own
    return held


def _unwrap_children(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        inner = unwrapped(child) if _wrapper(child) else child
        if inner is not child:
            setattr(module, name, inner)
        _unwrap_children(inner)


def _check_runnable(model: nn.Module) -> None:
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if kinds & SHARDING or any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise UnbatchError(
            "the model's parameters are shards that lie on several machines (FSDP, DTensor), and a guess is run on all of "
            "them at once. Build the plain model, and load the gathered state_dict into it."
        )
    if "ScriptModule" in kinds:
        raise UnbatchError(
            "the model is scripted or traced (torch.jit), and cannot be run with other parameters than its own. Give the "
            "Python model that it was made from, with the same state_dict."
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise UnbatchError(
                f"the model's {name!r} is not initialised: run it once on a batch, as lazy layers ask for."
            )
        if tensor.is_meta:
            raise UnbatchError(
                f"the model's {name!r} is on the meta device and has no values; load its weights "
                "(model.to_empty(device='cpu'), then load_state_dict)."
            )


def _kind(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"no module but a {type(thing).__name__}"
