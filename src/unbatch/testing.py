"""Testing: the contract that every plugin keeps, for third parties to hold their own plugins to.

    from unbatch.testing import check_attack
    def test_mine():
        check_attack(MyAttack)

Each check raises AssertionError with a sentence that says what is broken.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.analysis import Analysis, Bound, LayerRisk, Verdict
from unbatch.attack import ActiveAttack, Attack, Demo, Guarantee
from unbatch.auditing.cheating import planted_exchange
from unbatch.auditing.client import observe
from unbatch.auditing.run import audit
from unbatch.case import Case, Setting
from unbatch.defence import Defence
from unbatch.domain import Images, Table, Tokens
from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.received import Received
from unbatch.knowledge import Knowledge
from unbatch.layer import LayerRule
from unbatch.metric import Metric
from unbatch.observation import Observation
from unbatch.plugin import Plugin
from unbatch.privacy import Privacy
from unbatch.reconstruction import Reconstruction
from unbatch.reporting.results import Status
from unbatch.sign import Sign
from unbatch.truth import Truth


def check_plugin(plugin: type[Plugin]) -> None:
    """Final, documented, one option a field with a description, and the same after parse(str(...))."""
    _hold(getattr(plugin, "__final__", False), plugin, "is not decorated with typing.final")
    _hold(bool(inspect.getdoc(plugin)), plugin, "has no docstring")
    for option in plugin.options():
        _hold(bool(option.description), plugin, f"option {option.name!r} has no description")
    made = plugin()
    _hold(str(made).partition(":")[0] == plugin.name, plugin, f"is spelt {str(made)!r}, not {plugin.name!r}")
    if plugin.name in plugin.find():
        _hold(plugin.parse(str(made)) == made, plugin, "is not the same after parse(str(...))")
    try:
        plugin.model_validate({"no_such_option": 1})
    except ValueError:
        return
    raise AssertionError(f"{plugin.name} takes an option that it has not.")


def check_attack(attack: type[Attack]) -> None:
    """The plugin contract, and on the attack's own demo: its floors, its guarantee, determinism, and no side effects."""
    check_plugin(attack)
    _hold(not attack.needs & attack.uses, attack, f"both needs and uses {sorted(attack.needs & attack.uses)}")
    _hold(isinstance(attack.guarantee, Guarantee), attack, "has no guarantee of type Guarantee")
    _hold(bool(attack.family and attack.paper), attack, "names no family or no paper")
    demo = attack.demo
    setting = demo_setting(demo)
    made = attack.parse(f"{attack.name}:{demo.options}") if attack.name in attack.find() else attack()
    obs, _ = _exchange(setting, demo, made)
    for field in sorted(attack.needs):
        _hold(_refuses(made, obs.only(*(set(obs.knowledge) - {field})), field), attack, f"runs without {field!r}")
    state = {k: v.clone() for k, v in obs.model.state_dict().items()}
    modes = [module.training for module in obs.model.modules()]
    with _global_seed(1):
        first = made(obs, seed=3)
    with _global_seed(2):
        second = made(obs.only(*(attack.needs | attack.uses)), seed=3)
    _hold(_same(first, second), attack, "gives two answers for one seed: it reads a generator or knowledge not its own")
    kept = all(torch.equal(v, state[k]) for k, v in obs.model.state_dict().items())
    _hold(kept, attack, "changes the model's parameters or buffers")
    _hold(
        modes == [module.training for module in obs.model.modules()], attack, "changes the model's train or eval mode"
    )
    record = audit(setting, attacks=[made], defences=demo.defences, analyses=())
    run = record.runs[0]
    _hold(run.status == Status.DONE, attack, f"does not run on its own demo: {run.status}: {run.words}")
    raised = {flag.name for flag in record.flags} & {"exact-claim-fails", "bound-violated"}
    _hold(not raised, attack, f"raises {', '.join(raised)} on its own demo")
    if attack.guarantee is Guarantee.EXACT:
        errors = [e.error for e in run.examples]
        _hold(any(e is not None for e in errors), attack, "is exact and recovers nothing on its own demo")
    for name, floor in demo.floors.items():
        metric = record.metrics[name]
        scores = [example.scores.get(name) for example in run.examples]
        met = all(s is not None and (s >= floor if metric.higher_is_better else s <= floor) for s in scores)
        _hold(met, attack, f"misses its floor {name} = {floor} on its demo: {scores}")


def check_defence(defence: type[Defence]) -> None:
    """The plugin contract; the identity at zero strength, bitwise and by its own word; the same update for one seed; no
    trace on the model.
    """
    check_plugin(defence)
    _hold(bool(defence.paper), defence, "names no paper")
    setting = Case.parse("digits:batch=4,width=16").setting()

    def sent(spec: Defence | None, seed: int = 0) -> Mapping[str, Tensor]:
        defences = [spec] if spec is not None else []
        return observe(setting.model, setting.loss, setting.inputs, setting.labels, defences=defences, seed=seed)[
            0
        ].update

    before = {k: v.clone() for k, v in setting.model.state_dict().items()}
    clean = sent(None)
    still = defence.parse(defence.identity) if defence.name in defence.find() else defence()
    _hold(_equal(sent(still), clean), defence, f"{defence.identity!r} changes the update")
    _hold(not still.effects(), defence, f"{defence.identity!r} says of itself {', '.join(still.effects())}")
    made = defence()
    _hold(_equal(sent(made), sent(made)), defence, "gives two updates for one seed")
    _hold(set(sent(made)) == set(clean), defence, "changes the names in the update")
    if defence.random:
        _hold(not _equal(sent(made, 0), sent(made, 1)), defence, "is declared random and ignores the seed")
    kept = all(torch.equal(v, before[k]) for k, v in setting.model.state_dict().items())
    _hold(kept, defence, "changes the client's model")
    known = made.public(Knowledge(batch_size=4))
    _hold(isinstance(known, Knowledge), defence, "publishes something that is no Knowledge")


def check_sign(sign: type[Sign]) -> None:
    """The plugin contract; a limit beyond what honest models gave, within which a small honest model stays."""
    check_plugin(sign)
    _hold(bool(sign.paper), sign, "names no paper")
    _hold(sign.honest < sign.limit, sign, f"has a limit of {sign.limit}, and honest models gave {sign.honest}")
    setting = Case.parse("digits:batch=32,width=16").setting()
    seen = Received.of(setting.model, inputs=setting.inputs, labels=setting.labels, loss=setting.loss)
    found = sign()(seen)
    _hold(found is None or found.value <= sign.limit, sign, f"is raised by an honest model: {found}")
    _hold(sign()(seen) == found, sign, "gives two readings of one model")


def check_metric(metric: type[Metric]) -> None:
    """The plugin contract; its best score for equal examples, a worse one for others, one score a pair."""
    check_plugin(metric)
    rng = torch.Generator().manual_seed(0)
    if metric.subject == "labels":
        true, other = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    else:
        true, other = (torch.rand(3, 3, 16, 16, generator=rng, dtype=torch.float64) for _ in range(2))
    made = metric().on(Images(shape=(3, 16, 16)))
    if made is None:  # then it is about the categories of rows
        true, other = true.flatten(1), other.flatten(1)
        made = metric().on(Table(shape=(768,), categories=(tuple(range(400)), tuple(range(400, 768)))))
    if made is None:  # then about texts
        true, other = (torch.randint(9, (3, 12), generator=rng) for _ in range(2))
        made = metric().on(Tokens(shape=(12,), high=8))
    if made is None:
        raise AssertionError(f"{metric.name} has no meaning on 16x16 pictures, rows with categories, or 12 tokens.")
    best, worse = made.score(true, true), made.score(other, true)
    _hold(best.shape == (3,) and worse.shape == (3,), metric, "does not give one score a pair")
    if metric.best is not None:
        expected = torch.full((3,), metric.best).double()
        _hold(bool(torch.allclose(best.double(), expected)), metric, f"best is {best.tolist()}")
    sign = 1 if metric.higher_is_better else -1
    _hold(bool((sign * worse < sign * best).all()), metric, "does not score a wrong example below a right one")
    _hold(made.score(true[:0], true[:0]).shape == (0,), metric, "fails where nothing was matched")


def check_case(case: type[Case]) -> None:
    """The plugin contract; the same client for one spelling, disjoint clients, labels and shapes that fit."""
    check_plugin(case)
    _hold(bool(case.source), case, "does not say where its data come from")
    made = case.model_validate({"batch": 2, "clients": 2})
    first, again, other = made.setting(0), made.setting(0), made.setting(1)
    _hold(torch.equal(first.inputs, again.inputs), case, "draws two batches for one spelling")
    state, twice = first.model.state_dict(), again.model.state_dict()
    _hold(_equal(state, twice), case, "draws two models for one spelling")
    _hold(_equal(state, other.model.state_dict()), case, "gives its clients different global models")
    shared = (first.inputs[:, None] == other.inputs[None]).flatten(2).all(2).any()
    _hold(not bool(shared), case, "gives two clients the same example")
    _hold(
        tuple(first.inputs.shape[1:]) == first.domain.shape, case, "draws examples that are not of its domain's shape"
    )
    low, high = first.domain.low, first.domain.high
    inside = bool(((first.inputs >= low) & (first.inputs <= high)).all())
    _hold(inside, case, f"draws entries outside its domain's range [{low}, {high}]")
    _hold(int(first.labels.max()) < len(first.classes), case, "draws labels that have no name")


def check_analysis(analysis: type[Analysis]) -> None:
    """The plugin contract; findings of the right types, the same for one seed, with and without the truth.

    Where it says that it has none, it refuses with those words; on one of the exchanges tried it has some.
    """
    check_plugin(analysis)
    _hold(bool(analysis.paper), analysis, "names no paper")
    privacy = Knowledge(privacy=Privacy(clip=1.0, noise_multiplier=1.0, sampling_rate=0.5, steps=2, delta=1e-5))
    answers = 0
    for case, defences, known in (
        ("digits:batch=3,width=16", (), Knowledge()),
        ("digits:model=lenet", (), Knowledge()),
        ("digits:batch=2,width=16,activation=tanh", ("noise:sigma=0.01",), Knowledge()),
        ("digits:width=16", (), privacy),
        ("digits:width=16", ("prune:share=0.999",), Knowledge()),
        ("text:batch=2,width=64,depth=1", (), Knowledge()),
        ("trained:batch=3,width=16,steps=50,threat=start", (), Knowledge()),
    ):
        if answers and case.startswith(("text", "trained")):
            continue  # texts and released models are tried where pictures gave no answer
        setting = Case.parse(case).setting()
        obs, truth = observe(
            setting.model,
            setting.loss,
            setting.inputs,
            setting.labels,
            knowledge=setting.knowledge | known,
            training=setting.training,
            defences=defences,
        )
        for at in ((truth.inputs, truth.labels), None):
            try:
                found = analysis()(obs, at=at, rng=torch.Generator().manual_seed(0))
            except NotApplicable as why:
                _hold(len(str(why)) > 10, analysis, "refuses without a word")
                continue
            answers += 1
            again = analysis()(obs, at=at, rng=torch.Generator().manual_seed(0))
            _hold(list(found) == list(again), analysis, "gives two answers for one seed")
            typed = all(isinstance(f, LayerRisk | Bound | Verdict) for f in found)
            _hold(len(found) > 0 and typed, analysis, "finds nothing, or something that is no finding")
    _hold(answers > 0, analysis, "has nothing to say of any exchange tried")


def check_layer_rule(rule: LayerRule, layer: nn.Module, x: Tensor) -> None:
    """The true input x [1, ...] of `layer` (float64) satisfies the rule's forward and gradient equations.

    Also: the products are each other's transposes, in float64; an output of another shape is refused; and what the rule
    says of a layer without a way back, `grad_input` says too.
    """
    kind, shape, rng = type(rule), tuple(x.shape[1:]), torch.Generator().manual_seed(0)
    output = layer(x.clone())
    out_grad = torch.randn(output.shape, generator=rng, dtype=output.dtype)
    systems = [rule.forward_equations(layer, shape, output.detach())]
    if isinstance(weight := getattr(layer, "weight", None), Tensor):
        (grad,) = torch.autograd.grad(output, weight, out_grad)
        systems.append(rule.gradient_equations(layer, shape, out_grad, grad))
    live = x.clone().requires_grad_()
    (input_grad,) = torch.autograd.grad(layer(live.clone()), live, out_grad)
    with suppress(ValueError):  # where the output does not tell it
        found = rule.grad_input(layer, shape, output.detach(), out_grad)
        _hold(not rule.no_way_back(layer, shape), kind, "says that a layer has no way back, and gives its gradient")
        close = torch.allclose(found, input_grad[0], rtol=1e-6, atol=1e-8)
        _hold(close, kind, "gives another gradient of its input than autograd")
    for system in systems:
        gap = float(system.residual(x.flatten()).norm() / (1 + system.b.norm()))
        _hold(gap < 1e-8, kind, f"writes equations that the true input breaks by {gap:.1e}")
        _hold(system.unknowns == x.numel(), kind, f"has {system.unknowns} unknowns for {x.numel()} entries")
        _hold(system.b.dtype == torch.float64, kind, "does not compute in float64")
        v, u = (torch.randn(1, k, generator=rng, dtype=torch.float64) for k in (system.unknowns, system.equations))
        one, other = (system.push(v) * u).sum(), (v * system.pull(u)).sum()
        _hold(torch.allclose(one, other, rtol=1e-8, atol=1e-8), kind, "has a push and a pull that are no transposes")
    try:
        rule.forward_equations(layer, shape, torch.zeros(*output.shape[1:], 2))
        refused = False
    except ValueError:
        refused = True
    _hold(refused, kind, "takes an output of another shape")


def demo_setting(demo: Demo) -> Setting:
    """The client of an attack's demo, with the knowledge that the demo grants."""
    setting = Case.parse(demo.case).setting()
    granted: dict[str, Any] = {"labels": setting.labels.sort().values} if "labels" in demo.knows else {}
    if set(demo.knows) - {"labels"}:
        raise UnbatchError(f"a demo can grant labels, not {sorted(set(demo.knows) - {'labels'})}.")
    object.__setattr__(setting, "knowledge", setting.knowledge | Knowledge(**granted))
    object.__setattr__(setting, "protocol", demo.protocol)
    return setting


def _exchange(setting: Setting, demo: Demo | None, attack: Attack | None) -> tuple[Observation, Truth]:
    told = setting.domain.public() | Knowledge(input_range=(setting.domain.low, setting.domain.high))
    told |= setting.knowledge
    defences = demo.defences if demo is not None else ()
    if isinstance(attack, ActiveAttack):
        return planted_exchange(attack, setting, knowledge=told, defences=defences, server_seed=3)
    return observe(
        setting.model,
        setting.loss,
        setting.inputs,
        setting.labels,
        knowledge=told,
        protocol=setting.protocol,
        training=setting.training,
        defences=defences,
    )


def _refuses(attack: Attack, obs: Observation, field: str) -> bool:
    try:
        attack(obs)
    except NotApplicable as why:
        return field in str(why)
    return False


def _hold(kept: bool, plugin: type[Plugin], broken: str) -> None:
    if not kept:
        raise AssertionError(f"{plugin.kind} {plugin.name} {broken}.")


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def _same(a: Reconstruction, b: Reconstruction) -> bool:
    """Equal up to rounding, which differs from call to call.

    BLAS sums in the order that its buffers' addresses give. A bound that is measured from that rounding differs as it does:
    by a factor below 2, and is finite for the same examples.
    """

    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=1e-6, atol=1e-6 * _largest(y))

    def alike(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.shape == y.shape and bool(((x <= 2 * y) & (y <= 2 * x)).all())

    return equal(a.inputs, b.inputs) and equal(a.labels, b.labels) and alike(a.bound, b.bound) and a.layer == b.layer


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


@contextmanager
def _global_seed(seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
