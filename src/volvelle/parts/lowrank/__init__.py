"""Low-rank updates of a weight matrix."""
