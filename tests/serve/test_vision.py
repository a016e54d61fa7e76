"""Pictures that are sent: what the models find in them, and what is refused."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

fastapi = pytest.importorskip("fastapi", reason="wants the extra serve")
pytest.importorskip("httpx", reason="the client")

from fastapi.testclient import TestClient  # noqa: E402

from volvelle.data.run_lengths import RunLengths  # noqa: E402
from volvelle.serve.app import create_app  # noqa: E402
from volvelle.serve.figures import Figures  # noqa: E402
from volvelle.serve.vision import detect_routes, segment_routes  # noqa: E402
from volvelle.systems.detection.inference import detect  # noqa: E402

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def encoded(array=PICTURE, kind="PNG", **options):
    """An image file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def client(promptable, finder):
    routers = [segment_routes(promptable), detect_routes(*finder, trusted=0.5)]
    with TestClient(create_app(routers, Figures(), body=1 << 20)) as client:
        yield client


def test_masks_are_the_models_own(client, promptable):
    asked = {"image": encoded(), "points": [[[10, 12]], [[30, 20], [5, 5]]], "labels": [[1], [1, 0]]}
    found = client.post("/v1/segment", json=asked).json()
    assert (found["width"], found["height"]) == (60, 40)
    embedding = promptable.embed(Image.fromarray(PICTURE))
    with torch.no_grad():
        expected = promptable.predict(embedding, points=asked["points"], labels=asked["labels"], multimask=True)
    for row, one in enumerate(found["masks"]):
        best = int(expected.iou[row].argmax())
        mask = RunLengths.from_coco(one["segmentation"]).mask()
        assert np.array_equal(mask, expected.masks[row, best].numpy())
        assert one["area"] == int(mask.sum())
        assert one["predicted_iou"] == pytest.approx(float(expected.iou[row, best]), abs=1e-5)


def test_a_further_click_sends_the_id_only(client, monkeypatch, promptable):
    first = client.post("/v1/segment", json={"image": "data:image/png;base64," + encoded(), "boxes": [[5, 5, 30, 30]]})
    known = first.json()["image_id"]
    monkeypatch.setattr(promptable, "embed", lambda image: pytest.fail("embedded again"))
    again = client.post("/v1/segment", json={"image_id": known, "boxes": [[5, 5, 30, 30]], "polygons": True}).json()
    assert again["masks"][0]["segmentation"] == first.json()["masks"][0]["segmentation"]
    assert again["masks"][0]["polygons"] is not None
    gone = client.post("/v1/segment", json={"image_id": "0" * 64, "points": [[[1, 1]]]})
    assert (gone.status_code, "send it again" in gone.json()["error"]["message"]) == (404, True)


def test_boxes_are_the_detectors_own(client, finder):
    model, fit = finder
    found = client.post("/v1/detect", json={"image": encoded(), "score": 0.0}).json()
    with torch.no_grad():
        expected = detect(model, fit.prepare(Image.fromarray(PICTURE))[None])
    count = int(expected.mask[0].sum())
    assert len(found["objects"]) == count > 0
    corners = fit.back(expected.boxes[0][expected.mask[0]], 60, 40)
    assert torch.allclose(torch.tensor([one["box"] for one in found["objects"]]), corners, atol=1e-3)
    sure = client.post("/v1/detect", json={"image_id": found["image_id"], "score": 1.0}).json()
    assert sure["objects"] == []


def test_a_photo_is_upright_and_of_any_mode(client):
    turned = Image.fromarray(PICTURE)
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    asked = {"image": base64.b64encode(buffer.getvalue()).decode(), "points": [[[1, 1]]]}
    found = client.post("/v1/segment", json=asked).json()
    assert (found["width"], found["height"]) == (40, 60)
    grey = client.post("/v1/segment", json={"image": encoded(PICTURE[..., 0]), "points": [[[1, 1]]]})
    assert grey.status_code == 200


def bomb():
    """A small PNG file whose header promises 100,000 x 100,000 pixels."""
    raw = bytearray(base64.b64decode(encoded()))
    raw[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return base64.b64encode(bytes(raw)).decode()


WRONG = [
    ({"points": [[[1, 1]]]}, 400, "image or image_id: one of both"),
    ({"image": "", "image_id": "x", "points": [[[1, 1]]]}, 400, "image or image_id: one of both"),
    ({"image": "%%%", "points": [[[1, 1]]]}, 400, "image: not base64"),
    ({"image": base64.b64encode(b"hello").decode(), "points": [[[1, 1]]]}, 400, "not an image"),
    ({"image": encoded()[:200], "points": [[[1, 1]]]}, 400, "image: "),
    ({"image": bomb(), "points": [[[1, 1]]]}, 400, "refused|are more than"),
    ({"image": "/etc/passwd", "points": [[[1, 1]]]}, 400, "image: not base64"),
    ({"image": encoded()}, 400, "at least one object is wanted"),
    ({"image": encoded(), "points": [[]]}, 400, "points"),
    ({"image": encoded(), "points": [[[1, 1, 1]]]}, 400, "points"),
    ({"image": encoded(), "points": [[[100, 1]]]}, 400, "outside|lies"),
    ({"image": encoded(), "boxes": [[5, 5, 5, 5]]}, 400, "box"),
    ({"image": encoded(), "points": [[[1, 1]]], "labels": [[1, 1]]}, 400, "labels: one for each point"),
    ({"image": encoded(), "points": [[[1, 1]]], "boxes": [[1, 1, 5, 5]] * 2}, 400, "boxes: one for each object"),
    ({"image": encoded(), "points": [[[1, 1]]] * 65}, 400, "points"),
    ({"image": encoded(), "point": [[[1, 1]]]}, 400, "point"),
    ({"image": "A" * (1 << 20), "points": [[[1, 1]]]}, 413, "larger than"),
]


@pytest.mark.parametrize(("asked", "status", "said"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_segmented_is_said(client, asked, status, said):
    import re

    found = client.post("/v1/segment", json=asked)
    assert found.status_code == status
    assert re.search(said, found.json()["error"]["message"])
