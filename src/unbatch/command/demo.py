"""Demo: what `unbatch demo` audits, in under two minutes."""

from __future__ import annotations

CASE = "photos:batch=8,width=512,activation=gelu"
ATTACKS = ("unmix", "gradient-matching")
REMEDIES = ("clip:norm=0.1", "noise:sigma=0.01", "noise:sigma=0.1")
BUDGET = 5.0  # seconds for each run of an attack
