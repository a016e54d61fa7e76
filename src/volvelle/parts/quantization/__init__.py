"""Numbers from a small set: weights on grids of a few bits, with a scale for each group of inputs; vectors as codes."""
