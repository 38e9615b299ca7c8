"""Attack: what reads examples of a private batch out of an exchange, and the contract that it must keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Any, ClassVar, final

import torch
from torch import nn

from unbatch.errors import NotApplicable, UnbatchError
from unbatch.inversion.claims import judged
from unbatch.inversion.view import View
from unbatch.knowledge import Knowledge, check_fields
from unbatch.network.precision import in_our_words
from unbatch.observation import Observation
from unbatch.plugin import Plugin
from unbatch.protocol import Protocol
from unbatch.reconstruction import Reconstruction
from unbatch.threat_model import ThreatModel, sees

NOTHING_SENT = "nothing was sent: this is a released model, and the attack reads updates."
NOT_THE_END = (
    "the attack reads a model whose training has ended, and this is an update: its model is from before the step."
)


class Guarantee(StrEnum):
    """How much an attack promises of the examples that it returns; this decides which tests it must pass.

    >>> from unbatch.attacks import GradientMatching, Unmix
    >>> Unmix.guarantee, str(GradientMatching.guarantee)
    (<Guarantee.EXACT: 'exact'>, 'heuristic')
    """

    EXACT = "exact"  # every example it returns is within its bound, at rounding error
    BOUNDED = "bounded"  # every example carries a predicted error that holds
    HEURISTIC = "heuristic"  # a guess


class Cost(IntEnum):
    """What an attack takes, roughly: an audit in which none is named runs the cheapest first.

    >>> from unbatch.attacks import BiasRatio, GradientMatching
    >>> BiasRatio.cost < GradientMatching.cost
    True
    """

    READS = 0  # an answer off the update, in no time
    SOLVES = 1  # equations, and ends by itself: in milliseconds or minutes
    SEARCHES = 2  # for as long as it is let


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The smallest case on which an attack must work, and how well it must do there.

    `case` is the spelling of a case; `floors` gives for each metric the score that even the worst example must reach.

    >>> from unbatch.attacks import BiasRatio
    >>> BiasRatio.demo.case, BiasRatio.demo.floors["psnr"]
    ('photos:width=16', 80.0)
    """

    case: str
    floors: dict[str, float] = field(default_factory=dict)  # metric -> worst score allowed
    knows: tuple[str, ...] = ()  # fields of Knowledge beyond the client's default
    defences: tuple[str, ...] = ()
    options: str = ""  # of the attack, where its defaults are too slow for a test
    protocol: Protocol = field(default_factory=Protocol)


class Attack(Plugin, ABC):
    """Reads examples of a private batch out of one exchange between client and server.

    A subclass is final; its fields are its options. It gives the class attributes below and `run`, and is handed only the
    knowledge that it declares, as a `View`. Calling an attack runs it and holds what it returns to its declaration.

    >>> from unbatch.knowledge import Knowledge
    >>> class Grey(Attack):
    ...     'Guesses that every input is grey.'
    ...     family: ClassVar[str] = "chance"
    ...     guarantee: ClassVar[Guarantee] = Guarantee.HEURISTIC
    ...     needs: ClassVar[frozenset[str]] = frozenset({"input_shape"})
    ...     def run(self, view, rng):
    ...         return Reconstruction(inputs=torch.full((1, *view.knowledge.input_shape), 0.5))
    >>> seen = Observation(
    ...     model=nn.Linear(2, 3),
    ...     loss=nn.functional.cross_entropy,
    ...     update={"bias": torch.ones(3)},
    ...     knowledge=Knowledge(input_shape=(2,)),
    ... )
    >>> Grey.name, Grey()(seen).inputs
    ('grey', tensor([[0.5000, 0.5000]]))
    """

    kind: ClassVar[str] = "attack"
    folder: ClassVar[str] = "attacks"

    family: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of Knowledge it cannot do without
    uses: ClassVar[frozenset[str]] = frozenset()  # fields it takes if they are known; it is handed no others
    demo: ClassVar[Demo]
    cost: ClassVar[Cost] = Cost.SEARCHES
    threat_model: ClassVar[str] = ThreatModel.CURIOUS

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        try:
            check_fields(sorted(cls.needs | cls.uses))
        except UnbatchError as error:
            raise UnbatchError(f"the attack {cls.name!r} declares what nobody can know: {error}") from None

    @abstractmethod
    def run(self, view: View, rng: torch.Generator) -> Reconstruction:
        """The examples that the attack reads out of the exchange; implemented by each attack, called by `__call__` alone.

        `view` holds only the knowledge that the attack declares, and `rng` is the one source of its random numbers.
        Raises NotApplicable: it cannot run here; the message says why, in words for the report.
        """

    @final
    def __call__(self, obs: Observation, *, seed: int = 0) -> Reconstruction:
        """Run on what this attack may know, and hold its answer to its own contract.

        Raises NotApplicable: it cannot run here; the message says why.

        >>> import unbatch
        >>> from unbatch.models.small import build
        >>> rng = torch.Generator().manual_seed(0)
        >>> model, x = build("mlp", (4,), 3, width=8, rng=rng), torch.rand(1, 4, generator=rng)
        >>> seen, truth = unbatch.observe(model, nn.functional.cross_entropy, x, torch.tensor([2]))
        >>> found = Attack.parse("bias-ratio")(seen)
        >>> torch.allclose(found.inputs, x.double(), rtol=1e-6), found.labels == truth.labels
        (True, tensor([True]))
        """
        wanted = sees(self.threat_model)
        if obs.released != (wanted == "release"):
            raise NotApplicable(NOTHING_SENT if obs.released else NOT_THE_END)
        missing = sorted(self.needs - set(obs.knowledge))
        if missing:
            raise NotApplicable(f"{self.name} needs {', '.join(missing)}, which the attacker does not know here.")
        obs = obs.as_rounded()
        view = View.of(obs.only(*(self.needs | self.uses)))
        with torch.random.fork_rng(devices=[]):  # an attack that reads the global generator must not disturb the caller
            try:
                found = _as_the_loss_takes(view, self.run(view, torch.Generator().manual_seed(seed)))
            except (RuntimeError, ValueError) as error:
                raise in_our_words(error) or error from None
            self._judge(obs, found)
            return judged(view.on(obs), found)

    @final
    def _judge(self, obs: Observation, found: Reconstruction) -> None:
        k = len(found)
        wrong = None
        if found.inputs is not None and not found.inputs.isfinite().all():
            wrong = "examples that are not finite"
        elif found.inputs is not None and not found.layer and "input_shape" in obs.knowledge:
            shape = obs.knowledge.input_shape
            if obs.knowledge.get("domain") == "tokens" and found.inputs.is_floating_point():
                wrong = "examples of real numbers where the inputs are tokens"
            elif tuple(found.inputs.shape[1:]) != shape:
                wrong = f"examples of shape {tuple(found.inputs.shape[1:])} where the inputs have {shape}"
        if found.labels is not None and len(found.labels) != k:
            wrong = f"{len(found.labels)} labels for {k} examples"
        if found.bound is not None and (found.bound.shape != (k,) or bool((found.bound < 0).any())):
            wrong = f"a bound of shape {tuple(found.bound.shape)} for {k} examples, or a negative one"
        if self.guarantee is not Guarantee.HEURISTIC and found.bound is None:
            wrong = f"no bound, though it declares itself {self.guarantee}"
        if wrong:
            raise RuntimeError(f"{self.name} breaks its contract: it returned {wrong}. This is a defect of the attack.")


def _as_the_loss_takes(view: View, found: Reconstruction) -> Reconstruction:
    """The reconstruction with its labels in the form that the loss takes; as it is where they have no such form."""
    if found.labels is None or not len(found.labels):
        return found
    try:
        return replace(found, labels=view.labels.taken(found.labels, next(view.model.parameters()).dtype))
    except (NotApplicable, UnbatchError):
        return found


NOTHING = Knowledge()


class ActiveAttack(Attack):
    """An attack by a server that does not only look: it also chooses the model's parameters, or its architecture.

    The audit hands `plant`'s model to the client in place of its own, and `run` sees what comes back. Where the protocol
    has several rounds `replant` chooses the model of each further one, and the rounds before the last are `earlier`.

    >>> from unbatch.attacks import TensorMomentDeep, Unmix
    >>> issubclass(TensorMomentDeep, ActiveAttack), issubclass(Unmix, ActiveAttack)
    (True, False)
    """

    threat_model: ClassVar[str] = ThreatModel.MALICIOUS

    @abstractmethod
    def plant(self, model: nn.Module, rng: torch.Generator, known: Knowledge = NOTHING) -> nn.Module:
        """A copy of `model` with the parameters that the server sends out in place of its own.

        `known` is what the attack declares to know, before any client has answered. Raises NotApplicable: the attack's
        parameters do not fit such a model; the message says why.
        """

    def replant(self, seen: Observation, rng: torch.Generator) -> nn.Module | None:
        """The model of the next round, from what the server has seen so far; None: it has seen enough.

        `seen` is the last round, with those before it as `earlier`, and holds only the knowledge that the attack declares.
        The model is to have the parameters and buffers of the one before, by name and shape. By default each round is
        played on the same model.
        """
        return seen.model
