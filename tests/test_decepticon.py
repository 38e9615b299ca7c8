import pytest
import torch
from torch import nn

from unbatch import NotApplicable, Observation, Truth, observe
from unbatch.attacks import Decepticon
from unbatch.case import Case
from unbatch.inversion.tokens.imprints import SPARE
from unbatch.models.transformer import build_transformer
from unbatch.reconstruction import certified


def planted(spec: str) -> tuple[Observation, Truth]:
    s = Case.parse(spec).setting()
    model = Decepticon().plant(s.model, torch.Generator().manual_seed(1))
    return observe(model, s.loss, s.inputs, s.labels, knowledge=s.domain.public())


def sentences(inputs: torch.Tensor | None) -> set[tuple[int, ...]]:
    assert inputs is not None
    return {tuple(row) for row in inputs.tolist()}


@pytest.mark.parametrize(
    "spec",
    [
        "text:batch=4,width=64,depth=1,vocabulary=500",
        "text:batch=4,width=64,model=bert,depth=1,vocabulary=500",
        "text:batch=2,width=64,depth=1,vocabulary=500,task=next",
    ],
)
def test_sentences_are_read_and_claimed(spec: str) -> None:
    seen, truth = planted(spec)
    found = certified(Decepticon()(seen))
    assert len(found) == len(truth.inputs)
    assert sentences(found.inputs) == sentences(truth.inputs)


def test_a_wrong_update_is_not_claimed() -> None:
    """One tensor at twice its size: the sentences are read all the same, and nothing is claimed of them."""
    seen, _ = planted("text:batch=2,width=64,depth=1,vocabulary=500")
    doubled = dict(seen.update) | {"head.weight": 2 * seen.update["head.weight"]}
    found = Decepticon()(Observation(model=seen.model, loss=seen.loss, update=doubled, knowledge=seen.knowledge))
    assert found.bound is not None
    assert not bool(found.bound.isfinite().any())


def test_the_head_is_left_as_it_was() -> None:
    model = Case.parse("text:width=64,depth=1,vocabulary=500").setting().model
    made = Decepticon().plant(model, torch.Generator())
    changed = {k for k, v in made.state_dict().items() if not torch.equal(v, model.state_dict()[k])}
    assert not changed & {"head.weight", "head.bias", "norm.weight"}
    assert not bool(made.get_parameter("tokens.weight")[:, -SPARE:].any())


def test_other_models_are_refused() -> None:
    narrow = build_transformer("gpt", 6, 50, 3, depth=1, width=16, heads=2, rng=torch.Generator())
    with pytest.raises(NotApplicable, match="to be spared"):
        Decepticon().plant(narrow, torch.Generator())
    with pytest.raises(NotApplicable, match="own transformers"):
        Decepticon().plant(nn.Linear(3, 3), torch.Generator())
    seen, _ = observe(narrow, nn.functional.cross_entropy, torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([1]))
    with pytest.raises(NotApplicable, match="not alike"):
        Decepticon()(seen)
