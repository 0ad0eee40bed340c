"""`inl serve` and its connections: full queues, slow clients, clients that go away, and the end of the server."""

import asyncio
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest

from inl_core.inference.loading import LoadedModel
from inl_core.interop.server import connections, serving
from tests.interop.served import GOOD, Blocked, Served, serving_of


def test_a_full_queue_turns_requests_away_and_the_others_are_still_served(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = Blocked(monkeypatch)
    with serving_of(loaded, max_waiting=1) as served, ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.post, GOOD)
        assert blocked.entered.wait(30)
        answer = served.post(GOOD | {"prompt": ["a", "b"]})  # two prompts where one may wait
        blocked.released.set()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert first.result().status_code == 200
        assert served.post(GOOD).status_code == 200


def test_a_request_that_takes_too_long_is_ended_and_no_longer_computed(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = Blocked(monkeypatch)
    with serving_of(loaded, timeout=0.2) as served:
        answer = served.post(GOOD)
        assert (answer.status_code, answer.json()["error"]["message"]) == (408, "not done within 0.2 seconds")
        assert blocked.given_up.wait(30)
        blocked.released.set()


def send_part_of_a_body(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    connection = socket.create_connection((url.host, url.port), timeout=30)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: tiny\r\nContent-Length: 1000\r\n\r\n{")
    return connection


def test_a_body_that_does_not_come_in_time_is_answered_and_its_connection_closed(loaded: LoadedModel) -> None:
    with serving_of(loaded, timeout=0.2) as served, send_part_of_a_body(served) as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"not done within 0.2 seconds" in answer


def idle_connection(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    return socket.create_connection((url.host, url.port), timeout=30)


def ends(connection: socket.socket) -> bool:
    """Whether the server ends the connection; False where it has not done so after 30 seconds."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_connections_on_which_no_request_comes_are_ended(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(connections, "SECONDS_FOR_HEADERS", 0.1)
    with serving_of(loaded) as served, idle_connection(served) as silent, idle_connection(served) as slow:
        slow.sendall(b"GET /v1/models HTTP/1.1\r\nx: ")
        assert ends(silent)
        assert ends(slow)
        monkeypatch.setattr(connections, "SECONDS_FOR_HEADERS", 30)
        assert served.post(GOOD).status_code == 200


def test_an_answer_that_nobody_takes_does_not_keep_its_connection(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck:
        """Stands for the connection of a client that does not read."""

        is_idle, waits_since = False, 0.0

        def __init__(self) -> None:
            self.was_aborted = asyncio.Event()

        def abort(self) -> None:
            self.was_aborted.set()

    stuck, recent = Stuck(), Stuck()

    async def look() -> None:
        now = asyncio.get_running_loop().time()
        limit = connections.SECONDS_FOR_HEADERS + 60 + connections.SPARE_SECONDS
        stuck.waits_since, recent.waits_since = now - limit - 1, now - limit + 1000
        watch = asyncio.create_task(connections.cut_off_slow_clients({recent, stuck}, 60))
        await asyncio.wait_for(stuck.was_aborted.wait(), 30)
        watch.cancel()

    monkeypatch.setattr(connections, "EVERY_SECONDS", 0.01)
    asyncio.run(look())
    assert not recent.was_aborted.is_set()


def test_idle_connections_make_room_for_a_client_that_asks(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_SPARE_CONNECTIONS", -29)  # and 1 that waits and 32 that are computed make 4
    with serving_of(loaded, max_waiting=1) as served:
        idle = [idle_connection(served) for _ in range(4)]
        assert ends(idle[0])
        assert served.post(GOOD).status_code == 200
        for connection in idle:
            connection.close()


def test_while_a_prompt_is_tokenised_others_are_served(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, released, encode = threading.Event(), threading.Event(), served.loaded.tokenizer.encode

    def slow(text: str) -> list[int]:
        entered.set()
        assert released.wait(30)
        return encode(text)

    monkeypatch.setattr(served.loaded.tokenizer, "encode", slow)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, GOOD)
        assert entered.wait(30)
        assert httpx.get(served.url.replace("/v1", "/health"), timeout=20).status_code == 200
        released.set()
        assert answer.result().status_code == 200


def test_a_server_that_is_stopped_ends_open_requests_and_logs_no_error(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = Blocked(monkeypatch)
    monkeypatch.setattr(serving, "_SECONDS_TO_FINISH", 0.1)
    with serving_of(loaded) as served, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
        stream = pool.submit(served.post, GOOD | {"stream": True, "max_tokens": 50})
        assert blocked.entered.wait(30)
        with send_part_of_a_body(served) as connection:
            served.server.should_exit = True
            assert blocked.given_up.wait(30)
            blocked.released.set()
            assert "the server is shutting down" in stream.result().text
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    assert not caplog.records


def test_a_client_that_goes_away_is_no_longer_computed_for(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for body in (GOOD, GOOD | {"stream": True}):
        with monkeypatch.context() as patched:
            blocked = Blocked(patched)
            with serving_of(loaded) as served:
                patience = httpx.Timeout(5, read=0.2)
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{served.url}/completions", json=body, timeout=patience)
                assert blocked.given_up.wait(30)
                blocked.released.set()


def test_a_client_beyond_the_last_connection_is_told_to_come_again_and_health_answers(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_SPARE_CONNECTIONS", -29)  # which makes 4, of which 3 are in use
    with serving_of(loaded, max_waiting=1) as served, ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(idle_connection(served))
            waiting.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
            )
            assert waiting.recv(1 << 10).startswith(b"HTTP/1.1 100 ")  # so the server waits for the body
        refused = served.post(b"{")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(served.url.replace("/v1", "/health")).json()["status"] == "ok"
