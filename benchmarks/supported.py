"""What every public function can do, by trying it: number formats, derivatives, torch.compile, torch.export.

    python -m benchmarks.supported [--only NAME…]

Each trial is one small call (support/supported_examples.py). "yes" is a finite result in the format; of compiled and
exported calls, the result of the plain one. "refused" is an error in which the function itself says that it does not;
"fails" is any other error, so nothing is hidden.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from benchmarks import protocol
from benchmarks.support.supported_examples import FAMILIES, Example
from volvelle import functional

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Maker:
    """Tensors of one dtype, the same in every trial."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.draw = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.draw, dtype=torch.float64).to(self.dtype).requires_grad_()

    def share(self, *shape: int) -> Tensor:
        """Numbers between 0.05 and 0.95."""
        drawn = 0.05 + 0.9 * torch.rand(shape, generator=self.draw, dtype=torch.float64)
        return drawn.to(self.dtype).requires_grad_()


class Flat(torch.nn.Module):
    """A function with its example as a Module of tensors alone, which is what can be compiled and exported."""

    def __init__(self, function: Callable[..., Any], example: Example, dtype: torch.dtype):
        super().__init__()
        self.function = function
        leaves, self.spec = tree.tree_flatten(example(Maker(dtype)))
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i].detach() for i in self.places]
        self.wanted = [leaves[i].requires_grad for i in self.places]
        self.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors of the result."""
        leaves = list(self.rest)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree.tree_unflatten(leaves, self.spec)
        return list(results(self.function(*args, **kwargs)))

    def leaves(self) -> list[Tensor]:
        """Fresh tensors, those of the dtype under trial with gradients."""
        return [x.clone().requires_grad_(wanted) for x, wanted in zip(self.tensors, self.wanted, strict=True)]


def results(found: Any) -> Iterator[Tensor]:
    """The tensors in what a function returned."""
    for leaf in tree.tree_leaves(found):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))


def tried(function: Callable[..., Any], example: Example) -> dict[str, str]:
    """The answer of every trial."""
    found: dict[str, str] = {}
    for name, dtype in DTYPES.items():
        found[name] = answer(lambda dtype=dtype: plain(function, example, dtype))
    for name, trial in (("gradient", gradient), ("second", second), ("compile", compiled), ("export", exported)):
        found[name] = answer(lambda trial=trial: trial(function, example))
    return found


def answer(trial: Callable[[], str]) -> str:
    """What a trial says, or which kind of error ended it."""
    torch.compiler.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trial()
    except Exception as error:  # noqa: BLE001  # every error is an answer
        if isinstance(error, ValueError | TypeError) and re.match(r"\w+: ", str(error)):
            return "refused"
        print(f"  {type(error).__name__}: {str(error).splitlines()[0][:140] if str(error) else ''}", file=sys.stderr)
        return "fails"


def plain(function: Callable[..., Any], example: Example, dtype: torch.dtype) -> str:
    """Whether the result is finite."""
    flat = Flat(function, example, dtype)
    if not any(flat.wanted):
        return "-"
    out = flat(*flat.leaves())
    return "yes" if all(bool(x.isfinite().all()) for x in out if x.is_floating_point()) else "not finite"


def gradient(function: Callable[..., Any], example: Example) -> str:
    """Whether some input has a finite gradient; "-" where the result has none to give."""
    found = _gradients(function, example, again=False)
    return "-" if found is None else "yes" if all(bool(x.isfinite().all()) for x in found) else "not finite"


def second(function: Callable[..., Any], example: Example) -> str:
    """Whether the gradients have gradients."""
    found = _gradients(function, example, again=True)
    return "-" if found is None else "yes" if all(bool(x.isfinite().all()) for x in found) else "not finite"


def _gradients(function: Callable[..., Any], example: Example, *, again: bool) -> Sequence[Tensor] | None:
    flat = Flat(function, example, torch.float64)
    leaves = flat.leaves()
    wanted = [x for x in leaves if x.requires_grad]
    out = [x for x in flat(*leaves) if x.requires_grad]
    if not out or not wanted:
        return None
    loss = sum(x.tanh().sum() for x in out)
    assert isinstance(loss, Tensor)
    first = [x for x in torch.autograd.grad(loss, wanted, create_graph=again, allow_unused=True) if x is not None]
    if not again:
        return first
    curved = [x.square().sum() for x in first if x.requires_grad]
    if not curved:
        return first
    return [x for x in torch.autograd.grad(sum(curved), wanted, allow_unused=True) if x is not None]  # pyright: ignore


def compiled(function: Callable[..., Any], example: Example) -> str:
    """Whether one graph without breaks gives the same, forward and backward included."""
    flat = Flat(function, example, torch.float32)
    return _alike(flat, torch.compile(flat, fullgraph=True, backend="aot_eager"))


def exported(function: Callable[..., Any], example: Example) -> str:
    """Whether the exported program gives the same."""
    flat = Flat(function, example, torch.float32)
    return _alike(flat, torch.export.export(flat, tuple(flat.tensors)).module())


def _alike(flat: Flat, other: Callable[..., Any]) -> str:
    torch.manual_seed(0)
    ours = flat(*flat.tensors)
    torch.manual_seed(0)
    theirs = other(*flat.tensors)
    same = all(
        torch.allclose(a.double(), b.double(), atol=1e-5, equal_nan=True) for a, b in zip(ours, theirs, strict=False)
    )
    return "yes" if same and len(ours) == len(theirs) else "differs"


def measure(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row a function, in the order of the families."""
    rows = []
    for family, examples in FAMILIES.items():
        for name, example in examples.items():
            if names is None or name in names:
                rows.append(
                    {"family": family, "name": name} | tried(getattr(functional, name.partition(",")[0]), example)
                )
                print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="these functions; the others keep what was found before")
    options = parser.parse_args()
    rows = measure(options.only)
    if options.only:
        known = {row["name"]: row for row in (*protocol.read("supported").get("rows", []), *rows)}
        rows = [known[name] for examples in FAMILIES.values() for name in examples if name in known]
    print(protocol.write("supported", {"machine": protocol.machine(["torch"]), "rows": rows}))


if __name__ == "__main__":
    main()
