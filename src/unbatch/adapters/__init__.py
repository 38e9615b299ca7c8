"""Adapters: other frameworks, imported on use; each is an optional extra."""
