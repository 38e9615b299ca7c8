"""unbatch: what a shared gradient gives away, from both sides.

Recovers the batch behind a gradient and proves the recovery, or proves how badly any attacker must do. A defensive audit
tool: use it on gradients that you are entitled to inspect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ActiveAttack": "attack",
    "Analysis": "analysis",
    "Attack": "attack",
    "Audit": "reporting.results",
    "Bound": "analysis",
    "Case": "case",
    "Defence": "defence",
    "Domain": "domain",
    "Earlier": "knowledge",
    "Guarantee": "attack",
    "Images": "domain",
    "Inspection": "reporting.inspection",
    "Knowledge": "knowledge",
    "LayerRisk": "analysis",
    "LayerRule": "layer",
    "Leak": "auditing.guard",
    "Metric": "metric",
    "NotApplicable": "errors",
    "Observation": "observation",
    "Privacy": "privacy",
    "Protocol": "protocol",
    "Reconstruction": "reconstruction",
    "Setting": "case",
    "Sign": "sign",
    "Table": "domain",
    "Tokens": "domain",
    "Truth": "truth",
    "Unknown": "errors",
    "UnbatchError": "errors",
    "Verdict": "analysis",
    "as_update": "update",
    "audit": "auditing.run",
    "capture": "training_step",
    "certify": "auditing.certify",
    "diagnose": "auditing.diagnosis",
    "guard": "auditing.guard",
    "harden": "auditing.harden",
    "inspect": "auditing.inspection",
    "observe": "auditing.client",
    "read_exchange": "data.exchange",
    "state_difference": "update",
    "sweep": "command.sweeps",
}
_OPEN_SETS = ("analyses", "attacks", "cases", "defences", "layers", "metrics", "signs")  # `unbatch.attacks.Unmix`

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from unbatch.analysis import Analysis as Analysis
    from unbatch.analysis import Bound as Bound
    from unbatch.analysis import LayerRisk as LayerRisk
    from unbatch.analysis import Verdict as Verdict
    from unbatch.attack import ActiveAttack as ActiveAttack
    from unbatch.attack import Attack as Attack
    from unbatch.attack import Guarantee as Guarantee
    from unbatch.auditing.certify import certify as certify
    from unbatch.auditing.client import observe as observe
    from unbatch.auditing.diagnosis import diagnose as diagnose
    from unbatch.auditing.guard import Leak as Leak
    from unbatch.auditing.guard import guard as guard
    from unbatch.auditing.harden import harden as harden
    from unbatch.auditing.inspection import inspect as inspect
    from unbatch.auditing.run import audit as audit
    from unbatch.case import Case as Case
    from unbatch.case import Setting as Setting
    from unbatch.command.sweeps import sweep as sweep
    from unbatch.data.exchange import read_exchange as read_exchange
    from unbatch.defence import Defence as Defence
    from unbatch.domain import Domain as Domain
    from unbatch.domain import Images as Images
    from unbatch.domain import Table as Table
    from unbatch.domain import Tokens as Tokens
    from unbatch.errors import NotApplicable as NotApplicable
    from unbatch.errors import UnbatchError as UnbatchError
    from unbatch.errors import Unknown as Unknown
    from unbatch.knowledge import Earlier as Earlier
    from unbatch.knowledge import Knowledge as Knowledge
    from unbatch.layer import LayerRule as LayerRule
    from unbatch.metric import Metric as Metric
    from unbatch.observation import Observation as Observation
    from unbatch.privacy import Privacy as Privacy
    from unbatch.protocol import Protocol as Protocol
    from unbatch.reconstruction import Reconstruction as Reconstruction
    from unbatch.reporting.inspection import Inspection as Inspection
    from unbatch.reporting.results import Audit as Audit
    from unbatch.sign import Sign as Sign
    from unbatch.training_step import capture as capture
    from unbatch.truth import Truth as Truth
    from unbatch.update import as_update as as_update
    from unbatch.update import state_difference as state_difference


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import unbatch` costs no torch."""
    if name in _OPEN_SETS:
        return import_module(f"unbatch.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'unbatch' has no attribute {name!r}")
    value = getattr(import_module(f"unbatch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_OPEN_SETS])
