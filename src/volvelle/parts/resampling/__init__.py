"""Changing the size of images and maps: one file a technique, and one layer that has them all."""
