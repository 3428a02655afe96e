"""Which of a run's hosts holds the others up, by what each process measured. No jax."""

import statistics

SLOW_SHARE = 0.2  # of a step: what a process may take beyond the median


def slow_hosts(rows: list[dict], hosts: tuple[str, ...]) -> list[str]:
    """A line for each process that takes longer than the median by more than SLOW_SHARE of a step, for anything.

    rows: by process, name to seconds a step ("step_seconds", "data_wait_seconds" ...), `step_seconds` among them; the
    same names in all. For the step itself that is 1.2 times the median; what takes microseconds is never reported.
    """
    # The lower one: the faster of two processes is what the other is compared with.
    medians = {name: statistics.median_low(row[name] for row in rows) for name in rows[0]}
    bearable = SLOW_SHARE * medians["step_seconds"]
    lines = []
    for process_id, row in enumerate(rows):
        slow = [
            f"{name.removesuffix('_seconds').replace('_', ' ')} {row[name]:.3g} s (median {median:.3g} s)"
            for name, median in medians.items()
            if row[name] - median > bearable
        ]
        if slow:
            lines.append(f"process {process_id} ({hosts[process_id]}) is slow: {', '.join(slow)}")
    return lines
