"""Reference files that differ from the usual ones: names, embedding, groups of mu, rotary base, a budget allocator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inl_core.corpus.chat_template import encode_chat, end_of_answer
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.loading import load_model_alone, open_checkpoint
from inl_core.interop.reference import import_reference
from tests.interop.reference_files import LAYERS, ignored_tensors, random_tensors, reference_logits, write_file
from tests.interop.test_reference import EPS, IDS, logits, run_import

Tensors = dict[str, Tensor]


def check_logits(path: Path, tensors: Tensors, generation: str, iterations: list[int], **of_the_file: Any) -> None:
    """The import of these tensors computes what the reference does with so many iterations in each layer."""
    given, atol = of_the_file.pop("given", {}), of_the_file.pop("atol", 1e-10)
    model = run_import(path, tensors, **given)
    for row, ids in zip(logits(model), IDS, strict=True):
        wanted = reference_logits(tensors, ids, iterations=iterations, eps=EPS[generation], **of_the_file)
        torch.testing.assert_close(row, wanted, rtol=1e-10, atol=atol)


def test_a_fused_attention_matrix_may_be_called_qkv_proj(tmp_path: Path) -> None:
    tensors = random_tensors("earlier")
    check_logits(tmp_path / "old", tensors, "earlier", [2] * LAYERS)
    renamed = {name.replace("attention.in_proj_", "attention.qkv_proj."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    ours, theirs = run_import(tmp_path / "new", renamed), run_import(tmp_path / "again", tensors)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0)


def test_names_may_begin_with_model(tmp_path: Path) -> None:
    tensors = random_tensors("released") | ignored_tensors("released") | allocator(updates=20)
    wrapped = {f"model.{name}": tensor for name, tensor in tensors.items()}
    ours, theirs = run_import(tmp_path / "new", wrapped), run_import(tmp_path / "again", tensors)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0)
    with pytest.raises(ArtefactError, match=r"holds no layers\.0"):
        run_import(tmp_path / "mixed", {**wrapped, "lm_head.weight": tensors["lm_head.weight"].clone()})


@pytest.mark.parametrize("generation", ["released", "earlier"])
def test_an_embedding_that_is_not_factored(tmp_path: Path, generation: str) -> None:
    tensors = random_tensors(generation)
    low = tensors.pop("token_embedding.embed_low.weight")
    tensors["token_embedding.weight"] = low @ tensors.pop("token_embedding.project_up.weight").T
    check_logits(tmp_path, tensors | ignored_tensors(generation), generation, [2] * LAYERS)


def in_groups_of(size: int) -> Tensors:
    tensors = random_tensors("released")
    for name in [name for name in tensors if name.endswith("mu_local_offsets")]:
        tensors[name] = torch.randn(-(-128 // size), generator=torch.Generator().manual_seed(len(name)))
    return tensors


@pytest.mark.parametrize(("size", "given"), [(32, None), (128, None), (48, 48)])
def test_mu_may_have_groups_of_another_size(tmp_path: Path, size: int, given: int | None) -> None:
    arguments = {"group_size": given} if given else {}
    # Where a group is cut off at the end, mu is stored for each dimension, as a sum rounded to float32.
    atol = 1e-10 if 128 % size == 0 else 1e-6
    check_logits(tmp_path, in_groups_of(size), "released", [2] * LAYERS, group_size=size, given=arguments, atol=atol)


def test_groups_that_cannot_be_known_are_asked_for_and_wrong_ones_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"3 offsets for 128 dimensions; give --group-size"):
        run_import(tmp_path / "a", {**in_groups_of(64), **in_groups_of(43)})
    with pytest.raises(RecipeError, match=r"--group-size 32: .* has 2 offsets for 128 dimensions"):
        run_import(tmp_path / "b", in_groups_of(64), group_size=32)


def of_base(base: float, dtype: torch.dtype = torch.float32) -> Tensors:
    tables = ignored_tensors("released")
    for name, table in tables.items():
        if name.endswith("inv_freq"):
            tables[name] = (base ** (-torch.arange(len(table), dtype=torch.float64) / len(table))).to(dtype)
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [500.0, 10_000.0, 500_000.0, 1e6])
def test_the_rotary_base_is_that_of_the_tables(tmp_path: Path, base: float, dtype: torch.dtype) -> None:
    check_logits(tmp_path, random_tensors("released") | of_base(base, dtype), "released", [2] * LAYERS, base=base)


def test_without_tables_the_rotary_base_is_the_one_given(tmp_path: Path) -> None:
    given = {"rope_theta": 5e5}
    check_logits(tmp_path / "a", random_tensors("released"), "released", [2] * LAYERS, base=5e5, given=given)
    with pytest.raises(RecipeError, match=r"--rope-theta 500000: the tables in .* are of base 10000"):
        run_import(tmp_path / "b", random_tensors("released") | of_base(1e4), **given)


def allocator(*, updates: int, seed: int = 0) -> Tensors:
    """The allocator's tensors as a trained model has them, under both names that a saved one holds."""
    generator = torch.Generator().manual_seed(seed)
    own = {
        "budget_weights": torch.randn(LAYERS, generator=generator),
        "layer_convergence_speed": torch.rand(LAYERS, generator=generator) * 3,
        "layer_grad_magnitude": torch.rand(LAYERS, generator=generator) * 2,
        "layer_L_speed": torch.rand(LAYERS, generator=generator),
        "layer_L_energy": torch.rand(LAYERS, generator=generator),
        "update_count": torch.tensor([float(updates)]),
    }
    prefixes = ("budget_allocator.", *(f"layers.{layer}.budget_allocator." for layer in range(LAYERS)))
    return {prefix + name: tensor.clone() for prefix in prefixes for name, tensor in own.items()}


def budgets(tensors: Tensors, average: int) -> list[int]:
    """What the reference's allocator gives each layer in evaluation, written from its definition, in float64."""
    own = {
        name.removeprefix("budget_allocator."): tensor.double().numpy()
        for name, tensor in tensors.items()
        if name.startswith("budget_allocator.")
    }
    shares = np.exp(own["budget_weights"]) / np.exp(own["budget_weights"]).sum()
    found = shares * LAYERS * average * 0.8 * np.array([0.8, 1.2, 1.0])  # three layers: one in each third
    if own["update_count"][0] > 10:
        slow = 1 / (own["layer_convergence_speed"] + 0.1)
        found *= slow / slow.mean()
        found *= np.clip(own["layer_grad_magnitude"] / own["layer_grad_magnitude"].mean(), 0.8, 1.3)
        found *= np.clip(1 + 0.2 * (own["layer_L_speed"] / own["layer_L_speed"].mean() - 1), 0.9, 1.2)
    return [int(number) for number in np.clip(np.floor(found), max(2, average // 2), 2 * average)]


@pytest.mark.parametrize("average", [2, 5, 12])
@pytest.mark.parametrize("updates", [0, 10, 11])
def test_the_iterations_of_the_layers_follow_from_the_budget_allocator_in_the_file(
    tmp_path: Path, average: int, updates: int
) -> None:
    state = allocator(updates=updates, seed=average)
    tensors = random_tensors("released") | state
    expected = budgets(state, average)
    assert average == 2 or expected != [average] * LAYERS
    check_logits(tmp_path, tensors, "released", expected, given={"iterations": (average,)})


def test_iterations_given_for_each_layer_are_taken_as_they_are(tmp_path: Path) -> None:
    tensors = random_tensors("released") | allocator(updates=20)
    check_logits(tmp_path, tensors, "released", [1, 4, 2], given={"iterations": (1, 4, 2)})


def test_an_allocator_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors("released") | allocator(updates=20)
    tensors["budget_allocator.layer_L_speed"] = torch.ones(7)
    with pytest.raises(ArtefactError, match="layer_L_speed has 7 values for 3 layers"):
        run_import(tmp_path, tensors)


def test_the_rows_after_gpt2s_tokens_are_the_chat_tokens(tmp_path: Path, tokenizer_file: Path) -> None:
    size = Tokenizer.load(tokenizer_file).vocab_size
    file = write_file(tmp_path / "a.safetensors", random_tensors("released", vocab=size + 4))
    imported = import_reference(file, tmp_path / "out", num_heads=4, iterations=(2,), tokenizer=tokenizer_file)
    assert any("<USER>, <ASSISTANT>, <SYSTEM>, <ERROR>" in warning for warning in imported.warnings)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    ids = [tokenizer.special_ids[name] for name in ("<USER>", "<ASSISTANT>", "<SYSTEM>", "<ERROR>")]
    assert ids == [size, size + 1, size + 2, size + 3]
    assert not set(ids) & set(tokenizer.encode("<USER> hello"))


def test_a_conversation_with_a_released_model_is_written_with_its_chat_tokens(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    size = Tokenizer.load(tokenizer_file).vocab_size
    file = write_file(tmp_path / "a.safetensors", random_tensors("released", vocab=size + 4))
    import_reference(file, tmp_path / "out", num_heads=4, iterations=(2,), tokenizer=tokenizer_file)
    loaded = open_checkpoint(tmp_path / "out")
    assert loaded.chat_template
    user, assistant, system = size, size + 1, size + 2
    messages = [{"role": role, "content": f"def <USER> {role}"} for role in ("system", "user", "assistant")]
    texts = [loaded.tokenizer.encode(f" def <USER> {role}") for role in ("system", "user", "assistant")]
    expected = [system, *texts[0], user, *texts[1], assistant]
    assert encode_chat(loaded.tokenizer, loaded.chat_template, messages[:2]) == expected
    whole = encode_chat(loaded.tokenizer, loaded.chat_template, messages, add_generation_prompt=False)
    assert whole == [*expected, *texts[2]]
    # What the model wrote after <ASSISTANT> stands in the next prompt as it was.
    messages[2]["content"] = loaded.tokenizer.decode(texts[2])
    assert encode_chat(loaded.tokenizer, loaded.chat_template, messages, add_generation_prompt=False) == whole
    assert end_of_answer(loaded.tokenizer, loaded.chat_template) == user


def test_without_a_tokenizer_there_are_still_logits(tmp_path: Path) -> None:
    tensors = random_tensors("released")
    run_import(tmp_path, tensors)
    model = load_model_alone(tmp_path / "out")
    with torch.no_grad():
        found = model.logits(model(IDS).hidden)
    wanted = torch.stack([reference_logits(tensors, ids, iterations=[2] * LAYERS, eps=EPS["released"]) for ids in IDS])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)
