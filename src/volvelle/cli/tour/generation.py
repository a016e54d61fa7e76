"""The stage of pictures from nothing: a codec and a prior over its codes, trained for a moment."""

from __future__ import annotations

from pathlib import Path

from volvelle.cli.console import say
from volvelle.cli.tour.frame import Tour

CLASSES = 10


def draw(tour: Tour) -> None:
    """Train a VQ-VAE and a prior for some seconds, and draw garments by class."""
    from volvelle.data.pictures import to_bytes
    from volvelle.data.sheet import sheet
    from volvelle.decode import Sampling, draw_images
    from volvelle.systems.generation.prior import read_prior
    from volvelle.train.prior import train_prior
    from volvelle.train.recipes.language import ModelShape
    from volvelle.train.recipes.prior import TrainPrior
    from volvelle.train.recipes.vqgan import AdversaryOptions, CodecShape, LossOptions, TrainVQGAN
    from volvelle.train.segment_pictures import png
    from volvelle.train.vqgan import train_vqgan

    quick = tour.quick
    data = _pictures(tour.path / "garments", train=60 if quick else 2000, val=30 if quick else 60)
    coding = TrainVQGAN(
        data=str(data),
        steps=2 if quick else 80,
        model=CodecShape(width=16, latent=32, codes=128),
        loss=LossOptions(perceptual=0),
        adversary=AdversaryOptions(weight=0),
        evaluate_every=None,
        checkpoint_every=None,
    )
    codec, _ = tour.train("codec", "vqgan", coding, train_vqgan)
    drawing = TrainPrior(
        data=str(data),
        codec=str(codec.path),
        steps=2 if quick else 150,
        batch=32,
        learning_rate=3e-3,
        model=ModelShape(width=96, depth=3, heads=3),
        samples=0,
        average=None,
        evaluate_every=None,
        checkpoint_every=None,
    )
    run, outcome = tour.train("prior", "prior", drawing, train_prior)
    prior = read_prior(run.path)
    shows = [i % CLASSES for i in range(CLASSES if quick else 4 * CLASSES)]
    drawn = draw_images(prior, shows, sampling=Sampling(temperature=1.0, seed=0))
    picture = sheet(to_bytes(prior.pictures(drawn.codes)), columns=CLASSES, least=56)
    nats = outcome.after["loss"]
    say(f"      {nats:.2f} nats a code; {len(shows)} garments drawn, a column for each class")
    tour.report.text(
        "A VQ-VAE that turns pictures of Fashion-MNIST into 7 x 7 codes, and a Llama over these codes, both trained "
        "for a few seconds. A column for each class."
    ).figure(png(picture), ", ".join(prior.layout.classes))
    tour.tiles.append(("pictures drawn", str(len(shows)), f"{nats:.2f} nats a code"))
    tour.results["draw"] = {"nats": nats, "run": str(run.path)}
    tour.next += [f"volvelle generate {run.path} count=16 class=Dress", "volvelle train vqgan data=FOLDER"]


def _pictures(folder: Path, *, train: int, val: int) -> Path:
    """Some of Fashion-MNIST's pictures as files, a folder for each class."""
    from volvelle.data.pictures import read_pictures
    from volvelle.hub import fetch

    for part, pictures, count in zip(
        ("train", "val"), read_pictures(fetch("fashion-mnist")), (train, val), strict=True
    ):
        assert pictures is not None
        for index in range(count):
            name = pictures.classes[pictures.label(index)].replace("/", " or ")
            file = folder / part / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pictures[index].save(file)
    return folder
