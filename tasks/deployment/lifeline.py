"""Run the command of one machine of a group so that the machines of the group end together.

python3 lifeline.py --leader HOST --port PORT --rank RANK --size SIZE -- COMMAND...

vLLM does not notice every lost machine: requests there would wait for minutes. This program starts the command at once.
Rank 0 listens, the other ranks connect to it for as long as it takes, and both sides send a heartbeat each second.

- A peer whose connection ends or is silent is lost: all processes of the command are killed at once, and the exit
  status is 69. Rank 0 tells the others which one it was.
- A rank whose command ends by itself exits with the command's status, which ends its connections.
- SIGTERM, SIGINT and SIGHUP end the group in order, whichever rank gets them: rank 0 sends SIGTERM to its command,
  which gives the running requests their answers; the others keep their commands until rank 0 has ended. A rank that got
  no signal itself exits with status 69, so that a service manager starts it again.
- vLLM 0.32 with data parallelism drops running requests at SIGTERM. So with --metrics, rank 0 first waits until no
  request is running or waiting; until then, new ones are still accepted.

A bundle for several machines has a copy of this file in serve/. It needs Python 3.11 and nothing else. What arrives on
the port can end the group, and nothing more; it carries no secrets and no commands. It is not protected, like the ports
between the machines of vLLM, so it belongs on the same network, which only the group shares.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

LOST = 69  # exit status: a service is unavailable (EX_UNAVAILABLE in sysexits.h)
LINE = 64  # bytes of a line, at most
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# the lines of a connection
HELLO = ("lifeline", "1")  # of a rank, first, followed by its number and the size of the group; 1: the version
WELCOME = "welcome"  # of rank 0: the rank has joined
ALIVE = "alive"  # of both: the heartbeat
LEAVING = "leaving"  # of a rank: it was told to end
ENDING = "ending"  # of rank 0: the group ends in order
GONE = "lost"  # of rank 0, followed by the number of the lost rank
REQUESTS = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")  # vLLM's metrics of each engine


class End(enum.Enum):
    """Why the group ends."""

    OWN = enum.auto()  # the command of this rank ended by itself
    ORDER = enum.auto()  # a rank was told to end
    LOSS = enum.auto()  # a peer is lost


class Link:
    """A connection between rank 0 and another rank. silent: own heartbeats since the last line arrived.

    It counts own heartbeats, not seconds: a process that was stopped must first read what arrived meanwhile.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.silent = 0

    def send(self, *words: object) -> None:
        """Send a line, if the connection is open."""
        if not self._writer.is_closing():
            self._writer.write(" ".join(map(str, words)).encode() + b"\n")

    async def line(self, seconds: float | None = None) -> list[str]:
        """The words of the next line; none if the connection ended, or if the line is too long, not text or late."""
        with suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(seconds):
                line = await self._reader.readline()
            if line.endswith(b"\n"):
                self.silent = 0
                return line.decode("ascii").split() or [""]
        return []

    async def lines(self) -> AsyncIterator[list[str]]:
        """The words of all further lines."""
        while words := await self.line():
            yield words

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


class Rank:
    """One machine of the group: its command, and its links to other ranks by their number."""

    child: asyncio.subprocess.Process

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.links: dict[int, Link] = {}
        self.told = asyncio.Event()  # by a signal
        self.ending = False  # in order
        self.over: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._running = False

    async def run(self) -> int:
        """Run the command until the group ends; the exit status. OSError if it cannot be started."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                loop.add_signal_handler(number, self._signalled)
        self.child = await asyncio.create_subprocess_exec(*self.options.command, start_new_session=True)
        self._running = True
        if self.told.is_set():
            self.end_in_order()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one) for one in (self.tend(), self._beat(), self._watch())]
                end = await self.over
                if end is End.ORDER and self.child.returncode is None:  # of another rank than 0
                    self.terminate()
                    await self._ended()
                self.kill()
                for link in self.links.values():
                    link.close()
                await self._ended()
                for task in tasks:
                    task.cancel()
        finally:
            self.kill()  # also what the command left behind
        return await self._status(end)

    async def tend(self) -> None:
        """Keep up the links."""

    def end_in_order(self) -> None:
        """End the group in order."""
        raise NotImplementedError

    def lose(self, rank: int, why: str) -> None:
        """End because a peer is lost."""
        if not self.over.done():
            self.say(f"rank {rank} is lost: {why}; its group ends")
            self.over.set_result(End.LOSS)

    def terminate(self) -> None:
        """Tell the command to end, and kill it after `drain` seconds."""
        with suppress(ProcessLookupError):
            self.child.terminate()
        asyncio.get_running_loop().call_later(self.options.drain, self.kill)

    def kill(self) -> None:
        """Kill all processes of the command."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def say(self, text: str) -> None:
        """Write a line to the log."""
        print(f"lifeline of rank {self.options.rank}: {text}", file=sys.stderr, flush=True)

    def _signalled(self) -> None:
        """End in order; at a second signal, the command is told at once."""
        if self._running:
            self.terminate() if self.told.is_set() else self.end_in_order()
        self.told.set()

    async def _beat(self) -> None:
        """Send heartbeats, and notice silence."""
        while True:
            await asyncio.sleep(self.options.heartbeat)
            for rank, link in self.links.items():
                link.send(ALIVE)
                link.silent += 1
                if link.silent * self.options.heartbeat > self.options.silence:
                    self.lose(rank, f"silent for {self.options.silence:g} s")

    async def _watch(self) -> None:
        """Notice the end of the command."""
        status = exit_status(await self.child.wait())
        if not self.told.is_set() and not self.ending and not self.over.done():
            self.say(f"the command ended with status {status}; its group ends")
        if self.ending and self.options.rank:
            # it ended with the command of rank 0, which will end the link; or by a fault, of which rank 0 must learn
            await asyncio.sleep(self.options.grace)
        if not self.over.done():
            self.over.set_result(End.ORDER if self.ending else End.OWN)

    async def _ended(self) -> None:
        """Wait until the command has ended, for `grace` seconds at most."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.child.wait(), self.options.grace)

    async def _status(self, end: End) -> int:
        found = exit_status(self.child.returncode)
        if end is not End.ORDER:
            return found if end is End.OWN else LOST
        if not self.told.is_set():
            # Kubernetes tells this rank too when it replaces the group; until then, the container must not start again
            with suppress(TimeoutError):
                await asyncio.wait_for(self.told.wait(), self.options.linger)
        if not self.told.is_set():
            return LOST
        return 0 if self.options.rank else found


class Leader(Rank):
    """Rank 0."""

    async def run(self) -> int:
        """Listen, then run the command. OSError if one of both is impossible."""
        try:
            bound = listening_socket(self.options.host, self.options.port)
        except OSError as error:
            where = f"{self.options.host or 'all addresses'}, port {self.options.port}"
            raise OSError(f"cannot listen on {where}: {error}; end the program that uses it, or correct it") from error
        self.server = await asyncio.start_server(self._connected, sock=bound, limit=LINE)
        if self.options.size == 1:
            self.server.close()
        return await super().run()

    def end_in_order(self) -> None:
        """Let the command give its answers, while the others keep theirs."""
        if not self.ending:
            self.ending = True
            self.server.close()
            for link in self.links.values():
                link.send(ENDING)
            asyncio.get_running_loop().call_later(self.options.drain, self.kill)
            self._draining = asyncio.create_task(self._drain())

    def lose(self, rank: int, why: str) -> None:
        """End because a peer is lost, and tell the others which."""
        if not self.over.done():
            for link in self.links.values():
                link.send(GONE, rank)
        super().lose(rank, why)

    async def _drain(self) -> None:
        """Tell the command to end, with --metrics not before its requests are answered."""
        with suppress(OSError, ValueError, TimeoutError):  # it does not serve
            async with asyncio.timeout(self.options.answers):
                quiet = 0
                while self.options.metrics and quiet < 2:  # a request may be on its way between two processes
                    quiet = 0 if await requests(self.options.metrics) else quiet + 1
                    await asyncio.sleep(self.options.heartbeat)
        self.terminate()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection, of a rank or of a stranger."""
        link = Link(reader, writer)
        rank = self._rank(await link.line(self.options.silence))
        if rank is None:
            link.close()
            return
        self.links[rank] = link
        link.send(WELCOME)
        if len(self.links) == self.options.size - 1:
            self.server.close()
            self.say(f"all {self.options.size} ranks are connected")
        try:
            async for words in link.lines():
                if words == [LEAVING]:
                    self.end_in_order()
        finally:
            self.lose(rank, "its connection ended")

    def _rank(self, words: list[str]) -> int | None:
        """The rank that a first line claims; None if no such rank is awaited.

        A rank is not taken twice: if it started again, its first connection ends, and with it the group.
        """
        if self.ending or self.over.done() or len(words) != 4 or tuple(words[:2]) != HELLO:
            return None
        awaited = {str(rank): rank for rank in range(1, self.options.size) if rank not in self.links}
        return awaited.get(words[2]) if words[3] == str(self.options.size) else None


class Follower(Rank):
    """Any other rank."""

    async def tend(self) -> None:
        """Join, and follow what rank 0 says."""
        if (link := await self._join()) is None:
            return
        self.links[0] = link
        self.say("connected to rank 0")
        async for words in link.lines():
            if words == [ENDING]:
                self.ending = True
            elif words[0] == GONE and len(words) == 2 and words[1].isdecimal():
                self.lose(int(words[1]), "rank 0 says so")
        if self.ending:
            self._finish()
        else:
            self.lose(0, "its connection ended")

    def end_in_order(self) -> None:
        """Ask rank 0 to end in order; without a link to it, end the command."""
        if link := self.links.get(0):
            link.send(LEAVING)
            asyncio.get_running_loop().call_later(self.options.drain + self.options.grace, self._finish)
        else:
            self.terminate()

    async def _join(self) -> Link | None:
        """A link to rank 0; None if this rank is told to end before there is one."""
        patience, said = self.options.silence, False
        while not self.told.is_set():
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(patience):
                    found = await asyncio.open_connection(self.options.leader, self.options.port, limit=LINE)
                link = Link(*found)
                link.send(*HELLO, self.options.rank, self.options.size)
                if await link.line(patience) == [WELCOME] and not self.told.is_set():
                    return link
                link.close()
                if not said:
                    self.say(f"rank 0 does not accept rank {self.options.rank} of {self.options.size}; trying again")
                said = True
            await asyncio.sleep(self.options.heartbeat)
        return None

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(End.ORDER)


def listening_socket(host: str | None, port: int) -> socket.socket:
    """A socket that listens on an address of this machine, or on all of them. OSError if the port is in use."""
    if host:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    with suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


async def requests(port: int) -> float:
    """The number of requests that vLLM on this machine runs or lets wait. OSError or ValueError if it does not say."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")  # 1.0: the answer is not in chunks
    text = (await reader.read()).decode()
    writer.close()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(REQUESTS))


def exit_status(found: int | None) -> int:
    """A process' exit status as shells give it: above 128 after a signal. found: None if it does not end."""
    if found is None:
        return LOST
    return found if found >= 0 else 128 - found


def read_options(arguments: list[str]) -> argparse.Namespace:
    """The options before `--`, and the command after it. Exits with status 2 if they are wrong."""
    split = [*arguments, "--"].index("--")
    parser = argparse.ArgumentParser(
        prog="lifeline.py",
        usage="%(prog)s --leader HOST --port PORT --rank RANK --size SIZE [options] -- COMMAND...",
        description="Run the command of one machine of a group so that the machines of the group end together.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--leader", required=True, metavar="HOST", help="address of rank 0")
    parser.add_argument("--port", required=True, type=int, help="port of rank 0")
    parser.add_argument("--rank", required=True, type=int, help="number of this machine; 0 is the leader")
    parser.add_argument("--size", required=True, type=int, help="number of machines")
    parser.add_argument(
        "--host",
        default=os.environ.get("VLLM_HOST_IP"),
        help="own address on which rank 0 listens, by default VLLM_HOST_IP or all",
    )
    parser.add_argument("--metrics", type=int, metavar="PORT", help="of vLLM at rank 0, to wait for its requests")
    for name, seconds, what in (
        ("heartbeat", 1, "between two heartbeats"),
        ("silence", 5, "without a heartbeat of a peer until it is lost"),
        ("drain", 90, "for the command to end after a signal, until it is killed"),
        ("answers", 60, "of them, at most, to wait with --metrics before the command is told to end"),
        ("grace", 10, "between the end of the command of rank 0 and those of the others, until they are killed"),
        ("linger", 30, "to wait for a signal before the end, if only another rank was told to end"),
    ):
        parser.add_argument(f"--{name}", type=float, default=seconds, metavar="SECONDS", help=what)
    options = parser.parse_args(arguments[:split])
    options.command = arguments[split + 1 :]
    if not options.command:
        parser.error("expected -- and a command")
    if not 0 <= options.rank < options.size:
        parser.error(f"--rank is {options.rank}; expected a number from 0 to below --size, which is {options.size}")
    if not 0 < 2 * options.heartbeat <= options.silence:
        parser.error(f"--silence is {options.silence:g}; expected at least twice --heartbeat")
    return options


async def main() -> None:
    """Run as a program."""
    options = read_options(sys.argv[1:])
    rank = Follower(options) if options.rank else Leader(options)
    try:
        status = await rank.run()
    except OSError as error:
        rank.say(str(error))
        status = 1
    os._exit(status)  # a thread may still look up the address of rank 0


if __name__ == "__main__":
    asyncio.run(main())
