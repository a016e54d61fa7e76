import hashlib

import huggingface_hub
import pytest
from huggingface_hub import errors

from volvelle import hub
from volvelle.errors import VolvelleError
from volvelle.hub import huggingface


class Hub:
    """Stands in for snapshot_download: lays a snapshot out as the real cache does, links to blobs named by hash."""

    def __init__(self, root):
        self.root, self.calls, self.error = root, [], None
        self.files = {"config.json": b"{}", "model.safetensors": b"weights"}

    def __call__(self, name, *, revision=None, allow_patterns):
        self.calls.append((name, revision, allow_patterns))
        if self.error:
            raise self.error
        snapshot, blobs = self.root / "snapshots" / "abc", self.root / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        for file, content in self.files.items():
            blob = blobs / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            if not (snapshot / file).exists():
                (snapshot / file).symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLVELLE_HOME", str(tmp_path / "home"))
    fake = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_once_complete_it_opens_without_the_network(remote):
    folder = hub.resolve("owner/name")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in remote.calls[0][2])
    remote.error = errors.LocalEntryNotFoundError("offline")
    assert hub.resolve("owner/name") == folder
    assert len(remote.calls) == 1
    assert [record["name"] for record in hub.repositories()] == ["owner/name"]


def test_a_missing_file_is_fetched_again(remote):
    folder = hub.fetch_repo("owner/name")
    (folder / "model.safetensors").unlink()
    assert (hub.fetch_repo("owner/name") / "model.safetensors").exists()
    assert len(remote.calls) == 2


def test_refresh_revision_and_pickles(remote):
    hub.fetch_repo("owner/name@v2")
    hub.fetch_repo("owner/name@v2", refresh=True, pickles=True)
    assert [call[1] for call in remote.calls] == ["v2", "v2"]
    assert "*.bin" in remote.calls[1][2]


def test_damaged_blob_is_removed(remote, monkeypatch):
    folder = hub.fetch_repo("owner/name")
    blob = (folder / "model.safetensors").resolve()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: (blob.write_bytes(b"damaged"), str(folder))[1]
    )
    with pytest.raises(VolvelleError, match="arrived damaged"):
        hub.fetch_repo("owner/name", refresh=True)
    assert not blob.exists()


def test_nothing_usable(remote):
    remote.files = {}
    with pytest.raises(VolvelleError, match="holds none of"):
        hub.fetch_repo("owner/name")


class Response:
    """The fields that huggingface_hub's errors read from an HTTP response."""

    status_code, headers, request, text = 404, {}, None, ""

    def json(self):
        return {}


@pytest.mark.parametrize(
    ("error", "message", "tip"),
    [
        (errors.LocalEntryNotFoundError("x"), "cannot be reached", "network"),
        (errors.OfflineModeIsEnabled("x"), "cannot be reached", "network"),
        (errors.RepositoryNotFoundError("x", response=Response()), "no such Hugging Face repository", "spelling"),
        (errors.GatedRepoError("x", response=Response()), "terms", "accept"),
        (errors.HFValidationError("x"), "not a Hugging Face repo id", None),
        (ConnectionError("reset"), "could not be downloaded", "network"),
    ],
)
def test_errors_have_tips(remote, error, message, tip):
    remote.error = error
    with pytest.raises(VolvelleError, match=message) as caught:
        hub.fetch_repo("owner/name")
    assert tip is None or tip in caught.value.tip


@pytest.mark.parametrize("name", ["a/b", "HuggingFaceTB/SmolLM2-135M", "a/b@refs/pr/1"])
def test_repo_ids(name):
    assert huggingface.REPO_ID.fullmatch(name)
