"""`inl serve` on loopback, with the real openai client: what it answers, how it shares batches, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from inl_core.inference.loading import LoadedModel
from inl_core.inference.settings import GenerationSettings
from inl_core.interop.server import engine as engines
from inl_core.interop.server import serving
from tests.inference.test_commands import assert_refused
from tests.interop.served import GOOD, Served, serving_of


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
        (GOOD | {"logit_bias": {"5": 1}}, 400, "logit_bias: is not supported: leave it out"),
        (GOOD | {"echo": True}, 400, "echo: is not supported: leave it out"),
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

    monkeypatch.setattr(serving, "build_server", lambda app, engine, timeout: Done())
    result = inl("serve", run, "--port", 0, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["model"], told["url"].startswith("http://127.0.0.1:")) == ("tiny", True)
    assert inl("serve", run, "--port", 0, "--name", "mine").stdout.split(" serves ")[1].startswith("mine, ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(inl("serve", run), 2, 'pip install "inl[serve]"')
