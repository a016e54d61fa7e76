"""Segmenters: every decoder on every stride, sizes that fit nothing, files, and looking at whole pictures."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.segmentation import (
    ASPP,
    FCN,
    GCN,
    Context,
    Looks,
    SegmenterConfig,
    UNet,
    gcn,
    probabilities,
    read_segmenter,
    segmenter,
    write_segmenter,
)
from volvelle.systems.segmentation.gcn_decoder import GCNDecoder
from volvelle.systems.segmentation.inference import labels, ready, starts

HEADS = {
    "gcn of the paper": (GCN(), 32),
    "gcn": (GCN(kernel=5, width=8, detail=6), 32),
    "gcn, even kernel": (GCN(kernel=4, width=8, refine=False), 32),
    "aspp": (ASPP(rates=(2, 4), width=16, low=8), 16),
    "aspp without low": (ASPP(rates=(2,), width=16, low=0), 16),
    "context": (Context(), 8),
    "fcn": (FCN(), 32),
    "fcn-32s": (FCN(finest=32), 32),
    "unet": (UNet(width=8), 32),
}


def small(head=None, stride=32, classes=3):
    torch.manual_seed(0)
    return segmenter(head or HEADS["gcn"][0], classes, backbone="mobilenet-v2", output_stride=stride)


@pytest.mark.parametrize("name", HEADS)
def test_every_decoder_scores_every_pixel_and_trains_every_weight(name):
    head, stride = HEADS[name]
    model = small(head, stride)
    x = torch.randn(2, 3, 45, 70)
    scores = model(x)
    assert scores.shape == (2, 3, 45, 70)
    # A weighted sum: the plain one has no gradient through a norm.
    (scores * torch.randn_like(scores)).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent
    assert model.eval()(x[:1]).shape == (1, 3, 45, 70)


def test_the_paper_decoder_carries_one_map_a_class():
    decoder = GCNDecoder(GCN(kernel=7), (16, 24, 32, 64), 5)
    assert isinstance(decoder.classify, nn.Identity)
    assert {layer.conv_l2.out_channels for layer in decoder.context} == {5}  # type: ignore[union-attr]
    features = [torch.zeros(1, c, 32 >> i, 40 >> i) for i, c in enumerate((16, 24, 32, 64))]
    assert decoder(features, torch.zeros(1, 3, 128, 160)).shape == (1, 5, 32, 40)


def test_context_module_begins_as_what_it_is_given():
    model = small(*HEADS["context"]).eval()
    front, decoder = model.decoder.front, model.decoder
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features = model.encoder.features(x)
        expected = front(features[-1]).relu()
        torch.testing.assert_close(decoder(features, x), expected)


def test_fcn_begins_as_its_coarsest_scores():
    fine, coarse = small(FCN(finest=8)), small(FCN(finest=32))
    coarse.decoder.classify[-1].load_state_dict(fine.decoder.classify[-1].state_dict())
    coarse.encoder.load_state_dict(fine.encoder.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a, b = fine.eval()(x), coarse.eval()(x)
    # Doubled twice on the way, or at once: the same up to how bilinear steps chain.
    assert float((a - b).abs().max()) < 0.2 * float(b.abs().max())


def test_the_encoders_classifier_is_gone_and_its_weights_stay():
    from volvelle.systems.backbone import backbone

    model = small()
    assert not [name for name in model.state_dict() if "classifier" in name or "conv_head" in name]
    whole = backbone("mobilenet-v2")
    model.encoder.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.encoder.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(model.eval().encoder.features(x), whole.eval().features(x), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", HEADS)
def test_files_bring_back_the_same_network(name, tmp_path):
    head, stride = HEADS[name]
    model = small(head, stride).eval()
    write_segmenter(model, tmp_path)
    again = read_segmenter(tmp_path)
    assert again.config == model.config
    x = torch.randn(1, 3, 40, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_broken_files_say_so(tmp_path):
    with pytest.raises(VolvelleError, match="no such file"):
        read_segmenter(tmp_path)
    write_segmenter(small(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"head": {"type": "gnc"}}, "unknown head 'gnc'"),
        ({"head": {"type": "gcn", "k": 3}}, "unknown field k"),
        ({"type": "decoder"}, "not the configuration of a segmenter"),
        ({"classes": ["a"]}, "does not fit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(VolvelleError, match=message):
            read_segmenter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(VolvelleError, match="cannot be read"):
        read_segmenter(tmp_path)


def test_bad_configurations_say_so():
    with pytest.raises(UsageError, match="finest must be 32, 16 or 8, got 4"):
        small(FCN(finest=4))
    with pytest.raises(UsageError, match="2 classes need as many colours, got 1"):
        SegmenterConfig("resnet-18", GCN(), ("a", "b"), ((0, 0, 0),))
    with pytest.raises(UsageError, match="resnett-18"):
        gcn(3, backbone="resnett-18")


class Local(nn.Module):
    """A stand-in for a network whose scores of a pixel depend on this pixel alone."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))
        self.calls = []
        from volvelle.data.images_prepare import Preprocessing

        self.preprocessing = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward(self, x):
        self.calls.append(tuple(x.shape[-2:]))
        return torch.cat([x[:, :1], x[:, 1:2] * 3], 1) * self.one


def test_windows_cover_a_picture_once_on_average():
    pixels = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    whole = probabilities(Local(), pixels)  # type: ignore[arg-type]
    model = Local()
    tiled = probabilities(model, pixels, Looks(window=(32, 24), overlap=0.25))  # type: ignore[arg-type]
    torch.testing.assert_close(tiled, whole)
    assert len(model.calls) == 2 * 4
    assert set(model.calls) == {(32, 24)}
    torch.testing.assert_close(probabilities(Local(), pixels, Looks(window=(99, 99))), whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "window", "overlap"), [(100, 33, 0.3), (100, 99, 0.5), (7, 3, 0.0), (64, 32, 0.9)])
def test_windows_overlap_enough_and_reach_both_ends(size, window, overlap):
    found = starts(size, window, overlap)
    assert found[0] == 0
    assert found[-1] == size - window
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(0 < step <= max(1, window * (1 - overlap)) + 1 for step in steps)


def test_a_mirror_and_scales_average_probabilities():
    pixels = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    torch.testing.assert_close(
        probabilities(Local(), pixels, Looks(mirror=True)),
        probabilities(Local(), pixels),  # type: ignore[arg-type]
    )
    model = Local()
    found = probabilities(model, pixels, Looks(scales=(0.5, 1.0, 1.5), mirror=True))  # type: ignore[arg-type]
    assert sorted(set(model.calls)) == [(16, 24), (32, 48), (48, 72)]
    assert len(model.calls) == 6
    torch.testing.assert_close(found.sum(1), torch.ones(1, 32, 48))
    assert float((found - probabilities(Local(), pixels)).abs().max()) < 0.5  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="scales: must be above 0"):
        Looks(scales=(0.0,))


def test_a_mirror_makes_the_answer_symmetric():
    model = small().eval()
    pixels = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    looks = Looks(mirror=True)
    torch.testing.assert_close(
        probabilities(model, pixels.flip(-1), looks), probabilities(model, pixels, looks).flip(-1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["gcn", "aspp", "unet", "context"])
def test_ready_changes_nothing_but_the_rounding(name):
    head, stride = HEADS[name]
    model = small(head, stride)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    exact = probabilities(model.eval(), pixels)
    before = labels(model, pixels)
    fast = ready(model)
    assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(probabilities(fast, pixels), exact, rtol=1e-3, atol=1e-4)
    assert float((labels(fast, pixels) != before).double().mean()) < 0.01
    assert probabilities(ready(small(head, stride), torch.bfloat16), pixels).dtype == torch.float32
