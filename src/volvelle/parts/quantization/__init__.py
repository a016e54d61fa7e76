"""Weights on grids of a few bits: a linear layer's matrix as small integers, with a scale for each group of inputs."""
