"""Dictionary: which of finitely many vectors a gradient's rows are made of, and what such a test can tell."""
