"""`inl serve` of a tiny model on a free port of loopback, for the tests."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from inl_core.inference.generate import generate
from inl_core.inference.loading import LoadedModel
from inl_core.inference.settings import GenerationSettings
from inl_core.interop.server import engine as engines
from inl_core.interop.server import serving
from inl_core.interop.server.app import ServerSettings, build_app
from inl_core.interop.server.engine import Engine


@dataclass
class Served:
    """A server that runs."""

    loaded: LoadedModel
    engine: Engine
    url: str
    server: Any

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="any", max_retries=0)

    def post(self, body: Any, path: str = "completions") -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}/{path}", content=content, timeout=60)

    def text_of(self, prompt: str, **settings: Any) -> str:
        """What `inl generate` writes."""
        return generate(self.loaded.model, self.loaded.tokenizer, [prompt], GenerationSettings(**settings))[0].text


@contextmanager
def serving_of(loaded: LoadedModel, *, timeout: float = 60, max_waiting: int = 512) -> Iterator[Served]:
    engine, bound = Engine(loaded, max_waiting=max_waiting), serving.bind("127.0.0.1", 0)
    app = build_app(engine, ServerSettings("tiny", timeout=timeout))
    server = serving.build_server(app, engine, timeout=timeout)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield Served(loaded, engine, serving.url_of(bound), server)
    finally:
        server.should_exit = True
        thread.join()


GOOD = {"model": "tiny", "prompt": "a", "max_tokens": 1}


class Blocked:
    """Stands for the model: a batch waits until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.released, self.given_up = threading.Event(), threading.Event(), threading.Event()
        self.real = engines.stream_together
        monkeypatch.setattr(engines, "stream_together", self)

    def __call__(self, decoder: Any, tokenizer: Any, requests: Any, is_wanted: Any) -> Any:
        self.entered.set()
        while not self.released.wait(0.01):
            if not is_wanted(0):
                self.given_up.set()
        yield from self.real(decoder, tokenizer, requests, is_wanted)
