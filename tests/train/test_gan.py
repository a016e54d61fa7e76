"""Two players: whose weights move when, runs that stop and go on, what games learn, and the recipe from end to end."""

from __future__ import annotations

import json
import signal
import typing

import pytest
import torch
from PIL import Image
from tests.train.programs import Gamblers
from tests.train.test_loop import interrupting, same, state
from tests.train.toys import Folder, loader
from tests.train.turns import turns_leave_the_other_untouched
from torch import nn

from volvelle.data.images import to_image
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.adversarial.losses import KINDS
from volvelle.parts.transport.certified import certified_w1
from volvelle.parts.transport.optimal_transport import wasserstein_distance
from volvelle.runs import RunFolder
from volvelle.systems.generation.extractor import open_extractor
from volvelle.systems.generation.gan import GAN, LipschitzCritic
from volvelle.train.gan import evaluate_run, objective_of, open_run, train_gan
from volvelle.train.gan_constraints import Clipped, Constraint, FlatOnData, Slope
from volvelle.train.gan_objective import Game, GANObjective
from volvelle.train.loop import fit
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions, to_dict
from volvelle.train.recipes.gan import CriticOptions, GeneratorOptions, LossName, PenaltyOptions, TrainGAN
from volvelle.train.resume import resume_run
from volvelle.train.samples_measure import compared, features_of
from volvelle.train.schedule import linear

SMALL = {"generator": GeneratorOptions(width=4), "latent": 8, "size": 12, "batch": 4, "channels": 1}
GAMES = {
    "non-saturating, spectral": {"critic": CriticOptions(width=4, norm="spectral")},
    "hinge, batch norm": {"loss": "hinge", "critic": CriticOptions(width=4, norm="batch")},
    "least squares, r1": {"loss": "least-squares", "penalty": PenaltyOptions(kind="r1")},
    "wasserstein, gradient": {"loss": "wasserstein", "critic_steps": 2},
    "wasserstein, clip": {"loss": "wasserstein", "penalty": PenaltyOptions(kind="clip", bound=0.05), "critic_steps": 2},
    "wasserstein, orthogonal": {"loss": "wasserstein", "critic": CriticOptions(kind="orthogonal", widths=(8,))},
    "minimax, residual, layer norm": {
        "loss": "minimax",
        "generator": GeneratorOptions(kind="resnet", width=4),
        "critic": CriticOptions(kind="resnet", width=4, norm="layer"),
        "penalty": PenaltyOptions(kind="one-sided"),
    },
}


def recipe(**more):
    return TrainGAN(**{"data": "pictures", "critic": CriticOptions(width=4), **SMALL, **more})


def batch(count=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {"images": torch.randint(0, 256, (count, 1, 12, 12), dtype=torch.uint8, generator=draw)}


def objective(game, seed=0, **more):
    torch.manual_seed(seed)
    chosen = recipe(**GAMES[game], **more)
    return objective_of(chosen, GAN(chosen.config(12, 1)), None)


@pytest.mark.parametrize("game", GAMES)
def test_each_player_s_turn_leaves_the_other_untouched(game):
    both = objective(game)
    for module in both.modules().values():
        module.train()
    turns_leave_the_other_untouched(both, both.phases(10), ("critic", "generator"), batch())


def pictures_loader(**options):
    from volvelle.data.loader import Loader

    items = [batch(1, seed)["images"][0] for seed in range(10)]
    return Loader(items, 4, seed=0, collate=lambda found: {"images": torch.stack(found)}, **options)


@pytest.mark.parametrize("game", ["non-saturating, spectral", "wasserstein, gradient"])
def test_paused_and_resumed_is_the_run_that_went_on(game, tmp_path):
    options = FitOptions(steps=6, checkpoint_every=2, seed=3, average=0.9)
    whole = objective(game)
    fit(whole, pictures_loader(), options=options, run=Folder(tmp_path / "whole"), observer=Quiet())
    run = Folder(tmp_path / "part")
    fit(objective(game), pictures_loader(), options=options, run=run, observer=Quiet(), until=3)
    again = objective(game, seed=9)
    result = fit(again, pictures_loader(), options=options, run=run, observer=Quiet(), resume=True)
    assert result.resumed_from == 3
    assert again.step == 6
    same(state(whole), state(again))


def test_stopped_inside_the_critic_s_turns_it_goes_on_bit_for_bit(tmp_path):
    options = FitOptions(steps=8, checkpoint_every=3, seed=3)
    whole = Gamblers()
    fit(whole, loader(), options=options, run=Folder(tmp_path / "whole"), observer=Quiet())
    for at in (2, 13):  # in the second turn of the first step; after a checkpoint, in a first turn
        run = Folder(tmp_path / f"part{at}")
        stopped = fit(
            interrupting(Gamblers(), at, signal.SIGTERM), loader(), options=options, run=run, observer=Quiet()
        )
        assert stopped.interrupted == "SIGTERM"
        again = Gamblers(seed=77)
        fit(again, loader(), options=options, run=run, observer=Quiet(), resume=True)
        same(state(whole), state(again))


def test_the_critic_plays_as_often_as_asked_and_sees_new_data_each_time():
    seen, both = [], Gamblers()
    original = both.real
    both.real = lambda given: seen.append(given["x"]) or original(given)
    fit(both, loader(), options=FitOptions(steps=3), observer=Quiet())
    # Two turns of the critic and one of the generator a step, and the count for the rate once a batch drawn.
    distinct = {float(x.sum()) for x in seen}
    assert len(distinct) == 6


def test_clipping_happens_after_every_update_of_the_critic():
    both = objective("wasserstein, clip")
    fit(both, pictures_loader(), options=FitOptions(steps=2), observer=Quiet())
    sizes = [float(p.detach().abs().max()) for p in both.critic.parameters()]
    assert max(sizes) <= 0.05 + 1e-7
    assert isinstance(both.game.constraint, Clipped)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_gives_finite_losses_and_penalties_in_fp32(precision, tmp_path):
    both = objective("wasserstein, gradient")
    options = FitOptions(steps=3, precision=precision)
    result = fit(both, pictures_loader(), options=options, observer=Quiet())
    assert all(torch.isfinite(p).all() for m in both.modules().values() for p in m.parameters())
    assert result.metrics["critic_penalty"] >= 0


# What games learn: a shift on a line


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(2))

    def forward(self, z):
        return z + self.by


def shifted(game, critic, steps, rate=0.05):
    torch.manual_seed(0)
    adam = lambda p: torch.optim.Adam(p.values(), lr=rate, betas=(0.5, 0.9))  # noqa: E731
    generator = Shift()
    both = GANObjective(
        generator, critic, game, optimizers=(adam, adam), latents=lambda n: torch.randn(n, 2),
        real=lambda given: torch.randn(64, 2) + torch.tensor([3.0, -1.0]), schedule=lambda steps: linear(steps),
    )  # fmt: skip
    fit(both, loader(), options=FitOptions(steps=steps), observer=Quiet())
    return generator, critic


def perceptron():
    return nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "constraint", "critic"),
    [
        ("minimax", FlatOnData(0.1), perceptron), ("non-saturating", FlatOnData(0.1), perceptron),
        ("hinge", FlatOnData(0.1), perceptron), ("least-squares", FlatOnData(0.1), perceptron),
        ("wasserstein", Slope(), perceptron), ("wasserstein", Slope(one_sided=True), perceptron),
        ("wasserstein", Constraint(), lambda: LipschitzCritic(2, (16,))),
    ],
)  # fmt: skip
def test_every_game_finds_the_shift(kind, constraint, critic):
    generator, _ = shifted(Game(kind, constraint, 2), critic(), 250)
    assert (generator.by.detach() - torch.tensor([3.0, -1.0])).norm() < 0.6


@pytest.mark.slow
def test_a_critic_of_known_slope_certifies_most_of_the_distance():
    torch.manual_seed(0)
    fixed = nn.Module()
    fixed.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    fixed.forward = lambda z: z + 0 * fixed.unused
    critic = LipschitzCritic(2, (16, 16))
    adam = lambda p: torch.optim.Adam(p.values(), lr=0.01)  # noqa: E731
    x = torch.randn(64, 2) + torch.tensor([3.0, -1.0])
    y = torch.randn(64, 2)
    both = GANObjective(
        fixed,
        critic,
        Game("wasserstein", critic_steps=4),
        optimizers=(adam, adam),
        latents=lambda n: y,
        real=lambda _: x,
    )
    fit(both, loader(), options=FitOptions(steps=60), observer=Quiet())
    exact = float(wasserstein_distance(x.double(), y.double()))
    bound = certified_w1(critic, x, y)
    assert 0.97 * exact < bound <= exact


# The recipe


def folder(path, count=24, sides=((14, 20), (12, 12), (30, 13))):
    """Pictures of unequal sizes and modes: grey, colour, transparent, with a palette."""
    path.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    for number in range(count):
        high, wide = sides[number % len(sides)]
        pixels = torch.randint(0, 256, (1, high, wide), generator=draw, dtype=torch.uint8)
        mode = ("L", "RGB", "LA", "P")[number % 4]
        to_image(pixels).convert(mode).save(path / f"{number:03d}.png")
    return path


def small(path, **more):
    return recipe(
        **{"data": str(path), "extractor": "pixels", "steps": 4, "evaluate_every": 2, "samples": 4, "size": None,
           "channels": None, "average": 0.9, **more}
    )  # fmt: skip


def test_from_pictures_of_every_kind_to_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = small(folder(tmp_path / "pictures"))
    run = RunFolder.create(kind="gan", config=to_dict(made))
    outcome = train_gan(made, run, observer=Quiet())
    assert outcome.interrupted is None
    assert {"FD-pixels-8", "FD-pixels-8 floor", "w1_pixels"} <= outcome.after.keys()
    model = open_run(run.path)
    assert (model.config.size, model.config.channels) == (13, 1)
    assert [file.stem for file in sorted((run.path / "samples").iterdir())] == [f"step-00000{i}" for i in (0, 2, 4)]
    page = (run.path / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "exact W1 in pixels" in page
    assert "E s(data) - E s(samples)" in page
    found = evaluate_run(run.path, made.data, extractor=None, most=10, on_bad="stop", observer=Quiet())
    assert found["FD-pixels-8"] >= 0
    one, two = (model.sample(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5))
    assert torch.equal(one, two)
    assert json.loads((run.path / "weights" / "config.json").read_text())["type"] == "gan"


def test_an_interrupted_run_goes_on_and_gives_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = small(folder(tmp_path / "pictures"), channels=3, size=12, checkpoint_every=1)
    whole, part = (RunFolder.create(name, kind="gan", config=to_dict(made)) for name in ("whole", "part"))
    train_gan(made, whole, observer=Quiet())

    class Stop(Quiet):
        def progress(self, progress):
            if progress.step == 2:
                signal.raise_signal(signal.SIGINT)

    stopped = train_gan(made, part, observer=Stop())
    assert stopped.interrupted == "SIGINT"
    with pytest.raises(VolvelleError, match="no weights yet"):
        open_run(part.path)
    resume_run(part.path, observer=Quiet())
    same(open_run(whole.path).state_dict(), open_run(part.path).state_dict())


def test_bad_pictures_and_words_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = folder(tmp_path / "one", count=1)
    made = small(one)
    with pytest.raises(VolvelleError, match="one picture leaves none"):
        train_gan(made, RunFolder.create(kind="gan", config={}), observer=Quiet())
    (one / "broken.png").write_bytes(b"no picture")
    with pytest.raises(VolvelleError, match=r"broken\.png"):
        train_gan(made, RunFolder.create(kind="gan", config={}), observer=Quiet())
    Image.new("L", (2, 3)).save(one / "tiny.png")
    (one / "broken.png").unlink()
    outcome = train_gan(
        small(one, steps=1, evaluate_every=None), RunFolder.create(kind="gan", config={}), observer=Quiet()
    )
    assert outcome.after["w1_pixels"] > 0  # one picture to train on and one to measure on: no set to compare
    assert "FD-pixels-8" not in outcome.after
    for wrong, said in (
        ({"penalty": PenaltyOptions(kind="gradient"), "critic": CriticOptions(norm="batch")}, "no slope of its own"),
        ({"size": 4}, "size from 8"), ({"betas": (0.5, 1.0)}, "betas"), ({"latent": 0}, "latent"),
        ({"zoom": (0.0, 1.0)}, "zoom"), ({"critic": CriticOptions(kind="orthogonal", widths=(7,))}, "multiples"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            recipe(**wrong)
    with pytest.raises(UsageError, match="bound"):
        PenaltyOptions(bound=0)
    with pytest.raises(UsageError, match="no weights are known"):
        open_extractor("resnet-18", size=28)


def test_words_mean_what_the_first_line_says():
    assert typing.get_args(LossName) == KINDS
    assert recipe().norm == "batch"
    assert recipe(loss="wasserstein", penalty=PenaltyOptions(kind="none")).norm == "spectral"
    assert recipe(loss="wasserstein").penalty_kind == "gradient"
    assert recipe(loss="wasserstein").norm == "none"
    assert recipe(loss="wasserstein").turns == 5
    assert recipe(loss="wasserstein", critic=CriticOptions(kind="orthogonal")).penalty_kind == "none"


def test_features_of_equal_sets_are_at_no_distance():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 12, 12, generator=draw) * 2 - 1
    pixels = features_of(x, open_extractor("pixels", size=12), batch=7)
    assert pixels.shape == (40, 64)
    found = compared(pixels, pixels, pixels[:20], "pixels")
    assert found["FD-pixels"] < 1e-9
    assert found["FD-pixels floor"] < 1e-9
    assert (found["precision"], found["recall"]) == (1, 1)
    assert compared(pixels[:1], pixels, None, "pixels") == {}
