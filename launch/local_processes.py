#!/usr/bin/env python3
"""Trains with several processes on this machine, and ends as one: see --help."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
EXIT_START_AGAIN = 75
GRACE_SECONDS = 60  # from the first process that failed to SIGTERM for the others, and from there to SIGKILL

# One way to read the environment file: common.sh's. Words of the command, then NAME=VALUE of what PASS names.
READ_ENV = """
source "$1/common.sh"; SCRIPT=local_processes.py; ENV_FILE=$2
load_env NAME NEOX_JAX CONFIG WORKDIR NUM_PROCESSES
printf '%s\\0' "$NUM_PROCESSES" "${PORT:-8476}" "${CPU_DEVICES:-}" "${#ARGS[@]}" "$NEOX_JAX" train \\
  --config "$CONFIG" --workdir "$WORKDIR" "${ARGS[@]}"
for name in ${PASS:-}; do printf '%s\\0' "$name=${!name}"; done
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Trains with NUM_PROCESSES processes on this machine. SIGTERM and Ctrl-C go to all; exits with 75 "
        "where the same command goes on from the last checkpoint."
    )
    parser.add_argument("--env", metavar="FILE", default=str(LAUNCH / "run.env"), help="the environment file")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    args = parser.parse_args()
    commands, environment, shown = read_commands(args.env)
    if args.dry_run:
        for command in commands:
            print(" ".join([*shown, shlex.join(command)]))
        return 0
    return run_all(commands, environment)


def read_commands(env_file: str) -> tuple[list[list[str]], dict[str, str], list[str]]:
    """The command of each process, the environment of all, and what of it may be shown, as NAME=VALUE."""
    read = subprocess.run(["bash", "-c", READ_ENV, "bash", str(LAUNCH), env_file], stdout=subprocess.PIPE)
    if read.returncode:
        raise SystemExit(read.returncode)
    count, port, devices, num_args, *words = os.fsdecode(read.stdout).split("\0")[:-1]
    for name, text in (("NUM_PROCESSES", count), ("PORT", port), ("CPU_DEVICES", devices or "1")):
        if not text.isdecimal() or int(text) < 1:
            print(f"local_processes.py: {name} is {text!r}; wanted a whole number above 0", file=sys.stderr)
            raise SystemExit(65)
    length = 6 + int(num_args)
    train, passed = words[:length], words[length:]
    shown = [f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={devices}"] if devices else []
    environment = dict(os.environ)
    environment.update(word.split("=", 1) for word in [*passed, *" ".join(shown).split()])
    place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", count, "--process-id"]
    return [[*train, *place, str(i)] for i in range(int(count))], environment, shown


def run_all(commands: list[list[str]], environment: dict[str, str]) -> int:
    """Runs the commands until all have ended; their worst code."""
    children: list[subprocess.Popen] = []

    def pass_on(number, frame):
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    threads = []
    try:
        for i, command in enumerate(commands):
            # In a group of its own, or Ctrl-C would reach it twice.
            child = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
            )
            children.append(child)
            threads += [
                threading.Thread(target=copy_lines, args=(i, pipe, out), daemon=True)
                for pipe, out in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
            ]
            for thread in threads[-2:]:
                thread.start()
        wait_for(children)
    except OSError as error:
        print(f"local_processes.py: {commands[0][0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 65
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    for thread in threads:
        thread.join()
    return worst([child.returncode for child in children])


def wait_for(children: list[subprocess.Popen]) -> None:
    """Returns when all have ended. Those that do not follow one that failed are terminated, then killed."""
    failed_at, sent = None, []
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.returncode for child in children):
            failed_at = time.monotonic()
        for i, number in enumerate((signal.SIGTERM, signal.SIGKILL)):
            if failed_at is not None and len(sent) == i and time.monotonic() - failed_at > GRACE_SECONDS * (i + 1):
                sent.append(number)
                for child in children:
                    if child.poll() is None:
                        child.send_signal(number)
        time.sleep(0.05)


def copy_lines(process_id: int, pipe, out) -> None:
    """Whole lines, each behind its process's number."""
    for line in pipe:
        out.write(b"[%d] %s\n" % (process_id, line.rstrip(b"\n")))
        out.flush()


def worst(codes: list[int]) -> int:
    """A code that says what to mend before 75, that before 0; a killed process matters where no other says 75."""
    for code in codes:
        if code > 0 and code != EXIT_START_AGAIN:
            return code
    if EXIT_START_AGAIN in codes:
        return EXIT_START_AGAIN
    return max((128 - code for code in codes if code < 0), default=0)


if __name__ == "__main__":
    raise SystemExit(main())
