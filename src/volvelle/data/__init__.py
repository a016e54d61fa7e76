"""Readers of users' files, and the loader that feeds the training loop."""
