"""The data of a prior: pictures, what is said of them, their codes on disk, batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from volvelle.data.codes import CodedPictures, Untold, collate_codes, encode_pictures, read_codes, write_codes
from volvelle.data.loader import Loader
from volvelle.data.pictures import Framing, PictureSet
from volvelle.errors import UsageError
from volvelle.runs import RunFolder, scan
from volvelle.systems.generation.codec import Codec
from volvelle.systems.generation.layout import Layout
from volvelle.systems.generation.prior import WORDS
from volvelle.systems.language.tokenizer import TextTokenizer
from volvelle.train.observer import Observer
from volvelle.train.picture_sets import PictureParts, few, read_picture_parts
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.prior import Condition, TrainPrior
from volvelle.train.scratch import train_tokenizer
from volvelle.train.sets import drawn_in_batches

CODES = "codes"
"""The folder of the codes in a run's."""


def read_parts(recipe: TrainPrior, run: RunFolder, observer: Observer, ranks: Ranks) -> PictureParts:
    """Find and check all pictures; of each part at most as many as the recipe says are taken."""
    parts = read_picture_parts(recipe, run, observer, ranks)
    return replace(parts, train=few(parts.train, recipe.most), held=few(parts.held, recipe.held_out_size))


def find_codec(given: str | None, observer: Observer) -> Path:
    """The codec's path: the one given, or the newest finished run of train vqgan under runs/."""
    if given is not None:
        return Path(given)
    found = [run for run in scan() if run.manifest.get("kind") == "vqgan" and run.status == "finished"]
    if not found:
        raise UsageError(
            "train prior: no codec, what turns pictures into codes", tip="volvelle train vqgan data=… first, or codec="
        )
    observer.say(f"codec {found[-1].path}, the newest of train vqgan")
    return found[-1].path


@dataclass(frozen=True)
class Reading:
    """How pictures become texts: by which codec (and its path), in which layout, seen in which views."""

    codec: Codec
    path: Path
    layout: Layout
    framing: Framing
    words: TextTokenizer | None = None
    views: int = 1
    seed: int = 0

    def texts(
        self, pictures: PictureSet, file: Path, observer: Observer, ranks: Ranks, *, training: bool
    ) -> CodedPictures:
        """The texts of these pictures: read from the file, or encoded and left there.

        Pictures to train on are seen in random views, where there are any; others by their middles.
        """
        framing = self.framing if training else Framing(self.framing.size, self.framing.channels)
        views = self.views if training else 1
        facts: dict[str, Any] = {
            "codec": str(self.path), "layout": self.layout.to_dict(), "size": framing.size, "zoom": list(framing.zoom),
            "mirror": framing.mirror, "views": views, "seed": self.seed, "pictures": len(pictures),
        }  # fmt: skip
        if ranks.leads and read_codes(file, facts) is None:
            codes = encode_pictures(
                pictures, framing, self.encode, views=views, seed=self.seed,
                progress=lambda done, total: observer.work(f"encoding ({file.stem})", done, total),
            )  # fmt: skip
            write_codes(file, CodedPictures(codes, self.prompts(pictures) * views), facts)
            used = len(codes.unique())
            observer.say(f"{len(codes):,} pictures as {codes.shape[1]} codes, {used} of {self.layout.codes}: {file}")
        ranks.share(None)
        found = read_codes(file, facts)
        assert found is not None
        return found

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (b, c, y, x) in [-1, 1] to codes (b, h, w), wherever the codec is."""
        weight = next(self.codec.parameters(), None) if isinstance(self.codec, nn.Module) else None
        return self.codec.encode(pixels if weight is None else pixels.to(weight.device))

    def prompts(self, pictures: PictureSet) -> list[list[int]]:
        """What is said of each picture before its codes."""
        if self.words is not None:
            return [self.layout.prompt(self.words.encode(text)) for text in captions(pictures)]
        known = bool(self.layout.classes)
        return [self.layout.prompt(pictures.label(i) if known else None) for i in range(len(pictures))]


def reading(recipe: TrainPrior, parts: PictureParts, path: Path, codec: Codec, folder: Path, ranks: Ranks) -> Reading:
    """How the recipe reads its pictures; the tokenizer of captions is trained on them and left in `folder`, once.

    Raises UsageError for a side that holds no whole number of codes.
    """
    size = recipe.size or codec.size
    if size % codec.factor:
        raise UsageError(f"size={size}: a code is {codec.factor} x {codec.factor} pixels", tip="take a multiple of it")
    framing = Framing(size, codec.channels, zoom=recipe.zoom, mirror=recipe.mirror)  # pyright: ignore[reportArgumentType]
    side, kind, words = size // codec.factor, told(recipe.condition, parts.train), None
    layout = Layout(codec.vocabulary, side, side)
    if kind == "class":
        layout = replace(layout, classes=parts.train.classes)
    elif kind == "caption":
        words = _words(captions(parts.train), recipe.words, folder / WORDS, ranks)
        longest = max(len(words.encode(text)) for text in {*captions(parts.train), *captions(parts.held)})
        layout = replace(layout, words=words.vocabulary, caption=max(1, longest))
    return Reading(codec, path.resolve() if path.exists() else path, layout, framing, words, recipe.views, recipe.seed)


def _words(texts: list[str], count: int, folder: Path, ranks: Ranks) -> TextTokenizer:
    if ranks.leads and not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts, count).save(folder)
    ranks.share(None)
    return TextTokenizer.from_folder(folder)


def captions(pictures: PictureSet) -> list[str]:
    """All captions; none where they are not known."""
    return [] if pictures.captions is None else [pictures.caption(i) for i in range(len(pictures))]


def told(condition: Condition, pictures: PictureSet) -> Condition:
    """What the model is told of these pictures. Raises UsageError for what is not known of them."""
    known = {"caption": pictures.captions is not None, "class": bool(pictures.classes), "nothing": True}
    if condition == "auto":
        return next(kind for kind in ("caption", "class", "nothing") if known[kind])
    if not known[condition]:
        tip = (
            "a folder a class" if condition == "class" else 'captions.jsonl: {"image": "a.jpg", "caption": "…"} a line'
        )
        raise UsageError(f"condition={condition}: the data does not say it", tip=tip)
    return condition


def training_loader(recipe: TrainPrior, texts: CodedPictures, layout: Layout) -> Loader:
    """Seeded batches; a share of the texts is not told what it shows."""
    share = recipe.dropped if layout.said else 0.0
    return drawn_in_batches(recipe, Untold(texts, layout.prompt(), share), collate_codes)


def held_loader(texts: CodedPictures, batch: int) -> Loader:
    """Held-out texts in a fixed order."""
    return Loader(texts, batch, seed=0, collate=collate_codes, shuffle=False, lengths=texts.lengths)
