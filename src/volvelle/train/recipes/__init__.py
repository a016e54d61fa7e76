"""Recipes: frozen dataclasses without torch that the command line turns into help and overrides."""
