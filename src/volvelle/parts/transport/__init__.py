"""Distances between distributions by the cost of moving one onto the other: exact, entropic, sliced, certified."""
