"""Results and how they are shown; no torch."""
