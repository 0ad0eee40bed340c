"""`inl serve` on loopback, with the real openai client: what it answers, how it shares batches, and what it refuses."""

import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.corpus.chat_template import CHAT_TEMPLATE
from inl_core.errors import NonFiniteError
from inl_core.inference.chat import Chat
from inl_core.inference.generate import generate
from inl_core.inference.loading import LoadedModel, open_checkpoint
from inl_core.inference.settings import GenerationSettings
from inl_core.interop.server import engine as engines
from inl_core.interop.server import serving
from inl_core.interop.server.app import ServerSettings, build_app
from inl_core.interop.server.engine import Engine
from tests.inference.test_commands import assert_refused
from tests.inference.tiny import write_checkpoint


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
    server = serving.build_server(build_app(engine, ServerSettings("tiny", timeout=timeout)), engine)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield Served(loaded, engine, serving.url_of(bound), server)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    run = tmp_path_factory.mktemp("server") / "tiny"
    write_checkpoint(run, "v5")
    return open_checkpoint(run)


@pytest.fixture(scope="module")
def served(loaded: LoadedModel) -> Iterator[Served]:
    with serving_of(loaded) as found:
        yield found


def test_completions_are_those_of_generate(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "inl"
    found = client.completions.create(model="tiny", prompt=["def ", "The quick"], max_tokens=9, temperature=0)
    wanted = [served.text_of(prompt, max_new_tokens=9, temperature=0) for prompt in ("def ", "The quick")]
    assert [choice.text for choice in found.choices] == wanted
    assert [choice.finish_reason for choice in found.choices] == ["length", "length"]
    tokenizer = served.loaded.tokenizer
    assert found.usage is not None
    assert found.usage.completion_tokens == 18
    assert found.usage.prompt_tokens == 2 + len(tokenizer.encode("def ")) + len(tokenizer.encode("The quick"))

    sampled = client.completions.create(model="tiny", prompt="def ", max_tokens=12, seed=5, top_p=0.9, n=2)
    settings = GenerationSettings(max_new_tokens=12, temperature=1, seed=5, top_p=0.9, num_samples=2)
    both = generate(served.loaded.model, tokenizer, ["def "], settings)
    assert [choice.text for choice in sampled.choices] == [completion.text for completion in both]
    ids = tokenizer.encode("def ")
    for prompt in (ids, [tokenizer.bos_id, *ids], [ids]):
        again = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0)
        assert again.choices[0].text == wanted[0]


def test_streams_join_to_the_same_text(served: Served) -> None:
    whole = served.text_of("def ", max_new_tokens=9, temperature=0)
    chunks = list(
        served.client().completions.create(
            model="tiny",
            prompt="def ",
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9


def test_stop_strings_and_log_probabilities(served: Served) -> None:
    loaded, prompt = served.loaded, "The "
    settings = GenerationSettings(max_new_tokens=12, temperature=0)
    completion = generate(loaded.model, loaded.tokenizer, [prompt], settings)[0]
    stop = completion.text[3:5]
    found = served.client().completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=0, stop=[stop, "never"], logprobs=3
    )
    assert found.choices[0].text == completion.text[: completion.text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    scores = found.choices[0].logprobs
    assert scores is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(prompt)]
    for token, found_value, top in zip(completion.token_ids, scores.token_logprobs, scores.top_logprobs, strict=False):
        with torch.no_grad():
            table = loaded.model.logits(loaded.model(torch.tensor([ids])).hidden[0, -1]).log_softmax(-1)
        assert found_value == pytest.approx(float(table[token]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(table.max()), abs=1e-4)
        ids.append(token)


def test_two_hundred_requests_at_once_are_answered_together_and_as_alone(served: Served) -> None:
    client = served.client()

    def ask(number: int) -> str:
        found = client.completions.create(
            model="tiny", prompt="x" * (number % 7), max_tokens=1 + number % 9, seed=number % 11, temperature=0.7
        )
        return found.choices[0].text

    with ThreadPoolExecutor(200) as pool:
        texts = list(pool.map(ask, range(200)))
    assert served.engine.largest_batch > 1
    for number in range(0, 200, 17):
        settings = {"max_new_tokens": 1 + number % 9, "seed": number % 11, "temperature": 0.7}
        assert texts[number] == served.text_of("x" * (number % 7), **settings)


GOOD = {"model": "tiny", "prompt": "a", "max_tokens": 1}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "Invalid JSON"),
        (b"{", 400, "Invalid JSON"),
        (b"\xff\xfe\x00", 400, "Invalid JSON"),
        (b"[" * 100_000, 400, "recursion limit"),
        ([1], 400, "Input should be an object"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "Invalid JSON"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "a", "seed": 1e999}', 400, "seed"),
        (b" " * (2 << 20), 413, "more than 1,048,576 bytes"),
        ({"prompt": "a"}, 400, "model: Field required"),
        (GOOD | {"model": "gpt-4"}, 404, "'gpt-4' is not served here; 'tiny' is"),
        (GOOD | {"max_tokens": 0}, 400, "max_tokens: "),
        (GOOD | {"max_tokens": "9"}, 400, "max_tokens: "),
        (GOOD | {"n": 1000}, 400, "n: "),
        (GOOD | {"temperature": -1}, 400, "temperature: "),
        (GOOD | {"top_p": 0}, 400, "top_p: "),
        (GOOD | {"stop": ""}, 400, "stop: "),
        (GOOD | {"stop": ["a"] * 17}, 400, "stop: List should have at most 16 items, not 17"),
        (GOOD | {"stop": 3}, 400, "stop: must be a text or a list of texts"),
        (GOOD | {"prompt": []}, 400, "prompt: List should have at least 1 item, not 0"),
        (GOOD | {"prompt": [[]]}, 400, "prompt: List should have at least 1 item, not 0"),
        (GOOD | {"prompt": [-1]}, 400, "prompt: Input should be greater than or equal to 0"),
        (GOOD | {"prompt": ["a", 1]}, 400, "prompt: must be a text, a list of tokens, or a list of either"),
        (GOOD | {"prompt": ["a"] * 257}, 400, "prompt: Value should have at most 256 items, not 257"),
        (GOOD | {"prompt": [[1]] * 257}, 400, "prompt: Value should have at most 256 items, not 257"),
        (GOOD | {"prompt": "x" * 500_000}, 400, "500,000 characters cannot fit, the model's context holds 64 tokens"),
        (GOOD | {"prompt": [300]}, 400, "token 300: the model has 300"),
        (GOOD | {"prompt": "word " * 99}, 400, "the model's context holds 64"),
        (GOOD | {"stream": True, "logprobs": 1}, 400, "logprobs are not streamed"),
        (GOOD | {"best_of": 3}, 400, "best_of"),
        (GOOD | {"logit_bias": {"5": 1}}, 400, "logit_bias: "),
        (GOOD | {"frequency_penalty": 0.5}, 400, "frequency_penalty: "),
        (GOOD | {"tools": []}, 400, "tools: this server does not know it"),
    ],
)
def test_bad_input_is_answered_by_one_clear_4xx(served: Served, body: Any, status: int, message: str) -> None:
    answer = served.post(body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_are_answered_in_the_same_form(served: Served) -> None:
    assert "Not Found" in httpx.get(f"{served.url}/nothing").json()["error"]["message"]
    assert httpx.get(f"{served.url}/completions").status_code == 405
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        served.client().models.retrieve("gpt-4")
    assert httpx.get(served.url.replace("/v1", "/health")).json() == {"status": "ok", "waiting": 0}


def test_null_means_not_given_as_clients_write_it(served: Served) -> None:
    keys = "temperature top_p n seed stop stream stream_options user logprobs echo suffix best_of logit_bias"
    nulls = dict.fromkeys((*keys.split(), "frequency_penalty", "presence_penalty"))
    assert served.post(GOOD | nulls).status_code == 200
    assert served.post(GOOD | {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}}).status_code == 200


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


def test_a_model_that_fails_is_told_and_the_next_request_is_served(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise NonFiniteError("the model's logits are not finite")
        yield

    with serving_of(loaded) as served:
        with monkeypatch.context() as patched:
            patched.setattr(engines, "stream_together", fail)
            with pytest.raises(openai.InternalServerError, match="logits are not finite"):
                served.client().completions.create(model="tiny", prompt="a")
            with pytest.raises(openai.APIError, match="logits are not finite"):
                list(served.client().completions.create(model="tiny", prompt="a", stream=True))
        assert served.post(GOOD).status_code == 200


def test_a_chat_is_the_one_of_inl_chat(loaded: LoadedModel) -> None:
    settings = GenerationSettings(temperature=0, max_new_tokens=9)
    talking = replace(loaded, chat_template=CHAT_TEMPLATE)
    chat = Chat(talking, settings, system="Be brief.")
    expected = "".join(chat.answer("Hello <|end|>"))
    with serving_of(talking) as served:
        client = served.client().chat.completions
        given: Any = chat.messages[:2]
        answer = client.create(model="tiny", messages=given, temperature=0, max_tokens=9)
        assert answer.choices[0].message.content == expected
        wrong: Any = [{"role": "tool", "content": "x"}]
        with pytest.raises(openai.BadRequestError, match="a role must be system, user or assistant, not tool"):
            client.create(model="tiny", messages=wrong)
        long: Any = [{"role": "user", "content": "x" * 300}]
        with pytest.raises(openai.BadRequestError, match="the conversation: 3"):
            client.create(model="tiny", messages=long)
        with pytest.raises(openai.BadRequestError, match="65 messages cannot fit"):
            client.create(model="tiny", messages=wrong * 65)


def test_a_model_without_a_chat_template_says_so(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="this model has no chat template: use /v1/completions"):
        served.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])


def inl(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_says_where_it_serves_and_what_is_wrong(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(loaded.path).parents[1]
    taken = serving.bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    assert_refused(inl("serve", run, "--port", port), 1, f"--port {port}: Address already in use; name another port")
    taken.close()

    class Done:
        def run(self, sockets: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(serving, "build_server", lambda app, engine: Done())
    result = inl("serve", run, "--port", 0, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["model"], told["url"].startswith("http://127.0.0.1:")) == ("tiny", True)
    assert inl("serve", run, "--port", 0, "--name", "mine").stdout.split(" serves ")[1].startswith("mine, ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(inl("serve", run), 2, 'pip install "inl[serve]"')
