"""One of several processes, for tests/test_distributed.py: `distributed_worker.py MODE HOST:PORT N I PLAN.json`.

peers: does what the plan says with `neox_jax.peers` alone, without jax, and prints what came of it. runs: trains the
plan's runs one after another, joined once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def talk(coordinator: str, num_processes: int, process_id: int, plan: dict) -> None:
    from neox_jax.errors import InputError
    from neox_jax.peers import meet

    mine = {**plan, **plan.get(str(process_id), {})}
    time.sleep(mine.get("late", 0))
    try:
        peers = meet(
            coordinator,
            num_processes=mine.get("num_processes", num_processes),
            process_id=mine.get("process_id", process_id),
            facts=mine.get("facts", {}),
            problem=mine.get("problem"),
            timeout_seconds=mine.get("timeout", 20),
        )
    except InputError as error:
        print(error)
        sys.exit(65)
    peers.note_signals()
    with peers:
        for action, *arguments in mine.get("do", []):
            if action == "gather":
                print(json.dumps(peers.gather(*arguments)))
            elif action == "same":
                peers.check_same(*arguments)
            elif action == "sleep":
                time.sleep(*arguments)
            elif action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "signal":
                if arguments == ["SIGTERM"]:
                    peers.end_on_signals()
                os.kill(os.getpid(), getattr(signal, *arguments))
                peers.end_on_signals()  # a signal that came before is not forgotten
            elif action == "refuse":
                raise InputError(*arguments)
            elif action == "break":
                raise RuntimeError(*arguments)
            elif action == "steps":
                print(steps(peers, *arguments))
    peers.close()


def steps(peers, start: int, step_seconds: float, signal_at: int | None) -> int:
    """Steps until all stop, on average of `step_seconds` each; returns the last step."""
    for step in range(start, start + 100_000):
        time.sleep(step_seconds * ((step * 7919) % 3))
        if step == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if peers.agree_to_stop(step):
            return step
    raise AssertionError("never stopped")


def train_runs(coordinator: str, num_processes: int, process_id: int, plan: dict) -> None:
    import neox_jax.train
    from neox_jax.config import load_config
    from neox_jax.distributed import Place, joined

    neox_jax.train.SHARED_SECONDS = 1
    results = []
    with joined(Place(coordinator, num_processes, process_id), facts={}, timeout_seconds=120) as peers:
        for item in plan["runs"]:
            config = load_config("configs/tiny.py", item["overrides"])
            result = neox_jax.train.train(config, item["folder"], peers=peers)
            run = neox_jax.train.Run(config, Path(item["folder"]), None, peers)
            rows, read = [], run.train_loader._samples.rows
            run.train_loader._samples.rows = lambda indices, read=read, rows=rows: rows.extend(indices) or read(indices)
            run.train_loader.batch(3)
            results.append({"result": vars(result), "rows": [int(row) for row in rows]})
    Path(plan["out"], f"{process_id}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    mode, coordinator, num_processes, process_id, plan = sys.argv[1:]
    {"peers": talk, "runs": train_runs}[mode](
        coordinator, int(num_processes), int(process_id), json.loads(Path(plan).read_text())
    )
