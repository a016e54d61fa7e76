"""Text <-> token ids for language models: encoding that user text cannot subvert, decoding that never cuts a character.

Text is data: a `<|im_start|>` inside it is encoded as ordinary characters unless the caller says `special=True`. The
markers a chat template writes itself are parsed; the same letters inside a message are not (`chat_ids`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.errors import VolvelleError
from volvelle.systems.language.chat import render_chat
from volvelle.systems.language.chat_guard import ChatGuard

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Message = Mapping[str, Any]


class TextTokenizer:
    """A `tokenizers.Tokenizer` with the ids and the chat template that belong to it.

    `eos_ids` end a generation; `chat_template` is one Jinja text, or several by name ("default", "tool_use").
    The tokenizer handed in is owned from then on: its truncation and padding are switched off.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    >>> byte_level = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    >>> byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    >>> tokenizer = TextTokenizer(byte_level)
    >>> ids = tokenizer.encode("naïve")
    >>> len(ids), tokenizer.decode(ids)
    (6, 'naïve')
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ):
        # tokenizer.json may carry a training-time truncation, which would cut prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.pad_id = pad_id
        named = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        self.chat_templates: dict[str, str] = named
        self._guards: dict[str, ChatGuard] = {}

    @property
    def chat_template(self) -> str | None:
        """The template used when no tools are given, or None."""
        return self.chat_templates.get("default")

    @functools.cached_property
    def vocabulary(self) -> int:
        """One more than the highest token id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special (control) tokens."""
        return frozenset(i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Text -> ids, without begin or end tokens.

        `special=True` reads the spellings of control tokens as those tokens: only for text that the program wrote.
        Tokens that the vocabulary calls text (runs of spaces, `<think>`) are found in both forms.
        Raises VolvelleError when the text is not valid Unicode (a lone surrogate).
        """
        return self._encode(self._parsing if special else self.tokenizer, text, False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Like `encode`, with the begin and end tokens that the model was trained to see (its post-processor)."""
        return self._encode(self.tokenizer, text, True).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids -> text. Ids without a token (padding rows of an embedding) give nothing; broken UTF-8 gives U+FFFD."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Start decoding token by token (see `TextStream`)."""
        return TextStream(self, skip_special)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages (`{"role": …, "content": …}`) with the chat template, for people to read.

        To feed a model use `chat_ids`: in the rendered text a marker typed by a user looks like a real one.
        `variables` are further names the template knows (`enable_thinking`).
        Raises VolvelleError without a template, for a template that fails or misbehaves, and for malformed messages.
        """
        return render_chat(
            self._template(tools),
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables={**self._special_texts(), **(variables or {})},
        )

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render messages and encode them: the template's markers become control tokens, the users' text never does.

        Equal to `encode(chat(messages), special=True)` when no message spells a control token.
        """
        guard = self._guard(self._template(tools))
        marked = guard.mark([dict(message) for message in messages] if _are_messages(messages) else messages)
        text = self.chat(marked.value, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables)
        return guard.encode(marked, text) if marked.found else self.encode(text, special=True)

    @classmethod
    def from_folder(cls, path: str | Path) -> TextTokenizer:
        """Read tokenizer.json and what lies beside it (tokenizer_config.json, chat_template.jinja, eos lists).

        Raises VolvelleError that names the missing or broken file.
        """
        from volvelle.systems.language.tokenizer_files import read_tokenizer_folder

        return read_tokenizer_folder(Path(path))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
        from volvelle.systems.language.tokenizer_files import write_tokenizer_folder

        write_tokenizer_folder(self, Path(folder))

    def _encode(self, tokenizer: Tokenizer, text: str, special_tokens: bool) -> Encoding:
        try:
            return tokenizer.encode(text, add_special_tokens=special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            # `tokenizers` says "must be str" of a str that UTF-8 cannot hold.
            bad = (
                next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
                if isinstance(text, str)
                else None
            )
            if bad is None:
                raise
            raise VolvelleError(f"text is not valid Unicode: a lone surrogate at character {bad}") from error

    @functools.cached_property
    def _parsing(self) -> Tokenizer:
        # A second object rather than a switch: the switch is state that two threads would share.
        parsing = copy.deepcopy(self.tokenizer)
        parsing.encode_special_tokens = False
        return parsing

    def _guard(self, template: str) -> ChatGuard:
        if template not in self._guards:
            self._guards[template] = ChatGuard(self.tokenizer, template)
        return self._guards[template]

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "templates": self.chat_templates} | {
            name: getattr(self, name) for name in ("eos_ids", "bos_id", "pad_id")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied Tokenizer forgets that control tokens in text are text: go through __init__ again.
        templates = state.pop("templates")
        self.__init__(state.pop("tokenizer"), chat_template=templates, **state)

    def _template(self, tools: object) -> str:
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            have = ", ".join(self.chat_templates)
            raise VolvelleError(
                "this model has no chat template" + (f" named default (it has {have})" if have else ""),
                tip="it is a base model: complete text with generate instead of chat",
            )
        return self.chat_templates[name]

    def _special_texts(self) -> dict[str, str]:
        """The names of special tokens that templates use."""
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None), "pad_token": self.pad_id}
        texts = {name: self.tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}
        return {name: text for name, text in texts.items() if text is not None}


class TextStream:
    """Decodes token by token: `push(id)` returns the text that became certain, `flush()` the rest.

    A character whose bytes lie in several tokens appears once, whole. The pieces joined equal `decode` of all ids.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # ids[: known] have been shown; they stay in front because decoders treat the first token differently.
        self._ids: list[int] = []
        self._known = 0

    def push(self, token: int) -> str:
        """Add a token; return the new text, or "" while a character is incomplete."""
        self._ids.append(token)
        before, now = self._texts()
        # U+FFFD at the end: the last bytes may be the beginning of a character that the next token completes.
        if now.endswith("\ufffd"):
            return ""
        if len(now) > len(before):
            self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return now[len(before) :]

    def flush(self) -> str:
        """Return what is held back, incomplete or not, and start afresh."""
        before, now = self._texts()
        self._ids, self._known = [], 0
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        decode = functools.partial(self._tokenizer.decode, skip_special=self._skip_special)
        return decode(self._ids[: self._known]), decode(self._ids)


def _are_messages(messages: object) -> bool:
    return isinstance(messages, Sequence) and all(isinstance(message, Mapping) for message in messages)
