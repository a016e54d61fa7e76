"""The thousand classes of ImageNet-1k (ILSVRC 2012) in the order of all published classifiers' outputs. No torch.

The names are WordNet 3.0's (Princeton University): the words of a synset, one class a line of imagenet.txt.
"""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of the classes, most common word first.

    >>> imagenet_classes()[285], len(imagenet_classes())
    ('Egyptian cat', 1000)
    """
    text = resources.files("volvelle.systems.backbone").joinpath("imagenet.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
