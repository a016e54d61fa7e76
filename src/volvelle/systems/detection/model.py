"""A detector: a backbone's maps, a neck that joins them, a proposer of regions, a head that scores them, a last rule.

    maps = neck(features(x)),   regions and the head's features = proposer(maps),   detections = post(head(…), regions)

b images of one size, some of which may fill only the upper left part of it: `sizes` (b, 2) says how much, y and x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from volvelle.data.images_prepare import Preprocessing
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.detection.config import DetectorConfig
from volvelle.systems.detection.heads import RoIHead
from volvelle.systems.detection.post import PostProcess
from volvelle.systems.detection.proposer import Proposed, RegionProposer
from volvelle.systems.detection.targets import Detections, Targets


class Detector(nn.Module):
    """Detections of pictures, and the losses of training, from five parts.

    `neck(features, sizes, image)` gives the proposer's map and the head's. `config` is needed to write the detector;
    one that was composed by hand has none.

    >>> from volvelle.systems.detection import thundernet
    >>> net = thundernet("snet49", ("red cell", "white cell")).eval()
    >>> found = net(torch.zeros(2, 3, 64, 96), torch.tensor([[64, 96], [50, 40]]))
    >>> found.boxes.shape[0], found.boxes.shape[2], found.mask.dtype
    (2, 4, torch.bool)
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        proposer: RegionProposer,
        roi_head: RoIHead,
        post: PostProcess,
        *,
        config: DetectorConfig | None = None,
    ):
        super().__init__()
        self.backbone, self.neck, self.proposer = backbone, neck, proposer
        self.roi_head, self.post = roi_head, post
        self._config = config

    @property
    def config(self) -> DetectorConfig:
        """The configuration that it was made of. Raises VolvelleError when it was composed by hand."""
        if self._config is None:
            raise VolvelleError("this detector was composed by hand: it has no configuration, and cannot be written")
        return self._config

    @config.setter
    def config(self, value: DetectorConfig) -> None:
        self._config = value

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where it was composed by hand."""
        if self._config is None:
            return tuple(str(number) for number in range(self.roi_head.classes))
        return self._config.classes

    @property
    def preprocessing(self) -> Preprocessing:
        """What the backbone expects of its pictures."""
        return self.backbone.preprocessing

    @property
    def composed(self) -> bool:
        """Whether it was made of a configuration."""
        return self._config is not None

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Detections:
        """Find objects in normalised images (b, 3, y, x) of valid sizes (b, 2) int64, all of it when left out."""
        sizes = _full(images) if sizes is None else sizes
        return self.detections(self.backbone.features(images), sizes, images.shape[-2:])

    def losses(self, images: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Named scalar losses, to be added up: `objectness`, `proposal_boxes`, `classes`, `boxes`.

        targets are boxes in pixels of the batch's images. All are finite, and every weight has a gradient, zeros
        perhaps, also for images without objects. Raises UsageError for shapes and labels that do not fit.
        """
        targets = self._checked(len(images), sizes, targets)
        return self.losses_of(self.backbone.features(images), sizes, images.shape[-2:], targets)

    def look(self, maps: Sequence[Tensor], sizes: Tensor, image: Sequence[int]) -> Proposed:
        """What the proposer answers to the backbone's maps of images of `image` (height, width) pixels."""
        return self.proposer(*self.neck(maps, sizes, image))

    def detections(self, maps: Sequence[Tensor], sizes: Tensor, image: Sequence[int]) -> Detections:
        """`forward` from the backbone's maps on."""
        found = self.look(maps, sizes, image)
        regions = self.proposer.propose(found, sizes, self.proposer.options.testing)
        return self.post(self.roi_head(found.features, regions.boxes), regions, sizes)

    def losses_of(
        self, maps: Sequence[Tensor], sizes: Tensor, image: Sequence[int], targets: Targets
    ) -> dict[str, Tensor]:
        """`losses` from the backbone's maps on; `targets` have one row at least."""
        found = self.look(maps, sizes, image)
        regions = self.proposer.propose(found, sizes, self.proposer.options.training)
        return self.proposer.losses(found, sizes, targets) | self.roi_head.losses(found.features, regions, targets)

    def _checked(self, images: int, sizes: Tensor, targets: Targets) -> Targets:
        """The targets, with one row of padding where there is none: so that there is something to look at."""
        b, m = targets.mask.shape
        shapes = [tuple(part.shape) for part in (sizes, *targets)]
        if b != images or shapes != [(b, 2), (b, m, 4), (b, m), (b, m), (b, m)]:
            raise UsageError(
                f"losses: for {images} images wanted are sizes (b, 2), boxes (b, m, 4), labels, mask and ignored "
                f"(b, m), got {', '.join(map(str, shapes))}"
            )
        wrong = targets.mask & ((targets.labels < 0) | (targets.labels >= self.roi_head.classes))
        if bool(wrong.any()):
            label = int(targets.labels[wrong][0])
            raise UsageError(f"losses: labels are 0 to {self.roi_head.classes - 1} here, got {label}")
        if m:
            return targets
        return Targets(*(part.new_zeros((b, 1, *part.shape[2:])) for part in targets))


def _full(images: Tensor) -> Tensor:
    """Sizes (b, 2) of images that fill the batch."""
    return torch.tensor(images.shape[-2:], device=images.device).expand(images.shape[0], 2)
