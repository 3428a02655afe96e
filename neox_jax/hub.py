"""Process 0's end of the connections between a run's processes: who is there, what they say, who has gone. No jax.

A message is a line of JSON. Like jax's own coordinator, the hub trusts whoever reaches its port and speaks as a process
of the run would.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time

from neox_jax.errors import InputError

EXIT_DEFECT, EXIT_BAD_INPUT, EXIT_BAD_NUMBERS, EXIT_START_AGAIN = 1, 65, 70, 75
PROTOCOL = 1
MAX_LINE_BYTES = 2**20
HELLO_SECONDS = 10  # for a connection to say who it is
LATECOMER_SECONDS = 5  # how long those that come after a problem is known are waited for, so that they learn of it
ROLL_SECONDS = 5  # for all to answer to a roll call
LEAVE_SECONDS = 5  # for all to leave before process 0, whose end jax would report in its own way
RETRY_SECONDS = 0.2
MAX_DIFFERENCES, MAX_NAMED = 3, 10
AGAIN = "start it again: a run goes on from its last checkpoint"


@dataclasses.dataclass(eq=False)
class _Member:
    """A connection that has said hello."""

    id: int
    host: str
    hello: dict
    writer: asyncio.StreamWriter
    left: bool = False

    def __str__(self) -> str:
        return f"process {self.id} ({self.host})"


class Hub(threading.Thread):
    """Process 0's end of all connections; the thread ends when every process has left."""

    def __init__(self, listener, hello: dict, coordinator: str, *, timeout_seconds: float, heartbeat_seconds: float):
        super().__init__(name="neox_jax.peers.hub", daemon=True)
        self._listener, self._hello, self._coordinator = listener, hello, coordinator
        self._timeout_seconds, self._heartbeat_seconds = timeout_seconds, heartbeat_seconds
        self._num_processes = hello["num_processes"]
        self._members: dict[int, _Member] = {}
        self._connected: set[_Member] = set()  # those that cannot take part are told why, too
        self._problem = None
        self._meeting, self._ended = True, False
        self._calls: dict[int, dict] = {}
        self._steps: dict[int, int] | None = None
        self._roll: dict[int, int] | None = None

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._changed = asyncio.Event()
        server = await asyncio.start_server(self._talk, sock=self._listener, limit=MAX_LINE_BYTES)
        await self._meet()
        self._meeting = False
        server.close()  # jax's coordinator is the next to listen here
        if self._problem is None:
            hosts = [self._members[i].host for i in range(self._num_processes)]
            self._tell({"op": "welcome", "hosts": hosts})
        else:
            self._end(self._problem, EXIT_BAD_INPUT)
        while self._connected:
            await self._wait(LEAVE_SECONDS if self._ended else None)
            if self._ended and not self._changed.is_set():
                break

    async def _wait(self, seconds: float | None) -> None:
        """Until something changes, or for so long."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _meet(self) -> None:
        now = asyncio.get_running_loop().time
        deadline, known = now() + self._timeout_seconds, False
        while len(self._members) < self._num_processes or self._problem is not None:
            if self._problem is not None and not known:
                deadline, known = min(deadline, now() + LATECOMER_SECONDS), True
            if now() >= deadline or (known and len(self._connected) >= self._num_processes):
                break
            await self._wait(deadline - now())
        if self._problem is None and len(self._members) < self._num_processes:
            missing = [i for i in range(self._num_processes) if i not in self._members]
            here = ", ".join(f"{self._members[i].host} ({i})" for i in sorted(self._members))
            self._problem = (
                f"{_numbered(missing)} (of {self._num_processes}) did not arrive at {self._coordinator} within "
                f"{self._timeout_seconds:g} s; here are {here}"
            )

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, first line to last; one that does not say hello properly is closed without a word."""
        member = None
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = _parse_hello(await reader.readline())
            if hello is None or not self._meeting:
                return
            keep_alive(writer.get_extra_info("socket"), self._heartbeat_seconds)
            member = _Member(hello["id"], hello["host"], hello, writer)
            self._admit(member)
            async for line in reader:
                self._take(member, json.loads(line))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a stranger, or a connection that broke: what is left of it is below
        except asyncio.CancelledError:
            pass  # the hub has ended; Python 3.11 would print a traceback
        finally:
            writer.close()
            if member is not None:
                self._leave(member)

    def _admit(self, member: _Member) -> None:
        hello, first = member.hello, self._hello
        self._connected.add(member)
        problem = None
        if hello["num_processes"] != self._num_processes:
            problem = (
                f"{member} was started as one of {hello['num_processes']} processes, process 0 ({first['host']}) as "
                f"one of {self._num_processes}; start all with the same number"
            )
        elif member.id in self._members:
            hosts = f"{self._members[member.id].host} and {member.host}"
            problem = f"process {member.id} was started twice, on {hosts}; give each its own id"
        elif hello["problem"] is not None:
            problem = f"{member}: {hello['problem']}"
            self._members[member.id] = member
        else:
            if first["problem"] is None:
                problem = _difference(member, hello["facts"], first["host"], first["facts"])
            self._members[member.id] = member
        self._problem = self._problem or problem
        self._changed.set()

    def _leave(self, member: _Member) -> None:
        self._connected.discard(member)
        self._changed.set()
        if self._meeting and self._members.get(member.id) is member:
            del self._members[member.id]
        elif not self._meeting and not member.left:
            self._end(f"{member} is gone; {AGAIN}", EXIT_START_AGAIN)

    def _take(self, member: _Member, message: dict) -> None:
        match message["op"]:
            case "call":
                self._take_call(member, message)
            case "stop" if self._steps is None:
                self._steps = {}
                self._tell({"op": "where"})
            case "at":
                self._steps[member.id] = message["step"]
                if len(self._steps) == self._num_processes:
                    self._tell({"op": "stop", "step": max(self._steps.values()) + 1})
            case "stuck" if self._roll is None:
                self._roll, self._stuck = {}, message["line"]
                self._tell({"op": "roll"})
                asyncio.get_running_loop().call_later(ROLL_SECONDS, self._end_roll)
            case "here":
                self._roll[member.id] = message["step"]
                if len(self._roll) == len(self._present()):
                    self._end_roll()
            case "fail":
                self._end(f"{member}: {message['line']}", message["code"])
            case "bye":
                member.left = True

    def _take_call(self, member: _Member, message: dict) -> None:
        number, what = message["number"], message["what"]
        if number not in self._calls:
            late = asyncio.get_running_loop().call_later(self._timeout_seconds, self._report_late, number)
            self._calls[number] = {"what": what, "values": {}, "late": late}
        call = self._calls[number]
        if call["what"] != what:
            self._end(f"{member} is at {what!r}, another at {call['what']!r}: a defect of neox-jax", EXIT_DEFECT)
            return
        call["values"][member.id] = message["value"]
        if len(call["values"]) < self._num_processes:
            return
        call["late"].cancel()
        del self._calls[number]
        values = [call["values"][i] for i in range(self._num_processes)]
        differing = []
        if message["same"]:
            others = zip(self._members.values(), (values[i] for i in self._members), strict=True)
            differing = [_difference(m, facts, self._hello["host"], values[0]) for m, facts in others]
        line = next((line for line in differing if line is not None), None)
        if line is not None:
            self._end(line, EXIT_BAD_INPUT)
        else:
            self._tell({"op": "answer", "number": number, "values": [] if message["same"] else values})

    def _report_late(self, number: int) -> None:
        call = self._calls[number]
        missing = [i for i in range(self._num_processes) if i not in call["values"]]
        names = ", ".join(f"{self._members[i].host} ({i})" for i in missing[:MAX_NAMED])
        self._end(
            f"{_numbered(missing)} (of {self._num_processes}), on {names}, did not come to {call['what']!r} within "
            f"{self._timeout_seconds:g} s; {AGAIN}",
            EXIT_START_AGAIN,
        )

    def _end_roll(self) -> None:
        """Ends all with a line that names the silent or, where all answered, those that are behind."""
        steps = {self._members[i]: step for i, step in self._roll.items()}
        silent = [member for member in self._present() if member not in steps]
        first, last = min(steps.values(), default=0), max(steps.values(), default=0)
        behind = [member for member, step in steps.items() if step == first]
        if silent:
            verb = "does" if len(silent) == 1 else "do"
            who = f"{_listed(silent)} {verb} not answer (stopped, or the host is gone)"
        elif first < last:
            who = f"{_listed(behind)} {'is' if len(behind) == 1 else 'are'} {_at(first)}, the furthest {_at(last)}"
        else:
            who = f"all {len(steps)} processes answer, and are {_at(first)}"
        self._end(f"{self._stuck}: {who}; {AGAIN}", EXIT_START_AGAIN)

    def _present(self) -> list[_Member]:
        return [self._members[i] for i in sorted(self._members) if not self._members[i].left]

    def _end(self, line: str, code: int) -> None:
        """The first reason is the one that all end with."""
        if not self._ended:
            self._ended = True
            self._tell({"op": "end", "line": line, "code": code})
            self._changed.set()

    def _tell(self, message: dict) -> None:
        for member in self._connected:
            with contextlib.suppress(OSError):
                member.writer.write(encode(message))


def _listed(members: list[_Member]) -> str:
    """'process 3 (c), process 5 (e)'; of many the first."""
    more = f" and {len(members) - MAX_NAMED} more" if len(members) > MAX_NAMED else ""
    return ", ".join(map(str, members[:MAX_NAMED])) + more


def _at(step: int) -> str:
    return f"at step {step}" if step else "before the first step"


def _difference(member: _Member, facts: dict, first_host: str, wanted: dict) -> str | None:
    names = [name for name in {**wanted, **facts} if facts.get(name) != wanted.get(name)]
    if not names:
        return None
    shown = [f"{name} is {facts.get(name)!r}, not {wanted.get(name)!r}" for name in names[:MAX_DIFFERENCES]]
    more = f" (and {len(names) - MAX_DIFFERENCES} more)" if len(names) > MAX_DIFFERENCES else ""
    return f"{member} differs from process 0 ({first_host}): {'; '.join(shown)}{more}; start all alike"


def _parse_hello(line: bytes) -> dict | None:
    """A hello of ours, or None."""
    hello = decode(line)
    kinds = {"neox_jax": int, "id": int, "num_processes": int, "host": str, "facts": dict}
    if hello.get("op") != "hello" or any(not isinstance(hello.get(name), kind) for name, kind in kinds.items()):
        return None
    if hello["neox_jax"] != PROTOCOL or not isinstance(hello.get("problem"), str | None):
        return None
    return hello if hello["id"] >= 0 and len(hello["host"]) <= 255 else None


def _numbered(ids: list[int]) -> str:
    """'process 3', 'processes 3, 5-9'."""
    runs = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"process{'es' if len(ids) > 1 else ''} {', '.join(texts)}"


def loopback(host: str) -> str | None:
    """The loopback address, where that is all that is asked for.

    By what is written, not by what it resolves to: Debian has a host's own name at 127.0.1.1.
    """
    return "127.0.0.1" if host == "localhost" else host if host == "::1" or host.startswith("127.") else None


def open_listener(host: str, port: int) -> socket.socket:
    """Listens at the loopback address, if that is where process 0 is met, else at all addresses of this host."""
    address = loopback(host)
    dual = address is None and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or address == "::1" else socket.AF_INET
    deadline = time.monotonic() + HELLO_SECONDS
    while True:
        try:
            return socket.create_server((address or "", port), family=family, dualstack_ipv6=dual, backlog=1024)
        except OSError as error:
            if time.monotonic() > deadline:  # not at once: a run that has just ended may still be there
                raise InputError(
                    f"process 0 cannot listen on port {port} of {socket.gethostname()} ({reason(error)}); is another "
                    f"run, or a second process 0, there? Give --coordinator another port"
                ) from error
            time.sleep(RETRY_SECONDS)


def keep_alive(connection: socket.socket, seconds: float) -> None:
    """A host that vanished without a word is noticed within so many seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", seconds / 2), ("TCP_KEEPINTVL", seconds / 10), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, int(value)))


def hang_up(connection: socket.socket) -> None:
    """Ends what we send; what was sent still arrives."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def encode(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict:
    """The message on a line, or {} for what is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
