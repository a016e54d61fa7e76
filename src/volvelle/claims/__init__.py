"""One file a technique: what its paper says, how that is measured here, and whether it held.

A claim file is a module of this package that does not import torch at its top. It holds `CLAIM`, a `Claim` with the
paper's sentence and the catalogue entry of the technique, and `measure(budget)`, which returns a `Measurement`.
The folder listing is the list of claims; there is nothing to register.
"""
