"""The processes of one run, seen from one of them: they meet, compare, agree, and learn of each other's end. No jax.

Process 0 has a hub (`hub.py`), a thread that every process, its own too, has one TCP connection with. A connection that
ends without a goodbye is a process that died, and everybody is told at once: a collective would wait for it until jax's
heartbeat gives up.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

from neox_jax.errors import InputError, NumbersError
from neox_jax.hub import (
    AGAIN,
    EXIT_BAD_INPUT,
    EXIT_BAD_NUMBERS,
    EXIT_DEFECT,
    EXIT_START_AGAIN,
    HELLO_SECONDS,
    LATECOMER_SECONDS,
    LEAVE_SECONDS,
    MAX_LINE_BYTES,
    PROTOCOL,
    RETRY_SECONDS,
    ROLL_SECONDS,
    Hub,
    decode,
    encode,
    hang_up,
    keep_alive,
    open_listener,
    reason,
)

EXIT_INTERRUPTED = 130


class StopSignal:
    """Notes SIGTERM and Ctrl-C instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.requested = False
        self._previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: the caller's affair
                return

    def _note(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        for number, handler in self._previous.items():
            # None: it was not set from Python (jax's, which is of no use once ours has been there)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Alone:
    """A run of one process: what `Peers` has, with nobody to wait for."""

    process_id, num_processes = 0, 1

    def __init__(self):
        self.hosts = (socket.gethostname(),)
        self.on_roll_call = None
        self._signal = None

    def gather(self, what: str, value=None) -> list:
        return [value]

    def check_same(self, what: str, facts: dict) -> None:
        pass

    @contextlib.contextmanager
    def noting_signals(self):
        self._signal = StopSignal()
        try:
            yield
        finally:
            self._signal.restore()

    def end_on_signals(self) -> None:
        pass

    def agree_to_stop(self, step: int) -> bool:
        return self._signal.requested

    def end_stuck(self, line: str) -> None:
        """Ends the process, whatever its main thread is in."""
        _say(f"{line}; {AGAIN}")
        _exit(EXIT_START_AGAIN)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Peers:
    """One process's place among the `num_processes` of a run; made by `meet`.

    hosts: the host of each process. on_roll_call: called, in another thread, before all are ended because one hangs. As
    a context it ends the process, and all others, where its body raises: a process that left by itself would be waited
    for, by the others in a collective and by itself when jax shuts down.
    """

    def __init__(self, connection: socket.socket, lines, hello: dict, welcome: dict, timeout_seconds: float, hub=None):
        self.process_id, self.num_processes = hello["id"], hello["num_processes"]
        self.hosts = tuple(welcome["hosts"])
        self.debug = False  # show the traceback of an InputError
        self.on_roll_call = None
        self._connection, self._lines, self._hub = connection, lines, hub
        self._timeout_seconds = timeout_seconds
        self._sending, self._changed, self._ending = threading.Lock(), threading.Condition(), threading.Lock()
        self._num_calls, self._answers = 0, {}
        self._step, self._stop_at, self._asked, self._deciding = -1, None, False, False
        self._signal, self._closed = None, False
        self._reader = threading.Thread(target=self._listen, name="neox_jax.peers", daemon=True)
        self._reader.start()

    def gather(self, what: str, value=None) -> list:
        """The values that all processes give here, by process; JSON. All are waited for."""
        return self._call({"what": what, "value": value, "same": False})

    def check_same(self, what: str, facts: dict) -> None:
        """Ends all processes with a line that names who differs, where the facts (name to JSON) do."""
        self._call({"what": what, "value": facts, "same": True})

    def _call(self, call: dict) -> list:
        with self._changed:
            number = self._num_calls
            self._num_calls += 1
        self._send({"op": "call", "number": number, **call})
        # The hub ends everybody where one is late; this is for a hub that does nothing at all.
        patience = self._timeout_seconds + 2 * LEAVE_SECONDS
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._answers, patience):
                raise TimeoutError(f"process 0 on {self.hosts[0]} did not answer {call['what']!r} for {patience:.0f} s")
            return self._answers.pop(number)

    def note_signals(self) -> None:
        """SIGTERM and Ctrl-C are noted from now on until the process ends, for `agree_to_stop`."""
        self._signal = StopSignal()

    @contextlib.contextmanager
    def noting_signals(self):
        """Here they are noted for as long as there are several processes."""
        yield

    def end_on_signals(self) -> None:
        """SIGTERM and Ctrl-C end this process again, and so all: for what has nothing to save."""
        self._signal.restore()
        if self._signal.requested:
            raise KeyboardInterrupt

    def agree_to_stop(self, step: int) -> bool:
        """Whether to stop after `step`: every process gets the same answer at the same step.

        To be called after each step, ascending. Where one got a signal, each tells the last step that it answered and
        holds on; the one after the highest of them is where all stop, since none is beyond that yet.
        """
        wanted = self._signal is not None and self._signal.requested
        with self._changed:
            if not self._changed.wait_for(lambda: not self._deciding, self._timeout_seconds):
                raise TimeoutError(f"the processes did not agree where to stop for {self._timeout_seconds:.0f} s")
            self._step = step
            ask, self._asked = wanted and not self._asked, self._asked or wanted
            stop = self._stop_at is not None and step >= self._stop_at
        if ask:
            self._send({"op": "stop"})
        return stop

    def end_stuck(self, line: str) -> None:
        """Ends all processes with this line and who it is that hangs: those that do not answer, or are behind.

        line: what takes too long, as this process sees it. A process that answers nothing because it is stopped finds
        out, and ends, when it goes on.
        """
        self._send({"op": "stuck", "line": line})
        time.sleep(ROLL_SECONDS + LEAVE_SECONDS)  # the reader ends this process before that
        self._end(f"{line}: process 0 ({self.hosts[0]}) does not answer; {AGAIN}", EXIT_START_AGAIN)

    def close(self) -> None:
        """Says goodbye: from now on nobody minds that this process ends."""
        self._closed = True
        self._send({"op": "bye"})
        hang_up(self._connection)
        self._reader.join(LEAVE_SECONDS)
        if self._hub is not None:
            self._hub.join(self._timeout_seconds)
        if self._signal is not None:
            self._signal.restore()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends all processes with one line that names this one and the reason; what is a defect of ours has its
        traceback here."""
        if isinstance(error, InputError) and not self.debug:
            line, code = str(error), EXIT_BAD_INPUT
        elif isinstance(error, NumbersError):
            line, code = str(error), EXIT_BAD_NUMBERS
        elif isinstance(error, KeyboardInterrupt):
            line, code = "interrupted", EXIT_INTERRUPTED
        else:
            # Perhaps it is only what comes of another one's end, of which we are about to be told.
            time.sleep(RETRY_SECONDS * 5)
            with self._ending:
                traceback.print_exception(error)
            line, code = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", EXIT_DEFECT
        self._send({"op": "fail", "line": line, "code": code})
        time.sleep(LEAVE_SECONDS)
        self._end(f"process {self.process_id} ({self.hosts[self.process_id]}): {line}", code)

    def _send(self, message: dict) -> None:
        with self._sending, contextlib.suppress(OSError):  # a lost connection is the reader's to report
            self._connection.sendall(encode(message))

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._lines:
                self._take(json.loads(line))
        if not self._closed:
            self._end(f"process 0 ({self.hosts[0]}) is gone; {AGAIN}", EXIT_START_AGAIN)

    def _take(self, message: dict) -> None:
        if message["op"] == "end":
            self._end(message["line"], message["code"])
        if message["op"] == "where":
            with self._changed:
                self._deciding = True
                step = self._step
            self._send({"op": "at", "step": step})
            return
        if message["op"] == "roll":
            self._send({"op": "here", "step": self._step + 1})
            if self.on_roll_call is not None:
                self.on_roll_call()
            return
        with self._changed:
            if message["op"] == "answer":
                self._answers[message["number"]] = message["values"]
            elif message["op"] == "stop":
                self._stop_at, self._deciding = message["step"], False
            self._changed.notify_all()

    def _end(self, line: str, code: int) -> None:
        """Ends the process, whatever its main thread is in the middle of."""
        self._ending.acquire()  # for good: the first line is the one to be seen
        _say(line)
        hang_up(self._connection)
        if self._hub is not None:
            self._hub.join(LEAVE_SECONDS)
        _exit(code)


def _say(line: str) -> None:
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
    with contextlib.suppress(OSError):
        os.write(2, f"{cursor}neox-jax: {line}\n".encode())


def _exit(code: int) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def meet(
    coordinator: str,
    *,
    num_processes: int,
    process_id: int,
    facts: dict,
    timeout_seconds: float,
    heartbeat_seconds: float = 100,
    problem: str | None = None,
) -> Peers:
    """Waits until all processes are there and compares what they were started with.

    coordinator: HOST:PORT, where process 0 listens until all are there; afterwards the port is free. facts: name to
    JSON, to be the same everywhere. problem: what keeps this process from taking part, for the others to know.
    Raises: InputError with one line, the same in all processes, for one that did not come, that came twice, that
    differs or that has a problem.
    """
    hello = {"op": "hello", "neox_jax": PROTOCOL, "id": process_id, "num_processes": num_processes}
    hello |= {"host": socket.gethostname(), "facts": facts, "problem": problem}
    hello = decode(encode(hello))  # as the others get it: tuples are lists
    host, _, port = coordinator.rpartition(":")
    host, hub = host.strip("[]"), None
    if process_id == 0:
        listener = open_listener(host, int(port))
        hub = Hub(listener, hello, coordinator, timeout_seconds=timeout_seconds, heartbeat_seconds=heartbeat_seconds)
        hub.start()
        host = listener.getsockname()[0]
        host = "127.0.0.1" if host in ("::", "0.0.0.0") else host
    try:
        connection, lines, answer = _say_hello(host, int(port), hello, timeout_seconds=timeout_seconds)
    except OSError as error:
        if problem is not None:
            raise InputError(problem) from error
        raise InputError(
            f"process {process_id} (of {num_processes}), on {hello['host']}, did not find process 0 at {coordinator} "
            f"within {timeout_seconds:g} s ({reason(error)}); start it there, or open the port"
        ) from error
    if answer["op"] == "end":
        hang_up(connection)
        if hub is not None:
            hub.join(LEAVE_SECONDS)
        raise InputError(answer["line"])
    keep_alive(connection, heartbeat_seconds)
    return Peers(connection, lines, hello, answer, timeout_seconds, hub)


def _say_hello(host: str, port: int, hello: dict, *, timeout_seconds: float):
    """Connects and waits for the answer: (connection, its lines, answer). Raises: OSError when time is up."""
    # With a problem of our own there is nothing to wait for: whoever listens is told.
    deadline = time.monotonic() + (timeout_seconds if hello["problem"] is None else LATECOMER_SECONDS)
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=HELLO_SECONDS)
            try:
                # The hub's own patience ends before this does, as it began earlier.
                connection.settimeout(timeout_seconds + LATECOMER_SECONDS + HELLO_SECONDS)
                connection.sendall(encode(hello))
                lines = connection.makefile("rb")
                answer = decode(lines.readline(MAX_LINE_BYTES))
                if answer.get("op") in ("welcome", "end"):
                    connection.settimeout(None)
                    return connection, lines, answer
                raise ConnectionError("what answers there is no process 0 of a neox-jax run")
            except BaseException:
                connection.close()
                raise
        except OSError:  # not there yet, or something else is, perhaps the end of an earlier run
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
