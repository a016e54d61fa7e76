import pytest
import torch


@pytest.fixture
def tiny_llama():
    """Make transformers' random Llama of two layers; the same weights on every call."""
    transformers = pytest.importorskip("transformers")

    def build(dtype=torch.float32, **changes):
        sizes = {
            "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        }  # fmt: skip
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval().to(dtype)

    return build


@pytest.fixture
def ids():
    return torch.arange(14).view(2, 7) % 64
