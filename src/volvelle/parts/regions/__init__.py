"""Regions of images: boxes, their overlap and suppression, and pooling inside them; one file a technique."""
