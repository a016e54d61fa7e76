"""Small tokenizers for tests, built in memory."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from volvelle.systems.language.tokenizer import TextTokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "what is the capital of france?", "naïve café, 北京 😀"] * 4


def byte_level(template: str | None = CHATML) -> TextTokenizer:
    """Byte-level BPE with two control tokens, and `<think>`, `<tool_call>` as tokens that are text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "<tool_call>")])
    end = tokenizer.token_to_id("<|im_end|>")
    return TextTokenizer(
        tokenizer,
        eos_ids=(end, tokenizer.token_to_id("<|endoftext|>")),
        bos_id=tokenizer.token_to_id("<|im_start|>"),
        pad_id=end,
        chat_template=template,
    )
