"""The compositions: which parts make a ThunderNet, an R-FCN, a Faster R-CNN of a configuration."""

from __future__ import annotations

from torch import nn

from volvelle.systems.backbone.config import OutputStride
from volvelle.systems.backbone.load import build
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.backbone.names import find_config
from volvelle.systems.backbone.shufflenet import ShuffleNet
from volvelle.systems.backbone.trim import without_classifier
from volvelle.systems.detection import config as c
from volvelle.systems.detection.heads import FullyConnected, PositionSensitive, RoIHead
from volvelle.systems.detection.model import Detector
from volvelle.systems.detection.necks import ContextEnhancement, TwoStages
from volvelle.systems.detection.pools import Align, PositionSensitiveAlign
from volvelle.systems.detection.post import PostProcess
from volvelle.systems.detection.proposer import RegionProposer, SpatialAttention, dense_body, light_body
from volvelle.systems.detection.sampling import build_sampler


def compose(config: c.DetectorConfig, encoder: Backbone | None = None) -> Detector:
    """The detector of a configuration, on a backbone of the right output stride, or on a fresh one."""
    encoder = encoder or build(find_config(config.backbone), output_stride(config.composition))
    composition = config.composition
    if isinstance(composition, c.ThunderNet):
        neck, proposer, scorer = _thundernet(composition, config, encoder)
    elif isinstance(composition, c.RFCN):
        neck, proposer, scorer = _rfcn(composition, config, encoder)
    else:
        neck, proposer, scorer = _faster_rcnn(composition, config, encoder)
    head = RoIHead(scorer, build_sampler(config.sampling), len(config.classes))
    return Detector(without_classifier(encoder), neck, proposer, head, PostProcess(config.post), config=config)


def output_stride(composition: c.Composition) -> OutputStride:
    """The stride of the backbone's last map: R-FCN and Faster R-CNN dilate the last stage."""
    return 32 if isinstance(composition, c.ThunderNet) else 16


Parts = tuple[nn.Module, RegionProposer, nn.Module]
"""Neck, proposer, and the scorer of regions."""


def _thundernet(composition: c.ThunderNet, config: c.DetectorConfig, encoder: Backbone) -> Parts:
    bins, used = composition.bins, composition.maps
    inputs = composition.alpha * bins * bins
    channels, stride = list(encoder.channels[-used:]), encoder.strides[-used]
    last = None
    if isinstance(encoder, ShuffleNet) and len(encoder.conv5):
        # Where SNet has a last 1 x 1 convolution (SNet49), C5 is behind it.
        last, channels[-1] = encoder.conv5, encoder.fc.in_features
    neck = ContextEnhancement(channels, inputs, last=last)
    width = composition.proposer
    attention = SpatialAttention(width, inputs) if composition.attention else None
    proposer = RegionProposer(config.rpn, light_body(inputs, width), width, stride=stride, attention=attention)
    pool = PositionSensitiveAlign(bins, stride, reduce=composition.reduce, convention=composition.convention)
    return neck, proposer, FullyConnected(pool, inputs, inputs, composition.hidden, len(config.classes))


def _rfcn(composition: c.RFCN, config: c.DetectorConfig, encoder: Backbone) -> Parts:
    pool = PositionSensitiveAlign(composition.bins, encoder.strides[-1])
    scorer = PositionSensitive(pool, composition.width, composition.bins, len(config.classes))
    return *_two_stages(composition, config, encoder), scorer


def _faster_rcnn(composition: c.FasterRCNN, config: c.DetectorConfig, encoder: Backbone) -> Parts:
    pool = Align(composition.bins, encoder.strides[-1])
    inputs = composition.width * composition.bins**2
    scorer = FullyConnected(pool, composition.width, inputs, composition.hidden, len(config.classes))
    return *_two_stages(composition, config, encoder), scorer


def _two_stages(
    composition: c.RFCN | c.FasterRCNN, config: c.DetectorConfig, encoder: Backbone
) -> tuple[TwoStages, RegionProposer]:
    neck = TwoStages(encoder.channels[-1], composition.width)
    body = dense_body(encoder.channels[-2], composition.proposer)
    return neck, RegionProposer(config.rpn, body, composition.proposer, stride=encoder.strides[-2])
