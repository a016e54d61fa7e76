"""A real server in a thread of this process, with a small random model."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
import torch
from tests.systems.language.tokenizers_made import byte_level

pytest.importorskip("fastapi", reason="wants the extra serve")
pytest.importorskip("uvicorn", reason="wants the extra serve")

import uvicorn

import volvelle.adapt as adapt
from volvelle.adapt.methods import LoRA
from volvelle.decode.drafters.prompt_lookup import PromptLookup
from volvelle.decode.seats import Seats
from volvelle.serve.app import create_app
from volvelle.serve.engine import Engine
from volvelle.serve.figures import Figures
from volvelle.serve.run import Server
from volvelle.serve.texts import Texts, routes
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder

CONTEXT = 160


@pytest.fixture(scope="session")
def model():
    """A random decoder over bytes with a chat template and two adapters, in fp64: no near ties."""
    tokenizer = byte_level()
    config = c.LanguageConfig(
        "volvelle", vocabulary=tokenizer.vocabulary, width=32, depth=2, heads=4, context=256, norm=c.RMSNorm(),
        mlp=c.GatedMLP(48), position=c.Rope(), kv_heads=2, head=c.Head(tied=False),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(config).double().eval()
    for name in ("poet", "chef"):
        adapt.apply(model, LoRA(rank=2, targets=("q_proj", "v_proj")), name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    adapt.activate(model, None)
    model.tokenizer = tokenizer
    return model


@contextlib.contextmanager
def serving(model, *, count=4, queue=64, drafter=None, seconds=60.0, api_key=None, body=1 << 16, grace=5.0):
    """The address of a running server, and its engine."""
    engine, figures = Engine(Seats(model, count, context=CONTEXT, drafter=drafter), queue=queue), Figures()
    names = {"tiny": None, "poet": "poet", "chef": "chef"}
    texts = Texts(engine, model.tokenizer, names, figures, seconds)
    app = create_app([routes(texts)], figures, engine=engine, api_key=api_key, body=body)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False), engine, grace)
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until, "the server does not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(model):
    """A server with drafts."""
    with serving(model, drafter=PromptLookup(n=2, k=4)) as (url, _):
        yield url
