"""The OpenAPI document is true: requests made from it, and others that it forbids, are answered as it says.

schemathesis' plugin of pytest stays off (pyproject.toml): it would take its seconds in every run of any test.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="wants the extra serve")
schemathesis = pytest.importorskip("schemathesis", reason="makes requests from the document; in the extra dev")

from schemathesis import GenerationMode, checks  # noqa: E402

from volvelle.decode.drafters.prompt_lookup import PromptLookup  # noqa: E402
from volvelle.decode.seats import Seats  # noqa: E402
from volvelle.serve.app import create_app  # noqa: E402
from volvelle.serve.engine import Engine  # noqa: E402
from volvelle.serve.figures import Figures  # noqa: E402
from volvelle.serve.texts import Texts, routes  # noqa: E402

KEY = "s3cret"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(Seats(model, 4, context=24, drafter=PromptLookup(n=2, k=4)), queue=64).start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def document(model, engine):
    figures = Figures()
    texts = Texts(engine, model.tokenizer, {"tiny": None, "poet": "poet"}, figures)
    app = create_app([routes(texts)], figures, api_key=KEY, body=1 << 24)
    config = schemathesis.Config.from_dict({"generation": {"with-security-parameters": False}})
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=HEADERS)


SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
OPERATIONS = [
    "GET /debug/threads", "GET /health", "GET /metrics", "GET /ready", "GET /v1/models", "GET /v1/models/{name}",
    "POST /v1/chat/completions", "POST /v1/completions",
]  # fmt: skip


def test_every_path_is_tried(document):
    assert sorted(operation.ok().label for operation in document.get_all_operations()) == OPERATIONS


def ask(document, label, mode, examples):
    """Make requests and hold their answers against the document."""
    method, path = label.split()
    operation = document[path][method]

    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    @settings(SETTINGS, max_examples=examples)
    def try_one(case, known):
        # Else nearly all ask for a model that is not there. What is wrong about a body may be its model: it stays then.
        allowed = mode is GenerationMode.POSITIVE
        if allowed and known and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        case.call_and_validate(headers=HEADERS, timeout=300, excluded_checks=[checks.positive_data_acceptance])

    try_one()


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_it_allows(document, label):
    ask(document, label, GenerationMode.POSITIVE, 40 if "POST" in label else 5)


@pytest.mark.parametrize("label", [label for label in OPERATIONS if "POST" in label])
def test_what_it_forbids(document, label):
    ask(document, label, GenerationMode.NEGATIVE, 60)


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_all_of_it_at_length(document, label, mode):
    if mode is GenerationMode.NEGATIVE and label.startswith("GET"):
        pytest.skip("nothing about it can be wrong")
    ask(document, label, mode, 1500 if "POST" in label else 100)
