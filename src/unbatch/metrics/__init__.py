"""Metrics, one per file; found, never listed."""
