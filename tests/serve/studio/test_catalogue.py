"""The catalogue and the pages of techniques, from the files they are made of."""

from __future__ import annotations

import ast
import json
import re

import pytest
from fastapi.testclient import TestClient

from volvelle.claims.claim import names as claim_names
from volvelle.cli.catalogue import PACKAGE, techniques
from volvelle.serve.studio import catalogue
from volvelle.serve.studio.documents import blocks, coloured, formulas, paper_of, title_of
from volvelle.serve.studio.files import read_files
from volvelle.serve.studio.shell import create_studio
from volvelle.serve.studio.techniques import FAMILY_INSTRUMENTS, INSTRUMENTS, router
from volvelle.serve.studio.verdicts import Verdicts, this_machine

RECORD = {
    "claim": "rope",
    "verdict": "held",
    "why": None,
    "findings": [
        {"what": "reported", "value": 1.0, "unit": "", "spread": None, "bound": None, "held": None},
        {"what": "error", "value": 1e-9, "unit": "", "spread": None, "bound": "<= 1e-08", "held": True},
    ],
    "notes": [],
    "setting": {},
    "peers": {},
    "pictures": ["decay", "../outside"],
    "budget": "quick",
    "seconds": 3.0,
    "machine": this_machine(),
    "measured": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "runs" / "claims"
    folder.mkdir(parents=True)
    (folder / "rope.json").write_text(json.dumps(RECORD))
    (folder / "rope-decay.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "runs" / "outside.svg").write_text("secret")
    return folder


@pytest.fixture
def shipped(tmp_path):
    folder = tmp_path / "shipped"
    folder.mkdir()
    other = RECORD | {"verdict": "not held", "machine": this_machine() | {"processor": "another"}}
    (folder / "rope.json").write_text(json.dumps(other))
    (folder / "lora.json").write_text(json.dumps(other | {"claim": "lora", "findings": []}))
    (folder / "dora.json").write_text("{ torn")
    return folder


@pytest.fixture
def client(own, shipped):
    with TestClient(create_studio([router(Verdicts(own, shipped))]), base_url="http://127.0.0.1") as made:
        yield made


def test_every_claim_and_every_part_has_its_place():
    entries = catalogue.entries()
    keys = [entry.key for entry in entries]
    assert len(set(keys)) == len(keys)
    assert set(claim_names()) <= set(keys)
    shown = {file for entry in entries for file in entry.files}
    assert {part.file for part in techniques()} <= shown
    for entry in entries:
        assert entry.title, entry
        assert entry.summary.strip("."), entry
        assert entry.files, entry


def test_every_card_says_it_in_chinese_too():
    entries = catalogue.entries()
    silent = [entry.key for entry in entries if not re.search("[\u4e00-\u9fff]", entry.summary_zh or "")]
    assert silent == [], f"a part without a claim wants a line in serve/studio/chinese.json: {silent}"


def test_the_newest_paper_comes_first_and_all_pages_are_there(client):
    found = client.get("/studio/api/techniques").json()
    years = [one["year"] for one in found["techniques"]]
    assert years == sorted(years, reverse=True)
    assert sum(count for _, count in found["families"]) == len(years)
    for one in found["techniques"]:
        page = client.get(f"/studio/api/techniques/{one['key']}")
        assert page.status_code == 200, one["key"]
        assert page.json()["title"] == one["title"]


def test_a_page_holds_formula_parts_recipe_and_claim(client):
    page = client.get("/studio/api/techniques/lora").json()
    assert page["names"] == ["functional.lora_linear", "nn.LoRALinear"]
    assert page["recipe"].startswith("volvelle adapt")
    assert "(x Aᵀ) Bᵀ" in page["files"][0]["formulas"][0]
    assert page["claim"]["sentence"]
    assert [file["file"] for file in page["files"]] == ["parts/lowrank/lora.py", "claims/lora.py"]
    rope = client.get("/studio/api/techniques/rope").json()
    assert rope["files"][0]["formulas"][0].startswith("x_1' = x_1 cos mθ_i")


def test_this_machines_record_comes_before_another_ones(client):
    page = client.get("/studio/api/techniques/rope").json()
    assert page["found"]["verdict"] == "held"
    assert (page["found"]["own"], page["found"]["here"]) == (True, True)
    assert page["found"]["main"]["what"] == "error"
    assert [record["verdict"] for record in page["claim"]["records"]] == ["held", "not held"]
    lora = client.get("/studio/api/techniques/lora").json()["found"]
    assert (lora["verdict"], lora["own"], lora["here"]) == ("not held", False, False)
    assert client.get("/studio/api/techniques/dora").json()["found"] is None


def test_a_technique_that_a_claim_measures_among_others_shows_its_verdict(client):
    page = client.get("/studio/api/techniques/position.alibi").json()
    assert page["claim"]["name"] == "position-zoo"
    assert "position.t5" in [one["key"] for one in page["kin"]]


def test_every_instrument_is_there():
    modules = read_files()
    keys = {entry.key for entry in catalogue.entries()}
    assert set(INSTRUMENTS) <= keys
    assert set(FAMILY_INSTRUMENTS) <= {entry.family for entry in catalogue.entries()}
    for where in (*INSTRUMENTS.values(), *FAMILY_INSTRUMENTS.values()):
        assert f"rooms/{where.replace('/', '_')}.js" in modules, where


def test_pictures_come_from_the_record_alone_and_run_nothing(client):
    good = client.get("/studio/api/techniques/rope/pictures/0?own=true")
    assert good.headers["content-type"] == "image/svg+xml"
    assert "sandbox" in good.headers["content-security-policy"]
    assert "script-src" not in good.headers["content-security-policy"]
    for path in ("rope/pictures/1?own=true", "rope/pictures/2?own=true", "rope/pictures/-1?own=true"):
        assert client.get(f"/studio/api/techniques/{path}").status_code == 404
    assert client.get("/studio/api/techniques/rope/pictures/0?own=false").status_code == 404
    assert client.get("/studio/api/techniques/nothing/pictures/0").status_code == 404


@pytest.mark.parametrize("file", ["errors.py", "../../pyproject.toml", "/etc/passwd", "parts/../errors.py", ""])
def test_only_the_catalogues_files_are_shown(client, file):
    assert client.get("/studio/api/techniques/source", params={"file": file}).status_code == 404


def test_code_comes_whole_and_coloured(client):
    for part in techniques()[::12]:
        answer = client.get("/studio/api/techniques/source", params={"file": part.file})
        text = (PACKAGE / part.file).read_text(encoding="utf-8")
        assert "".join(piece for _, piece in answer.json()["pieces"]) == text, part.file


def test_pieces_of_code_are_what_they_say():
    source = '@export("a.b")\ndef f(x):  # why\n    """Say."""\n    return len(x) + self.len + 1.5\n'
    pieces = {text: kind for kind, text in coloured(source) if text.strip()}
    assert pieces["def"] == pieces["return"] == "k"
    assert pieces["f"] == pieces["export"] == "d"
    assert pieces["# why"] == "c"
    assert pieces['"""Say."""'] == pieces['"a.b"'] == "s"
    assert pieces["1.5"] == "n"
    assert [kind for kind, text in coloured(source) if text == "len"] == ["b"]  # self.len is no builtin


def test_docstrings_fall_into_paragraphs_and_lines():
    text = (
        "One\nsentence.\n\n    a = b + c\n    d = e\nwhere e is small.\n\nTwo.\n\n| a | b |\n|---|---|\n\n>>> 1 + 1\n2"
    )
    assert [tuple(block) for block in blocks(text)] == [
        ("text", "One sentence."),
        ("lines", "a = b + c\nd = e"),
        ("text", "where e is small."),
        ("text", "Two."),
        ("lines", "| a | b |\n|---|---|"),
    ]


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("y[i] = Σ_k x[s i + r k - p] w[k]", True),
        ("out_i = Σ_j p_ij v_j,  p_i = softmax_j(scale * q_i · k_j + bias_ij)", True),
        ("The result is zero where x = 0, and nothing else changes there.", False),
        ("Shapes: x (b, n) = rows", False),
    ],
)
def test_formulas_are_told_from_prose(line, is_one):
    found = formulas(ast.parse(f'"""A title.\n\n{line}\n"""'))
    assert found == ([line] if is_one else [])


@pytest.mark.parametrize(
    ("text", "title", "said", "paper"),
    [
        ('RoIAlign: He et al. 2017, "Mask R-CNN", section 3.', "RoIAlign", "", ("He et al.", 2017, "Mask R-CNN")),
        ("GroupSort: it keeps the norm.\n\nAnil, Lucas & Grosse 2019.", "GroupSort", "it keeps the norm",
         ("Anil, Lucas & Grosse", 2019, None)),
        ('T5 (Raffel et al. 2020, "A title", section 2.1): a number a head.', "T5", "a number a head",
         ("Raffel et al.", 2020, "A title")),
        ("Codes: van den Oord et al. 2017, appendix A.", "Codes", "", ("van den Oord et al.", 2017, None)),
        ("Plain words, VOC 2007 among them.", "Plain words, VOC 2007 among them", "", None),
    ],
)  # fmt: skip
def test_titles_and_papers_are_read_from_docstrings(text, title, said, paper):
    assert title_of(text) == (title, said)
    found = paper_of(text)
    assert (None if found is None else tuple(found)) == paper
