"""Bind, serve until a signal ends it, and say what is missing before anything is loaded."""

import importlib.util
import socket
from typing import Any

from inl_core.errors import InlError, RecipeError

_SECONDS_TO_FINISH = 10
"""What requests that are being answered get when the server is told to end."""


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


def build_server(app: Any) -> Any:
    """uvicorn's server for the application; `server.run(sockets=[bound])` serves until a signal."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    return uvicorn.Server(config)
