"""Training a codec: two players that leave each other alone, weights that balance, runs from folders to reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tests.train.programs import Painters
from tests.train.test_loop import same, state
from tests.train.toys import Folder, loader, points, stack
from tests.train.turns import turns_leave_the_other_untouched

from volvelle.data.images_labelled import Arrays
from volvelle.data.pictures import PictureSet, read_pictures
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.adversarial.losses import gan_loss
from volvelle.runs import RunFolder
from volvelle.systems.generation.load import load_vqgan, vqgan
from volvelle.systems.generation.perceptual import Perceptual
from volvelle.train import vqgan_objective
from volvelle.train.loop import fit
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions, to_dict
from volvelle.train.precision import Precision
from volvelle.train.recipes.vqgan import AdversaryOptions, CodecShape, LossOptions, TrainVQGAN
from volvelle.train.resume import resume_run
from volvelle.train.vqgan import evaluate_run, fitting_size, train_vqgan
from volvelle.train.vqgan_measure import measure
from volvelle.train.vqgan_objective import balance_of, gradient_at

TINY = CodecShape(width=4, multipliers=(1, 2), groups=2, latent=4, code_width=3, codes=8)


def batch(count=4):
    return stack(points(count))


def ready(step=5):
    """Both players in the middle of a run, where the codec hears the discriminator."""
    both = Painters()
    phases = both.phases(12)
    both.train_mode()
    both.step = step
    return both, phases


def test_each_player_s_turn_leaves_the_other_untouched():
    both, phases = ready()
    turns_leave_the_other_untouched(both, phases, ("model", "discriminator"), batch())
    # Statistics of the codebook too: those of the codec's own turn have been used, the other's leave none.
    assert not both.model.quantize.embedding.seen.any()


def test_before_it_begins_the_discriminator_is_neither_run_nor_weighed(monkeypatch):
    both = Painters()
    ran = []
    both.discriminator.register_forward_hook(lambda *_: ran.append(both.step))
    weighed = []
    original = vqgan_objective.balance_of
    monkeypatch.setattr(vqgan_objective, "balance_of", lambda *a: weighed.append(both.step) or original(*a))
    fit(both, loader(), options=FitOptions(steps=7), observer=Quiet())
    assert min(ran) == 2  # it learns from step 2 on
    assert weighed == [4, 5, 6]  # and is heard from step 4 on
    assert both.ramp == 1.0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_s_gradient_is_that_of_equation_7(precision):
    both, _ = ready()
    images = both.painted(batch())["images"]
    given = {"images": images}
    format_ = Precision(precision, torch.device("cpu"))
    weights = list(both.model.parameters())
    with format_.autocast():
        found = both.loss(given)
    assert torch.isfinite(found.value)
    if precision != "fp32":
        assert 0 < float(found.metrics["adversary_weight"]) < 1e4
        return
    ours = torch.autograd.grad(found.value, weights)
    # The same the long way: each loss back through everything, weighed by the last convolution's gradients.
    made = both.model(vqgan_objective.to_signed(images))
    judged = torch.nn.functional.mse_loss(made.pixels, vqgan_objective.to_signed(images))
    fooled = gan_loss(both.discriminator(made.pixels), True, "hinge", for_="generator")
    last = both.model.decoder.conv_out.weight
    sizes = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (judged, fooled)]
    weight = 0.1 * both.ramp * (sizes[0] / (sizes[1] + 1e-4))
    torch.testing.assert_close(found.metrics["adversary_weight"], weight)
    whole = judged + weight.detach() * fooled + made.quantized.loss
    torch.testing.assert_close(found.value, whole)
    torch.testing.assert_close(ours, torch.autograd.grad(whole, weights), atol=1e-6, rtol=1e-4)


def test_gradients_too_small_for_fp16_are_found_and_balanced():
    leaf = torch.zeros(8, 1, 64, 64, requires_grad=True)
    tiny = (leaf.half() * 3.0).float().mean() * 1e-2  # 1e-6 a pixel, and 1e-7 of it in fp16 is nothing
    torch.testing.assert_close(gradient_at(tiny, leaf), torch.full_like(leaf, 3e-2 / leaf.numel()), rtol=1e-3, atol=0)
    last = torch.nn.Conv2d(2, 1, 3, padding=1)
    features = torch.randn(1, 2, 6, 6)
    one = torch.randn(1, 1, 6, 6)
    assert float(balance_of(features, last, one, one / 100)) == pytest.approx(100, rel=0.05)
    assert float(balance_of(features, last, one, torch.zeros_like(one))) == vqgan_objective.LARGEST


def test_paused_and_resumed_is_the_run_that_went_on(tmp_path):
    options = FitOptions(steps=8, checkpoint_every=3, seed=3)
    whole = Painters()
    fit(whole, loader(), options=options, run=Folder(tmp_path / "whole"), observer=Quiet())
    run = Folder(tmp_path / "part")
    fit(Painters(), loader(), options=options, run=run, observer=Quiet(), until=5)
    again = Painters(seed=9)
    assert fit(again, loader(), options=options, run=run, observer=Quiet(), resume=True).resumed_from == 5
    same(state(whole), state(again))


# The recipe


def pictures(folder, count=14, size=(12, 10), mode="RGB"):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("L", size, 18 * i).convert(mode).save(folder / f"{i:02d}.png")
    return folder


def recipe(data, **more):
    chosen = {
        "model": TINY,
        "steps": 6,
        "batch": 4,
        "size": 8,
        "samples": 3,
        "evaluate_every": 3,
        "checkpoint_every": 2,
    }
    chosen |= {"loss": LossOptions(perceptual=0), "adversary": AdversaryOptions(width=4, layers=1, begin=0.5)}
    return TrainVQGAN(data=str(data), **{**chosen, **more})


def started(tmp_path, chosen, name="run"):
    return RunFolder.create(name, root=tmp_path / "runs", kind="vqgan", config=to_dict(chosen))


def test_from_a_folder_to_a_report_and_a_codec(tmp_path, monkeypatch):
    monkeypatch.setattr("volvelle.train.vqgan.Perceptual", lambda: Perceptual(None, least=32))
    chosen = recipe(pictures(tmp_path / "data"))
    run = started(tmp_path, chosen)
    outcome = train_vqgan(chosen, run, observer=Quiet())
    assert {"psnr", "used", "code_perplexity"} <= set(outcome.after)
    codec = load_vqgan(run.path)
    assert (codec.channels, codec.size, codec.vocabulary) == (1, 8, 8)  # all the pictures are grey
    assert len(list((run.path / "samples").glob("step-*.png"))) == 3
    page = (run.path / "report.html").read_text()
    assert "codes in use" in page
    assert page.count("data:image/png") == 3
    found = evaluate_run(run.path, str(tmp_path / "data"), batch=4, on_bad="stop", observer=Quiet())
    assert int(found.counts.sum()) == 14 * 16
    assert "perceptual" in found.metrics
    losses = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert any("discriminator_loss" in record for record in losses)
    assert any("codec_adversary" in record for record in losses)


def test_an_interrupted_run_goes_on_and_a_finished_one_is_fine_tuned(tmp_path):
    chosen = recipe(pictures(tmp_path / "data", mode="RGBA"), channels=3)
    whole = started(tmp_path, chosen, "whole")
    train_vqgan(chosen, whole, observer=Quiet())
    part = started(tmp_path, chosen, "part")
    with pytest.raises(RuntimeError, match="power cut"):
        train_vqgan(chosen, part, observer=Failing(4))
    resume_run(part.path, observer=Quiet())
    same(load_vqgan(whole.path).state_dict(), load_vqgan(part.path).state_dict())
    tuned = recipe(tmp_path / "data", start=str(whole.path), steps=1, size=None, learning_rate=1e-9)
    run = started(tmp_path, tuned, "tuned")
    train_vqgan(tuned, run, observer=Quiet())
    assert load_vqgan(run.path).config == load_vqgan(whole.path).config


class Failing(Quiet):
    def __init__(self, at):
        self.at = at

    def progress(self, progress):
        if progress.step == self.at:
            raise RuntimeError("power cut")


def test_bad_input_is_named(tmp_path):
    one = recipe(pictures(tmp_path / "one", count=1))
    with pytest.raises(VolvelleError, match="one picture leaves none to measure on"):
        train_vqgan(one, started(tmp_path, one, "a"), observer=Quiet())
    two = recipe(pictures(tmp_path / "two", count=2), model=replace(TINY, codes=64))
    with pytest.raises(UsageError, match="give 16 vectors in all, fewer than there are codes") as caught:
        train_vqgan(two, started(tmp_path, two, "b"), observer=Quiet())
    assert caught.value.tip == "model.codes=4, or more pictures"
    odd = recipe(tmp_path / "two", size=None, model=replace(TINY, multipliers=(1, 1, 1)))
    with pytest.raises(UsageError, match="must be a multiple of the 4 pixels a code"):
        fitting_size(10, 4, asked=True)
    assert odd.model.levels(10) == (1, 1, 1)
    for bad in ({"held_out_share": 0.0}, {"zoom": (0.5, 2.0)}, {"mirror": 2.0}, {"size": 9}, {"samples": 0}):
        with pytest.raises(UsageError):
            recipe("x", **bad)
    with pytest.raises(UsageError, match="adversary"):
        AdversaryOptions(weight=-1)


def test_grids_follow_the_size_of_the_pictures():
    shape = CodecShape()
    assert [2 ** (len(shape.levels(size)) - 1) for size in (28, 64, 65, 128, 256, 1000)] == [4, 4, 8, 8, 16, 16]
    assert AdversaryOptions(begin=0.0, warmup=0.5, ramp=0.0).moments(10) == (0, 0, 0)


def test_measuring_looks_at_what_it_was_given():
    values = torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, 9, 11).contiguous() * 6
    held = PictureSet(Arrays(values, "x"), range(40))
    codec = vqgan(TINY.build(1, 8))
    found = measure(codec, held, batch=7)
    again = measure(codec.train(), held, batch=40)
    assert codec.training
    assert torch.equal(found.counts, again.counts)
    assert found.metrics == pytest.approx(again.metrics)
    assert int(measure(codec, held, limit=5).counts.sum()) == 5 * 16
    assert not codec.quantize.embedding.seen.any()


def test_pictures_of_all_kinds_become_squares(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGBA", (50, 3), (9, 9, 9, 0)).save(folder / "strip.png")
    Image.new("I;16", (1, 1)).save(folder / "dot.png")
    Image.new("CMYK", (5, 9)).save(folder / "ink.tif")
    found, held = read_pictures(folder)
    assert held is None
    assert len(found) == 3
    chosen = recipe(folder, model=replace(TINY, codes=4), steps=2, batch=1)
    run = started(tmp_path, chosen)
    assert train_vqgan(chosen, run, observer=Quiet()).after["psnr"] > 0
