"""Turns what was given as --model into a folder: the folder itself, or a snapshot in the Hugging Face cache."""

from __future__ import annotations

import re
from pathlib import Path

from gptoss_export.exporter.checkpoint.files import shown
from gptoss_export.exporter.errors import CheckpointNotFoundError, HubError

# Weights, config and tokenizer; never the same weights once more in original/ or metal/.
WANTED = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED = ["*/*"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The checkpoint folder that `model` stands for; an existing folder wins over a Hub id of the same name.

    revision: branch, tag or commit on the Hub; None is its default branch. Downloads what the cache lacks, unless
    HF_HUB_OFFLINE is set. Raises CheckpointNotFoundError for what is neither folder nor Hub id, or is not in the
    cache while offline, and HubError when the Hub cannot be reached or refuses.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        if revision is not None:
            raise CheckpointNotFoundError(
                f"{folder} is a folder and has no revision {shown(revision)}",
                "Leave --revision out, or give a Hub id as --model.",
            )
        return folder
    if folder.is_file():
        raise CheckpointNotFoundError(f"{folder} is a file", "Give the folder that it lies in as --model.")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointNotFoundError(
            f"{shown(model)} is no folder here, and not a Hub id either",
            "Give an existing folder, or an id such as openai/gpt-oss-20b.",
        )
    return _snapshot(model, revision)


def _snapshot(model: str, revision: str | None) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = is_offline_mode()
    name = model if revision is None else f"{model} at revision {shown(revision)}"
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                local_files_only=offline,
            )
        )
    except LocalEntryNotFoundError as e:
        if offline:
            raise CheckpointNotFoundError(
                f"{name} is not, or not completely, in the Hugging Face cache, and HF_HUB_OFFLINE is set",
                "Unset HF_HUB_OFFLINE, or download it where there is a network and copy the folder here.",
            ) from e
        raise HubError(
            f"{name} is not a folder here, and the Hugging Face Hub cannot be reached",
            "Check the network (and HF_ENDPOINT), or give a folder as --model.",
        ) from e
    except GatedRepoError as e:
        raise HubError(
            f"{name} is gated, and this user has no access", "Ask for access on its page, then `hf auth login`."
        ) from e
    except RepositoryNotFoundError as e:
        raise HubError(
            f"{name} is neither a folder here nor a repository on the Hub that this user can see",
            "Check the spelling; for a private repository, `hf auth login`.",
        ) from e
    except RevisionNotFoundError as e:
        raise HubError(f"the Hub has no {name}", "Give a branch, a tag or a commit of that repository.") from e
    except HFValidationError as e:
        raise CheckpointNotFoundError(
            f"{shown(model)} is no folder here, and not a valid Hub id", "Give an id such as openai/gpt-oss-20b."
        ) from e
    except (HTTPError, OSError, ValueError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise HubError(
            f"{name} could not be downloaded: {type(e).__name__} {shown(reason)}",
            "Try again; what was downloaded is kept. Or give a folder as --model.",
        ) from e
