"""label-count: how often each class occurs in the batch, from the head's gradient, with what of it is proven."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from unbatch.attack import Attack, Cost, Demo, Guarantee
from unbatch.errors import NotApplicable
from unbatch.inversion.view import View
from unbatch.knowledge import DOMAIN_FIELDS, PROTOCOL_FIELDS
from unbatch.loss import LossForm
from unbatch.network.dense import Dense, forward, layer_inputs
from unbatch.numerics import label_counts
from unbatch.observation import Observation
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction

CONFIDENCE_WEIGHT = 20.0
PROOF_SIGMAS = 7.0  # a Gaussian entry lies further out with probability 3e-12


@final
class LabelCount(Attack):
    """Counts how often each class occurs in the batch, from the last layer's bias gradient.

    Class counts c from dL/db_j = a (sum_i p_ij - c_j), a = 1 / n for the mean: every p_ij > 0, so c_j >= -dL/db_j / a.

    Where these lower bounds add up to n the counts are proven; elsewhere sum_i p_ij is estimated from the model's
    outputs on stand-in inputs, or as equal classes where it is confident, and rounded within the bounds. SGD's local
    steps add up gradients with known weights, so the bounds hold of them as well; Adam keeps little but signs, which
    prove that a class occurs. Labels that are proven have bound 0, estimated ones infinity. The proofs take the update
    for what the loss and the protocol say.
    """

    family: ClassVar[str] = "labels"
    guarantee: ClassVar[Guarantee] = Guarantee.BOUNDED
    cost: ClassVar[Cost] = Cost.READS
    paper: ClassVar[str] = "Zhao et al., iDLG, 2020; Wainakh et al., PoPETs 2022; Geng et al., 2021"
    needs: ClassVar[frozenset[str]] = frozenset({"input_shape", "batch_size"})
    uses: ClassVar[frozenset[str]] = frozenset({"clients", "noise"}) | DOMAIN_FIELDS | PROTOCOL_FIELDS
    demo: ClassVar[Demo] = Demo(case="digits:batch=4", floors={"label-accuracy": 1.0})

    formerly: ClassVar[dict[str, str]] = {"probes": "stand_ins"}

    stand_ins: Annotated[int, Field(gt=0, description="stand-in inputs behind the estimate")] = 256

    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        head, form = _head(view), _form(view)
        obs, n = view.obs, view.knowledge.batch_size
        inputs = view.stand_in(self.stand_ins, rng)
        expected = n * _mean_answer(form, forward(obs.model, inputs).double().cpu().reshape(len(inputs), -1))
        features = layer_inputs(obs.model, head.name, inputs).cpu()
        reach = torch.tensor([0.1, 1.0, 10.0]).repeat(len(inputs))[: len(inputs)]
        wild = torch.randn(inputs.shape, generator=rng) * reach.view(-1, *[1] * (inputs.ndim - 1))
        nonnegative = bool((torch.cat([features, layer_inputs(obs.model, head.name, wild).cpu()]) >= 0).all())
        lower, upper, estimate = self._counts(obs, head, form, expected, features.mean(0), nonnegative)
        return self._report(obs, head, lower, upper, estimate, nonnegative and head.weight in obs.update)

    def _counts(
        self, obs: Observation, head: Dense, form: LossForm, expected: Tensor, features: Tensor, nonnegative: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, steps = obs.knowledge.batch_size, obs.protocol.steps(obs.knowledge.batch_size)
        sent = {name: obs.update[name].cpu() for name in (head.weight, head.bias) if name and name in obs.update}
        weight, bias = sent.get(head.weight), sent.get(head.bias or "")
        noise = PROOF_SIGMAS * obs.knowledge.get("noise", 0.0)
        before = {name: p.detach().cpu() for name, p in obs.model.named_parameters() if name in sent}
        if steps and obs.protocol.optimiser == "adam":
            return label_counts.counts_by_sign(
                weight if nonnegative else None, bias, max(len(expected), 2), n, slack=noise
            )
        shares, decay = example_weights(obs, form)
        mean, most = float(shares.mean()), float(shares.max())
        slack = noise
        if steps:
            size = max(float(before[k].abs().max() + u.abs().max()) for k, u in sent.items())
            slack += 4 * steps * obs.knowledge.get("clients", 1) * torch.finfo(obs.dtype).eps * size
            grown = {k: (decay * before[k].double() - u.double()).to(u.dtype) for k, u in sent.items()}
            weight, bias = grown.get(head.weight), grown.get(head.bias or "")
        if form.name == "squared-error" and n == 1 and not (steps or noise) and weight is not None and bias is not None:
            V, b = before[head.weight], before[head.bias or ""]
            target = label_counts.single_target(weight, bias, V, b, factor=mean)
            one = torch.nn.functional.one_hot(target.argmax(), len(target))
            if float((target - one).abs().max()) < 1e-3:
                return one, one, one
        return label_counts.label_counts(
            weight,
            bias,
            n,
            factor=mean,
            expected=expected,
            loss=form.name,
            smoothing=form.smoothing,
            features=features,
            nonnegative=nonnegative,
            most=most,
            slack=slack,
        )

    def _report(
        self, obs: Observation, head: Dense, lower: Tensor, upper: Tensor, estimate: Tensor, nonnegative: bool
    ) -> Reconstruction:
        n, classes = obs.knowledge.batch_size, torch.arange(len(estimate))
        sure = int(lower.sum())
        proof = "exact" if sure == n else "bounded" if sure or int(upper.min()) < n else "estimate"
        words = {
            "exact": f"The gradient of {head.name!r} proves every label of the batch of {n}",
            "bounded": f"The gradient of {head.name!r} proves the class of {sure} of {n} examples, and how many each "
            f"class has at most; the other {n - sure} are estimates",
            "estimate": f"The gradient of {head.name!r} proves nothing about the classes; all {n} labels are estimates",
        }[proof]
        if nonnegative and proof != "estimate":
            words += ", taking the head's features for nonnegative as they were on every probe"
        if obs.knowledge.get("noise", 0.0) and proof != "estimate":
            words += f", at {PROOF_SIGMAS:g} standard deviations of the known noise"
        return Reconstruction(
            inputs=None,
            labels=torch.cat([classes.repeat_interleave(lower), classes.repeat_interleave(estimate - lower)]),
            bound=torch.cat([torch.zeros(sure), torch.full((n - sure,), torch.inf)]).double(),
            trace={
                "lower": lower.tolist(),
                "upper": upper.tolist(),
                "estimate": estimate.tolist(),
                "proof": proof,
                "words": words + ".",
            },
        )


def example_weights(obs: Observation, form: LossForm) -> tuple[Tensor, float]:
    """How much each example of the union weighs in the update [n], and the sum of the clients' parameter decays.

    update = decay * parameters - sum_i weight_i grad_i (after local steps), or sum_i weight_i grad_i.
    """
    n, clients, protocol = obs.knowledge.batch_size, obs.knowledge.get("clients", 1), obs.protocol
    parts, decay = [], 0.0
    for share in torch.arange(n).tensor_split(clients):
        weights = torch.zeros(len(share), dtype=torch.float64)
        size, steps = len(share), protocol.steps(len(share))
        if not steps:
            weights += form.scale / (size if form.reduction == "mean" else 1)
        keep, kicks = _impulse(protocol, steps)
        batch = min(protocol.local_batch_size or size, size)
        for step, kick in enumerate(kicks.tolist()):
            start = (step % -(-size // batch)) * batch
            taken = weights[start : start + batch]
            taken += kick * form.scale / (len(taken) if form.reduction == "mean" else 1)
        parts.append(weights)
        decay += keep - 1
    return torch.cat(parts), decay


def _impulse(protocol: Protocol, steps: int) -> tuple[float, Tensor]:
    rate, momentum, decay = protocol.learning_rate, protocol.momentum, protocol.weight_decay
    return label_counts.impulse(steps, learning_rate=rate, momentum=momentum, weight_decay=decay)


def _head(view: View) -> Dense:
    """The layer whose gradient counts the labels. Raises NotApplicable: there is none, or it was not sent."""
    head = view.head
    if head is None:
        raise NotApplicable("the network's output is not that of a dense layer, whose gradient would count the labels.")
    if not {head.weight, head.bias} & set(view.update):
        raise NotApplicable(
            f"the head {head.name!r} sent no gradient; it is frozen, and only the head's gradient counts labels."
        )
    return head


def _form(view: View) -> LossForm:
    """The form of a loss on class labels. Raises NotApplicable: it is another, or the protocol leaves nothing to count."""
    form, protocol, outputs = view.form, view.protocol, math.prod(view.outputs)
    n, clients = view.knowledge.batch_size, view.knowledge.get("clients", 1)
    if form is None or form.scale <= 0:
        raise NotApplicable(
            "the loss is neither cross entropy, nor binary cross entropy, nor squared error (class weights?)."
        )
    if not form.classes and not (form.name == "binary-cross-entropy" and outputs == 1):
        raise NotApplicable(
            f"the labels of this {form.name} are vectors or real numbers, not classes: nothing to count."
        )
    if clients > n:
        raise NotApplicable(f"{clients} clients cannot share a batch of {n}.")
    if view.steps and protocol.optimiser == "adam":
        if protocol.weight_decay or form.smoothing or form.name == "squared-error":
            raise NotApplicable(
                f"Adam keeps only signs, which under {form} and weight decay {protocol.weight_decay:g} say nothing."
            )
    elif bool((_impulse(protocol, protocol.steps(-(-n // clients)))[1] < 0).any()):
        raise NotApplicable(
            "the local steps overshoot: learning rate times weight decay turns the sign of a gradient's share."
        )
    return form


def _mean_answer(form: LossForm, outputs: Tensor) -> Tensor:
    """What an example adds to the head's gradient besides its label, on average [k], from outputs [p, k] on stand-ins.

    A confident model says little of strange inputs, but follows the labels of real ones: from a confidence of 1 / 20 on
    (0 for equal probabilities, 1 for certainty) all classes are taken to be equally frequent.
    """
    k = outputs.shape[1]
    if form.name == "squared-error":
        return outputs.mean(0)
    if form.name == "cross-entropy":
        p = outputs.softmax(1)
        confidence = (p.square().sum(1).mean() - 1 / k) / (1 - 1 / k)
    else:
        p = outputs.sigmoid()
        confidence = (2 * p - 1).square().mean()
    trust = (1 - CONFIDENCE_WEIGHT * confidence).clamp_min(0)
    return trust * p.mean(0) + (1 - trust) / max(k, 2)
