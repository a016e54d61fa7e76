"""Convolutions beyond the plain one: dilated, separable, factorised, large; one file a technique."""
