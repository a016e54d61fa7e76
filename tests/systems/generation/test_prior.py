"""Prior: a folder that transformers opens, with the same logits, and which writes nothing but codes."""

import json

import pytest
import torch
from tests.small_priors import Patches, small_prior

from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.generation.larger import Larger
from volvelle.systems.generation.layout import Layout
from volvelle.systems.generation.prior import FILE, is_prior, read_prior, write_prior
from volvelle.systems.language.config import Learned
from volvelle.systems.language.huggingface import read_folder
from volvelle.train.scratch import train_tokenizer


def test_only_codes_have_a_chance(tmp_path):
    prior = small_prior()
    ids = torch.tensor([[*prior.prompt(0), 3, 4], [*prior.prompt(1), 5, 6]])
    logits = prior.model(ids).logits
    assert logits[..., 16:].eq(-torch.inf).all()
    assert logits[..., :16].isfinite().all()
    plain = prior.model.lm_head(prior.model.hidden(ids))
    torch.testing.assert_close(logits[..., :16], plain[..., :16], rtol=0, atol=0)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(16, (8,)))
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in prior.model.parameters())
    write_prior(prior, tmp_path)
    assert read_folder(tmp_path).written == 16
    assert json.loads((tmp_path / "generation_config.json").read_text())["suppress_tokens"] == list(range(16, 32))


def test_other_lists_of_suppressed_tokens_are_left_to_transformers(tmp_path):
    write_prior(small_prior(), tmp_path)
    for found in ([], [3], list(range(16, 31)), "all", [None]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": found}))
        assert read_folder(tmp_path).written is None


def test_it_goes_to_disk_and_back(tmp_path):
    codec = Patches()
    prior = small_prior(codec=codec)
    write_prior(prior, tmp_path / "weights")
    for path in (tmp_path, tmp_path / "weights"):
        assert is_prior(path)
        again = read_prior(path, codec=codec)
        assert again.layout == prior.layout
        ids = torch.tensor([prior.prompt(1)])
        torch.testing.assert_close(again.model(ids).logits, prior.model(ids).logits, rtol=0, atol=0)
    assert not is_prior(tmp_path / "nowhere")


def test_captions_have_a_tokenizer_of_their_own(tmp_path):
    words = train_tokenizer(["a red coat", "a blue bag", "a red bag"], 300)
    layout = Layout(codes=16, rows=3, columns=3, words=words.vocabulary, caption=8)
    prior = small_prior(layout)
    prior.words = words
    write_prior(prior, tmp_path)
    again = read_prior(tmp_path, codec=Patches())
    assert again.prompt("a red bag") == prior.prompt("a red bag") == layout.prompt(words.encode("a red bag"))
    with pytest.raises(UsageError, match="trained without"):
        again.prompt(0)
    with pytest.raises(UsageError, match="trained without"):
        small_prior().prompt("a red bag")


def test_what_is_missing_or_of_another_kind_is_said(tmp_path):
    prior = small_prior()
    with pytest.raises(VolvelleError, match=r"holds no prior"):
        read_prior(tmp_path)
    write_prior(prior, tmp_path)
    with pytest.raises(VolvelleError, match="which codec"):
        read_prior(tmp_path)
    with pytest.raises(VolvelleError, match="a codec of 8 codes, the prior writes 16"):
        read_prior(tmp_path, codec=Patches(codes=8))
    facts = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(facts | {"codec": str(tmp_path / "gone")}))
    with pytest.raises(VolvelleError, match=r"its codec .* is gone"):
        read_prior(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(facts | {"layout": facts["layout"] | {"codes": 40}}))
    with pytest.raises(VolvelleError, match="vocabulary"):
        read_prior(tmp_path, codec=Patches(codes=40))


def test_larger_pictures_need_rope_and_the_trained_width():
    prior = small_prior(position=Learned())
    prior.model.config  # noqa: B018
    with pytest.raises(VolvelleError, match="its positions are Learned"):
        Larger(prior.model, prior.layout, rows=6, columns=6, said=2)
    with pytest.raises(VolvelleError, match="this prior's are 3 wide"):
        Larger(small_prior().model, prior.layout, rows=6, columns=2, said=2)


@pytest.mark.peer
def test_transformers_writes_the_same_codes(tmp_path):
    transformers = pytest.importorskip("transformers")
    from volvelle.decode.images import draw_images
    from volvelle.decode.options import Sampling

    prior = small_prior(Layout(codes=40, rows=4, columns=5, classes=("a", "b", "c")))
    write_prior(prior, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([prior.prompt(label) for label in (0, 1, 2)])
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits[..., :40], prior.model(ids).logits[..., :40], rtol=1e-4, atol=1e-4
        )
        whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    ours = draw_images(prior, [0, 1, 2], sampling=Sampling()).codes.flatten(1)
    assert torch.equal(whole[:, 2:], ours)
    assert len(ours.unique()) > 5
