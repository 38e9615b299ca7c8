"""Lower bounds on any attacker's error: priors, rate distortion, accounting."""
