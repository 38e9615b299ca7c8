"""Layer rules, one kind of layer per file; found, never listed."""
