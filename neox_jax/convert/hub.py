"""The Hugging Face hub: a repository id becomes a folder on this machine, or a list of what its revisions hold."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from neox_jax.errors import InputError

SAFETENSORS = "*.safetensors"
TORCH_WEIGHTS = "pytorch_model*.bin"  # only where there are no safetensors
FILES = ["config.json", "tokenizer*.json", "special_tokens_map.json", SAFETENSORS, "*.safetensors.index.json"]
TORCH_FILES = [TORCH_WEIGHTS, "pytorch_model.bin.index.json"]
NUM_REQUESTS = 8  # at a time: what the hub's own client opens for a download
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"(.+)-[0-9]+-of-([0-9]+)(\.[a-z]+)")


@dataclass(frozen=True)
class Revisions:
    """The weight files of a repository, revision by revision.

    weights: {branch or tag: {file name: content}}, main first and numbers in their order. A content is the file's
    SHA-256, or `git:` and the git blob's id for a file that the hub keeps outside LFS, of which no SHA-256 is known.
    Equal contents are equal bytes. A revision with no weight files has {}: that two have none makes them no pair.
    hub_error: why the hub could not be asked, so that `weights` is what this machine's cache holds; None where it was.
    """

    weights: dict[str, dict[str, str]]
    hub_error: str | None = None

    @property
    def from_cache(self) -> bool:
        return self.hub_error is not None


def looks_like_repo_id(source: str) -> bool:
    """Whether this could be `owner/name` on the hub; a relative path may look the same, so see first if it exists."""
    return _REPO_ID.fullmatch(str(source)) is not None


def fetch_snapshot(repo_id: str, *, revision: str | None = None) -> Path:
    """Downloads what `load_hf` reads of a repository into the hub's cache, or finds it there; returns the folder.

    revision: a branch, tag or commit; None is the main branch.
    Raises: InputError if huggingface_hub is not installed, or the repository cannot be had.
    """
    with _input_errors(repo_id, revision):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
        if not any(folder.glob(SAFETENSORS)):
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES + TORCH_FILES))
        return folder


def list_revisions(repo_id: str, *, progress: Callable[[int, int], None] | None = None) -> Revisions:
    """Maps each branch and tag of a repository to its weight files and their hashes; downloads none of them.

    Counted are the files that `load_hf` would read: safetensors, or PyTorch's where a revision has no safetensors.
    Where the hub cannot be reached, the answer is of those revisions of which the local cache knows every weight file,
    as they were when they were fetched. A hub that fails after its first answer is an error, never half an answer.
    progress: called as progress(done, total) with numbers of revisions.
    Raises: InputError if huggingface_hub is not installed, or neither the hub nor the cache has the repository.
    """
    with _input_errors(repo_id):
        import httpx2
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        api = HfApi()
        try:
            refs = api.list_repo_refs(repo_id)
        except (
            OfflineModeIsEnabled,
            httpx2.NetworkError,
            httpx2.TimeoutException,
            httpx2.RemoteProtocolError,
        ) as error:
            return _cached_revisions(repo_id, _one_line(error), progress)
        except HfHubHTTPError as error:  # a hub that is down is not there; one that refuses is
            if error.response.status_code < 500:
                raise
            return _cached_revisions(repo_id, _one_line(error), progress)
    names = sorted({ref.name for ref in [*refs.branches, *refs.tags]}, key=_natural_order)
    return Revisions(_hub_weights(api, repo_id, names, progress))


def _hub_weights(api, repo_id: str, names: list[str], progress) -> dict[str, dict[str, str]]:
    from huggingface_hub import RepoFile

    def weights_of(name: str) -> dict[str, str]:
        with _input_errors(repo_id, name):
            # By name and not by the ref's commit: this is what a download of that name would get.
            entries = api.list_repo_tree(repo_id, revision=name)
            files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return {name: _content_on_hub(files[name]) for name in _weight_files(files)}

    pool = ThreadPoolExecutor(NUM_REQUESTS)
    try:
        futures = {name: pool.submit(weights_of, name) for name in names}
        for done, future in enumerate(as_completed(futures.values()), start=1):
            future.result()
            if progress is not None:
                progress(done, len(names))
        return {name: future.result() for name, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an error or Ctrl-C does not wait for the rest


def _cached_revisions(repo_id: str, hub_error: str, progress) -> Revisions:
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    refs = {path.relative_to(repository / "refs").as_posix(): path for path in (repository / "refs").rglob("*")}
    # refs/pr/1 and refs/convert/... are neither branches nor tags; the hub's list has none of them either.
    names = sorted((name for name in refs if refs[name].is_file() and not name.startswith("refs/")), key=_natural_order)
    weights = {}
    for done, name in enumerate(names, start=1):
        files = _cached_weights(repository, repo_id, refs[name].read_text(errors="replace").strip())
        if files is not None:
            weights[name] = files
        if progress is not None:
            progress(done, len(names))
    if not weights:
        raise InputError(
            f"the hub cannot be reached ({hub_error}), and its cache here has no revision of {repo_id} with all of its "
            "weights; check the name, or connect (and unset HF_HUB_OFFLINE)"
        )
    return Revisions(weights, hub_error)


def _cached_weights(repository: Path, repo_id: str, commit: str) -> dict[str, str] | None:
    """The weight files of a commit in the cache; None where not all of them are there."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if not _COMMIT.fullmatch(commit):
        return None
    snapshot = repository / "snapshots" / commit
    here = [path.name for path in snapshot.glob("*") if not path.is_dir()]
    try:
        names = _weight_files([entry.path for entry in get_cached_repo_tree(repo_id, revision=commit)])
        is_whole = set(names) <= set(here)
    except CachedRepoTreeNotFoundError:  # fetched file by file (as transformers does) or by an older client
        names = _weight_files(here)
        is_whole = bool(names) and _has_every_shard(names)
    return {name: _content_in_cache(snapshot / name) for name in names} if is_whole else None


def _content_on_hub(entry) -> str:
    # A git blob's id is a SHA-1 over a header and the bytes: no SHA-256, and not to be taken for one.
    return f"git:{entry.blob_id}" if entry.lfs is None else entry.lfs.sha256


def _content_in_cache(path: Path) -> str:
    if path.is_symlink():
        blob = Path(os.readlink(path)).name  # the hub's ETag: SHA-256 of a file in LFS, else the git blob's id
        if _SHA256.fullmatch(blob):
            return blob
        if _COMMIT.fullmatch(blob):
            return f"git:{blob}"
    with path.open("rb") as file:  # a cache without links, or from a mirror with ETags of its own
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(names: Collection[str]) -> list[str]:
    """The names at the repository's top that are weights, by the choice that `fetch_snapshot` makes."""
    for pattern in (SAFETENSORS, TORCH_WEIGHTS):
        if found := sorted(name for name in names if "/" not in name and fnmatchcase(name, pattern)):
            return found
    return []


def _has_every_shard(names: list[str]) -> bool:
    """Whether of weights in shards (NAME-00001-of-00003) there are as many as their names say."""
    shards = Counter(match.groups() for match in map(_SHARD.fullmatch, names) if match)
    return all(count == int(total) for (_, total, _), count in shards.items())


def _natural_order(name: str) -> tuple:
    """main first, and step9 before step10."""
    parts = re.split(r"([0-9]+)", name)
    return name != "main", [int(part) if index % 2 else part for index, part in enumerate(parts)], name


@contextmanager
def _input_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns everything that the hub's client raises for a user to mend into an InputError of one line."""
    try:
        import huggingface_hub  # noqa: F401  first: its errors alone may be there when it is not
        from httpx2 import HTTPError
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
    no_revision = f"the hub has no {what}; give a branch, tag or commit that is there"
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is neither a folder here nor a repository id (owner/name)") from error
    except GatedRepoError as error:
        raise InputError(f"{what} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(no_revision) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no {what}, or it is private: check the name, or `hf auth login`") from error
    except IncompleteSnapshotError as error:
        raise InputError(f"{what} is only partly in the hub's cache, and the hub cannot be reached; connect") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, RevisionNotFoundError):
            raise InputError(no_revision) from error
        if isinstance(cause, HfHubHTTPError):  # it was reached, and refused
            raise InputError(f"{what} cannot be fetched from the hub: {_one_line(cause)}") from error
        raise InputError(
            f"{what} is no folder here, nor in the hub's cache, and the hub cannot be reached; check the name and the "
            "revision, or connect (and unset HF_HUB_OFFLINE)"
        ) from error
    except (HTTPError, OSError) as error:
        raise InputError(f"{what} cannot be fetched from the hub: {_one_line(error)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise InputError(
            f"{what} cannot be fetched: the answer is not a hub's ({type(error).__name__}: {_one_line(error)}); see "
            "what HF_ENDPOINT names, and whether this network wants a login first"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
