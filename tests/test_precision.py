"""Models and losses that cast, attention and recurrent layers: audited in float64 and differentiated twice all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import Attack, NotApplicable, Setting, observe
from unbatch.inversion.determined_share import determined
from unbatch.inversion.fisher import doubled
from unbatch.network.dense import forward
from unbatch.network.precision import Lifted, in_double, loss_value, outputs_of

X, Y = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2])


class Net(nn.Module):
    """Two dense layers; `cast` is what happens to the input, `after` to the output."""

    def __init__(self, cast: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g = nn.Linear(64, 24), nn.Linear(24, 10)
        self.cast, self.after = cast, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.g(torch.tanh(self.f(self.cast(x.flatten(1))))))


def by_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype != torch.float32):
        return F.linear(x, torch.eye(64))


def written(x: Tensor) -> Tensor:
    whole = torch.zeros(len(x), 64)
    whole[:, :32] = x[:, :32].float()
    whole[:, 32:] += x[:, 32:]
    return whole


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "to a type": lambda x: x.to(torch.float32),
    "to a type by keyword": lambda x: x.to(dtype=torch.float32),
    "type": lambda x: x.type(torch.float32),
    "type by name": lambda x: x.type("torch.FloatTensor"),
    "a class of tensors": lambda x: x.type(torch.FloatTensor),
    "a constant": lambda x: x @ torch.eye(64),
    "a constant of the default type": lambda x: torch.cat([x[:, :60], torch.zeros(len(x), 4)], 1) + torch.tensor(0.5),
    "the type of a constant": lambda x: x.type_as(torch.zeros(1)),
    "softmax in float32": lambda x: x + F.softmax(x, 1, dtype=torch.float32) + torch.softmax(x, 1, torch.float32),
    "one-hot numbers": lambda x: x + F.one_hot(torch.arange(len(x)), 64).float(),
    "autocast": by_autocast,
    "written into zeros": written,
}


@pytest.mark.parametrize("name", CASTS)
def test_a_forward_that_casts_is_computed_in_float64(name: str) -> None:
    model = Net(CASTS[name], after=lambda z: z.float())
    double = outputs_of(in_double(model), X.double())
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), model(X), atol=1e-5)
    moved = outputs_of(in_double(model), X.double() + 1e-10) - double
    assert 1e-13 < float(moved.detach().abs().max()) < 1e-8  # in float32 it would be 0, or 1e-7


@pytest.mark.parametrize("name", ["float", "a constant", "written into zeros"])
def test_attacks_recover_behind_a_cast(name: str) -> None:
    model = Net(CASTS[name])
    seen, _ = observe(model, F.cross_entropy, X, Y)
    found = Attack.parse("gradient-matching")(seen)
    assert found.trace["converged"]
    assert float(found.trace["residual"]) < 1e-5
    if name == "float":  # behind it the input reaches the first layer as it is
        exact = Attack.parse("unmix")(seen)
        assert exact.inputs is not None
        order = exact.inputs.flatten(1).argsort(0)[:, 0]
        assert torch.allclose(exact.inputs[order], X[X.flatten(1).argsort(0)[:, 0]].double(), atol=1e-4)


def test_halves_inside_are_recovered_to_their_rounding() -> None:
    model = Net(lambda x: x.half().float(), after=lambda z: z.bfloat16().float())
    setting = Setting(model=model, loss=F.cross_entropy, inputs=X[:1], labels=Y[:1])
    record = unbatch.audit(setting, attacks="gradient-matching:iterations=200", analyses=[])
    assert record.runs[0].ran, record.runs[0].words
    assert record.runs[0].examples[0].scores["psnr"] > 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_every_precision_are_matched(dtype: torch.dtype) -> None:
    model = Net(lambda x: x).to(dtype)
    seen, _ = observe(model, F.cross_entropy, X[:1], Y[:1])
    assert seen.dtype == dtype
    found = Attack.parse("gradient-matching")(seen)
    assert found.inputs is not None
    assert float((found.inputs - X[:1]).norm() / X[:1].norm()) < 0.1


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, labels: F.cross_entropy(outputs.float(), labels),
        nn.CrossEntropyLoss(weight=torch.linspace(1, 2, 10)),
        lambda outputs, labels: -(outputs.log_softmax(1, torch.float32) * torch.eye(10)[labels]).sum(1).mean(),
    ],
    ids=["casts", "weighs classes in float32", "constants"],
)
def test_losses_that_cast_are_computed_in_float64(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    outputs = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    assert loss_value(loss, outputs, Y).dtype == torch.float32
    value = loss_value(loss, outputs.double(), Y)
    assert value.dtype == torch.float64
    assert torch.allclose(value.float(), loss(outputs, Y))
    seen, _ = observe(Net(lambda x: x), loss, X[:1], Y[:1])
    assert Attack.parse("gradient-matching")(seen).trace["converged"]


class OnlyFloat(torch.autograd.Function):
    """An operation of a kind that knows float32 alone, as kernels of one's own do."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("this kernel takes Float")
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


def test_what_runs_in_its_own_precision_alone_is_matched_there_and_named_elsewhere() -> None:
    model = Net(OnlyFloat.apply)
    with pytest.raises(NotApplicable, match=r"runs in float32 alone: this kernel takes Float"):
        outputs_of(in_double(model), X.double())
    with pytest.raises(NotApplicable, match="runs in float32 alone"):
        forward(in_double(model), X)
    setting = Setting(model=model, loss=F.cross_entropy, inputs=X[:1], labels=Y[:1])
    record = unbatch.audit(setting, attacks=["gradient-matching", "unmix"], analyses=[], budget=3)
    assert record.runs[0].residual is not None
    assert record.runs[0].residual < 1e-3
    assert all(run.status != "failed" for run in record.runs), [run.words for run in record.runs]


def test_nothing_is_lifted_where_nothing_casts() -> None:
    model, x = in_double(Net(lambda x: x)), X.double()
    with Lifted() as mode:
        outputs_of(model, x)
    assert not mode.lifted
    with Lifted() as mode:
        bits = torch.ones(2, dtype=torch.float64).view(torch.int64)
    assert bits.dtype == torch.int64


class Attending(nn.Module):
    """Attention over four patches of a picture."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.p, self.h = kind, nn.Linear(16, 16), nn.Linear(16, 3)
        if kind == "encoder":
            self.a = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
        elif kind == "multi-head":
            self.a = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.p(x.reshape(len(x), 4, 16))
        if self.kind == "encoder":
            z = self.a(z)
        elif self.kind == "multi-head":
            z = self.a(z, z, z, need_weights=False)[0]
        else:
            z = F.scaled_dot_product_attention(z[:, None], z[:, None], z[:, None], is_causal=self.kind == "causal")[
                :, 0
            ]
        return self.h(z.mean(1))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["encoder", "multi-head", "plain", "causal"])
def test_attention_is_matched_by_the_kernel_that_differentiates_twice(kind: str, mode: str) -> None:
    model = Attending(kind).train(mode == "train")
    seen, _ = observe(model, F.cross_entropy, X[:1], Y[:1])
    slopes = []
    for obs in (seen, doubled(seen)):
        x = X[:1].to(obs.dtype, copy=True).requires_grad_()
        update = obs.simulate(x, Y[:1], create_graph=True)
        slopes += torch.autograd.grad(sum((u.square().sum() for u in update.values()), torch.zeros(())), x)
    assert bool(slopes[0].any())
    assert torch.allclose(slopes[0].double(), slopes[1], atol=1e-5 * float(slopes[1].abs().max()))
    assert 0 < determined(seen.model, seen.loss, X[:1], Y[:1], mode=mode).share <= 1  # forward over reverse
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_transformer_is_audited_as_under_the_math_kernel() -> None:
    setting = Setting(model=Attending("encoder"), loss=F.cross_entropy, inputs=X[:1], labels=Y[:1])
    record = unbatch.audit(setting, attacks="gradient-matching", budget=3)
    assert record.runs[0].ran, record.runs[0].words
    assert record.runs[0].residual is not None
    assert record.runs[0].residual < 0.5
    assert not [done for done in record.analyses if done.status == "failed"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_with_states_made_in_the_forward_are_matched(kind: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.r, self.h = kind(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            start = torch.zeros(1, len(x), 8)
            return self.h(self.r(x, (start, start) if kind is nn.LSTM else start)[0][:, -1])

    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    seen, _ = observe(Recurrent(), F.cross_entropy, x, Y[:1])
    assert Attack.parse("gradient-matching:iterations=1")(seen).trace["residual"] < 1e-3
