"""A TCP proxy that delays, holds or forgets what passes through it. Knows bytes and connections alone."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Self

_READ_BYTES: Final = 64 * 1024


class SlowProxy:
    """`async with SlowProxy(target) as proxy: …  # proxy.address`.

    - `delay_s`: what each chunk takes, each way; later chunks do not overtake it.
    - `hold()`: bytes are taken and not passed on, until `release()`, as in a network that loses packets.
    - `strand()`: the connections of now are never served again, and nobody is told, as when a machine behind
      them is gone; new ones are served.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.delay_s = 0.0
        self._flows = asyncio.Event()
        self._flows.set()
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = "127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for each in self._connections:
            each.end()
        while self._connections:  # noqa: ASYNC110  # their tasks end within a turn or two of the loop
            await asyncio.sleep(0.001)

    def hold(self) -> None:
        """Passes nothing on from now on."""
        self._flows.clear()

    def release(self) -> None:
        """Passes on what was held, in its order, and what comes."""
        self._flows.set()

    def strand(self) -> None:
        """Lets the connections of now hang for ever."""
        for each in self._connections:
            each.stranded = True

    def bury(self) -> None:
        """Ends the connections that hang, so that nobody has to find out."""
        for each in self._connections:
            if each.stranded:
                each.end()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            return
        connection = _Connection(self, (reader, writer), there)
        self._connections.add(connection)
        await connection.run()
        self._connections.discard(connection)

    async def passes(self) -> None:
        """Returns when bytes may go on."""
        await self._flows.wait()


class _Connection:
    """One connection, both ways."""

    def __init__(
        self,
        proxy: SlowProxy,
        here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._here, self._there = here, there
        self.stranded = False
        self._ways = [
            asyncio.create_task(self._carry(here[0], there[1])),
            asyncio.create_task(self._carry(there[0], here[1])),
        ]

    async def run(self) -> None:
        """Until one side closes."""
        await asyncio.wait(self._ways, return_when=asyncio.FIRST_COMPLETED)
        self.end()
        await asyncio.wait(self._ways)
        self._here[1].close()
        self._there[1].close()

    def end(self) -> None:
        """Carries nothing more."""
        for way in self._ways:
            way.cancel()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One way. Reads on while earlier bytes are on theirs, as a long line does."""
        loop = asyncio.get_running_loop()
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due_s, chunk = await line.get()
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                await self._proxy.passes()
                if not chunk:
                    return
                if not self.stranded:
                    writer.write(chunk)
                    await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            chunk = b"-"
            while chunk:
                chunk = await reader.read(_READ_BYTES)
                line.put_nowait((loop.time() + self._proxy.delay_s, chunk))
            await delivering
        except OSError:
            pass  # either side hung up
        finally:
            delivering.cancel()
