"""Metrics of what models produce, one file a metric."""
