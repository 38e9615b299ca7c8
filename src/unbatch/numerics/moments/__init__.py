"""Moment tensors of a gradient and their decomposition."""
