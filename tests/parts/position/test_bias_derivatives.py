"""First and second derivatives through attention with every score bias, in fp64, and the blocks under torch.compile."""

import pytest
import torch
from tests.parts.position.zoo import HEADS, ZOO, D
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from volvelle.parts.attention.attention import attention

BIASES = [name for name, entry in ZOO.items() if entry.build().bias() is not None]
POSITIONS = torch.tensor([0, 2, 7])


class Attend(nn.Module):
    def __init__(self, position):
        super().__init__()
        self.position = position

    def forward(self, q, k, v, backend="reference"):
        return attention(
            q,
            k,
            v,
            bias=self.position.bias(),
            q_positions=POSITIONS[1:],
            k_positions=POSITIONS,
            backend=backend,
        )


@pytest.mark.parametrize("name", BIASES)
def test_first_and_second_derivatives(name):
    """To q, k, v and every parameter of the encoding, through the reference back end."""
    torch.manual_seed(0)
    module = Attend(ZOO[name].build()).double()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    weights = [parameter.detach().clone().requires_grad_() for _, parameter in module.named_parameters()]
    q = torch.randn(1, HEADS, 2, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 3, D, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(q, k, v, *weights):
        return functional_call(module, dict(zip(names, weights, strict=True)), (q, k, v))

    assert gradcheck(call, (q, k, v, *weights), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(call, (q, k, v, *weights), fast_mode=True)


@pytest.mark.parametrize("name", ["shaw", "transformer-xl", "deberta v2"])
def test_derivatives_entry_by_entry(name):
    """The same without the random projection of fast mode, for the terms that depend on q and k."""
    torch.manual_seed(1)
    module = Attend(ZOO[name].build()).double()
    q = torch.randn(1, HEADS, 2, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 3, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(module, (q, k, v))


COMPILED = ["shaw", "transformer-xl", "t5", "deberta v2", "dynamic", "alibi both sides"]  # a variant of each file


class AllBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.ModuleList(ZOO[name].build() for name in COMPILED)

    def forward(self, q, k, q_positions, k_positions):
        biases = [position.bias() for position in self.positions]
        blocks = [bias.tile(q, k, q_positions, k_positions) for bias in biases]
        terms = [
            bias.value_term(block.softmax(-1), q_positions, k_positions)
            for bias, block in zip(biases, blocks, strict=True)
            if bias.has_value_term
        ]
        return *blocks, *terms


def test_blocks_compile_and_export():
    module, q, k = AllBlocks(), torch.randn(2, HEADS, 4, D), torch.randn(2, 2, 6, D)
    inputs = (q, k, torch.tensor([[2, 3, 4, 5], [9, 9, 0, 1]]), torch.arange(6))
    expected = module(*inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    torch.testing.assert_close(torch.export.export(module, inputs).module()(*inputs), expected)
