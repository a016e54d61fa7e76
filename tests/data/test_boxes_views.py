"""Views of pictures with boxes move with the pixels, and anchors follow the boxes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.data.boxes import Boxes, BoxFolder
from volvelle.data.boxes_anchors import best_overlap, cluster_shapes, shape_iou, suggest_anchors
from volvelle.data.boxes_augment import BoxAugmentation, Fit, Fitted, Views, collate_views
from volvelle.data.loader import Loader


def picture(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path)


def marked(boxes, size=(64, 48)):
    """A dark picture in which every box is filled with a colour of its own: red, green, blue."""
    image = np.full((size[1], size[0], 3), 10, dtype=np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2, number] = 250
    corners = torch.tensor(boxes, dtype=torch.float32)
    k = len(boxes)
    return Image.fromarray(image), Boxes(corners, torch.arange(k), torch.zeros(k, dtype=torch.bool), torch.ones(k))


@pytest.mark.parametrize("stretch", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_boxes_move_with_the_pixels(seed, stretch):
    image, boxes = marked([(4, 4, 20, 16), (30, 20, 58, 44), (40, 2, 50, 14)])
    augment = BoxAugmentation((0.5, 1.5), mirror=0.5, upside_down=0.5, colour=0.0)
    view = augment(image, boxes, Fit(96, stretch), random.Random(seed))
    assert view.pixels.shape == ((3, 96, 96) if stretch else (3, 72, 96))
    for box, label in zip(view.boxes, view.labels.tolist(), strict=True):
        others = view.pixels[[channel for channel in range(3) if channel != label]]
        region = (view.pixels[label] > 150) & (others < 100).all(0)
        ys, xs = torch.nonzero(region, as_tuple=True)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        assert float((found - box).abs().max()) <= 2.0


def test_centres_decide_and_the_rest_is_ignored():
    image, boxes = marked([(0, 0, 20, 20), (28, 0, 40, 20), (60, 44, 64, 48)])

    class Fixed(random.Random):
        def random(self):
            return 0.0

        def uniform(self, low, high):
            return high

    # The window is the upper left half of the sides: 32 x 24.
    view = BoxAugmentation((0.5, 0.5), mirror=0.0, colour=0.0)(image, boxes, Fit(64), Fixed())
    assert view.labels.tolist() == [0, 1]
    assert view.ignored.tolist() == [False, True]
    torch.testing.assert_close(view.boxes[1], torch.tensor([56.0, 0, 64, 20 * 64 / 24]))
    whole = BoxAugmentation((2.0, 2.0), mirror=0.0, colour=0.0)(image, boxes, Fit(64), Fixed())
    assert whole.ignored.tolist() == [False] * 3
    assert bool((whole.pixels[:, 32:] == 124).all())
    with pytest.raises(ValueError, match="BoxAugmentation: 0 < crop"):
        BoxAugmentation((1.0, 0.5))


def test_fitting_and_back():
    image, boxes = marked([(4, 4, 20, 16)])
    for fit in (Fit(32), Fit(100, stretch=False)):
        pixels = fit.prepare(image)
        moved = fit.boxes(boxes.corners, *image.size)
        x1, y1, x2, y2 = (round(v) for v in moved[0].tolist())
        inside = pixels[0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
        assert bool(((inside.int() - 250).abs() <= 3).all())
        torch.testing.assert_close(fit.back(moved, *image.size), boxes.corners)
    assert Fit(10, stretch=False).shape(1000, 3) == (10, 1)


def some(tmp_path, sizes):
    files = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        picture(file, size)
    boxes = []
    for i, (wide, high) in enumerate(sizes):
        corners = torch.tensor([[0.0, 0, wide / 2, high / 2]]).repeat(i % 3, 1)
        boxes.append(Boxes(corners, torch.zeros(i % 3).long(), torch.zeros(i % 3).bool(), torch.ones(i % 3)))
    return BoxFolder(tmp_path, files, boxes, sizes, ("cat",))


def test_batches_of_views_of_several_sizes(tmp_path):
    folder = some(tmp_path, [(64, 48), (48, 64), (40, 40)])
    batch = collate_views([Fitted(folder, Fit(32, stretch=False))[i] for i in range(3)])
    assert batch["images"].shape == (3, 3, 32, 32)
    assert batch["sizes"].tolist() == [[24, 32], [32, 24], [32, 32]]
    assert bool((batch["images"][0, :, 24:] == 124).all())
    assert [len(boxes) for boxes in batch["boxes"]] == [0, 1, 2]


def test_a_view_depends_on_seed_epoch_and_number_alone(tmp_path):
    dataset = Views(some(tmp_path, [(50, 40)] * 6), Fit(32), BoxAugmentation())

    def epochs(**options):
        loader = Loader(dataset, 2, seed=3, collate=collate_views, **options)
        try:
            return [[batch.value for batch in loader] for _ in range(2)]
        finally:
            loader.close()

    def same(a, b):
        boxes = all(torch.equal(x, y) for x, y in zip(a["boxes"], b["boxes"], strict=True))
        return torch.equal(a["images"], b["images"]) and boxes

    plain, threads = epochs(), epochs(num_workers=2)
    assert all(same(a, b) for one, two in zip(plain, threads, strict=True) for a, b in zip(one, two, strict=True))
    assert not same(plain[0][0], plain[1][0])


# Anchors.


def test_clusters_are_found_again():
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[10.0, 12], [40, 20], [90, 120]])
    shapes = torch.cat([c * (1 + 0.04 * torch.randn(50, 2, generator=draw)) for c in centres])
    found = cluster_shapes(shapes, 3, seed=1)
    torch.testing.assert_close(found.float(), centres, rtol=0.03, atol=0)
    assert torch.equal(found, cluster_shapes(shapes, 3, seed=1))
    assert cluster_shapes(shapes[:1].expand(9, 2), 3).tolist() == shapes[:1].double().tolist()
    scores = [float(shape_iou(shapes.double(), cluster_shapes(shapes, k)).amax(1).mean()) for k in (1, 2, 3, 6)]
    assert scores == sorted(scores)
    for bad, count in ((torch.zeros(0, 2), 3), (torch.tensor([[1.0, 0]]), 3), (shapes, 0)):
        with pytest.raises(ValueError, match="cluster_shapes: wants"):
            cluster_shapes(bad, count)


def test_the_distance_treats_sizes_alike():
    """Plain k-means gives all centres to large boxes; this one follows shapes, whatever their size."""
    draw = torch.Generator().manual_seed(2)
    small = torch.tensor([[5.0, 5]]) * (1 + 0.02 * torch.randn(40, 2, generator=draw))
    large = torch.tensor([[200.0, 200]]) * (1 + 0.05 * torch.randn(40, 2, generator=draw))
    assert cluster_shapes(torch.cat((small, large)), 2)[0].tolist() == pytest.approx([5, 5], rel=0.05)


def test_few_classes_have_anchors_of_their_own(tmp_path):
    corners = torch.tensor([[0.0, 0, 40, 30]] * 30 + [[0.0, 0, 4, 4], [0.0, 0, 6, 6]])
    labels = torch.tensor([0] * 30 + [1, 1])
    boxes = Boxes(corners, labels, torch.zeros(32).bool(), torch.ones(32))
    folder = BoxFolder(tmp_path, [tmp_path], [boxes], [(80, 80)], ("large", "small"))
    found = suggest_anchors(folder, Fit(160), 5)
    assert found.tolist() == [[8, 8], [12, 12], [80, 60]]  # in fitted pixels; no more shapes than there are
    assert best_overlap(folder, Fit(160), found) == pytest.approx(1.0)
    nothing = Boxes(corners, labels, torch.ones(32).bool(), torch.ones(32))
    with pytest.raises(ValueError, match="there is no box to be found"):
        suggest_anchors(BoxFolder(tmp_path, [tmp_path], [nothing], [(80, 80)], ("a", "b")), Fit(160), 5)
