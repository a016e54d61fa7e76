"""Keep the control tokens of a chat template apart from the same letters typed by a user.

Before rendering, each spelling of a control token inside a message is wrapped in two noncharacters that occur in no
message. Templates see text they can still split and search. After rendering, a wrapped spelling is text and a bare
one is the template's. The bare ones are then renamed to spellings nobody can guess, which a copy of the tokenizer
knows as the control tokens, and which knows no others: so text stays text whatever a template glues together.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from volvelle.errors import VolvelleError
from volvelle.systems.language.chat import template_texts

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Marked:
    """Messages with control spellings wrapped between `opening` and `closing`; `found` when there were any."""

    value: Any
    opening: str
    closing: str
    found: bool


class ChatGuard:
    """Marks messages for one template and encodes the rendered text.

    Control tokens are the tokenizer's special ones, and any other added token that the template's own text contains
    (Qwen's `<tool_call>`).
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        added = tokenizer.get_added_tokens_decoder()
        literals = "\0".join(template_texts(template))
        control = {i: token for i, token in added.items() if token.special or token.content in literals}
        self._control = {token.content for token in control.values()}
        longest = sorted(self._control, key=len, reverse=True)
        self._pattern = "|".join(map(re.escape, longest)) or r"(?!)"
        self._tokenizer = tokenizer
        self._added, self._control_ids = added, frozenset(control)
        self._renamed: tuple[Tokenizer, dict[str, str], dict[int, int]] | None = None

    def mark(self, messages: Any) -> Marked:
        """Wrap the control spellings in every text of the messages. Raises VolvelleError for cyclic messages."""
        texts: list[str] = []
        _walk(messages, lambda text: texts.append(text) or text)
        used = set().union(*map(set, texts)) if texts else set()
        free = [c for c in _NONCHARACTERS if c not in used]
        if len(free) < 2:
            raise VolvelleError("messages use all 32 noncharacters U+FDD0 to U+FDEF: not text")
        found = any(re.search(self._pattern, text) for text in texts)
        if not found:
            return Marked(messages, free[0], free[1], False)
        wrapped = rf"{free[0]}\g<0>{free[1]}"
        return Marked(_walk(messages, lambda text: re.sub(self._pattern, wrapped, text)), free[0], free[1], True)

    def encode(self, marked: Marked, rendered: str) -> list[int]:
        """Ids of a chat rendered from marked messages."""
        if self._renamed is None:
            self._renamed = self._rename()
        tokenizer, spellings, ids = self._renamed

        def settle(match: re.Match[str]) -> str:
            if match["typed"] is not None:
                return match["typed"]
            return "" if match["own"] is None else spellings[match["own"]]

        opening, closing = marked.opening, marked.closing
        pattern = f"{opening}(?P<typed>{self._pattern}){closing}|(?P<own>{self._pattern})|[{opening}{closing}]"
        found = tokenizer.encode(re.sub(pattern, settle, rendered), add_special_tokens=False).ids
        return [ids.get(i, i) for i in found]

    def _rename(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """A copy whose control tokens have secret spellings; spelling -> secret; id in the copy -> true id."""
        content = json.loads(self._tokenizer.to_str())
        content["added_tokens"], content["post_processor"] = [], None
        other = Tokenizer.from_str(json.dumps(content))
        spellings: dict[str, str] = {}
        ids: dict[int, int] = {}
        for i, token in sorted(self._added.items()):
            name = token.content
            if i in self._control_ids:
                name = spellings[token.content] = f"\ufdd0{secrets.token_hex(12)}\ufdd0"
            sides = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            normalized = token.normalized and i not in self._control_ids
            other.add_tokens([AddedToken(name, normalized=normalized, special=False, **sides)])
            place = other.token_to_id(name)
            if place is not None:
                ids[place] = i
        return other, spellings, ids


def _walk(value: Any, change: Any, depth: int = 0) -> Any:
    if depth > 64:
        raise VolvelleError("chat messages are nested more than 64 deep")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _walk(item, change, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_walk(item, change, depth + 1) for item in value]
    return value
