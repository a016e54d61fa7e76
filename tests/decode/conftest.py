import pytest
import torch

from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder

VOCABULARY, CONTEXT = 96, 128


@pytest.fixture(scope="session")
def model():
    """A random decoder of two layers, grouped-query, whose answers are not all one token."""
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama", vocabulary=VOCABULARY, width=32, depth=2, heads=4, context=CONTEXT, norm=RMSNorm(),
        mlp=GatedMLP(48), position=Rope(), kv_heads=2,
    )  # fmt: skip
    model = Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


class Letters:
    """A tokenizer for tests: token i is a piece of a few letters; 0 ends the answer."""

    eos_ids = (0,)

    def piece(self, token):
        return chr(97 + token % 26) + ("," if token % 7 == 0 else "")

    def stream(self):
        tokenizer = self

        class Stream:
            def push(self, token):
                return tokenizer.piece(token)

            def flush(self):
                return ""

        return Stream()

    def decode(self, ids):
        return "".join(self.piece(token) for token in ids if token not in self.eos_ids)


@pytest.fixture
def speaking(model):
    model.tokenizer = Letters()
    yield model
    model.tokenizer = None
