"""The Vision room: runs by name, masks and boxes as the server's, objects kept as COCO's JSON, names that stay in."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tests.serve.studio.vision_runs import write_runs

import volvelle.serve.studio.vision as vision
from volvelle.cli.prompting import open_promptable
from volvelle.data.coco_masks import read_coco_masks
from volvelle.data.run_lengths import RunLengths
from volvelle.serve.studio.jobs import Jobs
from volvelle.serve.studio.shell import create_studio
from volvelle.serve.vision import SegmentAsked, Segmenter
from volvelle.systems.segmentation.sam.promptable import Promptable

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
API = "/studio/api/vision"


def encoded(kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def mask(height=40, width=60):
    found = np.zeros((height, width), dtype=bool)
    found[5:20, 10:30] = True
    return RunLengths.of(found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision") / "runs"
    write_runs(root)
    return root


@pytest.fixture(scope="module")
def client(runs):
    jobs = Jobs(command=("true",))
    with TestClient(
        create_studio([jobs.routes(), vision.router(jobs, runs=runs)]), base_url="http://127.0.0.1"
    ) as made:
        yield made


def test_the_runs_that_can_be_asked_are_listed(client):
    facts = client.get(API).json()
    assert (facts["segment"], facts["detect"]) == (["clicks"], ["boxes"])
    assert facts["train"]["promptable"].startswith("volvelle train promptable ")


def test_masks_are_those_of_the_server(client, runs):
    asked = {"image": encoded(), "points": [[[10, 12], [30, 20]]], "labels": [[1, 0]]}
    found = client.post(f"{API}/segment", json=asked | {"run": "clicks"}).json()
    expected = Segmenter(Promptable(open_promptable(runs / "clicks").eval())).answer(SegmentAsked(**asked))
    assert found["masks"] == json.loads(json.dumps(expected["masks"]))
    again = {"run": "clicks", "image_id": found["image_id"], "boxes": [[5, 5, 30, 30]]}
    assert client.post(f"{API}/segment", json=again).json()["seconds"]["embed"] < found["seconds"]["embed"]


def test_boxes_are_found_by_a_run(client):
    found = client.post(f"{API}/detect", json={"run": "boxes", "image": encoded(), "score": 0.0}).json()
    assert {one["class"] for one in found["objects"]} <= {"disc", "box"}
    assert len(found["objects"]) > 0


@pytest.mark.parametrize("name", ["nobody", "boxes", "../runs/clicks", "/etc", "..", "."])
def test_only_runs_of_the_list_are_opened(client, name):
    answer = client.post(f"{API}/segment", json={"run": name, "image": encoded(), "points": [[[1, 1]]]})
    assert (answer.status_code, "there is no run of train promptable" in answer.text) == (404, True)


def test_kept_objects_are_cocos_and_are_read_by_the_next_training(client, runs):
    objects = [
        {"segmentation": mask().to_coco(), "name": "cup", "predicted_iou": 0.91, "points": [[12, 8]]},
        {"segmentation": mask().to_coco(), "name": "bowl"},
    ]
    asked = {"image": encoded(), "file_name": "../../../My Photo.JPG", "objects": objects}
    document = client.post(f"{API}/coco", json=asked).json()
    assert [one["file_name"] for one in document["images"]] == ["My Photo.JPG"]
    assert [one["bbox"] for one in document["annotations"]] == [[10, 5, 20, 15]] * 2
    first = client.post(f"{API}/save", json=asked).json()
    assert first["picture"].startswith("my-photo-")
    assert (first["pictures"], first["objects"]) == (1, 2)
    again = client.post(f"{API}/save", json=asked | {"objects": objects[:1]}).json()
    assert (again["pictures"], again["objects"]) == (1, 1)  # the same picture: its objects take the others' place
    other = client.post(f"{API}/save", json=asked | {"image": encoded("BMP")}).json()
    assert (other["pictures"], other["objects"]) == (2, 3)
    found = read_coco_masks(runs / "annotated" / "objects.json")
    assert [[one.name for one in some] for _, _, some in found] == [["cup"], ["cup", "bowl"]]
    assert all(np.array_equal(one.mask.mask(), mask().mask()) for _, _, some in found for one in some)
    assert all(file.parent == runs / "annotated" and file.is_file() for file, _, _ in found)
    assert np.array_equal(np.asarray(Image.open(found[0][0])), PICTURE)


WRONG = [
    ({"objects": []}, "objects"),
    ({"objects": [{"segmentation": mask(30, 60).to_coco()}]}, "a mask of 60 x 30 pixels in a picture of 60 x 40"),
    ({"objects": [{"segmentation": {"size": [40, 60], "counts": "~~"}}]}, "run lengths"),
    ({"objects": [{"segmentation": {"size": [10**7, 10**7], "counts": [10**14]}}]}, "run lengths"),
    ({"image": "%%"}, "image: not base64"),
    ({"image": base64.b64encode(b"hello").decode()}, "not an image"),
    ({"image": None, "image_id": "a" * 64}, "the picture itself is wanted"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_kept_is_said(client, wrong, said):
    asked = {"image": encoded(), "objects": [{"segmentation": mask().to_coco()}]} | wrong
    answer = client.post(f"{API}/save", json=asked)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_scene_is_labelled_as_composed_or_said_to_be_missing(client, monkeypatch):
    monkeypatch.setattr(vision, "_has_scenes", lambda: False)
    assert client.get(f"{API}/scene").json()["image"] is None
    monkeypatch.undo()
    found = client.get(f"{API}/scene?number=2").json()
    if found["image"] is not None:
        picture = Image.open(io.BytesIO(base64.b64decode(found["image"].partition(",")[2])))
        assert picture.size == (vision.SIDE, vision.SIDE)
        assert found["label"].startswith("composed")
    assert client.get(f"{API}/scene?number=-1").status_code == 400


def test_a_training_is_one_of_the_two(client):
    job = client.post(f"{API}/train", json={"kind": "detect"}).json()
    assert job["command"] == "volvelle " + " ".join(vision.SMALL["detect"])
    assert client.post(f"{API}/train", json={"kind": "language"}).status_code == 400
