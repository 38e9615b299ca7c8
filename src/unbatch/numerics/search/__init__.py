"""Searches: least squares, gradient matching, annealing, softened kinks."""
