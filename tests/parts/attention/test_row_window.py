"""RowWindow: with one layer, attention sees what the model run anew over each window would see."""

import itertools

import pytest
import torch

from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.row_window import RowWindow
from volvelle.parts.position.rope import RotaryEmbedding

SAID, WINDOW, H, D = 2, (3, 4), 2, 8
ROPE = RotaryEmbedding(D, base=100.0)
SIZES = [(3, 4), (2, 4), (5, 4), (4, 7), (6, 9), (3, 5)]


def turn(keys, distance):
    return ROPE.rotation(torch.full((keys.shape[2],), distance), torch.float64).turn(keys)


def cache_for(columns, batch=2, **more):
    return RowWindow.of(
        said=SAID, window=WINDOW, columns=columns, layers=1, batch=batch, kv_heads=H, head_width=D,
        dtype=torch.float64, **({"turn": turn} | more),
    )  # fmt: skip


class Layer:
    """One attention layer over random projections of each token of a picture of rows x columns codes."""

    def __init__(self, rows, columns, batch=2):
        draw = torch.Generator().manual_seed(0)
        self.rows, self.columns = rows, columns
        shape = (batch, H, SAID + rows * columns, D)
        self.q, self.k, self.v = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))

    def step(self, cache, tokens):
        """The outputs (b, h, n, d) of a step of these tokens."""
        seen = cache.begin(len(tokens))
        q, k = ROPE(self.q[:, :, tokens], self.k[:, :, tokens], seen.positions)
        keys, values = cache.append(0, k, self.v[:, :, tokens])
        return attention(q, keys, values, mask=seen.mask, causal=seen.causal, backend="reference")

    def run(self, cache, first):
        """Outputs for every code that follows, the first `first` tokens at once."""
        found, at = [], 0
        total = SAID + self.rows * self.columns
        for n in itertools.chain([first], itertools.repeat(1)):
            for piece in cache.pieces(min(n, total - at)):
                tokens = list(range(at, at + piece))
                ends = cache.ends_row(piece)
                out = self.step(cache, tokens)
                cache.commit()
                if ends:
                    out = torch.cat((out[:, :, :-1], self.step(cache, [cache.again()])), 2)
                    cache.commit()
                found.append(out)
                at += piece
            if at == total:
                return torch.cat(found, 2)

    def anew(self, code):
        """What the token before `code` gives when the window is written out as a picture of the trained size."""
        row, column = divmod(code, self.columns)
        top = max(0, row - WINDOW[0] + 1)
        left = min(max(0, column - WINDOW[1] // 2), self.columns - WINDOW[1])
        codes = [r * self.columns + c for r in range(top, row + 1) for c in range(left, left + WINDOW[1])]
        tokens = [*range(SAID), *(SAID + c for c in codes if c < code and c % self.columns < left + WINDOW[1])]
        tokens = tokens[: SAID + (row - top) * WINDOW[1] + column - left]
        q, k = ROPE(self.q[:, :, tokens], self.k[:, :, tokens], torch.arange(len(tokens)))
        return attention(q, k, self.v[:, :, tokens], causal=True, backend="reference")[:, :, -1]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("first", ["said", "half", "all"])
def test_each_code_sees_its_window_as_a_picture_of_the_trained_size(rows, columns, first):
    layer = Layer(rows, columns)
    count = {"said": SAID, "half": SAID + rows * columns // 2, "all": SAID + rows * columns}[first]
    found = layer.run(cache_for(columns), count)
    for code in range(rows * columns):
        torch.testing.assert_close(found[:, :, SAID + code - 1], layer.anew(code), rtol=1e-10, atol=1e-10)


def test_mutants_are_caught():
    """What is said does not come along; and a row begins from the end of the row above."""
    layer = Layer(5, 4)
    still = layer.run(cache_for(4, turn=None), SAID)
    assert (still[:, :, SAID + 12 - 1] - layer.anew(12)).abs().max() > 1e-3
    layer = Layer(2, 7)
    cache = cache_for(7)
    outputs = []
    for token in range(SAID, SAID + 7):
        if token == SAID:
            layer.step(cache, list(range(SAID)))
            cache.commit()
        outputs.append(layer.step(cache, [token]))
        cache.commit()
    assert (outputs[-1][:, :, 0] - layer.anew(7)).abs().max() > 1e-3


def test_memory_is_that_of_a_window_whatever_the_height():
    layer, cache = Layer(11, 5), cache_for(5)
    layer.run(cache, SAID)
    assert cache.context == SAID + WINDOW[0] * 5 == cache.storage.shape[4]
    assert cache.told == SAID + 55
    assert cache.length <= cache.context
    cache.reset()
    assert (cache.told, cache.length) == (0, 0)
    torch.testing.assert_close(layer.run(cache, SAID), layer.run(cache_for(5), SAID), rtol=0, atol=0)


def test_pieces_cut_where_the_window_moves():
    cache = cache_for(4)
    assert cache.pieces(SAID + 12) == [SAID + 11, 1]
    assert sum(cache.pieces(SAID + 20)) == SAID + 20
    with pytest.raises(ValueError, match=r"cut them as pieces\(15\) says"):
        cache.begin(15)
    wide = cache_for(6)
    assert wide.pieces(SAID + 7)[-1] == 1  # a run ends with the row
    assert sum(wide.pieces(SAID + 7)) == SAID + 7


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda c: c.begin(2, padding=torch.tensor([[True, True], [False, True]])), "neither padding nor trees"),
        (lambda c: c.begin(2, tree=torch.ones(2, 2, dtype=torch.bool)), "neither padding nor trees"),
        (lambda c: c.begin(1), "first step must hold all 2 tokens"),
        (lambda c: (c.begin(2), c.commit(torch.zeros(2, 1, dtype=torch.long))), "kept whole"),
        (lambda c: c.again(), "no row of a wide picture ends"),
        (lambda c: c.snapshot(), "no way back"),
    ],
)
def test_what_it_cannot_do_is_said(work, message):
    with pytest.raises(ValueError, match=message):
        work(cache_for(6))


@pytest.mark.parametrize("sizes", [{"said": 0}, {"window": (0, 4)}, {"columns": 3}, {"window": (3, 1), "columns": 2}])
def test_sizes_that_do_not_fit(sizes):
    kind = {"said": 2, "window": (3, 4), "columns": 4} | sizes
    with pytest.raises(ValueError, match="RowWindow: said and window"):
        RowWindow.of(**kind, layers=1, batch=1, kv_heads=1, head_width=2)


def test_half_precision_turns_what_is_said_from_the_original_keys():
    layer = Layer(9, 4)
    layer.q, layer.k, layer.v = (x.bfloat16() for x in (layer.q, layer.k, layer.v))

    def rounded(keys, distance):
        return turn(keys.double(), distance).to(keys.dtype)

    cache = RowWindow.of(
        said=SAID, window=WINDOW, columns=4, layers=1, batch=2, kv_heads=H, head_width=D, dtype=torch.bfloat16,
        turn=rounded,
    )  # fmt: skip
    layer.run(cache, SAID)
    spoken = ROPE(layer.k[:, :, :SAID], layer.k[:, :, :SAID], torch.arange(SAID) + 7 * 4)[0]
    # one rounding of the keys and one of the turned ones, after seven moves
    torch.testing.assert_close(cache.storage[0, 0, :, :, :SAID].float(), spoken.float(), rtol=2**-7, atol=2**-7)
