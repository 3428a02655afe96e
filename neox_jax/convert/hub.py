"""The Hugging Face hub: a repository id becomes a folder on this machine."""

import re
from pathlib import Path

from neox_jax.errors import InputError

FILES = ["config.json", "tokenizer*.json", "special_tokens_map.json", "*.safetensors", "*.safetensors.index.json"]
TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # only where there are no safetensors
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def looks_like_repo_id(source: str) -> bool:
    """Whether this could be `owner/name` on the hub; a relative path may look the same, so see first if it exists."""
    return _REPO_ID.fullmatch(str(source)) is not None


def fetch_snapshot(repo_id: str, *, revision: str | None = None) -> Path:
    """Downloads what `load_hf` reads of a repository into the hub's cache, or finds it there; returns the folder.

    revision: a branch, tag or commit; None is the main branch.
    Raises: InputError if huggingface_hub is not installed, or the repository cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            IncompleteSnapshotError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise InputError(
            f"{repo_id} is no folder here, and to fetch it from the hub huggingface_hub is needed: "
            "pip install neox_jax[hub]"
        ) from error

    what = repo_id if revision is None else f"{repo_id} at revision {revision}"
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES + TORCH_FILES))
        return folder
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is neither a folder here nor a repository id (owner/name)") from error
    except GatedRepoError as error:
        raise InputError(f"{what} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(_no_revision(what)) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no {what}, or it is private: check the name, or `hf auth login`") from error
    except IncompleteSnapshotError as error:
        raise InputError(f"{what} is only partly in the hub's cache, and the hub cannot be reached; connect") from error
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise InputError(_no_revision(what)) from error
        raise InputError(
            f"{what} is no folder here, nor in the hub's cache, and the hub cannot be reached; check the name and the "
            "revision, or connect (and unset HF_HUB_OFFLINE)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{what} cannot be fetched from the hub: {' '.join(str(error).split())}") from error


def _no_revision(what: str) -> str:
    return f"the hub has no {what}; give a branch, tag or commit that is there"
