"""Models of several inputs: joined into one, audited, and split again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch
from unbatch import UnbatchError
from unbatch.adapters.several_inputs import InputParts

BY_NAME = InputParts({"picture": (1, 4, 4), "row": (5,)})
IN_ORDER = InputParts([(1, 4, 4), (5,)])


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(21, 64), nn.Linear(64, 3)

    def forward(self, picture: Tensor, row: Tensor) -> Tensor:
        joined = torch.cat([picture.flatten(1), 2 * row], 1)
        found: Tensor = self.last(torch.relu(self.first(joined)))
        return found


class OfMapping(ByKeyword):
    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().forward(batch["picture"], batch["row"])


class OfTuple(ByKeyword):
    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*batch)


def batch(n: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return {"picture": torch.rand(n, 1, 4, 4, generator=rng), "row": torch.rand(n, 5, generator=rng)}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [(ByKeyword, BY_NAME), (ByKeyword, IN_ORDER), (OfMapping, BY_NAME), (OfTuple, IN_ORDER)],
)
@pytest.mark.parametrize("n", [1, 3])
def test_every_part_is_recovered_and_certified(kind: type[nn.Module], parts: InputParts, n: int) -> None:
    torch.manual_seed(0)
    model, given = kind(), batch(n)
    x = parts.joined(given if parts is BY_NAME else list(given.values()))
    one = parts.one_input(model)
    assert list(dict(one.named_parameters())) == list(dict(model.named_parameters()))
    assert next(one.parameters()) is next(model.parameters())
    setting = unbatch.Setting(model=one, loss=F.cross_entropy, inputs=x, labels=torch.arange(n) % 3)
    audit = unbatch.audit(setting, attacks=["bias-ratio", "unmix"], analyses=())
    assert len(audit.recovered()) == n, audit.verdict()
    assert any(e.bound is not None for run in audit.runs for e in run.examples)


def test_a_capture_of_the_model_itself_is_audited_through_it() -> None:
    torch.manual_seed(0)
    model, given, y = ByKeyword(), batch(1), torch.tensor([2])
    gradient = torch.autograd.grad(F.cross_entropy(model(**given), y), list(model.parameters()))
    seen = unbatch.Observation(
        model=BY_NAME.one_input(model),
        loss=F.cross_entropy,
        update=dict(zip(dict(model.named_parameters()), gradient, strict=True)),
        knowledge=unbatch.Knowledge(input_shape=(21,), batch_size=1),
    )
    found = unbatch.attacks.BiasRatio()(seen)
    parts = BY_NAME.split(found.inputs)  # type: ignore[arg-type]
    assert torch.allclose(parts["picture"].to(given["picture"]), given["picture"], atol=1e-4)  # type: ignore[call-overload]
    assert torch.allclose(parts["row"].to(given["row"]), given["row"], atol=1e-4)  # type: ignore[call-overload]


def test_what_does_not_fit_is_said() -> None:
    given = batch(2)
    with pytest.raises(UnbatchError, match="has the parts picture, and picture, row are asked for"):
        BY_NAME.joined({"picture": given["picture"]})
    with pytest.raises(UnbatchError, match=r"part row is \(2, 1, 4, 4\), and \(n, 5\) is asked for"):
        BY_NAME.joined(given | {"row": given["picture"]})
    with pytest.raises(UnbatchError, match="part row holds whole numbers"):
        BY_NAME.joined(given | {"row": given["row"].long()})
    with pytest.raises(UnbatchError, match="of 2, 1 examples"):
        BY_NAME.joined(given | {"row": given["row"][:1]})
    with pytest.raises(UnbatchError, match="ByKeyword does not take these parts"):
        InputParts({"picture": (1, 4, 4), "line": (5,)}).one_input(ByKeyword())
    model = ByKeyword().train()
    BY_NAME.one_input(model)
    assert model.training
