"""Who speaks in Chat: a model that is opened in a thread of its own, and an engine for each way to draft."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from volvelle import hub
from volvelle.cli.drafts import DraftOptions, open_draft
from volvelle.cli.models import open_language_model
from volvelle.decode.bitwise import is_any_width
from volvelle.decode.drafters.opening import kind_of
from volvelle.decode.seats import Seats
from volvelle.errors import VolvelleError
from volvelle.hub.store import status
from volvelle.runs import scan
from volvelle.serve.engine import Engine
from volvelle.serve.errors import Refused
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.models import LanguageModel
from volvelle.systems.language.projections import fuse_projections
from volvelle.systems.language.tokenizer import TextTokenizer

log = logging.getLogger("volvelle.studio")

State = Literal["absent", "closed", "opening", "open", "failed"]
CONTEXT = 2048
"""The longest conversation with its answer, in tokens; shorter where the model's own context is."""
ENGINES = 3
"""Ways to draft that stay ready; the one that was used longest ago goes."""
PLAIN = "none"
"""The way to draft that drafts nothing."""


@dataclass(frozen=True)
class Way:
    """One way to draft that may be chosen: what requests call it, what people read, and `draft=` of the verbs."""

    name: str
    label: str
    what: str
    draft: str | None


class Speaker:
    """The model called `name` and its engines; `open` begins to open it, `engine` is the one of a way to draft."""

    def __init__(
        self,
        name: str,
        runs: Path,
        *,
        opened: Callable[[str], LanguageModel] = open_language_model,
        context: int = CONTEXT,
    ):
        self.name, self.runs, self.opened, self.context = name, runs, opened, context
        self.model: Decoder | None = None
        self.exact: Literal["default", "bitwise"] = "default"
        self.problem: str | None = None
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()

    @property
    def state(self) -> State:
        """Where it stands: "absent" is a known model that was not fetched yet."""
        if self.model is not None:
            return "open"
        if self._thread is not None and self._thread.is_alive():
            return "opening"
        if self.problem is not None:
            return "failed"
        known = self.name in hub.ASSETS and not Path(self.name).exists()
        return "absent" if known and status(self.name).state != "ready" else "closed"

    def facts(self) -> dict[str, Any]:
        """What the page shows of it."""
        asset, model = hub.ASSETS.get(self.name), self.model
        found: dict[str, Any] = {"model": self.name, "state": self.state, "problem": self.problem}
        found["ways"] = [{"name": way.name, "label": way.label, "what": way.what} for way in self.ways()]
        if asset is not None:
            found |= {"what": asset.what, "licence": asset.licence, "download": asset.source.size}
        if model is not None:
            found |= {
                "parameters": sum(p.numel() for p in model.parameters()),
                "dtype": str(model.dtype).removeprefix("torch."),
                "context": self.room,
                "chats": bool(self.tokenizer.chat_template),
                "exact": self.exact,
            }
        return found

    def open(self) -> None:
        """Begin to open the model, unless it is open or being opened."""
        with self._guard:
            if self.state not in ("closed", "failed"):
                return
            self.problem = None
            self._thread = threading.Thread(target=self._open, name="volvelle-chat-open", daemon=True)
            self._thread.start()

    def _open(self) -> None:
        try:
            model = self.opened(self.name)
            if not isinstance(model, Decoder) or model.tokenizer is None:
                raise VolvelleError(f"{self.name}: a decoder with a tokenizer is wanted")
            fuse_projections(model)
            self.exact = "bitwise" if is_any_width(model) else "default"
            self.model = model.eval()
        except VolvelleError as error:
            self.problem = f"{error} (tip: {error.tip})" if error.tip else str(error)
        except Exception as error:  # whatever it is: the page must hear of it
            log.exception("the model of Chat did not open")
            self.problem = f"{type(error).__name__}: {error}"

    @property
    def room(self) -> int:
        """The longest text, prompt and answer together, in tokens."""
        return min(self.context, self._ready().room)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's."""
        tokenizer = self._ready().tokenizer
        assert tokenizer is not None
        return tokenizer

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The conversation as the model reads it; a model without a chat template goes on from the texts alone."""
        if self.tokenizer.chat_template:
            return self.tokenizer.chat_ids(messages)
        return self.tokenizer.encode_prompt("\n".join(message["content"] for message in messages))

    def ways(self) -> list[Way]:
        """The ways to draft: those that need no training, and runs of `volvelle draft` for this model."""
        depth = 0 if self.model is None else self.model.config.depth
        found = [
            Way(PLAIN, "no drafts", "one token a step", None),
            Way("lookup", "prompt lookup", "what followed the last words before", "lookup"),
            Way("ngram", "n-grams", "what is likely to follow, by counts of this text", "ngram"),
        ]
        if depth >= 4:
            left_out = depth // 4
            what = f"the model itself without {left_out} of its {depth} layers"
            found.append(Way("skip", "skipped layers", what, f"skip:{left_out}"))
        for run in scan(self.runs):
            kind = kind_of(run.path)
            if run.manifest.get("kind") == "draft" and run.manifest.get("base_model") == self.name and kind != "model":
                found.append(Way(f"run:{run.path.name}", run.path.name, f"trained: {kind}", f"{kind}:{run.path}"))
        return found

    def engine(self, name: str) -> Engine:
        """The engine that drafts in this way, begun when it is first asked for. Raises Refused for an unknown way."""
        with self._guard:
            if name not in self._engines:
                way = next((way for way in self.ways() if way.name == name), None)
                if way is None:
                    raise Refused(400, f"draft: there is no way to draft called {name!r}", param="draft")
                model = self._ready()
                drafter = open_draft(DraftOptions(draft=way.draft), model)
                seats = Seats(model, 1, context=self.room, drafter=drafter, exact=self.exact)
                self._engines[name] = Engine(seats, queue=1).start()
                if len(self._engines) > ENGINES:
                    self._engines.popitem(last=False)[1].close()
            self._engines.move_to_end(name)
            return self._engines[name]

    def close(self) -> None:
        """End all engines, and wait for them."""
        for engine in list(self._engines.values()):
            engine.close()

    def _ready(self) -> Decoder:
        if self.model is None:
            raise Refused(409, f"{self.name} is not open yet", code="closed")
        return self.model
