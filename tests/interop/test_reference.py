"""Imported reference weights compute what the reference computes, and every tensor of the file is accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inl_core.corpus.tokenizer import Tokenizer
from inl_core.inference.checkpoint_files import file_digest, verify_checkpoint
from inl_core.inference.loading import load_weights
from inl_core.interop.reference import import_reference
from inl_core.interop.reference.conversion import build_config
from inl_core.interop.reference.importing import load_reference
from inl_core.interop.reference.layout import read_layout
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig
from tests.interop.reference_files import (
    GENERATIONS,
    HEADS,
    LAYERS,
    VOCAB,
    ignored_tensors,
    random_tensors,
    reference_logits,
    write_file,
)

IDS = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))
EPS = {"released": 1e-6, "earlier": 1e-5}


def run_import(path: Path, tensors: dict[str, Tensor], **arguments: Any) -> IntegratorLanguageModel:
    """Import a file of these tensors, and load the model of the checkpoint that was made, in float64."""
    path.mkdir(exist_ok=True)
    settings = {"num_heads": HEADS, "iterations": (2,)} | arguments
    imported = import_reference(write_file(path / "model.safetensors", tensors), path / "out", **settings)
    verify_checkpoint(path / "out")
    return load_weights(path / "out", imported.config).double()


@torch.no_grad()
def logits(model: IntegratorLanguageModel, ids: Tensor = IDS) -> Tensor:
    """(B, S, V) in float64; the model's own `logits` end in float32."""
    return F.linear(*model.head_factors(model(ids).hidden))


@pytest.mark.parametrize(
    ("generation", "kv_heads", "iterations"),
    [
        ("released", 1, (5,)),
        ("released", 2, (1, 4, 2)),
        ("released", 4, (1,)),
        ("earlier", 4, (5,)),
        ("earlier", 4, (1, 4, 2)),
    ],
)
def test_logits_are_those_of_the_reference(
    tmp_path: Path, generation: str, kv_heads: int, iterations: tuple[int, ...]
) -> None:
    tensors = random_tensors(generation, kv_heads=kv_heads)
    model = run_import(tmp_path, tensors | ignored_tensors(generation), iterations=iterations)
    each = list(iterations) * (LAYERS if len(iterations) == 1 else 1)
    for row, ids in zip(logits(model), IDS, strict=True):
        wanted = reference_logits(tensors, ids, iterations=each, eps=EPS[generation])
        assert wanted.std() > 0.3
        torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("dim", "place"), [(96, "inl.inl"), (128, "inl"), (64, "inl.inl")])
def test_an_incomplete_last_group_of_mu_and_an_unwrapped_integrator_are_read(
    tmp_path: Path, generation: str, dim: int, place: str
) -> None:
    tensors = random_tensors(generation, dim=dim, place=place)
    wanted = reference_logits(tensors, IDS[0], iterations=[2] * LAYERS, eps=EPS[generation])
    # Without groups each sum mu_global + offset is stored as one float32 number.
    tolerance = 1e-7 if dim % 64 else 1e-10
    torch.testing.assert_close(logits(run_import(tmp_path, tensors))[0], wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_tensor_is_used_or_skipped_and_only_the_used_ones_count(tmp_path: Path, generation: str) -> None:
    tensors, ignored = random_tensors(generation), ignored_tensors(generation)
    file = write_file(tmp_path / "model.safetensors", tensors | ignored)
    imported = import_reference(file, tmp_path / "first", num_heads=HEADS, iterations=(2,))
    assert set(imported.used) == set(tensors)
    assert set(imported.skipped) == set(ignored)

    before = load_weights(imported.checkpoint, imported.config)
    moved = {name: tensor + 1 for name, tensor in ignored.items() if not name.endswith("inv_freq")}
    same = run_import(tmp_path / "ignored", tensors | ignored | moved).float().state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in before.state_dict().items())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_used_tensor_changes_the_logits(generation: str) -> None:
    tensors = random_tensors(generation)
    layout = read_layout(Path("file"), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    config = build_config(
        layout,
        num_heads=HEADS,
        num_kv_heads=layout.key_value_dim * HEADS // 128,
        iterations=(2, 2, 2),
        max_seq_len=32,
        rope_theta=1e4,
    )

    def outcome(stored: dict[str, Tensor]) -> Tensor:
        model, used = load_reference(Path("file"), layout, config, Stored(stored))
        assert set(used) == set(tensors)
        return logits(model.double(), IDS[:1, :6])

    base, generator = outcome(tensors), torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.startswith("layers.1."):  # a middle layer is like the others, and this test is slow enough
            continue
        moved = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        assert (outcome(tensors | {name: moved}) - base).abs().max() > 1e-4, name


class Stored:
    """Tensors in memory, read as a safetensors file is."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.get_tensor = tensors.__getitem__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_widened_or_rounded_to_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in random_tensors("released").items()}
    model = run_import(tmp_path, stored)
    head = model.head
    assert head is not None
    assert torch.equal(head.weight.detach(), stored["lm_head.weight"].float().double())


def test_mu_global_may_be_stored_with_a_dimension(tmp_path: Path) -> None:
    tensors = random_tensors("released")
    wanted = logits(run_import(tmp_path / "plain", tensors))
    reshaped = {name: tensor.reshape(1) if name.endswith("mu_global") else tensor for name, tensor in tensors.items()}
    torch.testing.assert_close(logits(run_import(tmp_path / "reshaped", reshaped)), wanted, rtol=1e-12, atol=1e-12)


def test_heads_and_context_come_from_the_tables_of_positions_where_there_are_any(tmp_path: Path) -> None:
    tensors = random_tensors("released", kv_heads=1)
    told = run_import(tmp_path / "told", tensors | ignored_tensors("released", length=48), num_heads=None).config
    assert (told.num_heads, told.num_kv_heads, told.max_seq_len) == (HEADS, 1, 48)
    given = run_import(tmp_path / "given", tensors, max_seq_len=77).config
    assert (given.num_heads, given.num_kv_heads, given.max_seq_len) == (HEADS, 1, 77)
    earlier = run_import(tmp_path / "earlier", random_tensors("earlier") | ignored_tensors("earlier", length=33)).config
    assert (earlier.num_heads, earlier.num_kv_heads, earlier.max_seq_len) == (HEADS, HEADS, 33)


def test_what_is_taken_on_trust_is_said(tmp_path: Path, tokenizer_file: Path) -> None:
    def warnings(name: str, tensors: dict[str, Tensor], **arguments: Any) -> tuple[str, ...]:
        file = write_file(tmp_path / f"{name}.safetensors", tensors)
        return import_reference(file, tmp_path / name, iterations=(1, 2, 3), **arguments).warnings

    tensors = random_tensors("released")
    trusted, context, words = warnings("bare", tensors, num_heads=HEADS)
    assert trusted.startswith("heads (4) and iterations (1, 2, 3) are as given")
    assert "1,024" in context
    assert "no tokenizer" in words
    full = tensors | ignored_tensors("released")
    (trusted,) = warnings("full", full, num_heads=HEADS, tokenizer=tokenizer_file)
    assert trusted.startswith("iterations (1, 2, 3) are as given")


def test_the_checkpoint_says_where_it_comes_from(tmp_path: Path) -> None:
    run_import(tmp_path, random_tensors("earlier"))
    (event,) = json.loads((tmp_path / "out" / "config.json").read_text())["provenance"]
    file = tmp_path / "model.safetensors"
    assert (event["event"], event["generation"]) == ("import", "earlier")
    assert (event["source"], event["sha256"]) == (str(file), file_digest(file))
    ModelConfig.model_validate(json.loads((tmp_path / "out" / "config.json").read_text())["model"])


def test_spare_rows_of_the_embedding_get_tokens_that_no_text_uses(tmp_path: Path, tokenizer_file: Path) -> None:
    tensors = random_tensors("released", vocab=304)
    run_import(tmp_path, tensors, tokenizer=tokenizer_file)
    given, padded = Tokenizer.load(tokenizer_file), Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert (given.vocab_size, padded.vocab_size) == (300, 304)
    text = "def greet(name): <|unused_302|> K\u00f6ln"
    assert padded.encode(text) == given.encode(text)
    assert padded.token_num_bytes[300:].tolist() == [0] * 4
    assert set(range(300, 304)) <= set(padded.special_ids.values())
