"""A function of many items, in processes of its own, with the results in the order of the items."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import signal
from collections.abc import Callable, Iterable, Iterator

from neox_jax.errors import InputError

ITEMS_AHEAD = 3  # for each process: how many items are read ahead of what was yielded, which bounds the memory


def map_in_order(make: Callable[[], Callable], items: Iterable, *, workers: int) -> Iterator:
    """Yields make()(item) for each item. workers: processes, started as they are needed; 1 is this one.

    make: called once in each process, to which it is pickled. Close the generator to end the processes; where this one
    is killed, they end after the item that they are at.
    Raises: the InputError of the first item, in their order, that has one; InputError for a process that was killed.
    """
    if workers == 1:
        yield from map(make(), items)
        return
    processes = {}  # by connection
    try:
        for answer in _map(make, items, processes, workers):
            if isinstance(answer, InputError):
                raise answer
            yield answer
    finally:
        for connection, process in processes.items():
            process.kill()  # it has nothing to put in order
            process.join()
            connection.close()


def _map(make: Callable[[], Callable], items: Iterable, processes: dict, workers: int) -> Iterator:
    numbered = enumerate(items)
    idle, running, done = [], {}, {}  # connections; the number of its item by connection; answers by number
    next_number = 0
    while True:
        ready = []
        while next_number in done:
            ready.append(done.pop(next_number))
            next_number += 1
        # Work is handed out before what is ready is, so that nobody waits for whoever takes that.
        while len(running) < workers and len(running) + len(done) < ITEMS_AHEAD * workers:
            number, item = next(numbered, (None, None))
            if number is None:
                break
            connection = idle.pop() if idle else _start(make, processes)
            _talk(processes[connection], connection.send, item)
            running[connection] = number
        yield from ready
        if not running:
            return
        for connection in multiprocessing.connection.wait(list(running)):
            done[running.pop(connection)] = _talk(processes[connection], connection.recv)
            idle.append(connection)


def _start(make: Callable[[], Callable], processes: dict) -> multiprocessing.connection.Connection:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make), daemon=True)
    # Ctrl-C reaches the whole process group. Only this process is to act on it; a blocked signal is inherited.
    multiprocessing.resource_tracker.ensure_running()  # else it is started by process.start, and unblocks it
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
        processes[here] = process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        there.close()
    return here


def _talk(process: multiprocessing.Process, talk: Callable, *arguments):
    try:
        return talk(*arguments)
    except (EOFError, ConnectionError) as error:
        process.join()
        if process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise InputError(
                f"a worker process was killed ({name}); where memory ran out, use fewer workers or shorter documents"
            ) from error
        raise RuntimeError(f"a worker process ended with exit code {process.exitcode}") from error


def _serve(connection: multiprocessing.connection.Connection, make: Callable[[], Callable]) -> None:
    """What a worker process does until the other end of its connection closes, if only because that process died."""
    function = make()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = function(item)
        except InputError as error:
            answer = error
        try:
            connection.send(answer)
        except ConnectionError:
            return
