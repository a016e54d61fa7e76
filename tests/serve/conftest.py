"""A real server in a thread of this process, with a small random model."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch
from tests.systems.language.tokenizers_made import byte_level

pytest.importorskip("fastapi", reason="wants the extra serve")
pytest.importorskip("uvicorn", reason="wants the extra serve")

import volvelle.adapt as adapt
from volvelle.adapt.methods import LoRA
from volvelle.data.boxes_augment import Fit
from volvelle.decode.contract import Always
from volvelle.decode.drafters.prompt_lookup import PromptLookup
from volvelle.decode.seats import Seats
from volvelle.serve.app import create_app
from volvelle.serve.connection import Connection
from volvelle.serve.engine import Engine
from volvelle.serve.figures import Figures
from volvelle.serve.run import Server, configure
from volvelle.serve.texts import Texts, routes
from volvelle.systems import sam
from volvelle.systems.detection.load import detector
from volvelle.systems.detection.names import named
from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.segmentation.sam.promptable import Promptable

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


@pytest.fixture(scope="session")
def promptable():
    torch.manual_seed(0)
    return Promptable(sam("lite0", size=64).eval())


@pytest.fixture(scope="session")
def finder():
    """A random detector, and how pictures are fitted to it."""
    torch.manual_seed(0)
    return detector(replace(named("thundernet-snet49", ("disc", "box")), size=64)).eval(), Fit(64, True)


@contextlib.contextmanager
def serving(
    model, *, count=4, queue=64, drafter=None, seconds=60.0, api_key=None, body=1 << 16, body_seconds=60.0, grace=5.0,
    context=CONTEXT, http=Connection, held=None,
):  # fmt: skip
    """The address of a running server, and its engine; the kernel holds hardly more than `held` bytes of an answer."""
    # Always: what a draft costs here and now shall not decide whether there are any.
    seats = Seats(model, count, context=context, drafter=drafter, policy=None if drafter is None else Always())
    engine, figures = Engine(seats, queue=queue), Figures()
    names = {"tiny": None, "poet": "poet", "chef": "chef"}
    texts = Texts(engine, model.tokenizer, names, figures, seconds)
    app = create_app([routes(texts)], figures, engine=engine, api_key=api_key, body=body, body_seconds=body_seconds)
    listener = socket.socket()
    if held is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, held)  # sockets that it accepts inherit it
    listener.bind(("127.0.0.1", 0))
    server = Server(configure(app, grace=grace, http=http), engine, grace)
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


def wait_until(holds, seconds=20.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)
