"""Unmixing: the examples in the span of one dense layer's gradient."""
