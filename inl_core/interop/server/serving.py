"""Bind, serve until a signal ends it, and say what is missing before anything is loaded."""

import asyncio
import importlib.util
import socket
from typing import TYPE_CHECKING, Any

from inl_core.errors import InlError, RecipeError

if TYPE_CHECKING:
    from inl_core.interop.server.engine import Engine

_SPARE_CONNECTIONS = 50
"""Besides those of the requests that wait or are computed."""
_ACCEPTED_AT_ONCE = 128
"""Connections that are accepted before idle ones are cut off for them; a process mostly has 1,024 file descriptors."""
_SECONDS_TO_FINISH = 3
"""What requests that are being answered get when the server is told to end; then they are told that it ends."""
_SECONDS_TO_LEAVE = 1
"""What clients get to take that last answer; then their connections are cut."""


def require_server() -> None:
    """RecipeError where FastAPI or uvicorn is not installed."""
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f'inl serve: {name} is not installed; pip install "inl[serve]"')


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        InlError: the address is in use, or is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        raise InlError(f"--host {host} --port {port}: {error.strerror or error}; name another port or host") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """What clients take as their base URL."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def build_server(app: Any, engine: "Engine", *, timeout: float) -> Any:
    """uvicorn's server for the application; `server.run(sockets=[bound])` serves until a signal.

    Args:
        timeout: seconds that a request may take, as the application has it.

    uvicorn would cancel the requests that are still open after a while, and log a traceback for each. Here they end
    before that: the engine tells them so, and a client that takes no answer, or sends none of its body, is cut off.
    """
    import uvicorn

    from inl_core.interop.server.connections import Connection, cut_off_slow_clients

    class Server(uvicorn.Server):
        async def main_loop(self) -> None:
            cutting = asyncio.create_task(cut_off_slow_clients(self.server_state.connections, timeout))
            await super().main_loop()
            cutting.cancel()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            ending = asyncio.create_task(self._end_requests())
            await super().shutdown(sockets)
            ending.cancel()

        async def _end_requests(self) -> None:
            await asyncio.sleep(_SECONDS_TO_FINISH)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))  # waits for the token being computed
            await asyncio.wait([closing], timeout=_SECONDS_TO_LEAVE)
            await asyncio.sleep(_SECONDS_TO_LEAVE)
            left: list[Any] = list(self.server_state.connections)
            for connection in left:
                connection.abort()

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        limit_concurrency=engine.max_waiting + engine.batch_size + _SPARE_CONNECTIONS,
        backlog=_ACCEPTED_AT_ONCE,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH + 4 * _SECONDS_TO_LEAVE,
    )
    return Server(config)
