"""What receptive_field says, against formulas, and against the gradients of copies with positive weights."""

import json
import random
from fractions import Fraction
from xml.etree import ElementTree

import pytest
import torch
from tests.inspect.nets import Net
from torch import nn
from torch.nn import functional as F

from volvelle.errors import UsageError, VolvelleError
from volvelle.inspect import chain_field, effective_field, receptive_field
from volvelle.inspect import receptive_field_mix as mix
from volvelle.inspect import receptive_field_space as space
from volvelle.inspect.receptive_field_call import RULES
from volvelle.inspect.receptive_field_verify import verified


def checked(net, shape, **options):
    """The fields, every node of which agrees with the gradients where it can be compared."""
    found = verified(receptive_field(net, shape, **options), nodes=1000)
    assert found.checks
    assert [str(check) for check in found.checks if not check.agrees] == []
    return found


def test_a_chain_by_both_recursions():
    """r = 1 + Σ (k_l - 1) Π s_i from the input on, and N_RF = (N_RF - 1) * stride + ksize from the top down."""
    order = random.Random(0)
    for _ in range(3):
        layers = [(order.choice([1, 2, 3, 5, 7]), order.choice([1, 1, 2, 3]), order.choice([1, 2])) for _ in range(5)]
        net = nn.Sequential(*(nn.Conv2d(1, 1, k, s, padding=order.randrange(3), dilation=d) for k, s, d in layers))
        found = receptive_field(net, (1, 1, 600, 600))
        size, jump, start = 1, 1, 0
        for (k, s, d), layer in zip(layers, net, strict=True):
            start -= layer.padding[0] * jump
            size, jump = size + d * (k - 1) * jump, jump * s
        assert found.size == (size, size)
        assert found.output.stride == (jump, jump)
        assert found.output.offset == (start, start)
        assert chain_field([(d * (k - 1) + 1, s) for k, s, d in layers]) == size


def test_axes_are_apart():
    net = nn.Sequential(
        nn.Conv2d(2, 3, (3, 5), stride=(2, 1), padding=(1, 0)),
        nn.MaxPool2d((1, 3), (1, 2)),
        nn.Conv2d(3, 2, (3, 1), dilation=(4, 1)),
    )
    found = checked(net, (2, 2, 33, 21))
    assert found.size == (19, 7)
    assert found.output.stride == (2, 2)
    assert found.output.offset == (-1, 0)


def test_gridding_size_is_the_extent_and_count_what_is_read():
    net = nn.Sequential(*(nn.Conv2d(1, 1, 3, dilation=2) for _ in range(3)))
    found = checked(net, (1, 1, 20, 20))
    assert found.size == (13, 13)
    assert [axis.count for axis in found.output.axes] == [7, 7]
    assert found.seen("2", (0, 0))[0] == frozenset(range(0, 13, 2))
    hybrid = receptive_field(nn.Sequential(*(nn.Conv2d(1, 1, 3, dilation=d) for d in (1, 2, 3))), (1, 1, 20, 20))
    assert hybrid.size == (13, 13)
    assert [axis.count for axis in hybrid.output.axes] == [13, 13]


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (1, 2, 40)), (nn.Conv2d, (1, 2, 16, 13)), (nn.Conv3d, (1, 2, 9, 10, 11))]
)
def test_one_to_three_axes(kind, shape):
    net = nn.Sequential(kind(2, 2, 3, stride=2, padding=1), nn.ReLU(), kind(2, 2, 3, padding="same"))
    found = checked(net, shape)
    assert found.size == (7,) * (len(shape) - 2)
    assert found.output.stride == (2,) * (len(shape) - 2)


def test_branches_take_the_union():
    inception = Net(
        lambda m, x: torch.cat([m.a(x), m.b(F.relu(x)), m.c(F.max_pool2d(x, 3, 1, 1))], 1),
        a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, (1, 5), padding=(0, 2)), c=nn.Conv2d(2, 2, 1),
    )  # fmt: skip
    assert checked(inception, (1, 2, 9, 9)).size == (3, 5)
    residual = Net(lambda m, x: m.b(m.a(x)) + m.c(x), a=nn.Conv2d(1, 1, 3, 2, 1), b=nn.Conv2d(1, 1, 3, 1, 1),
                   c=nn.Conv2d(1, 1, 1, 2))  # fmt: skip
    found = checked(residual, (1, 1, 11, 14))
    assert found["c"].size == (1, 1)
    assert found.size == (7, 7)
    one_sided = Net(lambda m, x: m.a(F.pad(x, (3, 0, 0, 0))) * m.a(F.pad(x, (0, 3, 0, 0))), a=nn.Conv2d(1, 1, (1, 4)))
    assert checked(one_sided, (1, 1, 8, 8)).output.local == (1, 7)


def test_upsampling_as_in_a_feature_pyramid():
    net = Net(
        lambda m, x: m.c(m.a(x) + F.interpolate(m.b(m.a(x)), scale_factor=2, mode="nearest")),
        a=nn.Conv2d(1, 1, 3, 2, 1), b=nn.Conv2d(1, 1, 3, 2, 1), c=nn.Conv2d(1, 1, 3, 1, 1),
    )  # fmt: skip
    found = checked(net, (1, 1, 24, 24))
    up = found["upsample_nearest2d"]
    assert up.stride == (2, 2)
    assert up.local == (7, 7)
    assert found.size == (11, 11)
    single = receptive_field(nn.Upsample(scale_factor=4), (1, 1, 8, 8))
    assert single.output.stride == (Fraction(1, 4),) * 2


WAYS = [("nearest", {}), ("nearest-exact", {}), ("area", {})]
WAYS += [(mode, {"align_corners": corners}) for mode in ("bilinear", "bicubic") for corners in (False, True)]


def test_resampling_to_any_size():
    def forward(m, x):
        return (
            [
                m.c(F.interpolate(x, **size, mode=mode, **options))
                for size in ({"size": (5, 31)}, {"size": (26, 9)}, {"scale_factor": (1.3, 0.6)})
                for mode, options in WAYS
                if "size" in size or mode != "area"
            ]
            + [  # sizes at which no weight of the smoothing kernel is zero but for rounding
                F.interpolate(x[:, :, 1:], size=(6, 34), mode=mode, antialias=True) for mode in ("bilinear", "bicubic")
            ]
        )

    checked(Net(forward, c=nn.Conv2d(1, 1, 3, 2, 1)), (1, 1, 13, 17))


def test_transposed_convolution_with_output_padding_and_holes():
    net = nn.ConvTranspose2d(1, 1, (3, 2), (2, 3), (1, 0), (1, 2))
    found = checked(net, (1, 1, 6, 7))
    assert found.output.stride == (Fraction(1, 2), Fraction(1, 3))
    assert found.size == (2, 1)
    assert found.seen(found.output.name, (0, 2))[1] == frozenset()
    checked(nn.Sequential(nn.ConvTranspose1d(1, 1, 1, 2), nn.Conv1d(1, 1, 2)), (1, 1, 7))
    checked(nn.Sequential(nn.Conv2d(1, 1, 1, 2, 1), nn.Conv2d(1, 1, 3, padding=1)), (1, 1, 6, 6))


def test_rearrangements():
    checked(Net(lambda m, x: m.c(F.pixel_shuffle(m.c(F.pixel_unshuffle(x, 2)), 2).repeat(1, 4, 1, 1)),
                c=nn.Conv2d(4, 4, 3, padding=1)), (1, 1, 12, 8))  # fmt: skip
    found = checked(Net(lambda m, x: m.c(x[:, :, ::2, 1:-2].flip(3).roll(2, 2)), c=nn.Conv2d(1, 1, 3)), (1, 1, 14, 11))
    assert found.output.stride == (2, -1)
    halves = Net(lambda m, x: m.c(torch.cat([x[..., 5:], x[..., :5]], 3)), c=nn.Conv2d(1, 1, 3, padding=1))
    checked(halves, (1, 1, 6, 12))
    for mode in ("reflect", "replicate", "circular"):
        checked(nn.Conv2d(1, 1, 5, stride=2, padding=2, padding_mode=mode), (1, 1, 9, 12))
    checked(Net(lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 3, 2, return_indices=True), 3, 2)), (1, 1, 9, 9))


def test_channels_that_see_different_things_stay_apart():
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        mixed = torch.cat([first, F.avg_pool2d(second, 3, 1, 1)], 1)
        return m.grouped(mixed), m.grouped(F.channel_shuffle(mixed, 2)), m.b(mixed[:, :2])

    net = Net(forward, a=nn.Conv2d(1, 4, 1), grouped=nn.Conv2d(4, 4, 3, padding=1, groups=2), b=nn.Conv2d(2, 1, 3))
    found = checked(net, (1, 1, 9, 9))
    assert found.seen("conv2d_1", (0, 0, 4, 4))[0] == frozenset(range(3, 6))
    assert found.seen("conv2d_1", (0, 3, 4, 4))[0] == frozenset(range(2, 7))
    assert found["b"].size == (3, 3)


def test_the_whole_input_is_a_value_of_its_own():
    gate = Net(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.a(x).mean((2, 3), keepdim=True))),
               a=nn.Conv2d(1, 1, 3, padding=1), b=nn.Conv2d(1, 1, 3, padding=1))  # fmt: skip
    found = checked(gate, (1, 1, 12, 10))
    assert found.size == ("whole", "whole")
    assert found.output.local == (5, 5)
    assert found.output.stride == (1, 1)
    for layer in (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.GroupNorm(2, 4)):
        tail = nn.Linear(4 * 64, 2) if isinstance(layer, nn.Flatten) else nn.Identity()
        assert checked(nn.Sequential(nn.Conv2d(1, 4, 1), layer, tail), (1, 1, 8, 8)).output.whole
    attention = Net(
        lambda m, x: m.t(x.flatten(2).transpose(1, 2)), t=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    )
    assert checked(attention, (1, 4, 6, 5)).size == ("whole", "whole")
    local = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.GELU(), nn.Softmax(1))
    assert checked(local, (1, 1, 8, 8)).size == (3, 3)
    last = Net(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(4))
    assert checked(last, (1, 4, 6, 6)).size == (1, 1)


def test_windows_of_attention_are_the_field():
    """Swin: attention inside windows of 4 x 4, and in windows shifted by 2."""

    def windows(m, x):
        x = x.permute(0, 2, 3, 1).reshape(1, 3, 4, 2, 4, 4).transpose(2, 3).reshape(6, 16, 4)
        x = ((x @ x.mT).softmax(-1) @ x).reshape(1, 3, 2, 4, 4, 4).transpose(2, 3)
        return x.reshape(1, 12, 8, 4).permute(0, 3, 1, 2)

    found = checked(
        Net(
            lambda m, x: windows(m, windows(m, x).roll((-2, -2), (2, 3))),
        ),
        (1, 4, 12, 8),
    )
    assert found["softmax"].local == (4, 4)
    assert found.output.local == (8, 8)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 40))])
def test_random_graphs_agree_with_their_gradients(seed):
    checked(random_net(seed), (2, 4, 15 + seed % 7, 22 - seed % 5))


def random_net(seed):
    """Layers one behind the other, each reading a random earlier result of its shape or the last one."""
    order = random.Random(seed)
    kinds = []
    for _ in range(7):
        k, s, d, p = order.choice([1, 2, 3, 5]), order.choice([1, 1, 2]), order.choice([1, 1, 2]), order.randrange(3)
        groups = order.choice([1, 2, 4])
        choice = order.randrange(7)
        kinds.append(
            [
                nn.Conv2d(4, 4, (k, 3), s, p, d, groups),
                nn.Conv2d(4, 4, 3, 1, 1),
                nn.MaxPool2d(3, s, 1, ceil_mode=True),
                nn.AvgPool2d((2, 3), s, (0, 1)),
                nn.Upsample(scale_factor=order.choice([2, 1.5]), mode=order.choice(["nearest", "bilinear"])),
                nn.ConvTranspose2d(4, 4, k, 2, 0, 0, groups),
                nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2)),
            ][choice]
        )

    def forward(m, x):
        seen = []
        for layer in m.layers:
            if x.shape[2] < 7 or x.shape[3] < 7:
                x = F.interpolate(x, size=(11, 9), mode="bilinear")
            if x.shape[2] > 40:
                x = x[:, :, 1::3, 2::2]
            seen.append(x)
            x = layer(x)
            x = sum((y for y in seen if y.shape == x.shape), x)
        return x

    return Net(forward, layers=nn.ModuleList(kinds))


MUTANTS = {
    "a stride forgotten": (space, "sliding", lambda f: lambda n, k, s=1, p=0, d=1: f(n, k, 1, p, d)),
    "a dilation forgotten": (space, "sliding", lambda f: lambda n, k, s=1, p=0, d=1: f(n, k, s, p, 1)),
    "a padding forgotten": (space, "sliding", lambda f: lambda n, k, s=1, p=0, d=1: f(n, k, s, 0, d)),
    "a tap too few": (space, "sliding", lambda f: lambda n, k, s=1, p=0, d=1: f(n, max(k - 1, 1), s, p, d)),
    "a transpose taken for a convolution": (space, "spreading", lambda f: space.sliding),
    "a window of pooling too short": (space, "adaptive", lambda f: lambda n, m: (f(n, m)[0][:, :1], f(n, m)[1])),
    "half a pixel": (space, "_ratio", lambda f: lambda n, m, s: f(n, m, s) + Fraction(1, 7)),
    "a row too many": (mix, "_lines", lambda f: lambda field, dims, shape: field),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_caught_by_the_gradients(name, monkeypatch):
    def forward(m, x):
        y = m.c(x)
        return m.t(y), m.n(y), F.adaptive_avg_pool2d(y, 5), F.interpolate(y, size=(9, 9), mode="bilinear")

    net = Net(forward, c=nn.Conv2d(1, 2, 3, 2, 2, 2), t=nn.ConvTranspose2d(2, 1, 3, 2), n=nn.InstanceNorm2d(2))
    assert verified(receptive_field(net, (1, 1, 24, 24)), nodes=100).agrees
    place, attribute, change = MUTANTS[name]
    monkeypatch.setattr(place, attribute, change(getattr(place, attribute)))
    assert verified(receptive_field(net, (1, 1, 24, 24)), nodes=100).agrees is False


def test_unknown_operations_are_named_and_conservative(monkeypatch):
    net = Net(lambda m, x: m.c(torch.special.entr(torch.linalg.matrix_exp(x))), c=nn.Conv2d(1, 1, 3))
    found = receptive_field(net, (1, 1, 6, 6))
    assert list(found.unknown.values()) == ["linalg_matrix_exp"]
    assert found.size == ("whole", "whole")
    assert "no rule for linalg_matrix_exp" in str(found)
    monkeypatch.delitem(RULES, "conv2d")
    assert receptive_field(nn.Conv2d(1, 1, 3), (1, 1, 6, 6)).unknown == {"conv2d": "conv2d"}


def test_reads_at_computed_places_are_not_bounded():
    sampled = Net(lambda m, x: F.grid_sample(x, m.c(x).permute(0, 2, 3, 1)), c=nn.Conv2d(1, 2, 3, padding=1))
    found = receptive_field(sampled, (1, 1, 6, 6))
    assert found.output.whole
    assert "grid sampling" in (found.output.note or "")
    picked = Net(lambda m, x: x[:, :, torch.tensor([4, 1, 3])] + x.gather(2, x[:, :, :3].argsort(2)))
    found = receptive_field(picked, (1, 1, 6, 6))
    assert found.seen("index", (1, 2))[0] == {1}
    assert found["gather"].whole


def test_writes_into_a_part_of_a_tensor():
    def forward(m, x):
        y = x.clone()
        y[:, :, 2:4] = m.c(x)[:, :, 2:4]
        return y

    found = checked(Net(forward, c=nn.Conv2d(1, 1, 3, padding=1)), (1, 1, 8, 8))
    assert found.seen(found.output.name, (0, 0, 1, 5))[0] == {1}
    assert found.seen(found.output.name, (0, 0, 2, 5))[0] == {1, 2, 3}


def test_the_module_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Dropout().eval())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    receptive_field(net, (1, 1, 8, 8), verify=True)
    effective_field(net, (1, 1, 8, 8), seeds=1)
    assert [part.training for part in net.modules()] == [True, True, True, False]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net[0].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_type_of_weights_and_fake_devices(dtype):
    assert receptive_field(nn.Conv2d(1, 1, 5).to(dtype), (3, 1, 9, 9)).size == (5, 5)
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(1, 1, 5, dtype=dtype), nn.MaxPool2d(2))
    assert receptive_field(net, (3, 1, 9, 9), verify=True).agrees


def test_other_layouts_and_wrong_shapes():
    last = Net(lambda m, x: m.c(x.permute(0, 3, 1, 2)), c=nn.Conv2d(2, 1, 3))
    assert checked(last, (1, 7, 8, 2), axes=(1, 2)).size == (3, 3)
    for shape in [(4, 4), (1, 1, 1, 1, 1, 1), (1, 1, 0, 4)]:
        with pytest.raises(ValueError, match="receptive_field: "):
            receptive_field(nn.Identity(), shape)
    with pytest.raises(ValueError, match="axes are one to three dimensions"):
        receptive_field(nn.Identity(), (1, 1, 4, 4), axes=(2, 2))


def test_a_module_that_cannot_be_traced_is_named():
    branching = Net(lambda m, x: x if x.sum() > 0 else -x)
    with pytest.raises(VolvelleError, match=r"Net cannot be traced .*test_receptive_field.py:\d+"):
        receptive_field(branching, (1, 1, 4, 4))


def test_the_result_prints_and_is_json():
    found = receptive_field(
        nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, dilation=2)), (1, 1, 16, 16), verify=True
    )
    record = json.loads(json.dumps(found.record()))
    assert record["nodes"][-1]["axes"][0]["size"] == 7
    assert record["agrees"] is True
    assert "1       conv2d" in str(found)
    assert str(found).splitlines()[0] == "Sequential, input 1x1x16x16"
    with pytest.raises(UsageError, match="no operation or module '7'"):
        found["7"]
    for shape, net in [((1, 1, 16, 20), nn.Conv2d(1, 1, 3)), ((1, 1, 30), nn.Conv1d(1, 1, 3))]:
        field = receptive_field(net, shape)
        assert ElementTree.fromstring(field.svg()).tag.endswith("svg")
        assert ElementTree.fromstring(effective_field(net, shape, seeds=1, field=field).svg()).tag.endswith("svg")


def test_the_effective_field_of_equal_weights_is_the_binomial():
    """n layers of k equal taps: E has the variance of n uniform draws, halved by squaring a Gaussian."""
    net = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(12)))
    for layer in net:
        nn.init.constant_(layer.weight, 1 / 9)
    found = effective_field(net, (1, 1, 41, 41), seeds=1)
    assert found.sigma == pytest.approx([(12 * 2 / 3 / 2) ** 0.5] * 2, rel=0.02)
    assert found.box == ((8, 32), (8, 32))
    assert found.centre == pytest.approx((20, 20))
    assert float(found.energy.sum()) == pytest.approx(1)
    with pytest.raises(UsageError, match="does not lie in space"):
        effective_field(nn.Sequential(net, nn.Flatten()), (1, 1, 41, 41), at="1")


def test_an_input_too_small_to_go_on_says_so():
    net = nn.Sequential(nn.ConvTranspose2d(1, 1, 3, 4, 1), nn.Conv2d(1, 1, 3, padding=1))
    assert "cut at a border" in (receptive_field(net, (1, 1, 1, 1)).output.note or "")
    assert receptive_field(net, (1, 1, 4, 4)).output.note is None
