"""Attacks, one per file; found, never listed."""
