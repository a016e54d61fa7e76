"""draw_images: whatever is batched, drafted or cached, a picture is what the model alone would write."""

import pytest
import torch
from tests.small_priors import small_prior

from volvelle.decode.contract import ALWAYS
from volvelle.decode.drafters.mtp import MTP
from volvelle.decode.images import draw_images
from volvelle.decode.options import Sampling
from volvelle.errors import UsageError
from volvelle.systems.generation.layout import Layout
from volvelle.systems.language.mtp import KINDS

GREEDY, FREE = Sampling(), Sampling(temperature=1.0, seed=3)


def alone(prior, shows, sampling=GREEDY, size=None):
    """Greedy codes by a loop over the whole text, without any cache."""
    rows, columns = size or (prior.layout.rows, prior.layout.columns)
    ids = torch.tensor([prior.prompt(shows)])
    for _ in range(rows * columns):
        with torch.no_grad():
            ids = torch.cat((ids, prior.model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, -rows * columns :].reshape(rows, columns)


def test_greedy_pictures_are_those_of_a_loop_without_a_cache():
    prior = small_prior()
    shows = [0, 1, None, 1]
    drawn = draw_images(prior, shows, sampling=GREEDY, batch=3)
    assert drawn.codes.shape == (4, 3, 3)
    for codes, one in zip(drawn.codes, shows, strict=True):
        assert torch.equal(codes, alone(prior, one))
    assert drawn.accepted_per_step == 1


def test_a_seed_gives_the_same_pictures_in_any_batch():
    prior = small_prior()
    shows = [i % 2 for i in range(7)]
    whole = draw_images(prior, shows, sampling=FREE).codes
    assert torch.equal(whole, draw_images(prior, shows, sampling=FREE, batch=2).codes)
    assert len({tuple(codes.flatten().tolist()) for codes in whole}) >= 5
    assert int(whole.max()) < prior.layout.codes
    later = draw_images(prior, shows[5:], sampling=Sampling(temperature=1.0, seed=3 + 5)).codes
    assert torch.equal(later, whole[5:])


def test_sampled_codes_follow_the_models_distribution():
    """The first code of 4,000 pictures against the softmax it was drawn from: chi-square, 15 degrees of freedom."""
    prior = small_prior(Layout(codes=16, rows=1, columns=1))
    drawn = draw_images(prior, [None] * 4000, sampling=FREE, batch=4000).codes.flatten()
    with torch.no_grad():
        p = prior.model(torch.tensor([prior.prompt()])).logits[0, -1, :16].double().softmax(-1)
    expected = 4000 * p
    likely = expected > 5
    counts = torch.bincount(drawn, minlength=16).double()
    chi = ((counts - expected).square() / expected)[likely].sum()
    assert chi < 37.7  # the 0.999 quantile


def test_pictures_begin_as_they_are_told():
    prior = small_prior()
    begins = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    drawn = draw_images(prior, [0, 1], sampling=GREEDY, begins=begins)
    assert torch.equal(drawn.codes.flatten(1)[:, :4], begins)
    ids = torch.tensor([prior.prompt(1) + begins[1].tolist()])
    with torch.no_grad():
        assert int(drawn.codes[1].flatten()[4]) == int(prior.model(ids).logits[0, -1].argmax())
    assert torch.equal(draw_images(prior, [0], begins=begins[0]).codes[0].flatten()[:4], begins[0])
    for wrong in (torch.zeros(9, dtype=torch.long), torch.tensor([16]), torch.tensor([-1])):
        with pytest.raises(UsageError):
            draw_images(prior, [0], begins=wrong)


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_drafts_of_image_tokens_change_nothing(kind):
    prior = small_prior()
    torch.manual_seed(1)
    modules = KINDS[kind](prior.model.config, 2, tokens=torch.arange(prior.layout.codes)).eval()
    plain = draw_images(prior, [0, 1, None], sampling=GREEDY)
    drafted = draw_images(prior, [0, 1, None], sampling=GREEDY, drafter=MTP(modules, k=2), policy=ALWAYS)
    assert torch.equal(plain.codes, drafted.codes)
    assert any(sum(one.proposed) for one in drafted.written)
    free = draw_images(prior, [0, 1, None], sampling=FREE, drafter=MTP(modules, k=2), policy=ALWAYS).codes
    assert 0 <= int(free.min()) <= int(free.max()) < prior.layout.codes
    with pytest.raises(UsageError, match="3 x 3 codes only"):
        draw_images(prior, [0], drafter=MTP(modules, k=2), size=(6, 3))


@pytest.mark.parametrize("size", [(3, 3), (2, 3), (7, 3), (3, 5), (5, 8)])
def test_other_sizes_are_drawn_through_a_window(size):
    prior = small_prior(depth=1)
    drawn = draw_images(prior, [0, None, 1], sampling=GREEDY, size=size)
    assert drawn.codes.shape == (3, *size)
    # one layer: each code is what the model writes behind its window, laid out as a picture of the trained size
    rows, columns = size
    for picture, shows in zip(drawn.codes, [0, None, 1], strict=True):
        for code in range(rows * columns):
            row, column = divmod(code, columns)
            top, left = max(0, row - 2), min(max(0, column - 1), columns - 3)
            window = picture[top : row + 1, left : left + 3].flatten()[: (row - top) * 3 + column - left]
            ids = torch.tensor([prior.prompt(shows) + window.tolist()])
            with torch.no_grad():
                logits = prior.model(ids).logits[0, -1]
            assert logits[picture[row, column]] >= logits.max() - 1e-4


def test_a_picture_of_the_trained_size_is_the_same_through_the_window():
    from volvelle.decode.generation import generate_batch
    from volvelle.systems.generation.larger import Larger

    prior = small_prior(depth=3)
    drawn = draw_images(prior, [0, 1], sampling=GREEDY)
    wide = Larger(prior.model, prior.layout, rows=3, columns=3, said=2)
    found = generate_batch(wide, [prior.prompt(0), prior.prompt(1)], max_tokens=9, eos_ids=())
    assert torch.equal(torch.tensor([one.tokens for one in found]).reshape(2, 3, 3), drawn.codes)


def test_captions_of_different_lengths_share_a_batch():
    from volvelle.train.scratch import train_tokenizer

    words = train_tokenizer(["a red coat on a plain background", "a bag"], 300)
    prior = small_prior(Layout(codes=16, rows=3, columns=3, words=words.vocabulary, caption=40))
    prior.words = words
    shows = ["a bag", "a red coat on a plain background", None]
    for size in (None, (6, 3)):
        together = draw_images(prior, shows, sampling=GREEDY, size=size).codes
        for i, one in enumerate(shows):
            assert torch.equal(together[i], draw_images(prior, [one], sampling=GREEDY, size=size).codes[0])


def test_no_pictures_and_no_room():
    prior = small_prior()
    assert draw_images(prior, []).codes.shape == (0, 3, 3)
    with pytest.raises(UsageError, match="nothing is left to write"):
        draw_images(prior, [0], size=(0, 3))
    pixels = prior.pictures(torch.arange(9).reshape(1, 3, 3))
    assert pixels.shape == (1, 1, 12, 12)
    assert float(pixels[0, 0, 0, 4]) == pytest.approx(-1 + 2 / 15)
