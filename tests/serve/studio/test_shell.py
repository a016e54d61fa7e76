"""The studio's page, its files, and whom it answers."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient

import volvelle
from volvelle.serve.studio.files import read_files
from volvelle.serve.studio.shell import create_studio

STATIC = Path(volvelle.__file__).parent / "serve" / "studio" / "static"
ORIGIN = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def client():
    room = APIRouter(prefix="/studio/api/echo")

    @room.post("")
    def echo() -> dict[str, bool]:
        return {"changed": True}

    with TestClient(create_studio([room]), base_url=ORIGIN) as made:
        yield made


def test_the_page_and_every_file_of_it_come_with_their_types(client):
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    files = [path for path in STATIC.rglob("*") if path.is_file()]
    assert {path.relative_to(STATIC).as_posix() for path in files} == set(read_files())
    for path in files:
        answer = client.get(f"/static/{path.relative_to(STATIC).as_posix()}")
        assert answer.content == path.read_bytes()
        assert answer.headers["content-type"].startswith(kinds[path.suffix])


def test_a_file_that_did_not_change_is_not_sent_again(client):
    tag = client.get("/static/main.js").headers["etag"]
    again = client.get("/static/main.js", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/static/main.js", headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["shell.py", "../shell.py", "..%2fshell.py", "/etc/passwd", "rooms", "rooms/", "rooms/../../shell.py", "%00", ""],
)
def test_no_path_opens_a_file_outside_the_list(client, path):
    answer = client.get(f"/static/{path}")
    assert answer.status_code == 404
    assert "error" in answer.json()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[::1", "0.0.0.0"])
def test_other_hosts_are_refused(client, host):
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 421
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:99", "localhost", "[::1]:8765"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": ORIGIN}, 200),
        ({"origin": ORIGIN, "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:8765"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://127.0.0.1:8765"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_only_the_own_page_may_change_anything(client, headers, status):
    assert client.post("/studio/api/echo", headers=headers).status_code == status


def test_every_answer_says_what_a_browser_may_do(client):
    for answer in (client.get("/"), client.get("/static/none"), client.get("/health"), client.post("/studio/api/echo")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_script_or_style():
    for name, file in read_files().items():
        text = file.content.decode()
        outside = re.findall(r"""(?:src|href|url|import)\s*[=(:]?\s*["'(]?(?:https?:)?//[^\s"')]+""", text)
        assert outside == [], f"{name} names {outside}"
    page = read_files()["index.html"].content.decode()
    assert re.findall(r"<script(?![^>]*src=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", page) == []


def test_git_keeps_every_file_of_the_page(repository):
    """What git ignores is in no package either: the build leaves it out."""
    listed = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", str(STATIC)]
    found = subprocess.run(listed, cwd=repository, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip("not a git checkout")
    assert found.stdout == ""


@pytest.mark.slow
def test_the_package_holds_every_file_of_the_page(repository, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        str(repository),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "hatchling" in built.stderr:
        pytest.skip("pip cannot fetch hatchling, which builds the package")
    assert built.returncode == 0, built.stderr
    packed = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    wanted = {f"volvelle/serve/studio/static/{name}" for name in read_files()} | {"volvelle/serve/studio/chinese.json"}
    assert wanted <= set(packed)


def test_no_file_of_the_page_is_longer_than_the_others_may_be():
    assert {name: n for name, file in read_files().items() if (n := file.content.count(b"\n")) > 400} == {}


def test_every_import_of_a_module_leads_to_a_file():
    files = read_files()
    for name, file in files.items():
        if name.endswith(".js"):
            folder = Path(name).parent
            for wanted in re.findall(r"""(?:from|import\()\s*["'](\.[^"'`$]+)["']""", file.content.decode()):
                parts: list[str] = []
                for part in (folder / wanted).parts:
                    parts = parts[:-1] if part == ".." else [*parts, part]
                assert "/".join(parts) in files, f"{name} imports {wanted}"
