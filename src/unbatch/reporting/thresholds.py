"""Thresholds: from where on an example counts as recovered, and a score as more than chance."""

EXACT = 1e-4  # relative l2 error up to which an example counts as recovered exactly
NEAR_CHANCE = 3.0  # dB above what as many prior draws score, within which a score owes nothing to the update
