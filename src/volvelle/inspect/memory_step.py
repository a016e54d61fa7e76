"""One training step of any module: build, adapt, cast, choose an optimiser, run forward, backward, update.

The same code runs under fake tensors for a plan and on real ones for a measurement, so both speak of one program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from volvelle.errors import VolvelleError
from volvelle.inspect.memory_methods import adapt
from volvelle.inspect.memory_options import StepOptions

Loss = Callable[[nn.Module, Any], Tensor]
_SWITCH = "gradient_checkpointing"
During = Callable[[str], contextlib.AbstractContextManager[Any]]


def model_loss(model: nn.Module, inputs: Any) -> Tensor:
    """The loss that the model itself computes: `model(**inputs).loss`, or a scalar result.

    Raises VolvelleError when the result holds no loss.
    """
    result = model(**inputs) if isinstance(inputs, Mapping) else model(*_as_tuple(inputs))
    loss = getattr(result, "loss", None)
    if loss is None and isinstance(result, Tensor) and result.dim() == 0:
        loss = result
    if loss is None:
        raise VolvelleError(
            f"plan_memory: {type(model).__name__} returned {type(result).__name__} without a loss",
            tip="pass loss=lambda model, inputs: ...",
        )
    return loss


class TrainingStep:
    """A module with its optimiser, ready to take steps.

    `run(inputs)` is one step. `during(phase)` wraps its parts: forward, backward, optimiser.
    """

    def __init__(self, build: Callable[[], nn.Module] | nn.Module, options: StepOptions, loss: Loss = model_loss):
        self.options, self.loss = options, loss
        model = build() if not isinstance(build, nn.Module) else build
        if not isinstance(model, nn.Module):
            raise VolvelleError(f"plan_memory: build must return an nn.Module, got {type(model).__name__}")
        model.train()
        dtype = {"fp32": None, "amp": None, "bf16": torch.bfloat16}.get(options.precision, torch.float16)
        dtype = torch.bfloat16 if options.precision == "bf16-master" else dtype
        if dtype is not None:
            cast(model, dtype)
        self.model = adapt(model, options.method)
        self.model.train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not self.trainable:
            raise VolvelleError(f"plan_memory: no parameter of {type(model).__name__} asks for a gradient")
        if options.checkpointing:
            checkpoint_blocks(self.model)
        self.masters = [p.detach().float() for p in self.trainable] if "master" in options.precision else []
        self.optimizer = make_optimizer(self.masters or self.trainable, options)

    def prepare(self) -> None:
        """Create the optimiser's state as a first step would, for every trained parameter.

        For fake tensors: the gradients have no values.
        """
        for parameter in self.masters or self.trainable:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.clear()

    def renew_optimizer(self) -> None:
        """Start with an optimiser without state."""
        self.optimizer = make_optimizer(self.masters or self.trainable, self.options)

    def clear(self) -> None:
        """Drop the gradients, as the next step's beginning does."""
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def run(self, inputs: Any, during: During = contextlib.nullcontext) -> None:
        """Forward, backward, update; the gradients stay until the next step begins."""
        self.clear()
        for _ in range(2 if self.options.accumulated else 1):
            with during("forward"):
                loss = self._forward(inputs)
            with during("backward"):
                loss.backward()
            del loss
        with during("optimiser"):
            self._update()

    def _forward(self, inputs: Any) -> Tensor:
        # Autocast to bf16 in fake-CPU form stands for CUDA's too: the casts and their cache are the same.
        with torch.autocast("cpu", torch.bfloat16, enabled=self.options.precision == "amp"):
            loss = self.loss(self.model, inputs)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise VolvelleError(f"plan_memory: loss must give one number with a gradient, got {what}")
        return loss

    def _update(self) -> None:
        for master, parameter in zip(self.masters, self.trainable, strict=False):
            if parameter.grad is not None:
                master.grad = parameter.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.trainable, strict=False):
                parameter.copy_(master)

    def named_tensors(self) -> dict[str, list[Tensor]]:
        """Tensors by category: weights, buffers, gradients, optimiser (states and master weights)."""
        gradients = [p.grad for p in (*self.model.parameters(), *self.masters) if p.grad is not None]
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return {
            "weights": list(self.model.parameters()),
            "buffers": list(self.model.buffers()),
            "gradients": gradients,
            "optimiser": [*self.masters, *states],
        }


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn floating-point parameters and buffers into `dtype`, shared ones into shared ones.

    `Module.to` swaps tensors in place, which fake ones refuse.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def make_optimizer(parameters: Sequence[Tensor], options: StepOptions) -> torch.optim.Optimizer:
    """The optimiser by name. Of AdamW the fused form, which takes no temporaries, as the training loop does.

    The others run as torch would choose: on CUDA in foreach form, which makes temporaries of all parameters at once,
    on the CPU in a loop.
    """
    foreach = options.device == "cuda"
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(list(parameters), lr=1e-5, fused=True)
        case "adamw-foreach":
            return torch.optim.AdamW(list(parameters), lr=1e-5, foreach=foreach)
        case "sgd":
            return torch.optim.SGD(list(parameters), lr=1e-5, foreach=foreach)
        case "momentum":
            return torch.optim.SGD(list(parameters), lr=1e-5, momentum=0.9, foreach=foreach)
        case "adafactor":
            return torch.optim.Adafactor(list(parameters), lr=1e-5, foreach=foreach)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: the members of its largest nn.ModuleList or nn.Sequential, by weight.

    >>> blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    [Linear(in_features=2, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True)]
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]

    def share(candidate: nn.Module) -> tuple[int, int]:
        sizes = [sum(p.numel() for p in child.parameters()) for child in candidate.children()]
        return min(sum(sizes) - max(sizes), sum(sizes)), len(sizes)

    return list(max(lists, key=share).children()) if lists else []


def sharded_blocks(model: nn.Module) -> list[nn.Module]:
    """What training shards: the members of every ModuleList, or of the largest Sequential where there is none.

    Once each, the outermost, and of those that are never called (containers, plain holders) what is called in them.
    Blocks without parameters are left out.

    >>> [type(block).__name__ for block in sharded_blocks(nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)]), nn.ReLU()]))]
    ['Linear']
    """
    found: dict[int, nn.Module] = {}

    def called(module: nn.Module) -> bool:
        return type(module).forward is not nn.Module.forward

    def take(module: nn.Module) -> None:
        if not called(module):
            for child in module.children():
                take(child)
        elif any(True for _ in module.parameters()):
            found.setdefault(id(module), module)

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList):
                take(child)
            else:
                visit(child)

    visit(model)
    if not found:
        for block in blocks_of(model):
            take(block)
    return list(found.values())


def units_of(model: nn.Module) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The parameters that sharding gathers together: of each block, and of all that is outside blocks."""
    units = [list(block.parameters()) for block in sharded_blocks(model)]
    inside = {id(p) for unit in units for p in unit}
    return units, [p for p in model.parameters() if id(p) not in inside]


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute the repeated blocks in backward: through the model's own switch when it has one.

    Raises VolvelleError when there are no blocks.
    """
    # transformers 5.2x and before; both take the keyword arguments of torch.utils.checkpoint first.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable: Any = getattr(model, name, None)
        if enable is not None:
            enable({"use_reentrant": False})
            return
    switches = [m for m in model.modules() if isinstance(getattr(m, _SWITCH, None), bool)]
    for module in switches:
        setattr(module, _SWITCH, True)
    if switches:
        return
    blocks = blocks_of(model)
    if not blocks:
        raise VolvelleError(
            f"plan_memory: {type(model).__name__} has no repeated blocks to checkpoint",
            tip="leave checkpointing off, or give the module a gradient_checkpointing attribute",
        )
    for block in blocks:
        block.forward = _Recomputed(block.forward)


class _Recomputed:
    """A block's forward under torch.utils.checkpoint."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
