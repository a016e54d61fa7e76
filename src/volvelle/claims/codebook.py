"""Codebooks: the nearest code in every number format, and restarts that keep all codes in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Codebooks without collapse",
    family="generation",
    paper=Paper(
        "van den Oord et al.; Dhariwal et al.",
        2020,
        "Neural Discrete Representation Learning; Jukebox: A Generative Model for Music",
        "equation 1; section 3.1, random restarts",
        "https://arxiv.org/abs/1711.00937",
    ),
    sentence="z_q(x) = e_k, where k = argmin_j ||z_e(x) - e_j||; when the mean usage of a codebook vector falls below "
    "a threshold, we randomly reset it to one of the encoder outputs from the current batch: this ensures all vectors "
    "in the codebook are being used",
    measured_by="nearest codes in fp32, bf16, fp16 and under autocast beside fp64, with the small first codes of "
    "taming-transformers, and how many different codes two libraries find there in bf16; running codes on vectors that "
    "drift, with restarts, without, and with restarts that forget the running sums",
    summary="A codebook turns vectors into numbers: pictures become sequences. It fails when most codes are never the "
    "nearest, by rounding or because they were left behind; here neither happens.",
    summary_zh="码本把向量变成编号，图像由此成为序列。若多数码字从不被选中（因舍入误差或长期闲置）便会坍缩；此处两者皆不发生。",
    seconds={"quick": 40, "full": 300},
    parts=("functional.nearest_code", "functional.vector_quantize", "nn.VectorQuantizer", "nn.EMAVectorQuantizer"),
    recipe="volvelle train vqgan data=PATH",
)

VECTORS, WIDTH = 512, 64
CODES = 256
"""Of the codebook whose vectors drift."""


def measure(budget: Budget) -> Measurement:
    """Numbers first, then restarts (full: 16,384 codes too, and more seeds)."""
    import torch

    from volvelle.claims.garments import two_threads

    sizes, seeds = ((1024,), 1) if budget == "quick" else ((1024, 16384), 5)
    findings: list[Finding] = []
    peers: dict[str, str] = {}
    with two_threads():
        for codes in sizes:
            vectors, codebook = _beginning(codes)
            findings += _formats(vectors, codebook)
            found, version = _peers(vectors, codebook)
            findings += found
            peers |= version
        findings += _restarts(seeds)
    setting = {
        "vectors": f"{VECTORS} x {WIDTH}, normal, of size 3", "codes": list(sizes), "their first size": "1 / codes",
        "drifting codes": CODES, "seeds": seeds, "torch": torch.__version__,
    }  # fmt: skip
    notes = () if peers else ("neither diffusers nor transformers is installed: no peer's codes were counted",)
    return Measurement(findings, peers=peers, setting=setting, notes=notes)


def _beginning(codes: int) -> tuple[Tensor, Tensor]:
    """Vectors of an encoder and the codebook that taming-transformers begins with."""
    import torch

    draw = torch.Generator().manual_seed(0)
    vectors = 3 * torch.randn(VECTORS, WIDTH, generator=draw)
    return vectors, (2 * torch.rand(codes, WIDTH, generator=draw) - 1) / codes


def exact(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codes by differences in fp64, a few vectors at a time."""
    import torch

    z, e = vectors.double(), codebook.double()
    return torch.cat([(part[:, None] - e).square().sum(-1).argmin(1) for part in z.split(8)])


def _formats(vectors: Tensor, codebook: Tensor) -> list[Finding]:
    """Agreement with fp64 on the numbers that each format holds."""
    import torch

    from volvelle.parts.quantization.nearest import nearest_code

    shares = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z, e = vectors.to(dtype), codebook.to(dtype)
        shares[str(dtype).removeprefix("torch.")] = _agreement(nearest_code(z, e), exact(z, e))
    with torch.autocast("cpu", torch.bfloat16):
        shares["autocast"] = _agreement(nearest_code(vectors, codebook), exact(vectors, codebook))
    what = f"{len(codebook):,} codes: vectors that get the code of fp64, in"
    return [at_least(f"{what} {name}", 100 * share, 100.0, "%") for name, share in shares.items()]


def _agreement(ours: Tensor, right: Tensor) -> float:
    return float((ours == right).double().mean())


def _peers(vectors: Tensor, codebook: Tensor) -> tuple[list[Finding], dict[str, str]]:
    """How many different codes other libraries' quantizers find in bf16; the formulas are theirs, the numbers ours."""
    import importlib

    import torch

    z, e = vectors.bfloat16(), codebook.bfloat16()
    right, findings, peers = exact(z, e), list[Finding](), {}
    what = f"{len(codebook):,} codes, bf16:"
    for name, module, build in (
        ("transformers", "transformers.models.chameleon.modeling_chameleon", "ChameleonVQVAEVectorQuantizer"),
        ("diffusers", "diffusers.models.autoencoders.vae", "VectorQuantizer"),
    ):
        try:
            kind = getattr(importlib.import_module(module), build)
            peers[f"{name}.{build}"] = importlib.import_module(name).__version__
        except (ImportError, AttributeError):
            continue
        if name == "transformers":
            from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

            quantizer = kind(ChameleonVQVAEConfig(num_embeddings=len(e), embed_dim=WIDTH))
        else:
            quantizer = kind(len(e), WIDTH, beta=0.25)
        with torch.no_grad():
            quantizer.embedding.weight.copy_(codebook)
            found = quantizer.bfloat16()(z.T[None, :, :, None])[2]
        codes = (found[2] if isinstance(found, tuple) else found).flatten()
        findings.append(Finding(f"{what} different codes that {name} finds", len(codes.unique())))
        findings.append(
            Finding(f"{what} vectors to which it gives the code of fp64", 100 * _agreement(codes, right), "%")
        )
    findings.append(Finding(f"{what} different codes in fp64", len(right.unique())))
    return findings, peers


def _restarts(seeds: int) -> list[Finding]:
    """Codes in use after the vectors have moved away from where the codes began."""
    kinds = ("restarted with their sums", "never restarted", "restarted, sums forgotten")
    used = {kind: [drifted(kind, seed) for seed in range(seeds)] for kind in kinds}
    spread = {kind: (min(found), max(found)) for kind, found in used.items()}
    with_sums, never, forgot = (used[kind] for kind in kinds)
    what = f"codes of {CODES} in use after a drift"
    return [
        at_least(f"{what}, {kinds[0]}: the least", min(with_sums), 99.0, "%"),
        at_most(f"{what}, {kinds[1]}: the most, over the least of these", max(never) / min(with_sums), 0.9, "x"),
        Finding(f"{what}, {kinds[1]}", sum(never) / seeds, "%", spread=spread[kinds[1]]),
        Finding(f"{what}, {kinds[2]}", sum(forgot) / seeds, "%", spread=spread[kinds[2]]),
    ]


def drifted(kind: str, seed: int, *, steps: int = 150) -> float:
    """Percent of the codes in use at the end of a drift: a cloud of vectors that moves away and turns flat."""
    import torch

    from volvelle.parts.quantization.ema import EMAVectorQuantizer
    from volvelle.parts.quantization.kmeans import kmeans
    from volvelle.parts.quantization.usage import codebook_usage

    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    quantizer = EMAVectorQuantizer(CODES, 8, dim=-1, decay=0.9, least=0.0 if kind == "never restarted" else 0.03)
    held = quantizer.embedding

    def cloud(t: float, count: int) -> Tensor:
        scale = torch.linspace(1, 1 - t, 8).clamp(min=0.05)
        return torch.randn(count, 8, generator=draw) * scale + 6 * t

    quantizer.start_from(kmeans(cloud(0.0, 4096), CODES, generator=draw))
    for step in range(steps):
        quantizer(cloud(min(1.0, 2 * step / steps), 2048))
        sizes, sums = torch.lerp(held.seen, held.cluster_size, quantizer.decay), held.embed_avg.clone()
        if quantizer.update() and kind == "restarted, sums forgotten":
            dead = sizes < quantizer.least * sizes.mean()
            held.embed_avg[dead] = sums[dead]
    codes = quantizer.eval()(cloud(1.0, 64 * CODES)).codes
    return 100 * codebook_usage(torch.bincount(codes, minlength=CODES)).share
