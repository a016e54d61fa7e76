"""Attention over (b, h, n, d) tensors: one function, several back ends, and the key/value cache."""
