"""dp-sgd: differentially private training, by Opacus."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator

from unbatch.adapters import opacus
from unbatch.defence import Defence, Round, Step, plain_update
from unbatch.errors import UnbatchError
from unbatch.knowledge import Knowledge, shares
from unbatch.privacy import Privacy
from unbatch.protocol import Protocol, Update


@final
class DpSgd(Defence):
    """Clips every example's gradient and adds normal noise: differentially private training, by Opacus.

    g -> (sum_i g_i min(1, clip / |g_i|) + noise_multiplier clip z) / b, in every gradient that the client takes; z
    standard normal in every entry, b the batch size (1 for a summed loss). Needs the extra `unbatch[opacus]`.

    It works in the training itself, wherever it stands among other defences. The private batch is the one that was drawn
    for this update; (epsilon, delta) is accounted for over `steps` such draws at `sampling_rate`, for neighbours that
    differ by one example added or removed. At sampling_rate=1 every step takes all data, the worst case.
    Raises UnbatchError: a module that Opacus cannot treat (batch norm), a loss that is no mean (or sum) over examples, more
    local steps than are accounted for.

    >>> import torch, unbatch
    >>> model, loss = torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    >>> seen, truth = unbatch.observe(model, loss, x, y, defences="dp-sgd:clip=1,noise_multiplier=2")
    >>> seen.knowledge.privacy.clip, seen.knowledge.privacy.noise_multiplier, seen.knowledge.noise  # 2 * 1 / 4
    (1.0, 2.0, 0.5)
    """

    paper: ClassVar[str] = (
        "Abadi et al., CCS 2016; Yousefpour et al., Opacus, 2021; Gopi, Lee and Wutschitz, NeurIPS 2021"
    )
    random: ClassVar[bool] = True
    identity: ClassVar[str] = "dp-sgd:clip=none,noise_multiplier=0"

    clip: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="largest l2 norm of one example's gradient; none: off"),
    ] = 1.0
    noise_multiplier: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="standard deviation of the summed gradient's noise over clip"),
    ] = 1.0
    sampling_rate: Annotated[float, Field(gt=0, le=1, description="share of the data that a step draws")] = 1.0
    steps: Annotated[int, Field(ge=1, description="noisy steps of the whole training, all accounted for")] = 1
    delta: Annotated[float, Field(gt=0, lt=1, description="of (epsilon, delta)")] = 1e-5
    accountant: Annotated[opacus.Accountant, Field(description="of Opacus; prv is tighter, rdp quicker")] = "prv"
    reduction: Annotated[Literal["mean", "sum"], Field(description="of the loss over the batch")] = "mean"

    @model_validator(mode="after")
    def _noise_has_a_scale(self) -> Self:
        if self.clip is None and self.noise_multiplier:
            raise UnbatchError("noise is in units of clip, so noise_multiplier=0 where clip=none")
        return self

    @property
    def adds_noise(self) -> bool:
        """In every gradient."""
        return self.noise_multiplier > 0

    @property
    def clips(self) -> bool:
        """Each example's gradient."""
        return self.clip is not None

    def wrap(self, step: Step) -> Step:
        def private(round_: Round) -> Update:
            if self.clip is None:
                return step(round_)
            rounds = round_.protocol.rounds or 1
            taken = max(1, round_.protocol.steps(len(round_.inputs))) * rounds
            what = "this update takes" if rounds == 1 else f"{rounds} updates of this batch take"
            if self.noise_multiplier and taken > self.steps:
                raise UnbatchError(
                    f"{self} accounts for {self.steps} private step{'s' * (self.steps > 1)}, and {what} {taken}; declare "
                    f"dp-sgd:steps={taken} or more."
                )
            if round_.train is not plain_update:
                raise UnbatchError(f"{self} stands among the defences twice; keep one.")
            return step(replace(round_, train=self._train))

        return private

    def public(self, known: Knowledge) -> Knowledge:
        """Its numbers with the epsilon that they give; and the noise, exactly, of one gradient or one step of SGD."""
        if self.clip is None:
            return known
        told = Knowledge(privacy=self.privacy())
        if "clip" in known:  # its noise is in the training, and shortened with the update
            known = known.after(f"clip:norm={known.clip:g}")
        if "clip_within" in known:  # the same, under noise that something around it changed
            known = known.without("noise_within", "clip_within")
        n, local = known.get("batch_size"), known.get("local_steps", 0) or known.get("epochs") or 0
        one = known.get("local_steps", 0) == 1 and known.get("optimiser", "sgd") == "sgd"
        if n is None or not self.noise_multiplier or (local and not one):
            return known | told
        scale = known.get("learning_rate", Protocol().learning_rate) if local else 1.0
        sizes = [min(known.get("local_batch_size") or size, size) for size in shares(n, known.get("clients", 1))]
        deviation = scale * told.privacy.deviation(sizes if self.reduction == "mean" else [1] * len(sizes))
        return known | told | Knowledge(noise=(known.get("noise", 0.0) ** 2 + deviation**2) ** 0.5)

    def privacy(self) -> Privacy:
        """The parameters with their epsilon; Opacus is asked for it."""
        return Privacy(
            clip=self.clip or 0.0,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            delta=self.delta,
            accountant=self.accountant,
            epsilon=opacus.epsilon(
                noise_multiplier=self.noise_multiplier,
                sampling_rate=self.sampling_rate,
                steps=self.steps,
                delta=self.delta,
                accountant=self.accountant,
            ),
        )

    def _train(self, round_: Round) -> Update:
        with torch.enable_grad():
            return opacus.private_update(
                round_, clip=self.clip or 0.0, noise_multiplier=self.noise_multiplier, reduction=self.reduction
            )
