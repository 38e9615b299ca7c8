"""Privacy: what a differentially private client does to its gradients, and spends; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from unbatch.errors import UnbatchError


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The parameters of a client's differentially private training, and what it spends over all of it.

    Every example's gradient is shortened to the l2 norm `clip`, and normal noise of standard deviation
    clip * noise_multiplier is added to each entry of their sum. A step takes each example with probability
    `sampling_rate`, there are `steps` of them, and the whole is (`epsilon`, `delta`)-private as `accountant` says.

    >>> print(Privacy(clip=1.0, noise_multiplier=1.1, sampling_rate=0.01, steps=1000, delta=1e-5, epsilon=2.1))
    epsilon 2.1 at delta 1e-05, clip 1, noise multiplier 1.1, sampling rate 0.01, steps 1000
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    clip: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float
    epsilon: float | None = None  # None: nobody has accounted for it; inf: there is no noise
    accountant: str = ""

    def __str__(self) -> str:
        spent = "epsilon not accounted for" if self.epsilon is None else f"epsilon {self.epsilon:.4g}"
        return (
            f"{spent} at delta {self.delta:g}, clip {self.clip:g}, noise multiplier {self.noise_multiplier:g}, "
            f"sampling rate {self.sampling_rate:g}, steps {self.steps}"
        )

    def words(self) -> str:
        """What is spent, in one sentence for a report.

        >>> Privacy(clip=1.0, noise_multiplier=1.0, sampling_rate=1.0, steps=3000, delta=1e-5).words()
        'epsilon is not accounted for at delta = 1e-05: noise multiplier 1, clip 1, sampling rate 1, steps 3,000.'
        """
        spent = "epsilon is not accounted for" if self.epsilon is None else f"epsilon = {self.epsilon:.4g}"
        by = f" ({self.accountant} accountant)" if self.accountant else ""
        return (
            f"{spent} at delta = {self.delta:g}{by}: noise multiplier {self.noise_multiplier:g}, clip {self.clip:g}, "
            f"sampling rate {self.sampling_rate:g}, steps {self.steps:,}."
        )

    def deviation(self, sizes: Sequence[int]) -> float:
        """The standard deviation of every entry of a sum of gradients, each noised and divided by its batch's size.

        clip * noise_multiplier * sqrt(sum of 1 / size^2).

        >>> Privacy(clip=2.0, noise_multiplier=1.0, sampling_rate=1.0, steps=1, delta=1e-5).deviation([8])
        0.25
        """
        return self.clip * self.noise_multiplier * math.sqrt(sum(1 / size**2 for size in sizes))


def told_privacy(facts: object) -> Privacy:
    """What a file or a command line says of a client's private training.

    >>> print(told_privacy({"clip": 1, "noise_multiplier": 1.1, "sampling_rate": 0.01, "steps": 1000, "delta": 1e-5}))
    epsilon not accounted for at delta 1e-05, clip 1, noise multiplier 1.1, sampling rate 0.01, steps 1000

    Raises UnbatchError: a number is missing, or is none.
    """
    try:
        return TypeAdapter(Privacy).validate_python(facts)
    except ValidationError as error:
        first = error.errors()[0]
        raise UnbatchError(f"privacy: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}.") from None
