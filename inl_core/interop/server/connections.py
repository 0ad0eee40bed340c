"""How long a client may keep a connection without using it, and how many connections there are.

uvicorn waits without end for headers, and for clients that do not take their answers; each such connection costs a file
descriptor, of which a process mostly has 1,024.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from inl_core.interop.server.app import refuse_all_but_health

SECONDS_FOR_HEADERS = 10
"""From the beginning of a connection, or the end of the answer before, to the end of a request's headers."""
SPARE_SECONDS = 10
"""What an answer may take beyond the time that the request had, until the client has all of it."""
EVERY_SECONDS = 1.0
"""How often connections are looked at."""


class Connection(H11Protocol):
    """uvicorn's connection, which knows since when it waits for a request."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # uvicorn would answer beyond its limit in plain text, and every probe of /health, too.
        self.most_connections, self.limit_concurrency = self.limit_concurrency, None

    def connection_made(self, transport: Any) -> None:
        """A client connects; where there are as many as may be, the one that has been idle longest makes room."""
        super().connection_made(transport)
        self.waits_since = self.loop.time()
        assert self.most_connections is not None
        if len(self.connections) >= self.most_connections:
            others: Any = self.connections - {self}
            idle = [other for other in others if other.is_idle]
            if idle:
                min(idle, key=lambda other: other.waits_since).abort()
            else:
                self.app = refuse_all_but_health(self.app)

    def on_response_complete(self) -> None:
        """The next request may come."""
        self.waits_since = self.loop.time()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered, and the client has all of the answer before."""
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered and not self.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Cut it off at once."""
        self.connections.discard(self)
        self.transport.abort()


async def cut_off_slow_clients(connections: set[Any], timeout: float) -> None:
    """Until it is cancelled: end connections that wait too long for headers, or whose client takes no answer.

    Args:
        connections: those of uvicorn, which it changes.
        timeout: seconds that a request may take.
    """
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(EVERY_SECONDS)
        for connection in list(connections):
            longest = SECONDS_FOR_HEADERS + (0 if connection.is_idle else timeout + SPARE_SECONDS)
            if loop.time() - connection.waits_since > longest:
                connection.abort()
