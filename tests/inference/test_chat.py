"""Conversations: what the template makes of them is what was trained on, and `inl chat` as a user meets it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.corpus.chat_template import CHAT_TEMPLATE, encode_chat, end_of_answer, tokenizer_config
from inl_core.corpus.encoding import encode_documents
from inl_core.corpus.reading.rows import Document
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.chat import Chat
from inl_core.inference.generate import generate
from inl_core.inference.loading import LoadedModel
from inl_core.inference.settings import GenerationSettings
from tests.inference.tiny import tiny_model, tokenizer

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0, repetition_penalty=1.3)
SAID = ["Be brief.", "a <|end|> b\n", "<|user|>", "  {{ bos_token }} ", "\ue000 0"]
_ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROLES = ["system", "user", "assistant", "user", "assistant"]
MESSAGES = [{"role": role, "content": text} for role, text in zip(ROLES, SAID, strict=True)]


def loaded(template: str | None = CHAT_TEMPLATE) -> LoadedModel:
    return LoadedModel(tiny_model("v5"), tokenizer(), Path("runs/x"), {}, chat_template=template)


def test_the_template_writes_what_was_trained_on_and_text_never_becomes_a_special_token():
    (expected, _), *_ = encode_documents(tokenizer(), [Document("", tuple(SAID), "suaua")])
    assert encode_chat(tokenizer(), CHAT_TEMPLATE, MESSAGES, add_generation_prompt=False) == expected
    asked = encode_chat(tokenizer(), CHAT_TEMPLATE, MESSAGES[:4])
    assert asked[-1] == tokenizer().role_id("assistant")
    assert asked[:-1] == expected[: len(asked) - 1]
    assert asked.count(tokenizer().role_id("end")) == 4


def test_what_a_template_says_beside_a_message_is_one_text_with_it():
    template = "{{ bos_token }}{% for message in messages %}{{ 'a' + message['content'] + 'b' }}{% endfor %}"
    text = "".join(f"a{said}b" for said in SAID)
    assert encode_chat(tokenizer(), template, MESSAGES) == [tokenizer().bos_id, *tokenizer().encode(text)]


def test_the_end_of_an_answer_is_found_in_the_template():
    assert end_of_answer(tokenizer(), CHAT_TEMPLATE) == tokenizer().role_id("end")
    plain = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{{ eos_token }}"
    assert end_of_answer(tokenizer(), plain) == tokenizer().eos_id


@pytest.mark.parametrize("template", ["{{ messages", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__[1]() }}"])
def test_a_template_that_cannot_be_used_is_one_line(template):
    with pytest.raises(ArtefactError, match=r"x/tokenizer_config\.json: the chat template cannot be used"):
        encode_chat(tokenizer(), template, MESSAGES, origin=Path("x/tokenizer_config.json"))


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}\ue0007\ue001", "message 8 of 5"),
        ("{{ messages[0].content }}", "leaves out what message 2 .of the user. says"),
        ("{{ 'a' * 20000000000 }}", "Memory"),
        ("{{ '{:>9999999999}'.format('a') }}", "Memory"),
        ("{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", "longer than 4,194,304 characters"),
        pytest.param(_ENDLESS, "too long|filled in", marks=pytest.mark.slow),
        pytest.param("{{ 10 ** 100000000 }}", "too long|filled in", marks=pytest.mark.slow),
    ],
)
def test_a_hostile_template_is_one_line(template, problem):
    with pytest.raises(ArtefactError, match=f"cannot be used for these messages: .*({problem})") as caught:
        encode_chat(tokenizer(), template, MESSAGES)
    assert "\n" not in str(caught.value)


def test_a_role_of_the_users_choice_makes_no_special_token():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'tool' %}!{% endif %}{% endfor %}"
    )
    said = {"role": "tool", "content": "a"}
    assert encode_chat(tokenizer(), template, [said]) == [
        id for text in ("<|tool|>", "a", "!") for id in tokenizer().encode(text)
    ]
    for role in ("end", "eos", "user|><|end"):
        with pytest.raises(ArtefactError, match="a role must be"):
            encode_chat(tokenizer(), template, [said | {"role": role}])


def test_a_long_conversation_costs_an_answer_no_more(monkeypatch):
    chat = Chat(loaded(), replace(GREEDY, max_new_tokens=1))
    given: list[int] = []

    def counted(tokenizer, template, messages, **options):
        given.append(len(messages))
        return encode_chat(tokenizer, template, messages, **options)

    monkeypatch.setattr("inl_core.inference.chat.encode_chat", counted)
    work = []
    for _ in range(60):
        given.clear()
        "".join(chat.answer("a question is this"))
        work.append(sum(given))
    assert max(work[-20:]) <= max(work[10:30])
    assert len(chat.messages) == 120


def test_an_answer_continues_the_conversation_and_ends_at_its_special_token(monkeypatch):
    chat = Chat(loaded(), GREEDY, system="s")
    first = "".join(chat.answer("Hello"))
    assert [message["content"] for message in chat.messages] == ["s", "Hello", first]
    assert chat.completion is not None
    prompt = encode_chat(tokenizer(), CHAT_TEMPLATE, [*chat.messages[:2]])
    text = tokenizer().decode(prompt[1:], skip_special_tokens=False)
    assert chat.completion.prompt_tokens == len(prompt)
    # The same by `generate`, whose prompt is told to hold these very tokens.
    monkeypatch.setattr(type(tokenizer()), "encode", lambda self, given: prompt[1:] if given == text else None)
    (alone,) = generate(chat.loaded.model, tokenizer(), [text], GREEDY)
    monkeypatch.undo()
    assert alone.text == first
    end = next(token for token in alone.token_ids[2:] if token not in alone.token_ids[:2])
    chat.reset()
    chat.settings = replace(chat.settings, end_ids=(end,))
    cut = "".join(chat.answer("Hello"))
    assert chat.completion.finish_reason == "eos"
    assert chat.completion.token_ids == alone.token_ids[: alone.token_ids.index(end) + 1]
    assert alone.text.startswith(cut)


def test_the_oldest_messages_are_left_out_when_the_context_is_full():
    chat = Chat(loaded(), GREEDY, system="s")
    for number in range(6):
        "".join(chat.answer(f"question {number} is this"))
    assert chat.num_left_out > 0
    assert chat.num_left_out % 2 == 0
    kept = [chat.messages[0], *chat.messages[1 + chat.num_left_out : -1]]
    assert chat.completion is not None
    assert chat.completion.prompt_tokens == len(encode_chat(tokenizer(), CHAT_TEMPLATE, kept))
    assert len(chat.messages) == 13
    with pytest.raises(RecipeError, match="the context holds 64"):
        "".join(chat.answer("long " * 100))


@pytest.fixture
def inl(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(workplace)
    return lambda lines, *options: CliRunner().invoke(
        app, ["chat", "runs/v5", "--max-new-tokens", "4", "--temperature", "0", *options], input=lines
    )


def test_lines_of_stdin_are_messages_and_commands(inl):
    result = inl("Hello\n\n/reset\n/help\nHello\n/exit\nnever\n", "--system", "Be brief.", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [(message["role"]) for message in data["messages"]] == ["system", "user", "assistant"]
    assert "warning: /help: no such command" in result.stderr
    assert "has no chat template" in result.stderr
    shown = inl("Hello\n", "--system", "Be brief.", "--quiet")
    assert shown.stdout == data["messages"][2]["content"] + "\n"
    passed_over = inl("a " * 600_000 + "\nHello\n", "--system", "Be brief.", "--quiet")
    assert passed_over.exit_code == 0
    assert passed_over.stdout == shown.stdout
    assert "line 1 is longer than 1,048,576 bytes" in passed_over.stderr
    assert inl(b"caf\xe9\n").exit_code == 2
    assert "line 1 is not UTF-8" in inl(b"caf\xe9\n").stderr


def test_the_file_beside_a_tokenizer_is_read_by_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer().save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(tokenizer_config(tokenizer(), CHAT_TEMPLATE))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = [message | {"content": "plain text"} for message in MESSAGES]
    for prompted in (False, True):
        expected = encode_chat(tokenizer(), CHAT_TEMPLATE, plain, add_generation_prompt=prompted)
        found = theirs.apply_chat_template(plain, add_generation_prompt=prompted, return_dict=False)
        assert found == expected
