"""Tokens: sentences read out of the spans that a transformer's gradients give away, looked up in its own dictionary."""
