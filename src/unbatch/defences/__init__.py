"""Defences, one per file; found, never listed."""
