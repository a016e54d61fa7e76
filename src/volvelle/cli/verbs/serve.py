"""`volvelle serve`: a language model behind OpenAI's API, and models that see beside it."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from volvelle.cli.console import say
from volvelle.cli.drafts import DraftOptions, check_drafts, open_draft
from volvelle.cli.models import Precision, open_language_model
from volvelle.errors import UsageError, VolvelleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastapi import APIRouter

    from volvelle.serve.engine import Engine
    from volvelle.serve.figures import Figures
    from volvelle.systems.language.decoder import Decoder

EXAMPLES = (
    "volvelle serve smollm2",
    "volvelle serve smollm2 draft=lookup seats=16",
    "volvelle serve smollm2 adapters=poet=runs/poet,chef=runs/chef port=8080",
    "volvelle serve runs/clicks",
)
KEY = "VOLVELLE_API_KEY"


@dataclass(frozen=True)
class Options(DraftOptions):
    """What to serve, to whom, and how much of it."""

    model: Positional[str]
    """A known model, a Hugging Face repo id, a folder, or a run, which requests call by this name; or a run of
    `train promptable` or `train detect`, to answer for pictures only."""
    segment: str | None = None
    """A run of `train promptable` or a folder of Segment Anything that answers /v1/segment besides."""
    detect: str | None = None
    """A run of `train detect` that answers /v1/detect besides."""
    adapters: str | None = None
    """NAME=RUN, several with commas: adapters of this model, which requests choose as the model NAME."""
    host: str = "127.0.0.1"
    """The address to listen on; another than this machine's own wants a key."""
    port: int = 8000
    """The port; 0 takes a free one."""
    api_key: str | None = None
    """What requests must send as their Bearer token; better in the environment variable VOLVELLE_API_KEY."""
    seats: int = 8
    """Texts that are written side by side."""
    queue: int = 64
    """Texts that may wait for a seat; more are sent away with status 503."""
    context: int = 2048
    """The longest text, prompt and answer together, in tokens; at most the model's own."""
    seconds: float = 600.0
    """The longest an answer may take."""
    grace: float = 30.0
    """Seconds that answers have to be finished when the server is told to end."""
    body: int | None = None
    """The largest body of a request in bytes; None: 1 MiB, and 32 MiB where pictures are sent."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware multiplies it, else fp32."""


def main(options: Options) -> int:
    """Serve until SIGINT or SIGTERM."""
    from dataclasses import replace

    from volvelle.cli.detecting import is_detection
    from volvelle.cli.prompting import is_promptable

    key = options.api_key or os.environ.get(KEY)
    check(options, key)
    speaks = True
    if is_promptable(options.model):
        options, speaks = replace(options, segment=options.model), False
    elif is_detection(options.model):
        options, speaks = replace(options, detect=options.model), False
    from volvelle.serve.app import BODY, create_app
    from volvelle.serve.figures import Figures
    from volvelle.serve.run import serve

    figures, engine = Figures(), None
    routers = list(picture_routes(options))
    body = options.body or (32 << 20 if routers else BODY)
    if speaks:
        engine, router = text_routes(options, figures)
        routers.append(router)
    say("a key is wanted" if key else "no key is wanted")
    app = create_app(routers, figures, engine=engine, api_key=key, body=body)
    return serve(app, options.host, options.port, engine=engine, grace=options.grace)


def text_routes(options: Options, figures: Figures) -> tuple[Engine, APIRouter]:
    """The engine of a language model, and the paths that lead to it."""
    from volvelle.decode.seats import Seats
    from volvelle.serve.engine import Engine
    from volvelle.serve.texts import Texts, routes
    from volvelle.systems.language.decoder import Decoder

    model = open_language_model(options.model, options.precision)
    if not isinstance(model, Decoder) or model.tokenizer is None:
        raise UsageError(f"{options.model}: a decoder with a tokenizer is wanted")
    names = {_name(options.model): None, **load_adapters(model, options.adapters)}
    seats = Seats(
        model,
        options.seats,
        context=min(options.context, model.room),
        drafter=open_draft(options, model),
        exact=options.exact,
    )
    engine = Engine(seats, queue=options.queue)
    say(
        f"{', '.join(names)}: {seats.count} texts side by side, up to {seats.context} tokens each, "
        f"{options.queue} more may wait"
    )
    return engine, routes(Texts(engine, model.tokenizer, names, figures, options.seconds))


def picture_routes(options: Options) -> Iterator[APIRouter]:
    """The paths for pictures that the options ask for."""
    if options.segment is not None:
        from volvelle.cli.prompting import is_promptable, open_promptable
        from volvelle.serve.vision import segment_routes
        from volvelle.systems.segmentation.sam.load import load_sam
        from volvelle.systems.segmentation.sam.promptable import Promptable

        path = Path(options.segment)
        model = open_promptable(path) if is_promptable(path) else load_sam(path)
        say(f"{options.segment}: segments at {model.config.size} px")
        yield segment_routes(Promptable(model.eval()), queue=options.queue)
    if options.detect is not None:
        from volvelle.cli.detecting import open_detector, trusted_score
        from volvelle.serve.vision import detect_routes

        detector, fit = open_detector(Path(options.detect))
        say(f"{options.detect}: detects {', '.join(detector.classes)}")
        trusted = trusted_score(Path(options.detect))
        yield detect_routes(detector.eval(), fit, trusted=trusted, queue=options.queue)


def check(options: Options, key: str | None) -> None:
    """Raise UsageError for what is wrong with the options, before a model is opened."""
    check_drafts(options)
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise VolvelleError("serve: FastAPI and uvicorn are not installed", tip='pip install "volvelle[serve]"')
    if options.stats:
        raise UsageError("stats: /metrics says what drafts gain")
    if options.acceptance != "exact":
        raise UsageError("acceptance=typical changes answers: a server writes exact ones")
    for name in ("seats", "context", "body"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}: must be at least 1, got {value}")
    if min(options.queue, options.grace) < 0 or options.seconds <= 0:
        raise UsageError("queue and grace: must not be negative; seconds: must be above 0")
    if not 0 <= options.port < 65536:
        raise UsageError(f"port: must be from 0 to 65535, got {options.port}")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UsageError("api_key: printable ASCII without spaces around it is wanted")
    if key is None and not _is_loopback(options.host):
        raise UsageError(
            f"host={options.host} can be reached from other machines, and there is no key",
            tip=f"set {KEY}, or leave host out",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(model: str) -> str:
    """What requests call the model: a path by its last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def load_adapters(model: Decoder, given: str | None) -> Mapping[str, Any]:
    """Put the adapters on the model; names as requests use them, with those on the model."""
    if given is None:
        return {}
    from volvelle import adapt

    found = {}
    for one in given.split(","):
        name, equals, path = one.partition("=")
        if not (name and equals and path) or name in found:
            raise UsageError(f"adapters={given}: NAME=RUN is wanted, each name once", tip="adapters=poet=runs/poet")
        folder = Path(path)
        if not folder.exists():
            raise UsageError(f"adapters: {path} does not exist")
        inner = folder / "adapter"
        adapt.load(model, inner if inner.is_dir() else folder, name=name)
        found[name] = name
    adapt.activate(model, None)
    return found
