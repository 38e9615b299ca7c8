"""Analyses, one per file; found, never listed."""
