"""From scored regions to detections: decode, suppress in each class, keep the best; all classes and images at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.parts.regions.boxes import clip_boxes, decode_boxes
from volvelle.parts.regions.order import stable_order
from volvelle.parts.regions.soft_nms import soft_nms
from volvelle.systems.detection.config import Post
from volvelle.systems.detection.heads import WEIGHTS, Scored
from volvelle.systems.detection.suppression import first_kept, keep_mask
from volvelle.systems.detection.targets import Detections, Regions, pick


class PostProcess(nn.Module):
    """Detections of scored regions, by the numbers of `config.Post`."""

    def __init__(self, options: Post):
        super().__init__()
        self.options = options

    @torch.no_grad()
    def forward(self, scored: Scored, regions: Regions, sizes: Tensor) -> Detections:
        """Padded detections of pictures of sizes (b, 2), best first.

        A region is found as every class that it scores high enough for. Boxes are of any class, so each region is
        decoded once; a row whose score is NaN is left out.
        """
        options = self.options
        boxes = clip_boxes(decode_boxes(scored.deltas, regions.boxes, WEIGHTS), sizes[:, None])
        scores = scored.logits.softmax(-1)[..., :-1]
        classes = scores.shape[-1]
        there = regions.mask & (boxes[..., 2:] > boxes[..., :2]).all(-1)
        scores = scores.masked_fill(~((scores > options.score) & there.unsqueeze(-1)), 0.0).flatten(1)
        scores, index = scores.topk(min(options.candidates, scores.shape[1]), 1)
        if not torch.compiler.is_compiling():
            # Scores are sorted: behind the most that any image has there is nothing but padding.
            most = int((scores > 0).sum(1).max()) if scores.numel() else 0
            scores, index = scores[:, :most], index[:, :most]
        boxes, labels = pick(boxes, index // classes), index % classes
        valid = scores > 0
        if options.decay:
            scores, order = self._softened(boxes, scores, labels)
            boxes, labels, valid = pick(boxes, order), pick(labels, order), scores > 0
        else:
            valid = keep_mask(boxes, valid, options.overlap, labels)
        kept = first_kept(valid, options.top)
        mask = kept.mask
        boxes, scores, labels = (pick(part, kept.index) for part in (boxes, scores, labels))
        return Detections(
            boxes.masked_fill(~mask.unsqueeze(-1), 0.0),
            scores.masked_fill(~mask, 0.0),
            labels.masked_fill(~mask, 0),
            mask,
        )

    def _softened(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (b, n) lowered by Soft-NMS, sorted, 0 below the least one; and the order in which rows then stand."""
        least = max(self.options.score, 1e-6)  # a score of 0 is padding
        lowered = []
        for number in range(len(scores)):
            index, left = soft_nms(
                boxes[number], scores[number], sigma=self.options.decay, score_threshold=least, idxs=labels[number]
            )
            lowered.append(torch.zeros_like(scores[number]).index_copy(0, index, left))
        left = torch.stack(lowered)
        order = stable_order(left, descending=True)
        return pick(left, order), order
