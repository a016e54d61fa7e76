"""What trace_gradients says of modules that were broken on purpose, each in one known place."""

import itertools
import json
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from volvelle.cli.main import main
from volvelle.inspect import first_nonfinite, nonfinite_origin, trace_gradients
from volvelle.inspect.gradients_layout import layered


class Net(nn.Module):
    """Three layers; `middle(self, x)` is the place where tests break it."""

    def __init__(self, middle=lambda net, x: net.two(x)):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.middle = middle

    def forward(self, x):
        return self.three(self.middle(self, torch.tanh(self.one(x))))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def states(report):
    return {p.name: p.state for p in report.parameters if p.state != "ok"}


def traced(net):
    return trace_gradients(net, lambda: net(X).square().mean())


def why(report, name):
    return next(p.why for p in report.parameters if p.name == name)


def test_a_sound_network_has_no_problems():
    net = Net()
    report = traced(net)
    loss = net(X).square().mean()
    loss.backward()
    assert states(report) == {}
    assert report.problems == ()
    assert report.origin is None
    assert report.loss == pytest.approx(float(loss))
    for found, p in zip(report.parameters, net.parameters(), strict=True):
        assert found.norm == pytest.approx(float(p.grad.norm()))


def no_grad(net, x):
    with torch.no_grad():
        return net.two(x)


def item(net, x):
    return x * net.two(x).mean().item()


CUTS = {
    "detach": (lambda net, x: x + net.two(x).detach(), "cut off by detach, in Net"),
    "data": (lambda net, x: x + net.two(x).data, "cut off by data, in Net"),
    "no_grad": (lambda net, x: x + no_grad(net, x), "cut off by no_grad, in two"),
    "argmax": (lambda net, x: x + net.two(x).argmax(-1, keepdim=True), "cut off by argmax gives int64"),
    "item": (item, "cut off by item takes the numbers out of torch, in Net"),
    "numpy": (lambda net, x: x + torch.from_numpy(net.two(x).detach().numpy()), "cut off by detach, in Net"),
    "round trip": (lambda net, x: x + net.two(x).long(), "cut off by long gives int64, which has no gradient"),
    "greater": (lambda net, x: torch.where(net.two(x) > 0, x, -x), "cut off by gt gives bool"),
}


@pytest.mark.parametrize("name", CUTS)
def test_detached_parameters_are_named_with_the_place(name):
    middle, says = CUTS[name]
    report = traced(Net(middle))
    assert states(report) == {"two.weight": "detached", "two.bias": "detached"}
    assert says in why(report, "two.weight")
    assert "test_gradients.py:" in why(report, "two.weight")


def test_a_cut_between_modules_names_all_above_it():
    report = traced(Net(lambda net, x: net.two(x).detach()))
    assert states(report) == dict.fromkeys(("one.weight", "one.bias", "two.weight", "two.bias"), "detached")
    assert "detach, in Net" in why(report, "one.bias")


def test_a_harmless_cut_is_not_reported():
    """A logged value is detached, the path to the loss is not."""
    assert states(traced(Net(lambda net, x: net.two(x) + 0 * float(net.two(x).detach().mean())))) == {}


def test_unused_parameters_are_told_from_dropped_results():
    def middle(net, x):
        net.kept = net.two(x)
        return x

    report = traced(Net(middle))
    assert states(report) == {"two.weight": "unused", "two.bias": "unused"}
    assert "its last result, of linear in two" in why(report, "two.weight")
    report = traced(Net(lambda net, x: x))
    assert why(report, "two.weight") == "the forward pass does not touch it"


def test_frozen_and_zero():
    net = Net()
    net.one.weight.requires_grad_(False)
    net.two.weight.data.zero_()
    with torch.no_grad():
        net.three.weight.zero_()
    report = traced(net)
    expected = {"one.weight": "frozen", "one.bias": "zero", "two.weight": "zero", "two.bias": "zero"}
    assert {k: v for k, v in states(report).items() if not k.startswith("three")} == expected
    assert "one.weight" not in {p.name for p in report.problems}


def test_everything_detached_still_reports():
    report = traced(Net(lambda net, x: net.two(x)).requires_grad_(False))
    assert set(states(report).values()) == {"frozen"}
    net = Net()
    report = trace_gradients(net, lambda: net(X).detach().sum())
    assert set(states(report).values()) == {"detached"}


def test_overflow_is_found_where_it_begins():
    def middle(net, x):
        return net.two(x * 1e30 * 1e30)

    net = Net(middle)
    origin = nonfinite_origin(net, lambda: net(X).sum())
    assert (origin.what, origin.op, origin.module, origin.direction) == ("Inf", "mul", "Net", "forward")
    assert origin.where.startswith("test_gradients.py:")
    assert first_nonfinite(net, lambda: net(X).sum()) == "Net"


def test_a_poisoned_parameter_is_named():
    net = Net()
    net.two.bias.data[2] = float("nan")
    origin = nonfinite_origin(net, lambda: net(X).sum())
    assert (origin.module, origin.given) == ("two", "parameter two.bias holds NaN already")


def test_a_poisoned_batch_is_said():
    net = Net()
    x = X.clone()
    x[0, 0] = float("nan")
    assert nonfinite_origin(net, lambda: net(x).sum()).given == "an argument holds NaN already"
    assert first_nonfinite(net, lambda: net(x).sum()) == "one"


def test_a_nan_that_begins_in_the_loss():
    net = Net()
    assert first_nonfinite(net, lambda: (net(X) - 1e9).sqrt().sum()) == "outside the module"


def test_a_nan_that_only_the_backward_pass_sees():
    net = Net(lambda net, x: (net.two(x) * 0).sqrt())
    report = traced(net)
    assert report.loss == pytest.approx(float(net.three.bias.square().mean()))
    assert (report.origin.direction, report.origin.module) == ("backward", "Net")
    assert report.origin.op == "sqrt (SqrtBackward0)"
    assert states(report)["two.weight"] == "non-finite"
    assert first_nonfinite(net, lambda: net(X).square().mean()) == "Net"


def test_meant_infinities_are_no_origin():
    def middle(net, x):
        mask = torch.full((6, 6), float("-inf")).triu(1)
        return torch.softmax(x[:, :, None] * x[:, None, :] + mask, -1).sum(1) + net.two(x)

    net = Net(middle)
    assert first_nonfinite(net, lambda: net(X).sum()) is None
    net.two.weight.data[0, 0] = float("inf")
    origin = nonfinite_origin(net, lambda: (net(X) * 0).sum())
    assert origin.module != "Net"  # not the mask


def test_a_row_that_may_attend_to_nothing():
    def middle(net, x):
        return torch.softmax(x.masked_fill(torch.ones(6, dtype=torch.bool), float("-inf")), -1) + net.two(x)

    net = Net(middle)
    origin = nonfinite_origin(net, lambda: net(X).sum())
    assert (origin.what, origin.op, origin.given) == ("NaN", "softmax", "an argument holds Inf already")


def test_half_precision_overflow_names_the_layer():
    net = Net().half()
    net.two.weight.data.fill_(60000.0)
    assert first_nonfinite(net, lambda: net(X.half()).float().sum()) == "two"


def test_nothing_is_changed():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(3)
    trace_gradients(net, lambda: net(X).sum())
    first_nonfinite(net, lambda: net(X).sum())
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_failing_forward_pass_leaves_no_hooks():
    net = Net(lambda net, x: x @ x)
    with pytest.raises(RuntimeError):
        traced(net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_loss_computed_before():
    net = Net(lambda net, x: x)
    loss = net(X).square().mean()
    report = trace_gradients(net, loss)
    assert states(report) == {"two.weight": "unused", "two.bias": "unused"}
    assert "give a callable" in why(report, "two.weight")
    assert report.graph.boxes[-1].title == "MeanBackward0"
    loss.backward()  # the graph is still there


@pytest.mark.parametrize("loss", [lambda: torch.ones(2), lambda: 3.0])
def test_a_loss_must_be_a_scalar(loss):
    with pytest.raises(TypeError, match="the loss must be a scalar tensor, got"):
        trace_gradients(Net(), loss)


def test_checkpointed_custom_and_in_place_operations():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *g):
            return g[0] * 2

    def middle(net, x):
        y = Twice.apply(checkpoint(net.two, x, use_reentrant=False))
        y.add_(1).clamp_(-5, 5)
        return y

    report = traced(Net(middle))
    assert states(report) == {}
    assert any("TwiceBackward" in box.title for box in report.graph.boxes)


def test_graph_is_folded_by_module_and_stays_acyclic():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(40)))
    report = trace_gradients(net, lambda: net(X).sum())
    titles = [box.title for box in report.graph.boxes]
    assert titles == [*(str(i) for i in range(40)), "sum"]
    assert all(j < i for i, box in enumerate(report.graph.boxes) for j in box.inputs)
    assert "39" in report.graph.text()
    deep = trace_gradients(net, lambda: net(X).sum(), depth=3)
    assert len(deep.graph.boxes) == 121
    shared = nn.Linear(4, 4)
    twice = trace_gradients(shared, lambda: shared(shared(X)).sum())
    assert [box.title for box in twice.graph.boxes] == ["linear", "linear", "sum"]


def test_svg_is_whole_and_holds_what_is_wrong():
    net = Net(lambda net, x: (net.two(x).detach() * 0 + x * 0).sqrt())
    report = traced(net)
    root = ElementTree.fromstring(report.graph.svg())
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Inf began here" in texts
    assert any("two.weight: detached, cut off by detach" in text for text in texts)
    assert "http" not in report.graph.svg().replace("http://www.w3.org/2000/svg", "")


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 14))
    inputs = [tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else () for i in range(count)]
    return inputs, [(draw(st.integers(20, 200)), draw(st.integers(10, 60))) for _ in range(count)]


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_boxes_do_not_overlap_and_edges_point_down(graph):
    inputs, sizes = graph
    layout = layered(inputs, [(float(w), float(h)) for w, h in sizes])
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(layout.places, sizes, strict=True)]
    for i, a in enumerate(boxes):
        assert a[0] >= -1e-6
        assert a[2] <= layout.width + 1e-6
        for b in boxes[:i]:
            assert a[2] <= b[0] + 1e-6 or b[2] <= a[0] + 1e-6 or a[3] <= b[1] or b[3] <= a[1]
    assert len(layout.edges) == sum(map(len, inputs))
    for points in layout.edges:
        assert all(y0 < y1 for (_, y0), (_, y1) in itertools.pairwise(points) if y0 != y1)
        assert points[0][1] < points[-1][1]


def test_verb(tmp_path, capsys):
    from volvelle.systems.language.config import GatedMLP, Head, LanguageConfig, RMSNorm, Rope
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.huggingface import write_folder

    tokenizers = pytest.importorskip("tokenizers")
    from volvelle.systems.language.tokenizer import TextTokenizer

    config = LanguageConfig(
        family="llama", vocabulary=64, width=16, depth=2, heads=2, kv_heads=1, context=32, norm=RMSNorm(1e-5),
        mlp=GatedMLP(32), position=Rope(), head=Head(tied=True),
    )  # fmt: skip
    model = Decoder(config)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate("abcd")}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.tokenizer = TextTokenizer(words, eos_ids=(0,), bos_id=None, pad_id=None, chat_template=None)
    write_folder(model, tmp_path / "model")
    line = ["inspect", "gradients", str(tmp_path / "model"), "text=a b c d"]
    assert main([*line, f"svg={tmp_path / 'graph.svg'}"]) == 0
    assert "model.layers.1" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "graph.svg")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    write_folder(model, tmp_path / "model")
    assert main([*line, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["origin"]["module"] == "model.layers.1.mlp.up_proj"
    assert main([*line[:-1], "text=a"]) == 2


def test_agrees_with_anomaly_detection():
    """torch's anomaly mode names the same backward node."""
    net = Net(lambda net, x: (net.two(x) * 0).pow(0.5))
    origin = nonfinite_origin(net, lambda: (net(X) * 0).sum())
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError) as caught:
        (net(X) * 0).sum().backward()
    assert origin.op.split("(")[1].rstrip(")") in str(caught.value)


def test_importing_inspect_does_not_import_torch():
    code = "import sys, volvelle.inspect as i; i.live_threads; sys.exit('torch' in sys.modules)"
    import sys

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loss_weighting_by_embedding_rows():
    """Rows of an embedding that no sample uses have zero gradients, but the parameter does not."""
    table = nn.Embedding(10, 3)
    report = trace_gradients(table, lambda: F.embedding(torch.tensor([1, 2]), table.weight).sum())
    assert states(report) == {}
