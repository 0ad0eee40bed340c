"""Bind, serve until a signal ends it, and say what is missing before anything is loaded."""

import asyncio
import importlib.util
import socket
from typing import TYPE_CHECKING, Any

from inl_core.errors import InlError, RecipeError

if TYPE_CHECKING:
    from inl_core.interop.server.engine import Engine

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


def build_server(app: Any, engine: "Engine") -> Any:
    """uvicorn's server for the application; `server.run(sockets=[bound])` serves until a signal.

    uvicorn would cancel the requests that are still open after a while, and log a traceback for each. Here they end
    before that: the engine tells them so, and a client that takes no answer, or sends none of its body, is cut off.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            ending = asyncio.create_task(self._end_requests())
            await super().shutdown(sockets)
            ending.cancel()

        async def _end_requests(self) -> None:
            await asyncio.sleep(_SECONDS_TO_FINISH)
            closing = asyncio.create_task(asyncio.to_thread(engine.close))  # waits for the token being computed
            await asyncio.wait([closing], timeout=_SECONDS_TO_LEAVE)
            await asyncio.sleep(_SECONDS_TO_LEAVE)
            for connection in list(self.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH + 4 * _SECONDS_TO_LEAVE,
    )
    return Server(config)
