"""--model as a folder and as a Hub id: a cache on disk, and a Hub that refuses in every way."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gptoss_export.exporter.checkpoint.hub import resolve_model
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.errors import CheckpointNotFoundError, HubError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, tiny_dir: Path) -> Path:
    """A Hub cache that holds `someone/tiny` at main, as huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for n, file in enumerate(sorted(tiny_dir.iterdir())):
        (repository / "blobs" / str(n)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{n}")
    return tmp_path / "hub"


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_snapshot_is_found_offline(offline: Path, revision):
    folder = resolve_model("someone/tiny", revision)
    assert folder == offline / "models--someone--tiny" / "snapshots" / COMMIT
    checkpoint = open_checkpoint(folder)
    assert all(f.is_symlink() for f in checkpoint.weight_files)
    assert checkpoint.side_files[0].name == "tokenizer.json"


@pytest.mark.parametrize(("model", "revision"), [("someone/other", None), ("someone/tiny", "v2")])
def test_offline_and_not_cached(offline: Path, model, revision):
    with pytest.raises(CheckpointNotFoundError, match="HF_HUB_OFFLINE") as e:
        resolve_model(model, revision)
    assert model in e.value.what and e.value.next_step


def test_the_environment_variable_is_respected(cache: Path):
    code = (
        "from gptoss_export.exporter.checkpoint.hub import resolve_model\n"
        "from gptoss_export.exporter.errors import CheckpointNotFoundError\n"
        "print(resolve_model('someone/tiny').name)\n"
        "try:\n    resolve_model('someone/other')\n"
        "except CheckpointNotFoundError as e:\n    print(e.what)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name, error = run.stdout.splitlines()
    assert name == COMMIT
    assert "someone/other" in error and "HF_HUB_OFFLINE" in error


def test_a_folder_wins_over_a_hub_id(offline: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert resolve_model("someone/tiny") == Path("someone/tiny")


def test_a_folder_has_no_revision(tiny_dir: Path):
    with pytest.raises(CheckpointNotFoundError, match="revision") as e:
        resolve_model(str(tiny_dir), "main")
    assert "--revision" in e.value.next_step


@pytest.mark.parametrize(
    "model",
    ["", " ", "gpt-oss-20b", "./none", "/no/such/folder", "a/b/c", "../a", "a/b?x", "a/\n", "a--b/..c", "a\0/b"],
)
def test_neither_folder_nor_id(offline: Path, model):
    with pytest.raises(CheckpointNotFoundError) as e:
        resolve_model(model)
    assert e.value.what.isprintable()


def test_a_file_is_no_folder(tiny_dir: Path):
    with pytest.raises(CheckpointNotFoundError, match="file"):
        resolve_model(str(tiny_dir / "config.json"))


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/api/models/someone/x"))


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        (RepositoryNotFoundError("404\nlong text", response=response(404)), "repository"),
        (GatedRepoError("403", response=response(403)), "gated"),
        (RevisionNotFoundError("404", response=response(404)), "the Hub has no"),
        (HfHubHTTPError("500 Server Error\nmore", response=response(500)), "500"),
        (LocalEntryNotFoundError("no network, and not in the cache"), "cannot be reached"),
        (httpx2.ProxyError("no proxy"), "ProxyError"),
        (httpx2.ReadTimeout("slow"), "ReadTimeout"),
        (ConnectionResetError(104, "reset by peer"), "reset"),
        (OSError(28, "No space left on device"), "No space"),
    ],
)
def test_every_refusal_is_one_clear_line(monkeypatch, raised, named):
    def refuse(*args, **kwargs):
        raise raised

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=named) as e:
        resolve_model("someone/x", "v1")
    assert "\n" not in e.value.what and "\n" not in e.value.next_step and e.value.next_step


def test_only_what_an_export_needs_is_asked_for(monkeypatch, tmp_path: Path):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(model, **kwargs):
        asked.update(kwargs, model=model)
        return str(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("openai/gpt-oss-20b", "refs/pr/1") == tmp_path
    assert (asked["model"], asked["revision"]) == ("openai/gpt-oss-20b", "refs/pr/1")
    files = [
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00000-of-00002.safetensors",
        "README.md",
        "pytorch_model.bin",
        "original/config.json",
        "original/model.safetensors",
        "metal/model.bin",
    ]
    kept = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == files[:6]
