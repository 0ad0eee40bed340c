"""Fine-tuning learns from answers alone: the packed loss is the mean over answer tokens, one document at a time."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.corpus.chat_template import CHAT_TEMPLATE, read_chat_template
from inl_core.corpus.encoding import document_stream, encode_documents
from inl_core.corpus.loader import IGNORED, make_batch
from inl_core.corpus.reading.rows import Document
from inl_core.corpus.tokenizer import Tokenizer, train_tokenizer
from inl_core.inference.checkpoint_files import verify_checkpoint
from inl_core.recipe.data import LossOn
from inl_core.recipe.load import dump_recipe
from inl_core.training.loss_module import micro_batches
from inl_core.training.losses import AuxiliaryWeights
from tests.training.test_losses import build

ROWS = [
    Document("chat", ("Be brief.", "one and two?", "three", "and four?", "seven <|end|> of it"), "suaua"),
    Document("prompt", ("the capital of France", " is Paris"), "pc"),
    Document("text", ("no prompt here",)),
    Document("chat", ("again?", "again"), "ua"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the one and two, three of four"]), vocab_size=270)


def answers_of(tokenizer: Tokenizer, row: Document) -> list[tuple[int, bool]]:
    """(token, whether it is learned) of a document, written out role by role."""
    found = [(tokenizer.bos_id, False)]
    for role, text in zip(row.roles or "t", row.texts, strict=True):
        if role in "sua":
            found.append((tokenizer.role_id({"s": "system", "u": "user", "a": "assistant"}[role]), False))
        is_learned = role in "act"
        found += [(token, is_learned) for token in tokenizer.encode(text)]
        if role in "sua":
            found.append((tokenizer.role_id("end"), is_learned))
    return [*found, (tokenizer.eos_id, True)]


@pytest.mark.parametrize("preset", ["v4", "v5", "transformer"])
def test_the_packed_loss_is_the_mean_over_answer_tokens_one_document_at_a_time(preset, tokenizer):
    losses = build(preset, vocab_size=tokenizer.vocab_size, max_seq_len=128).eval()
    stream = document_stream(tokenizer, ROWS, document_mask=True, loss_on="answers")
    batch = make_batch(stream, np.array([0]), stream.num_tokens - 1)  # all rows in one window
    expected, count = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        tokens, is_learned = zip(*answers_of(tokenizer, row), strict=True)
        assert list(tokens) == encode_documents(tokenizer, [row])[0][0]
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = losses.model.logits(losses.model(ids[:, :-1]).hidden)[0]
        for place, target in enumerate(tokens[1:]):
            if is_learned[place + 1]:
                expected -= F.log_softmax(logits[place], dim=-1)[target]
                count += 1
    assert batch.num_targets == count
    (part,) = micro_batches(batch, 1, torch.device("cpu"))
    with torch.no_grad():
        found = losses(part, AuxiliaryWeights(), torch.tensor(float(count), dtype=torch.float64), None)["task"]
    torch.testing.assert_close(found, expected / count, rtol=1e-7, atol=0)  # a loss is summed in float32


def targets_of(tokenizer, row: Document, loss_on: LossOn = "answers") -> list[int]:
    stream = document_stream(tokenizer, [row], document_mask=True, loss_on=loss_on)
    targets = make_batch(stream, np.array([0]), stream.num_tokens - 1).targets
    return targets[targets != IGNORED].tolist()


def test_a_label_in_a_prompt_never_counts_and_each_in_an_answer_does(tokenizer):
    row = ROWS[0]
    for changed, is_learned in enumerate((False, False, True, False, True)):  # system, user, assistant, ...
        texts = [text + "!" * (place == changed) for place, text in enumerate(row.texts)]
        other = Document("chat", tuple(texts), row.roles)
        assert (targets_of(tokenizer, other) != targets_of(tokenizer, row)) == is_learned
    assert len(targets_of(tokenizer, row, "last_answer")) < len(targets_of(tokenizer, row))
    assert len(targets_of(tokenizer, row, "all")) == len(answers_of(tokenizer, row)) - 1


def test_text_that_spells_a_special_token_does_not_end_an_answer(tokenizer):
    (tokens, _), *_ = encode_documents(tokenizer, ROWS)
    assert tokens.count(tokenizer.role_id("end")) == 5  # one for each message, though the last one spells another


def test_a_run_on_conversations_keeps_the_template_and_a_run_on_text_has_none(make_recipe, inl, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{row} + 1?"}, {"role": "assistant", "content": f"{row + 1} " * 9}]}
        for row in range(80)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"sources": ("chat.jsonl",), "directory": tmp_path / "chat-data"}
    texts = "".join(json.dumps({"text": f"{row} " * 40}) + "\n" for row in range(40))
    (tmp_path / "text.jsonl").write_text(texts)
    text = {"sources": ("text.jsonl",), "directory": tmp_path / "text-data"}
    tokens = {"tokenizer": {"file": tmp_path / "chat/checkpoints/step-00000002/tokenizer.json"}}
    changes = {
        "chat": {"data": data, "training": {"steps": 2}},
        "text": {"training": {"steps": 2}},
        "after": {"data": text | tokens, "training": {"steps": 1}, "model": {"init_from": "chat"}},
    }
    templates = {}
    for name, change in changes.items():
        recipe = make_recipe(**change)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        outcome = inl("train", "recipe.yaml", "--run-dir", name)
        assert outcome.exit_code == 0, outcome.stderr
        checkpoint = tmp_path / f"{name}/checkpoints/step-{recipe.training.num_steps:08d}"
        verify_checkpoint(checkpoint, purpose="resume")
        templates[name] = read_chat_template(checkpoint / "tokenizer_config.json")
    assert templates == {"chat": CHAT_TEMPLATE, "text": None, "after": CHAT_TEMPLATE}
    talk = CliRunner().invoke(app, ["chat", "chat", "--max-new-tokens", "3"], input="1 + 1?\n")
    assert talk.exit_code == 0
    assert "warning" not in talk.stderr
