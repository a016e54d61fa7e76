"""The recipe `train classify` on a few drawn pictures: it learns, reports, resumes, and refuses what it cannot use."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from volvelle.data.images_labelled import Prepared, read_labelled
from volvelle.data.images_prepare import Preprocessing
from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.backbone import backbone, read_backbone
from volvelle.train.classify import evaluate_run, held_loader, train_classify
from volvelle.train.classify_objective import ClassifyObjective, measure
from volvelle.train.observer import Observer, Quiet
from volvelle.train.options import to_dict
from volvelle.train.recipes.classify import TrainClassify
from volvelle.train.resume import resume_run

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}
MODES = ("RGB", "L", "RGBA", "P", "CMYK", "LA")


def draw(folder, count: int, seed: int = 0, classes=tuple(COLOURS)):
    """Noisy squares of a class's colour, of many sizes and modes; where a mode has no colour, of its brightness."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size = tuple(random.integers(20, 60, 2))
            pixels = np.clip(np.array(COLOURS[name]) + random.normal(0, 25, (*size, 3)), 0, 255).astype(np.uint8)
            mode = MODES[i % len(MODES)]
            picture = Image.fromarray(pixels).convert("RGB")
            if mode in {"RGBA", "P", "CMYK"}:
                picture = picture.convert(mode)
            picture.save(folder / name / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    return folder


def recipe(data, **changes) -> TrainClassify:
    options = {
        "data": str(data), "backbone": "snet49", "weights": "none", "size": 32, "batch": 8, "steps": 40,
        "learning_rate": 3e-3, "samples": 3, "evaluate_every": None, "average": None, "smoothing": 0.0, "colour": 0.0,
    }  # fmt: skip
    return TrainClassify(**{**options, **changes})


def start(made: TrainClassify, folder, observer=None):
    run = RunFolder.create("run", root=folder / "runs", kind="classify", config=to_dict(made))
    return train_classify(made, run, observer=observer or Quiet())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    said = []

    class Listens(Observer):
        def say(self, text):
            said.append(text)

        def progress(self, progress):
            pass

        def work(self, label, done, total):
            pass

    outcome = start(recipe(draw(folder / "data", 12)), folder, Listens())
    return folder, outcome, said


def test_it_learns_and_says_what_was_decided(finished):
    _, outcome, said = finished
    assert outcome.after["accuracy"] > 0.6
    assert "snet49 at 32 px, from scratch; trains all" in "\n".join(said)
    assert "; memory about " in "\n".join(said)
    assert said[0].endswith("36 pictures of 3 classes")
    assert outcome.next[0].startswith(f"volvelle predict {outcome.run} ")


def test_the_run_folder_holds_weights_and_a_report_with_pictures(finished):
    folder, outcome, _ = finished
    net = read_backbone(outcome.run / "weights")
    assert net.classes == ("blue", "green", "red")
    assert net.preprocessing.size == 32
    page = outcome.report.read_text()
    for part in ("confusion matrix", "Accuracy", "held out", "Classes"):
        assert part in page
    _, found = evaluate_run(outcome.run, str(folder / "data"), batch=8, on_bad="stop", observer=Quiet())
    assert len(found.labels) == 36
    assert found.metrics["accuracy"] > 0.6
    assert int(found.matrix.sum()) == 36


def test_predict_and_eval_at_the_command_line(finished, capsys):
    from volvelle.cli.main import main

    folder, outcome, _ = finished
    picture = folder / "data" / "red" / "0.png"
    assert main(["predict", str(outcome.run), str(picture), str(picture), "top=2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in record["images"]] == [str(picture)] * 2
    assert len(record["images"][0]["predictions"]) == 2
    assert record["images"][0]["predictions"][0]["class"] in COLOURS
    assert main(["eval", str(outcome.run), f"data={folder / 'data'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 36
    assert main(["predict", str(outcome.run), str(folder / "nothing.png")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["predict", "resnet-50", str(picture)]) == 2
    assert "no weights are known" in capsys.readouterr().err


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    draw(tmp_path / "data", 6)
    whole = start(recipe(tmp_path / "data", steps=6), tmp_path)

    class Stops(Quiet):
        def progress(self, progress):
            if progress.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    made = recipe(tmp_path / "data", steps=6)
    run = RunFolder.create("cut", root=tmp_path / "runs", kind="classify", config=to_dict(made))
    first = train_classify(made, run, observer=Stops())
    assert first.interrupted
    assert first.resume == f"volvelle resume {run.path}"
    again = resume_run(run.path, observer=Quiet())
    assert again.interrupted is None
    one, other = (read_backbone(path / "weights").state_dict() for path in (whole.run, run.path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_freezing(tmp_path):
    net = backbone("snet49", classes=("a", "b"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    objective = ClassifyObjective(net, recipe("x", freeze="backbone", weights="imagenet"))
    [phase] = objective.phases(1)
    assert set(phase.parameters) == {"fc.weight", "fc.bias"}
    objective.train_mode()
    batch = {"images": torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8), "labels": torch.tensor([0, 1, 0, 1])}
    optimizer = phase.optimizer(phase.parameters)
    objective.loss(batch).value.backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_a_batch_of_one_trains_with_the_running_statistics(tmp_path):
    draw(tmp_path / "data", 4)
    assert start(recipe(tmp_path / "data", batch=1, steps=3, freeze="norms"), tmp_path).step == 3


def test_known_weights_learn_more_slowly():
    net = backbone("snet49", classes=("a", "b"))
    made = recipe("x", weights="imagenet", backbone_rate=0.1, learning_rate=1e-3, weight_decay=0.5)
    [phase] = ClassifyObjective(net, made).phases(1)
    groups = phase.optimizer(phase.parameters).param_groups
    assert sorted((round(group["lr"], 6), group["weight_decay"]) for group in groups) == [
        (1e-4, 0.0), (1e-4, 0.5), (1e-3, 0.0), (1e-3, 0.5),
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(phase.parameters)


@torch.no_grad()
def test_figures_are_those_of_a_plain_count(tmp_path):
    pictures, _ = read_labelled(draw(tmp_path / "data", 5))
    torch.manual_seed(0)
    net = backbone("snet49", classes=pictures.classes)
    how = Preprocessing(32)
    net.config = type(net.config)(**{**vars(net.config), "preprocessing": how})
    found = measure(net, held_loader(pictures, how, 4))
    right, loss = 0, 0.0
    for pixels, label in (Prepared(pictures, how)[i] for i in range(len(pictures))):
        logits = net(how.normalise(pixels[None]))[0]
        right += int(int(logits.argmax()) == label)
        loss += float(torch.nn.functional.cross_entropy(logits[None], torch.tensor([label])))
    assert found.metrics["accuracy"] == pytest.approx(right / 15)
    assert found.metrics["loss"] == pytest.approx(loss / 15, rel=1e-4)
    assert len(measure(net, held_loader(pictures, how, 4), limit=7).labels) == 7
    worst = found.worst(2)
    assert all(found.predicted[i] != found.labels[i] for i in worst)


def test_folders_that_cannot_be_used(tmp_path):
    draw(tmp_path / "one", 2, classes=("red",))
    with pytest.raises(VolvelleError, match="one class only, red"):
        read_labelled(tmp_path / "one")
    with pytest.raises(UsageError, match="no such folder"):
        read_labelled(tmp_path / "nothing")
    data = draw(tmp_path / "data", 3)
    (data / "red" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(VolvelleError, match=r"bad\.jpg: not an image"):
        read_labelled(data)
    kept, _ = read_labelled(data, on_bad="skip")
    assert (len(kept), kept.counts) == (9, [3, 3, 3])
    assert "bad.jpg" in kept.skipped[0]
    (data / "red" / "bad.jpg").unlink()
    (data / "loose.png").write_bytes((data / "red" / "0.png").read_bytes())
    with pytest.raises(VolvelleError, match=r"loose\.png: lies beside the folders"):
        read_labelled(data)
    (data / "loose.png").unlink()
    with pytest.raises(VolvelleError, match="class blue is not one of"):
        read_labelled(data, classes=("red", "green"))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes((data / "red" / "0.png").read_bytes())
    with pytest.raises(VolvelleError, match="no folders of classes"):
        read_labelled(tmp_path / "flat")


def test_parts_of_a_folder(tmp_path):
    draw(tmp_path / "train", 4)
    draw(tmp_path / "val", 2, classes=("green", "red"))
    train, held = read_labelled(tmp_path)
    assert held is not None
    assert (train.counts, held.counts, held.classes) == ([4, 4, 4], [0, 2, 2], ("blue", "green", "red"))
    kept, aside = train.split(0.25, seed=0)
    assert (kept.counts, aside.counts) == ([3, 3, 3], [1, 1, 1])
    assert {kept.source(i) for i in range(9)}.isdisjoint(aside.source(i) for i in range(3))
    again, _ = train.split(0.25, seed=0)
    assert list(again.order) == list(kept.order)


def test_options_that_cannot_be():
    for wrong in ({"backbone": "resnet-51"}, {"area": (0.5, 2.0)}, {"mirror": 2.0}, {"size": 0}, {"samples": -1},
                  {"freeze": "backbone"}):  # fmt: skip
        with pytest.raises(UsageError):
            recipe("x", **wrong)
