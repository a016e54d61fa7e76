import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, read_json, sha256, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_text_bytes_and_parents(tmp_path):
    target = tmp_path / "a" / "b" / "c.txt"
    write_atomic(target, "αβγ\n")
    assert target.read_bytes() == "αβγ\n".encode()
    write_atomic(str(target), b"\x00\r\n")
    assert target.read_bytes() == b"\x00\r\n"
    assert names(target.parent) == ["c.txt"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_content_and_no_other_file(tmp_path, error):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")

    def interrupted():
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half of the n")
            assert target.read_bytes() == b"old"
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["weights.bin"]


def test_a_full_disk_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch):
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(target, b"new content")
    assert caught.value.errno == errno.ENOSPC
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["weights.bin"]


def test_a_failing_fsync_does_not_replace(tmp_path, monkeypatch):
    target = tmp_path / "x"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_content_is_on_disk_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    steps = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle):
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        real_fsync(handle)

    def replace(source, target):
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "x", "new")
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "x", "text")
        assert os.umask(mask) == mask, "the umask of the process must not change"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def test_replacing_keeps_the_permissions_of_the_file(tmp_path):
    target = tmp_path / "secret"
    target.write_text("old")
    target.chmod(0o600)
    write_atomic(target, "new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_symbolic_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "real"
    real.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(real)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")
    script = (
        "import os, sys\nfrom volvelle.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n    t.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == -9
    assert target.read_text() == "old"
    write_atomic(target, "new")
    assert target.read_text() == "new"


def test_sha256(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"")
    assert sha256(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    path.write_bytes(b"a" * 3_000_000)
    first = sha256(path)
    path.write_bytes(b"a" * 2_999_999 + b"b")
    assert sha256(path) != first


def test_a_writer_that_puts_its_own_private_file_there_does_not_make_the_result_private(tmp_path):
    """As safetensors' save_file does."""
    usual = tmp_path / "usual"
    usual.touch()
    with atomic_path(tmp_path / "new") as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert (tmp_path / "new").stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[]", "not a JSON object but a list"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(VolvelleError, match=f"config.json: {says}"):
        read_json(path)


def test_a_missing_json_file_is_named_with_those_beside_it(tmp_path):
    (tmp_path / "config.json").write_text('{"width": "µ"}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"width": "µ"}
    with pytest.raises(VolvelleError, match=r"confg\.json: no such file") as caught:
        read_json(tmp_path / "confg.json")
    assert caught.value.tip == "did you mean config.json?"
    with pytest.raises(VolvelleError) as caught:
        read_json(tmp_path / "confg.json", tip="get it first")
    assert caught.value.tip == "get it first"
