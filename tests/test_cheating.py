"""A server that cheats: rounds in which it plants anew, and clients who are sent different models."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch
from unbatch.attack import NOTHING, ActiveAttack, Demo, Guarantee
from unbatch.auditing.cheating import planted_exchange
from unbatch.case import Case
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge
from unbatch.observation import Observation
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction


class Counting(ActiveAttack):
    """Sends a larger bias in each round, until it has seen three."""

    family: ClassVar[str] = "test"
    guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[str]] = frozenset({"earlier"})
    uses: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    demo: ClassVar[Demo] = Demo(case="digits:batch=2,width=4")

    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        assert known.batch_size == 2
        assert "input_shape" not in known  # which it did not declare
        return model

    def replant(self, seen: Observation, rng: torch.Generator) -> nn.Module | None:
        if len(seen.knowledge.get("earlier", ())) == 2:
            return None
        assert "input_shape" not in seen.knowledge
        following = Case.parse("digits:batch=2,width=4").setting().model
        with torch.no_grad():
            following.get_parameter("head.bias").fill_(1.0 + len(seen.knowledge.get("earlier", ())))
        return following

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        biases = [float(past.state["head.bias"][0]) for past in view.knowledge.earlier]
        assert biases[1:] == [1.0]
        assert float(view.model.get_parameter("head.bias").detach()[0]) == 2.0
        return Reconstruction(inputs=None, labels=torch.tensor([0]))


def test_a_server_plants_anew_in_each_round_and_ends_when_it_has_seen_enough() -> None:
    setting = Case.parse("digits:batch=2,width=4").setting()
    object.__setattr__(setting, "protocol", Protocol(rounds=9))
    seen, truth = planted_exchange(Counting(), setting)
    assert len(seen.knowledge.earlier) == 2
    for each in seen.exchanges:  # the client took an honest step on each of them
        assert each.residual(truth.inputs, truth.labels) < 1e-5
    record = unbatch.audit(setting, attacks=[Counting()], analyses=())
    assert [(run.status, run.adaptive) for run in record.runs] == [("done", True)], record.runs[0].words


class Muted(nn.Linear):
    """The target's model, and for all other clients one that sends nothing back to the weight."""

    def for_client(self, number: int) -> nn.Module:
        if number == 1:
            return self
        other = Muted(2, 2)
        other.load_state_dict(self.state_dict())
        other.forward = lambda x: 0 * F.linear(x, other.weight) + other.bias  # type: ignore[method-assign]
        return other


def test_clients_who_are_no_targets_can_be_muted_under_a_sum() -> None:
    model, x, y = Muted(2, 2), torch.rand(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    seen, _ = unbatch.observe(model, F.cross_entropy, x, y, defences="secure-aggregation:clients=3")
    alone, _ = unbatch.observe(model, F.cross_entropy, x[2:4], y[2:4])
    torch.testing.assert_close(seen.update["weight"], alone.update["weight"])
    assert seen.residual(x, y) == pytest.approx(0.0, abs=1e-6)
