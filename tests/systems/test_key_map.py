import pytest
import torch

from volvelle.errors import VolvelleError
from volvelle.systems.key_map import KeyMap, Rule

RULES = (
    Rule("h.{i}.qkv.weight", ("layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"), transposed=True),
    Rule("norm.{p}", ("last.{p}",)),
    Rule("seen", ("count",)),
)
SHAPES = {f"layers.1.{name}.weight": (height, 3) for name, height in {"q": 4, "k": 2, "v": 2}.items()}
SHAPES |= {"last.weight": (3,), "count": (1,)}
FAMILY = KeyMap(RULES, optional=frozenset({"seen"}))


def test_reading_undoes_writing():
    state = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    file = FAMILY.write(state)
    assert {name: tuple(value.shape) for name, value in file.items()} == {
        "h.1.qkv.weight": (3, 8),
        "norm.weight": (3,),
        "seen": (1,),
    }
    back = FAMILY.read(file, SHAPES, source="file")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_what_a_file_may_lack_is_zero():
    file = FAMILY.write({name: torch.ones(shape) for name, shape in SHAPES.items()})
    del file["seen"]
    assert torch.equal(FAMILY.read(file, SHAPES, source="file")["count"], torch.zeros(1))


def test_a_wrong_file_is_named_with_its_tensor():
    file = FAMILY.write({name: torch.ones(shape) for name, shape in SHAPES.items()})
    with pytest.raises(VolvelleError, match=r"net\.pth: missing norm\.weight"):
        FAMILY.read({name: value for name, value in file.items() if name != "norm.weight"}, SHAPES, source="net.pth")
    file["norm.weight"] = torch.ones(5)
    with pytest.raises(VolvelleError, match=r"net\.pth: norm\.weight: shape \(5,\) in the file, \(3,\) by"):
        FAMILY.read(file, SHAPES, source="net.pth")
