"""What a person sees who types a name: one short line that dumps no tensor and no picture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from audits import captured, designed, exact, features, hostile, not_recovered, nothing_ran, png, table

import unbatch
from unbatch import Case, Knowledge, Protocol, observe
from unbatch.analysis import Bound
from unbatch.auditing.harden import Hardening, Tried
from unbatch.defence import Round
from unbatch.metric import Matching

MOST = 250  # characters


def shown() -> Iterator[object]:
    """One or more of everything public that a person can hold."""
    case = Case.parse("digits:batch=2,width=16")
    s = case.setting()
    protocol = Protocol(rounds=3, server_rate=0.1)
    obs, truth = observe(s.model, s.loss, s.inputs, s.labels, protocol=protocol, defences=["noise:sigma=0.001", "clip"])
    single = Case.parse("digits:width=16").setting()
    found = unbatch.attacks.BiasRatio()(observe(single.model, single.loss, single.inputs, single.labels)[0])
    yield from (case, s, s.domain, s.protocol, protocol, obs, truth, obs.knowledge.earlier[0], found)
    yield unbatch.Table(shape=(30,), columns=["age"] * 30)
    yield Knowledge(buffers={"mean": torch.zeros(99)}, labels=torch.arange(99), log_prob=lambda seen, clean: seen)
    yield obs.knowledge
    yield unbatch.inspect(s.model, data=(s.inputs, s.labels))
    yield unbatch.Reconstruction(inputs=None, labels=torch.arange(99))
    yield unbatch.Reconstruction(inputs=torch.zeros(3, 5), layer="fc", labels=torch.arange(3), bound=torch.ones(3))
    yield unbatch.Tokens(shape=(7,), high=9.0, vocabulary=["word"] * 1000)
    yield case.pool(torch.Generator().manual_seed(0))
    yield Round(model=s.model, loss=s.loss, inputs=s.inputs, labels=s.labels, protocol=protocol, rng=torch.Generator())
    yield Matching(found=torch.arange(2), true=torch.arange(2), inputs=torch.zeros(2, 9), factor=torch.ones(2))
    yield unbatch.Privacy(clip=1.0, noise_multiplier=1.0, sampling_rate=0.5, steps=1, delta=1e-5)
    yield Bound(name="B", value=0.1, scope="any", assumptions="long " * 99, source="", picture=png(1))
    tried = Tried(family="clip", strength=0.1, unit="", batch=2, defences=["clip"], verdict="leaks", words="why " * 99)
    yield from (
        tried,
        Hardening(case="digits", target=15.0, rounds=3, attacks=["unmix"] * 9, analyses=[], tried=[tried] * 9),
    )
    for audit in (exact(), not_recovered(), nothing_ran(), table(), captured(), designed(), features(), hostile()):
        yield audit
        yield from (
            *audit.runs,
            *audit.clients,
            *audit.flags,
            *audit.risks,
            *audit.bounds,
            *audit.verdicts,
            *audit.remedies,
        )
        yield from (example for run in audit.runs for example in run.examples)
    yield from (plugin() for plugin in unbatch.Attack.find().values())


SHOWN = list(shown())


@pytest.mark.parametrize("held", SHOWN, ids=lambda held: type(held).__name__)
def test_a_repr_is_one_short_line(held: object) -> None:
    for words in (repr(held), str(held)):
        assert len(words.splitlines()) == 1
        assert len(words) <= MOST
        assert "base64" not in words
        assert "tensor(" not in words
        assert " at 0x" not in words
    assert type(held).__name__ in repr(held)


def test_every_public_class_is_shown() -> None:
    public = [held for name in unbatch.__all__ if isinstance(held := getattr(unbatch, name), type)]
    held_apart = {unbatch.Guarantee, *(kind for kind in public if issubclass(kind, Exception))}
    instances = [kind for kind in public if kind not in held_apart]
    kinds = [
        unbatch.Analysis,
        unbatch.Defence,
        unbatch.Metric,
        unbatch.LayerRule,
        unbatch.ActiveAttack,
        unbatch.Sign,
    ]  # as Attack: one repr
    missing = [kind for kind in instances if kind not in kinds and not any(isinstance(held, kind) for held in SHOWN)]
    assert not missing


def test_what_a_repr_says() -> None:
    case = Case.parse("digits:batch=2,width=16")
    s = case.setting()
    obs, truth = observe(s.model, s.loss, s.inputs, s.labels)
    assert repr(case) == "Digits(batch=2, width=16)"
    assert repr(s) == "<Setting digits:batch=2,width=16: 2 images [1, 8, 8], Sequential of 1,210 parameters>"
    assert repr(truth) == "<Truth: 2 examples [1, 8, 8]>"
    assert repr(obs).startswith("<Observation of Sequential: 1,210 entries; known besides: input_shape, batch_size, ")
    assert repr(Protocol()) == "Protocol()"
    assert repr(Protocol(local_steps=2)) == "Protocol(local_steps=2)"
    assert (
        repr(Knowledge(labels=torch.arange(3), buffers={}))
        == "Knowledge(labels=<torch.int64 (3,)>, buffers=<0 tensors>)"
    )
    bounded = unbatch.Reconstruction(inputs=torch.zeros(2, 3), labels=torch.zeros(2), bound=torch.tensor([1e-6, 2e-6]))
    assert repr(bounded) == "<Reconstruction: 2 examples [3], with labels, bounds up to 2e-06>"
    assert repr(exact()) == (
        "<Audit of photos:batch=2: 1 of 2 private images recovered exactly; anyone who sees this update has it.>"
    )
    assert repr(exact().runs[0]) == "<Run of bias-ratio on client 0, seed 0: done, 1 of 2 examples exact>"
    assert repr(exact().runs[0].examples[0]) == (
        "<Example 0: recovered exactly, error 2e-07, bound 3e-07, psnr 131, l2-error 2e-07>"
    )
