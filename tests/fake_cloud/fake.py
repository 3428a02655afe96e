"""Stands in for gcloud, kubectl, sbatch, srun, scontrol and a TPU host's python3, uv and neox-jax.

Every call is a line of $FAKE_CLOUD/calls.jsonl: argv exactly, and what came on standard input. $FAKE_CLOUD/plan.json
says what goes wrong. A slice is a folder for each host, whose commands are really run there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["FAKE_CLOUD"])
PLAN = json.loads((HERE / "plan.json").read_text())
STATE = HERE / "state"
READY = {"tpu-vm": "READY", "queued-resources": "ACTIVE"}


def main() -> int:
    name, *arguments = sys.argv[1:]
    text = sys.stdin.read() if arguments[-2:] == ["-f", "-"] else None
    with open(HERE / "calls.jsonl", "a") as file:
        file.write(json.dumps({"argv": [name, *arguments], "input": text}) + "\n")
    return {
        "gcloud": gcloud, "kubectl": nothing, "sbatch": nothing, "srun": train, "scontrol": scontrol,
        "python3": pip, "uv": uv, "neox-jax": train,
    }[name](arguments)  # fmt: skip


def nothing(arguments) -> int:
    return 0


def scontrol(arguments) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("node1\nnode2")
    return 0


def gcloud(arguments) -> int:
    kind, verb, name = arguments[2:5]
    options = dict(word[2:].split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    words = [word for word in arguments[4:] if not word.startswith("--")]
    state = STATE.read_text() if STATE.exists() else None
    if verb == "describe":
        if state is None:
            print(f"ERROR: (gcloud.compute.tpus.{kind}.describe) NOT_FOUND: no {name}", file=sys.stderr)
            return 1
        print(READY[kind] if state == "READY" else state)
        return 0
    if verb == "create":
        if PLAN.get("quota"):
            print("ERROR: code 8: Quota limit exceeded", file=sys.stderr)
            return 1
        STATE.write_text("READY")
        for i in range(PLAN["workers"]):
            (HERE / f"worker{i}").mkdir()
        return 0
    if verb == "delete":
        STATE.unlink()
        for folder in HERE.glob("worker*"):
            shutil.rmtree(folder)
        return 0
    if state != "READY":
        print(f"ERROR: the TPU is {state}", file=sys.stderr)
        return 1
    chosen = range(PLAN["workers"]) if options["worker"] == "all" else [int(options["worker"])]
    codes = [255 if i == PLAN.get("down") else on_host(i, verb, words, options) for i in chosen]
    return next((code for code in codes if code), 0)


def on_host(i: int, verb: str, words: list[str], options: dict) -> int:
    home = HERE / f"worker{i}"
    if verb == "ssh":
        environment = {**os.environ, "HOME": str(home), "FAKE_WORKER": str(i)}
        return subprocess.run(["bash", "-c", options["command"]], cwd=home, env=environment).returncode
    source, destination = words
    if ":" in source:
        return subprocess.run(["cp", "-rL", home / source.split(":")[1], destination]).returncode
    return subprocess.run(["cp", "-r", source, home / destination.split(":")[1]]).returncode


def link(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
    path.chmod(0o755)


def pip(arguments) -> int:
    link(Path.home() / ".local/bin/uv", "uv")
    return 0


def uv(arguments) -> int:
    if arguments[0] == "pip":
        if PLAN.get("no_such_version"):
            print("no solution found", file=sys.stderr)
            return 1
        link(Path("venv/bin/neox-jax"), "neox-jax")
    return 0


def train(arguments) -> int:
    """What the plan has this start of this host print, and how it ends."""
    worker = os.environ.get("FAKE_WORKER", "0")
    starts = HERE / f"starts{worker}"
    number = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("x" * (number + 1))
    (HERE / f"environment{worker}").write_text(json.dumps(dict(os.environ)))
    step = PLAN["train"][min(number, len(PLAN["train"]) - 1)]
    for line in step.get("say", []):
        print(line, flush=True)
    for name in step.get("checkpoints", []):
        Path(step["into"], "checkpoints", name).mkdir(parents=True)
    if "state" in step:  # the slice goes away, and this process with it
        STATE.write_text(step["state"])
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if step.get("until_stopped"):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
        (HERE / f"ready{worker}").touch()
        time.sleep(60)
        return 1
    codes = step["codes"]
    return codes[int(worker)] if isinstance(codes, list) else codes


if __name__ == "__main__":
    raise SystemExit(main())
