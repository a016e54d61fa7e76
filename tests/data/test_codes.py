"""Pictures as codes on disk: what is written is what is read, views are drawn once, damage is named."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tests.small_priors import Patches

from volvelle.data.codes import (
    CodedPictures,
    Untold,
    collate_codes,
    encode_pictures,
    read_codes,
    write_codes,
)
from volvelle.data.images_labelled import Arrays
from volvelle.data.loader import Loader
from volvelle.data.pictures import Framing, PictureSet
from volvelle.data.sheet import sheet
from volvelle.data.tokens import IGNORE
from volvelle.errors import VolvelleError

FACTS = {"codec": "c", "size": 12}


def texts():
    return CodedPictures(torch.arange(12).reshape(3, 4), [[20, 16], [16], [17, 18, 16]])


def test_texts_read_the_prompt_and_learn_the_codes():
    ids, learn = texts()[2]
    assert ids.tolist() == [17, 18, 16, 8, 9, 10, 11]
    assert learn.tolist() == [False] * 3 + [True] * 4
    batch = collate_codes([texts()[i] for i in range(3)])
    assert batch["ids"].tolist()[1] == [16, 4, 5, 6, 7, 0, 0]
    assert batch["targets"].tolist()[1] == [4, 5, 6, 7, IGNORE, IGNORE, IGNORE]
    assert batch["targets"].tolist()[2] == [IGNORE, IGNORE, 8, 9, 10, 11, IGNORE]
    assert texts().tokens == 18
    part = texts().part([2, 0])
    assert (part.prompts, part.codes.tolist()) == ([[17, 18, 16], [20, 16]], [[8, 9, 10, 11], [0, 1, 2, 3]])
    with pytest.raises(ValueError, match="2 prompts for codes of shape"):
        CodedPictures(torch.zeros(3, 4), [[1], [2]])


def test_a_share_is_not_told_and_drawn_anew_in_every_epoch():
    many = CodedPictures(torch.zeros(400, 2), [[5, 1]] * 400)
    untold = Untold(many, [7, 1], 0.25)
    shares = []
    for epoch in range(2):
        drawn = [untold.draw(i, random.Random(f"{epoch}/{i}"))[0].tolist() for i in range(400)]
        assert {tuple(ids) for ids in drawn} == {(5, 1, 0, 0), (7, 1, 0, 0)}
        shares.append([ids[0] == 7 for ids in drawn])
    assert 60 < sum(shares[0]) < 140
    assert shares[0] != shares[1]
    assert Untold(many, [7, 1], 0.0).draw(3, random.Random(0))[0].tolist() == [5, 1, 0, 0]
    loader = Loader(untold, 8, seed=1, collate=collate_codes)
    again = Loader(untold, 8, seed=1, collate=collate_codes)
    assert all(torch.equal(a.value["ids"], b.value["ids"]) for a, b in zip(loader, again, strict=True))


def test_they_go_to_disk_and_back(tmp_path):
    file = tmp_path / "codes" / "train.safetensors"
    assert read_codes(file, FACTS) is None
    write_codes(file, texts(), FACTS)
    found = read_codes(file, FACTS)
    assert found is not None
    assert found.prompts == texts().prompts
    assert torch.equal(found.codes, texts().codes)
    assert read_codes(file, FACTS | {"size": 16}) is None  # other pictures: to be made anew
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(VolvelleError, match="damaged"):
        read_codes(file, FACTS)


def picture_set(count=5, side=16):
    pixels = torch.randint(256, (count, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return PictureSet(Arrays(pixels, "noise"), range(count))


def test_codes_are_those_of_the_middles_whatever_the_batch(monkeypatch):
    pictures, codec, framing = picture_set(), Patches(), Framing(12, 1)
    codes = encode_pictures(pictures, framing, codec.encode)
    assert codes.shape == (5, 9)
    alone = torch.cat(
        [codec.encode(framing.middle(pictures[i])[None].float() / 127.5 - 1).flatten(1) for i in range(5)]
    )
    assert torch.equal(codes, alone)
    monkeypatch.setattr("volvelle.data.codes.TOGETHER", 2)
    assert torch.equal(encode_pictures(pictures, framing, codec.encode), codes)


def test_views_are_drawn_and_always_the_same():
    pictures, codec, framing = picture_set(), Patches(), Framing(12, 1, zoom=(0.75, 1.0), mirror=0.5)
    codes = encode_pictures(pictures, framing, codec.encode, views=3, seed=2)
    assert codes.shape == (15, 9)
    assert not torch.equal(codes[:5], codes[5:10])
    assert torch.equal(codes, encode_pictures(pictures, framing, codec.encode, views=3, seed=2))
    assert not torch.equal(codes, encode_pictures(pictures, framing, codec.encode, views=3, seed=3))


def test_a_sheet_shows_every_picture_once():
    pictures = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 3, 2) * 40
    image = sheet(pictures, columns=2, gap=1)
    assert image.size == (5, 11)
    pixels = torch.from_numpy(np.array(image))
    assert pixels[::4, ::3].tolist() == [[40, 80], [120, 160], [200, 255]]
    assert pixels[3].eq(255).all()
    assert pixels[:, 2].eq(255).all()
    large = sheet(pictures[:1], least=10)
    assert large.size == (8, 12)  # four times: the longer side has at least ten pixels
    colour = sheet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert (colour.mode, colour.size) == ("RGB", (10, 4))
    assert isinstance(image, Image.Image)
    for wrong in (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="sheet: wanted pictures"):
            sheet(wrong)
