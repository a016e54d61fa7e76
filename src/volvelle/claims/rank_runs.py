"""What the claims on many ranks train: a small decoder and samples of unequal length; how far two vectors are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

VOCABULARY = 64


def decoder(width: int, depth: int, inner: int) -> Any:
    """The same random weights at every call."""
    import torch

    from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
    from volvelle.systems.language.decoder import Decoder

    torch.manual_seed(0)
    config = LanguageConfig(
        "llama",
        vocabulary=VOCABULARY,
        width=width,
        depth=depth,
        heads=2,
        kv_heads=1,
        context=64,
        norm=RMSNorm(),
        mlp=GatedMLP(inner),
        position=Rope(),
    )
    return Decoder(config)


def samples(count: int) -> list[Any]:
    """Arithmetic sequences modulo the vocabulary: something to learn, in samples of unequal length."""
    import random

    import torch

    draw, found = random.Random(0), []
    for _ in range(count):
        start, stride, length = draw.randrange(VOCABULARY), draw.randint(1, 5), draw.randint(4, 40)
        found.append(((start + stride * torch.arange(length)) % VOCABULARY, torch.ones(length, dtype=torch.bool)))
    return found


def flat(tensors: Any) -> np.ndarray:
    """All of them as one vector; a sharded one is gathered."""
    import torch

    whole = [getattr(t, "full_tensor", lambda t=t: t)() for t in (t.detach() for t in tensors)]
    return torch.cat([t.reshape(-1) for t in whole]).numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|, in fp64."""
    import numpy as np

    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
