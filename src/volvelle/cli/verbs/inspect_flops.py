"""`volvelle inspect WHAT flops`: the arithmetic of a network, layer by layer, MACs and FLOPs named apart."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from volvelle.cli.console import result, say, table

EXAMPLES = ("volvelle inspect efficientnet-b0 flops", "volvelle inspect smollm2 flops length=512 layers=false")


@dataclass(frozen=True)
class Options:
    """The network and its input."""

    model: Positional[str]
    """A backbone, a run, a language model (its configuration is enough), or package.module:callable of your own."""
    shape: str | None = None
    """Shape of the input, such as 1x3x224x224; that of the network when left out."""
    length: int | None = None
    """Tokens of a language model's input; 1024, or a shorter context, when left out."""
    layers: bool = True
    """Print every layer; otherwise only the sums for each kind of operation."""


def main(options: Options) -> int:
    """Print the counts; nothing is computed and no weights are read."""
    from volvelle.cli.inspected import find_module, parse_shape

    shape = parse_shape(options.shape)
    from volvelle.errors import UsageError

    if options.length is not None and options.length < 1:
        raise UsageError(f"inspect flops: length must be at least 1, got {options.length}")
    import torch

    from volvelle.inspect import count_flops

    found = find_module(options.model, shape, options.length)
    say(f"{options.model}: {found.source}; traced on fake tensors, nothing is computed", "")
    counted = count_flops(found.module, found.shape, dtype=torch.int64 if found.ids else None)
    if options.layers:
        say(str(counted), "")
    rows = [(op, f"{c.macs:,}", f"{2 * c.macs:,}", f"{c.other:,}") for op, c in counted.by_op().items() if any(c)]
    table(("operation", "MACs", "FLOPs", "other"), rows)
    say(
        "",
        f"{counted.macs / 1e9:.4g} G MACs = {counted.flops / 1e9:.4g} G FLOPs in products, "
        f"{counted.other / 1e9:.4g} G operations beside them, {counted.parameters / 1e6:.4g}M parameters",
    )
    result({**counted.record(), "source": found.source})
    return 0
