"""The hub: its real client against a server on this machine that answers as the hub does, and against a cache."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from neox_jax.convert import hub
from neox_jax.errors import InputError

pytest.importorskip("huggingface_hub", reason="the client of the hub is not installed: pip install neox_jax[hub]")

FINAL, EARLY, ODD = b"final weights", b"early weights", b"odd weights"
SAFE, TORCH = "model.safetensors", "pytorch_model.bin"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
MAIN = {"config.json": b"{}", SAFE: FINAL}
REPOSITORIES = {
    # As in pythia-2.8b: a step branch that serves the final weights.
    "org/name": {
        "step1000": {"config.json": b"{}", SAFE: FINAL},
        "step10": {"config.json": b"{}", SAFE: EARLY, "a-folder.safetensors/README.md": b""},
        "step9": {"config.json": b"{}", SAFE: ODD, TORCH: FINAL, "onnx/model.safetensors": FINAL},
        "main": MAIN | {"README.md": b"not counted", "tokenizer.json": b"{}"},
        "with/slash": {"config.json": b"{}", SAFE: EARLY},
        "only-torch": {"config.json": b"{}", TORCH: FINAL, "optimizer.bin": ODD},
        "no-weights": {"config.json": b"{}"},
        "shards": {"config.json": b"{}", SHARDS[0]: FINAL, SHARDS[1]: EARLY},
    },
    "org/gated": {"main": MAIN},
    "org/plain-git": {"main": {SAFE: FINAL, "small.safetensors": EARLY}},
    "org/one-gone": {"main": MAIN, "gone": MAIN},
}
TAGS = {"org/name": ["no-weights", "only-torch"]}
FAILURES = {  # of every question about the repository: status, headers, body
    "org/private": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"),
    "org/closed": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}"),
    "org/forbidden": (403, {"X-Error-Message": "no rights for this token"}, b"{}"),
    "org/broken": (503, {}, b"<html>down</html>"),
    "org/login-page": (200, {"Content-Type": "text/html"}, b"<html>please log in</html>"),
    "org/no-hub": (200, {"Content-Type": "application/json"}, b'{"error": "no such route"}'),
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def in_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin")) and name != "small.safetensors"


class Hub(BaseHTTPRequestHandler):
    """The hub's answers, in the form that huggingface_hub 2.4 parses."""

    protocol_version = "HTTP/1.1"  # with connections kept, as the pool of the client expects them
    page_size = 2  # the hub's own is 1000; this way every list has pages

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.server.asked.append(f"{self.command} {url.path}")
        if parts[:2] == ["api", "models"]:
            repository, (question, *rest) = "/".join(parts[2:4]), parts[4:] or ["revision", "main"]
        else:
            repository, (question, *rest) = "/".join(parts[:2]), parts[2:]
        if repository in FAILURES:
            return self._send(*FAILURES[repository])
        if repository not in REPOSITORIES:
            return self._send(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        revisions = REPOSITORIES[repository]
        if question == "refs":
            return self._send_refs(repository)
        files = revisions.get(rest[0]) or {commit_of(files): files for files in revisions.values()}.get(rest[0])
        if files is None or (repository, rest[0]) == ("org/one-gone", "gone"):
            return self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if question == "revision":
            return self._send_json({"id": repository, "sha": commit_of(files), "siblings": [], "tags": []})
        if question == "tree":
            return self._send_tree(url, files)
        assert question == "resolve", self.path
        if repository == "org/gated":
            return self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        name = "/".join(rest[1:])
        etag = sha256(files[name]) if in_lfs(name) else git_blob(files[name])
        return self._send(200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files)}, files[name])

    def _send_refs(self, repository):
        def refs(kind, names):
            commits = {name: commit_of(REPOSITORIES[repository][name]) for name in names}
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commits[name]} for name in names]

        tags = TAGS.get(repository, [])
        branches = [name for name in REPOSITORIES[repository] if name not in tags]
        self._send_json({"branches": refs("heads", branches), "tags": refs("tags", tags), "converts": []})

    def _send_tree(self, url, files):
        query = parse_qs(url.query)
        entries = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_blob(content)}
            if in_lfs(name):
                entry["oid"] = git_blob(b"a pointer to " + sha256(content).encode())
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        if query["recursive"] == ["false"]:
            folders = sorted({name.split("/")[0] for name in files if "/" in name})
            entries = [entry for entry in entries if "/" not in entry["path"]]
            entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.page_size
        link = f"http://{self.headers['Host']}{url.path}?recursive={query['recursive'][0]}&cursor={end}"
        self._send_json(entries[start:end], {"Link": f'<{link}>; rel="next"'} if end < len(entries) else {})

    def _send_json(self, value, headers=None):
        self._send(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def _send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server():
    """A hub at server.url, with server.asked, what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True  # a kept connection does not keep the test
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def nobody():
    """The address of a server that is not there: its port is bound but nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


PROGRAM = """
import dataclasses, json, sys
from neox_jax.convert import hub
from neox_jax.errors import InputError
for name, arguments, keywords in json.load(sys.stdin):
    if name == "list_revisions":
        steps = []
        keywords["progress"] = lambda done, total: steps.append([done, total])
    try:
        answer = getattr(hub, name)(*arguments, **keywords)
    except InputError as error:
        print(json.dumps({"refused": str(error)}))
        continue
    if name == "list_revisions":
        print(json.dumps({"weights": answer.weights, "hub_error": answer.hub_error, "from_cache": answer.from_cache,
                          "progress": steps}))
    else:
        print(json.dumps(str(answer)))
"""


def call(*calls, endpoint: str, home: Path, offline: bool = False) -> list:
    """The answers of calls (function, arguments, keywords); in a process of its own, for huggingface_hub reads its
    environment once. Neither this machine's cache, token nor proxies are in it."""
    environment = {
        name: value for name, value in os.environ.items() if not name.lower().startswith(("hf_", "huggingface"))
    }
    environment = {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(calls),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def revisions(repo_id: str) -> tuple:
    return "list_revisions", [repo_id], {}


def snapshot(repo_id: str, revision: str | None = None) -> tuple:
    return "fetch_snapshot", [repo_id], {"revision": revision}


# ---- the hub answers


def test_revisions_of_the_hub(server, tmp_path):
    (found,) = call(revisions("org/name"), endpoint=server.url, home=tmp_path)
    expected = {
        "main": {SAFE: sha256(FINAL)},
        "no-weights": {},
        "only-torch": {TORCH: sha256(FINAL)},
        "shards": {SHARDS[0]: sha256(FINAL), SHARDS[1]: sha256(EARLY)},
        "step9": {SAFE: sha256(ODD)},  # has safetensors, so its other files do not count
        "step10": {SAFE: sha256(EARLY)},
        "step1000": {SAFE: sha256(FINAL)},
        "with/slash": {SAFE: sha256(EARLY)},
    }
    assert found["weights"] == expected
    assert list(found["weights"]) == list(expected)
    assert found["hub_error"] is None
    assert not found["from_cache"]
    assert found["progress"] == [[done, 8] for done in range(1, 9)]
    assert not any("/resolve/" in question for question in server.asked)  # nothing was downloaded
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_outside_lfs_is_known_by_its_git_blob(server, tmp_path):
    """In the cache too, whose links name the blobs: one file has one content, wherever the answer is from."""
    found, _ = call(revisions("org/plain-git"), snapshot("org/plain-git"), endpoint=server.url, home=tmp_path)
    assert found["weights"] == {"main": {SAFE: sha256(FINAL), "small.safetensors": f"git:{git_blob(EARLY)}"}}
    (cached,) = call(revisions("org/plain-git"), endpoint=server.url, home=tmp_path, offline=True)
    assert cached["weights"] == found["weights"]


def test_refusals_of_the_hub(server, tmp_path):
    cases = {
        "org/none": "the hub has no org/none, or it is private: check the name, or `hf auth login`",
        "org/private": "the hub has no org/private, or it is private: check the name, or `hf auth login`",
        "org/closed": "org/closed is gated: accept its terms on the hub, then run `hf auth login`",
        "org/forbidden": "org/forbidden cannot be fetched from the hub: ",
        "org/login-page": "org/login-page cannot be fetched: the answer is not a hub's (JSONDecodeError: ",
        "org//x": "'org//x' is neither a folder here nor a repository id (owner/name)",
    }
    ours = {
        "org/no-hub": "org/no-hub cannot be fetched: the answer is not a hub's (KeyError: 'branches'); see",
        "org/one-gone": "the hub has no org/one-gone at revision gone; give a branch, tag or commit that is there",
        "org/broken": "the hub cannot be reached (",
    }
    asked = [revisions(repo_id) for repo_id in cases | ours] + [snapshot(repo_id) for repo_id in cases]
    answers = call(*asked, endpoint=server.url, home=tmp_path)
    assert len(answers) == len(asked)
    for answer, expected in zip(answers, [*cases.values(), *ours.values(), *cases.values()], strict=True):
        assert answer["refused"].startswith(expected)
        assert "\n" not in answer["refused"]
    refused = {asked[index][:2][1][0]: answer["refused"] for index, answer in enumerate(answers)}
    assert "no rights for this token" in refused["org/forbidden"]
    assert "503" in refused["org/broken"]


def test_a_gated_repository_can_be_listed_without_its_files(server, tmp_path):
    listed, fetched = call(revisions("org/gated"), snapshot("org/gated"), endpoint=server.url, home=tmp_path)
    assert listed["weights"] == {"main": {SAFE: sha256(FINAL)}}
    assert fetched == {"refused": "org/gated is gated: accept its terms on the hub, then run `hf auth login`"}


def test_an_endpoint_that_is_no_address(tmp_path):
    answers = call(revisions("org/name"), snapshot("org/name"), endpoint="localhost", home=tmp_path)
    for answer in answers:
        assert answer["refused"].startswith("org/name cannot be fetched from the hub: Request URL is missing")


# ---- a download, and the cache that it leaves


def test_fetch_snapshot_of_a_revision_then_without_the_hub(server, nobody, tmp_path):
    wanted = ["step1000", "step9", "only-torch", "main", "with/slash", "shards"]
    steps = [snapshot("org/name", revision) for revision in wanted]
    folders = call(*steps, endpoint=server.url, home=tmp_path)
    held = {
        "step1000": {SAFE, "config.json"},
        "step9": {SAFE, "config.json", "onnx"},  # the client's patterns reach into folders; a load does not
        "only-torch": {TORCH, "config.json"},
        "main": {SAFE, "config.json", "tokenizer.json"},
        "with/slash": {SAFE, "config.json"},
        "shards": {*SHARDS, "config.json"},
    }
    for revision, folder in zip(wanted, map(Path, folders), strict=True):
        files = REPOSITORIES["org/name"][revision]
        assert folder.name == commit_of(files)
        assert {path.name for path in folder.iterdir()} == held[revision]
        assert all((folder / name).read_bytes() == files[name] for name in held[revision] - {"onnx"})

    asked = [revisions("org/name"), snapshot("org/name", "step7"), snapshot("org/name", "0" * 40)]
    hub_answer, no_revision, no_commit = call(*asked, endpoint=server.url, home=tmp_path)
    for answer, revision in [(no_revision, "step7"), (no_commit, "0" * 40)]:
        wanted_instead = "give a branch, tag or commit that is there"
        assert answer == {"refused": f"the hub has no org/name at revision {revision}; {wanted_instead}"}

    for endpoint, offline, why in [(nobody, False, "refused"), (server.url, True, "HF_HUB_OFFLINE")]:
        server.asked.clear()
        *again, cached, missing = call(
            *steps,
            revisions("org/name"),
            snapshot("org/name", "step10"),
            endpoint=endpoint,
            home=tmp_path,
            offline=offline,
        )
        assert not server.asked
        assert again == folders
        assert list(cached["weights"]) == ["main", "only-torch", "shards", "step9", "step1000", "with/slash"]
        assert cached["weights"] == {name: hub_answer["weights"][name] for name in cached["weights"]}
        assert cached["from_cache"]
        assert why in cached["hub_error"]
        assert cached["progress"][-1] == [6, 6]
        assert missing["refused"].startswith(
            "org/name at revision step10 is no folder here, nor in the hub's cache, and"
        )


def test_a_hub_that_is_down_leaves_the_cache(server, tmp_path):
    """org/broken answers 503: what was fetched before counts."""
    make_cache(tmp_path, "org/broken", {"main": {SAFE: sha256(FINAL)}})
    (found,) = call(revisions("org/broken"), endpoint=server.url, home=tmp_path)
    assert found["weights"] == {"main": {SAFE: sha256(FINAL)}}
    assert "503" in found["hub_error"]


def make_cache(home: Path, repo_id: str, refs: dict[str, dict[str, str | bytes]]) -> Path:
    """The cache's layout by hand, as transformers and older clients leave it: {ref: {file: its blob's name, or bytes
    for a cache without links}}. No blob has content: a link's name is enough."""
    repository = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    for ref, files in refs.items():
        commit = hashlib.sha1(ref.encode()).hexdigest()
        path = repository / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                (folder / name).symlink_to(f"../../blobs/{content}")
    return repository


def test_revisions_of_a_cache_by_hand(nobody, tmp_path):
    a, b = sha256(FINAL), sha256(EARLY)
    repository = make_cache(
        tmp_path,
        "org/name",
        {
            "step1000": {SAFE: a},
            "step9": {SAFE: b, TORCH: a},
            "main": {SAFE: a, "config.json": git_blob(b"{}")},
            "dev/copies": {SAFE: FINAL},
            "small": {SAFE: git_blob(ODD)},
            "torch": {"pytorch_model-00001-of-00002.bin": a, "pytorch_model-00002-of-00002.bin": b},
            "half": {"pytorch_model-00001-of-00002.bin": a},
            "refs/pr/1": {SAFE: a},
            "config-only": {"config.json": git_blob(b"{}")},
        },
    )
    (repository / "snapshots" / (repository / "refs" / "main").read_text() / "a-folder.safetensors").mkdir()
    odd_name = repository / "blobs" / "an-etag-of-a-mirror"
    odd_name.parent.mkdir()
    odd_name.write_bytes(EARLY)
    make_cache(tmp_path, "org/name", {"mirror": {SAFE: odd_name.name}})
    (repository / "refs" / "damaged").write_bytes(b"\xff\0 no commit")
    (repository / "refs" / "empty").write_text("")
    (repository / "refs" / "cleaned").write_text("0" * 40)  # its snapshot is gone

    (found,) = call(revisions("org/name"), endpoint=nobody, home=tmp_path)
    expected = {
        "main": {SAFE: a},
        "dev/copies": {SAFE: a},
        "mirror": {SAFE: b},
        "small": {SAFE: f"git:{git_blob(ODD)}"},
        "step9": {SAFE: b},
        "step1000": {SAFE: a},
        "torch": {"pytorch_model-00001-of-00002.bin": a, "pytorch_model-00002-of-00002.bin": b},
    }
    assert found["weights"] == expected
    assert list(found["weights"]) == list(expected)
    assert found["from_cache"]


def test_a_snapshot_that_lacks_a_file_of_its_list_does_not_count(server, nobody, tmp_path):
    """The client keeps a commit's list of files; where a weight file of it is gone, the revision is not told."""
    folders = call(snapshot("org/name", "shards"), snapshot("org/name", "step10"), endpoint=server.url, home=tmp_path)
    (Path(folders[0]) / SHARDS[1]).unlink()
    found, refused = call(revisions("org/name"), snapshot("org/name", "shards"), endpoint=nobody, home=tmp_path)
    assert found["weights"] == {"step10": {SAFE: sha256(EARLY)}}
    assert refused["refused"].startswith("org/name at revision shards is only partly in the hub's cache")


def test_neither_hub_nor_cache(nobody, tmp_path):
    make_cache(tmp_path, "org/config", {"main": {"config.json": git_blob(b"{}")}})
    for offline, why in [(False, "refused"), (True, "offline mode is enabled")]:
        asked = [revisions("org/name"), revisions("org/config"), revisions("org//x")]
        *answers, no_name = call(*asked, endpoint=nobody, home=tmp_path, offline=offline)
        for answer, repo_id in zip(answers, ["org/name", "org/config"], strict=True):
            assert answer["refused"].startswith("the hub cannot be reached (")
            assert why in answer["refused"]
            assert f"its cache here has no revision of {repo_id} with all of its weights" in answer["refused"]
            assert "\n" not in answer["refused"]
        assert no_name == {"refused": "'org//x' is neither a folder here nor a repository id (owner/name)"}


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install neox_jax\[hub\]"):
        hub.list_revisions("org/name")
