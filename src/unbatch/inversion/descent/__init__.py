"""Descent: a batch told apart at an inner layer of a network, and led down from there to its inputs."""
