"""How far first order is relied on wherever an error is bounded by the response to a few draws of its cause."""

from __future__ import annotations

ERROR_SIGMAS = 6.0  # standard deviations of a measured error that its bound holds
LARGEST_RADIUS = 0.05  # relative error beyond which nothing is claimed: first order is then no proof of anything
