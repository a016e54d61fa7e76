"""`volvelle generate` on a folder that says how its answers are to be written."""

from __future__ import annotations

import pytest
from tests.systems.language.test_encoder_decoder import make_config
from tests.systems.language.tokenizers_made import byte_level

from volvelle.cli.main import main
from volvelle.systems.language.config import SpecialTokens
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import Writing
from volvelle.systems.language.huggingface import write_folder

SAID = "as the model's folder asks: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = byte_level()
    ends = tuple(tokenizer.eos_ids)
    config = make_config(
        vocabulary=tokenizer.vocabulary, start=ends[0], special=SpecialTokens(tokenizer.bos_id, ends[:1], ends[0]),
        writing=Writing(width=3, length_penalty=2.0, no_repeat_ngram_size=2),
    )  # fmt: skip
    model = EncoderDecoder(config)
    model.tokenizer = tokenizer
    path = tmp_path_factory.mktemp("bart")
    write_folder(model, path)
    return str(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "beams.width=3 beams.length_penalty=2.0 rules.no_repeat_ngram_size=2"),
        (["beams.length_penalty=1", "rules.no_repeat_ngram_size=0"], "beams.width=3"),
        (["sampling.temperature=0.5"], "rules.no_repeat_ngram_size=2"),
        (["draft=lookup", "rules.no_repeat_ngram_size=0"], None),
        (["beams.width=1", "rules.no_repeat_ngram_size=0"], None),
    ],
)
def test_what_nobody_asks_for_is_as_the_folder_has_it(folder, capfd, words, said):
    assert main(["generate", folder, "the quick brown", "max_tokens=4", *words]) == 0
    printed = "".join(capfd.readouterr())
    assert f"{SAID}{said}\n" in printed if said else SAID not in printed


def test_beams_asked_for_do_not_go_with_sampling(folder, capfd):
    assert main(["generate", folder, "the quick", "beams.width=2", "sampling.temperature=0.5"]) == 2
    assert "takes no sampling options" in capfd.readouterr().err
