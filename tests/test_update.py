"""Updates in every form in which people hold them, and models as training code holds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Earlier, Knowledge, Observation, Setting, UnbatchError, as_update, observe, state_difference


class Net(nn.Module):
    """Two layers that are used, and one between them that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.b = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Jaxlike:
    """An array of another framework: it knows how to become one of numpy's, and nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.held, self.shape = tensor.numpy(), tuple(tensor.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.held, dtype=dtype)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def grads(net: Net) -> dict[str, Tensor | None]:
    """Every parameter's p.grad, None of those that were not used."""
    F.cross_entropy(net(torch.rand(1, 6)), torch.tensor([1])).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def good(grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: g for name, g in grads.items() if g is not None}


FORMS: dict[str, Callable[[dict[str, Tensor | None]], Any]] = {
    "None where unused": lambda g: g,
    "numpy": lambda g: {k: t.numpy() for k, t in good(g).items()},
    "read-only, reversed and big-endian numpy": lambda g: {
        k: np.ascontiguousarray(t.numpy()[::-1])[::-1].astype(">f4") for k, t in good(g).items()
    },
    "arrays of another framework": lambda g: {k: Jaxlike(t) for k, t in good(g).items()},
    "lists of numbers": lambda g: {k: t.tolist() for k, t in good(g).items()},
    "COO": lambda g: {k: t.to_sparse() for k, t in good(g).items()},
    "CSR": lambda g: {k: t.to_sparse_csr() if t.ndim == 2 else t for k, t in good(g).items()},
    "float64": lambda g: {k: t.double() for k, t in good(g).items()},
    "requires a gradient": lambda g: {k: t.clone().requires_grad_() for k, t in good(g).items()},
    "parameters": lambda g: {k: nn.Parameter(t) for k, t in good(g).items()},
    "module.": lambda g: {f"module.{k}": t for k, t in good(g).items()},
    "_orig_mod.module.": lambda g: {f"_orig_mod.module.{k}": t for k, t in good(g).items()},
    "a compiled layer": lambda g: {k.replace(".", "._orig_mod."): t for k, t in good(g).items()},
    "pairs": lambda g: list(g.items()),
    "a generator of pairs": lambda g: (pair for pair in g.items()),
    "a list": lambda g: list(g.values()),
    "a list without the unused": lambda g: list(good(g).values()),
    "a tuple": lambda g: tuple(g.values()),
    "a generator": lambda g: (t for t in g.values()),
    "numpy objects": lambda g: np.array([*(t.numpy() for t in good(g).values()), None], dtype=object)[:-1],
    "what numpy.savez calls them": lambda g: {f"arr_{i}": t.numpy() for i, t in enumerate(good(g).values())},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_update(net: Net, grads: dict[str, Tensor | None], form: str) -> None:
    found = as_update(net, FORMS[form](grads))
    assert list(found) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    for name, tensor in good(grads).items():
        assert not found[name].requires_grad
        assert torch.equal(found[name].float(), tensor)
    seen = Observation(model=net, loss=F.cross_entropy, update=FORMS[form](grads))
    assert all(torch.equal(seen.update[name], found[name]) for name in found)


def test_values_keyed_by_the_parameters_themselves_are_named(net: Net, grads: dict[str, Tensor | None]) -> None:
    found = as_update(net, {p: grads[name] for name, p in net.named_parameters()})
    assert list(found) == list(good(grads))


def test_one_vector_of_all_parameters_is_cut(net: Net) -> None:
    flat = nn.utils.parameters_to_vector(net.parameters())
    for form in (flat, flat.detach().numpy()):
        assert all(torch.equal(t, net.get_parameter(k)) for k, t in as_update(net, form).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept(net: Net, grads: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    found = as_update(net, {name: t.to(dtype) for name, t in good(grads).items()})
    assert {t.dtype for t in found.values()} == {dtype}
    assert Observation(model=net, loss=F.cross_entropy, update=found).dtype == dtype


def test_a_scalar_parameter_takes_a_number() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    for value in (0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        found = as_update(Scaled(), {"scale": value})["scale"]
        assert found.shape == ()
        assert float(found) == 0.5


def norm() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def test_states_before_and_after_give_the_difference_of_parameters() -> None:
    model = norm()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    after = {name: t + 0.5 if t.is_floating_point() else t + 1 for name, t in before.items()}
    arrays = [t.numpy() for t in after.values()]  # as Flower sends them: in the order of the state, buffers among them
    counted = [t for name, t in after.items() if "num_batches" not in name]
    wrapped = {f"module.{name}": t for name, t in after.items()}
    trained = norm()
    trained.load_state_dict(after)
    for form in (after, arrays, counted, wrapped, trained, nn.DataParallel(trained)):
        found = as_update(model, form, before=before)
        assert list(found) == [name for name, _ in model.named_parameters()]
        assert all(torch.allclose(t, torch.full_like(t, 0.5)) for t in found.values())
        update, buffers = state_difference(model, form, before=before)
        assert all(torch.equal(t, found[name]) for name, t in update.items())
        missing = {"1.num_batches_tracked"} if form is counted else set()
        assert set(buffers) == {name for name, _ in model.named_buffers()} - missing
        assert all(torch.equal(t, after[name]) for name, t in buffers.items())
    with pytest.raises(UnbatchError, match=r"the state before lacks '0\.weight'"):
        as_update(model, after, before={k: t for k, t in before.items() if k != "0.weight"})


def test_a_state_after_alone_is_compared_with_the_model_and_may_lack_what_was_not_sent() -> None:
    model = norm()
    after = {name: t + 0.5 for name, t in model.state_dict().items() if name not in ("0.bias", "1.running_var")}
    update, buffers = state_difference(model, after)
    assert list(update) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert list(buffers) == ["1.running_mean", "1.num_batches_tracked"]
    assert all(torch.allclose(t, torch.full_like(t, 0.5)) for t in update.values())


def test_the_state_of_an_earlier_round_may_be_a_list_with_its_buffers() -> None:
    model = norm()
    update = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    past = Earlier(state=list(model.state_dict().values()), update=update)
    known = Knowledge(earlier=[past])
    seen = Observation(model=model, loss=F.cross_entropy, update=update, knowledge=known)
    assert set(seen.knowledge.earlier[0].state) == set(model.state_dict())


def test_a_list_in_the_order_of_the_state_leaves_out_its_buffers() -> None:
    model = norm()
    found = as_update(model, [torch.ones_like(t) for t in model.state_dict().values()])
    assert list(found) == [name for name, _ in model.named_parameters()]


def test_tied_weights_are_taken_once_and_frozen_ones_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    held = {name: torch.ones_like(t) for name, t in model.state_dict().items()}
    assert list(as_update(model, held)) == ["0.weight", "2.weight", "2.bias"]
    assert list(as_update(model, list(held.values()))) == ["0.weight", "2.weight", "2.bias"]
    with pytest.raises(UnbatchError, match=r"two different values for '0\.weight'"):
        as_update(model, held | {"1.weight": torch.zeros(3, 3)})
    model[2].weight.requires_grad_(False)
    assert list(as_update(model, [torch.ones(3, 3), torch.ones(2)])) == ["0.weight", "2.bias"]


REFUSED: dict[str, tuple[Any, str]] = {
    "meta": ({"a.bias": torch.empty(8, device="meta")}, "on the meta device and has no values"),
    "masked": ({"a.bias": np.ma.masked_array(np.ones(8), mask=[True] + [False] * 7)}, "is a masked array"),
    "complex": ({"a.bias": torch.zeros(8, dtype=torch.complex64)}, "updates are real"),
    "text": ({"a.bias": "0.1"}, "'0.1', a str"),
    "ragged": ({"a.bias": [[1.0], [1.0, 2.0]]}, "makes no array of numbers"),
    "objects": ({"a.bias": np.array([None] * 8)}, "an array of object"),
    "an unknown thing": ({"a.bias": object()}, "neither a tensor nor an array"),
    "numbers as names": ({0: torch.ones(8)}, r"keyed by int \(0\)"),
    "a path": ("round-1.npz", "read by Observation.load"),
    "a number": (3, "of type int; give a mapping"),
    "a set": ({"a.bias"}, "of type set"),
    "a model": (Net(), "the update is a model; give its gradients"),
    "nothing": ({}, "the update is empty"),
    "an empty list": ([], "a list of 0 values without names"),
    "nothing but None": ({"a.bias": None}, "the update is empty"),
    "a short list": ([torch.ones(9)], "a list of 1 values without names, and the model has 6 parameters"),
    "another order": ([torch.ones(8), torch.ones(8, 6), *[None] * 4], r"'a.weight' would have the shape \(8,\)"),
    "a matrix": (torch.ones(2, 3), r"one array of shape \(2, 3\)"),
    "integers": ({"a.bias": np.ones(8, dtype=np.int8)}, "updates are floating point"),
    "an unknown prefix": ({"model.a.bias": torch.ones(8)}, "Strip the prefix 'model.'"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_update_is_refused_in_words(net: Net, form: str) -> None:
    sent, words = REFUSED[form]
    with pytest.raises(UnbatchError, match=words):
        as_update(net, sent)
    if sent == {}:  # a released model, after whose training nothing was sent
        assert Observation(model=net, loss=F.cross_entropy, update=sent).released
        return
    with pytest.raises(UnbatchError, match=words):
        Observation(model=net, loss=F.cross_entropy, update=sent)


def test_buffers_are_called_buffers_and_said_where_they_belong() -> None:
    model = norm()
    state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    words = r"'1.running_mean', .* are buffers of the model .* Knowledge\(buffers="
    with pytest.raises(UnbatchError, match=words):
        Observation(model=model, loss=F.cross_entropy, update=state)
    update = as_update(model, {k: t for k, t in state.items() if "running" not in k and "num" not in k})
    sent = {"module.1.running_mean": np.ones(5, dtype=np.float32)}
    seen = Observation(model=model, loss=F.cross_entropy, update=update, knowledge=Knowledge(buffers=sent))
    assert torch.equal(seen.knowledge.buffers["1.running_mean"], torch.ones(5))
    for wrong, said in (
        ({"1.mean": torch.ones(5)}, "names '1.mean'"),
        ({"1.running_mean": torch.ones(4)}, "has shape"),
    ):
        with pytest.raises(UnbatchError, match=said):
            Observation(model=model, loss=F.cross_entropy, update=update, knowledge=Knowledge(buffers=wrong))


def test_earlier_rounds_take_every_form_as_well(net: Net, grads: dict[str, Tensor | None]) -> None:
    state = {f"module.{name}": t.numpy() for name, t in net.state_dict().items()}
    past = Earlier(state=state, update=list(grads.values()))
    seen = Observation(model=net, loss=F.cross_entropy, update=grads, knowledge=Knowledge(earlier=[past]))
    assert len(seen.exchanges) == 2
    assert torch.equal(seen.exchanges[0].update["a.weight"], seen.update["a.weight"])


def test_a_guard_takes_what_autograd_gives(net: Net) -> None:
    x, y = torch.rand(1, 6), torch.tensor([1])
    sent = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()), allow_unused=True)
    with pytest.raises(unbatch.Leak, match="Example 0 is recovered exactly"):
        unbatch.guard(sent, model=net, loss=F.cross_entropy, inputs=x, labels=y, attacks="bias-ratio")


def test_a_model_with_sparse_gradients_is_observed() -> None:
    model = nn.Sequential(nn.EmbeddingBag(20, 6, sparse=True), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.arange(10).reshape(2, 5), torch.tensor([0, 2])
    seen, _ = observe(model, F.cross_entropy, x, y)
    assert seen.update["0.weight"].any(1).tolist() == [True] * 10 + [False] * 10
    F.cross_entropy(model(x), y).backward()
    again = as_update(model, {name: p.grad for name, p in model.named_parameters()})
    assert torch.allclose(again["0.weight"], seen.update["0.weight"])


# Models as training code holds them.


def net_of_pictures() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 3))


def in_grad_samples(model: nn.Module) -> nn.Module:
    opacus = pytest.importorskip("opacus")
    held = opacus.GradSampleModule(model)
    F.cross_entropy(held(torch.rand(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
    held.zero_grad()
    return held


WRAPPED: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": partial(torch.compile, backend="eager"),
    "compiled in place": lambda m: (m.compile(), m)[1],
    "compiled, then DataParallel": lambda m: nn.DataParallel(torch.compile(m)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "GradSampleModule": in_grad_samples,
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_models_are_audited_under_the_network_s_own_names(wrapper: str) -> None:
    x, y = torch.rand(1, 1, 8, 8), torch.tensor([1])
    model = WRAPPED[wrapper](net_of_pictures())
    seen, _ = observe(model, F.cross_entropy, x, y)
    plain, _ = observe(net_of_pictures(), F.cross_entropy, x, y)
    assert list(seen.update) == list(plain.update)
    assert all(torch.allclose(seen.update[k], plain.update[k]) for k in plain.update)
    setting = Setting(model=model, loss=F.cross_entropy, inputs=x, labels=y)
    assert unbatch.audit(setting, attacks="bias-ratio", analyses=[]).recovered()
    names = [name for name, _ in model.named_parameters()]
    again = Observation(model=model, loss=F.cross_entropy, update=dict(zip(names, plain.update.values(), strict=True)))
    assert list(again.update) == list(plain.update)


def test_a_distributed_model_is_unwrapped(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net_of_pictures())
        seen, _ = observe(model, F.cross_entropy, torch.rand(1, 1, 8, 8), torch.tensor([1]))
        assert list(seen.update) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_part_that_is_wrapped_is_unwrapped_in_a_copy() -> None:
    model = nn.Sequential(torch.compile(net_of_pictures()), nn.Linear(3, 2))
    seen, _ = observe(model, F.cross_entropy, torch.rand(1, 1, 8, 8), torch.tensor([1]))
    assert next(iter(seen.update)) == "0.1.weight"
    assert "0._orig_mod.1.weight" in dict(model.named_parameters())


def fully_sharded() -> nn.Module:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = net_of_pictures()

    return FullyShardedDataParallel()


NOT_RUN: dict[str, tuple[Callable[[], Any], str]] = {
    "all frozen": (lambda: net_of_pictures().requires_grad_(False), "all parameters of the model are frozen"),
    "scripted": (lambda: torch.jit.script(net_of_pictures()), "scripted or traced"),
    "a scripted part": (lambda: nn.Sequential(torch.jit.script(net_of_pictures())), "scripted or traced"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "'1.weight' is not initialised"),
    "meta": (lambda: net_of_pictures().to("meta"), "on the meta device and has no values"),
    "sharded": (fully_sharded, "shards that lie on several machines"),
    "a class": (lambda: Net, "the class Net; give an nn.Module"),
    "no parameters": (nn.Flatten, "has no parameters"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*is deprecated")
@pytest.mark.parametrize("kind", NOT_RUN)
def test_models_that_no_guess_can_be_run_on_are_refused_in_words(kind: str) -> None:
    make, words = NOT_RUN[kind]
    with pytest.raises(UnbatchError, match=words):
        observe(make(), F.cross_entropy, torch.rand(1, 1, 8, 8), torch.tensor([1]))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*weight_norm:DeprecationWarning")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        lambda layer: layer.weight.requires_grad_(False),
    ],
    ids=["weight norm", "spectral norm", "old weight norm", "partly frozen"],
)
def test_parametrised_and_partly_frozen_models_are_audited(change: Callable[[nn.Module], object]) -> None:
    model, x, y = net_of_pictures(), torch.rand(1, 1, 8, 8), torch.tensor([1])
    change(model[3])
    setting = Setting(model=model, loss=F.cross_entropy, inputs=x, labels=y)
    record = unbatch.audit(setting, attacks="bias-ratio", analyses=[])
    assert record.recovered(), record.runs[0].words


def test_a_checkpoint_and_what_an_optimiser_keeps_are_named_with_what_to_hand_over() -> None:
    model = nn.Linear(4, 3)
    optimiser = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(torch.rand(2, 4)), torch.tensor([0, 2])).backward()
    optimiser.step()
    state, kept = model.state_dict(), optimiser.state_dict()
    for checkpoint in ({"model": state, "optimizer": kept}, {"epoch": 3, "state_dict": state}, {"net": dict(state)}):
        with pytest.raises(
            UnbatchError, match=r"is a checkpoint: .* as_update\(model, held\['(model|state_dict|net)'\], before="
        ):
            as_update(model, checkpoint)
    for theirs in (kept, optimiser.state, kept["state"], {"weight": {"exp_avg": state["weight"]}}):
        with pytest.raises(UnbatchError, match=r"the state of an optimiser.*Give the gradients"):
            as_update(model, theirs)
    assert set(as_update(model, {name: p.grad for name, p in model.named_parameters()})) == {"weight", "bias"}
