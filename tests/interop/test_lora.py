"""Low-rank adapters by peft on the exported class: trained, kept, merged, and taken by a run of our own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from inl_core.interop.huggingface.export import export
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig
from inl_core.training.checkpoint import load_weights
from inl_core.training.starting_weights import find_weights
from tests.inference.tiny import config, tokenizer, write_checkpoint

TARGETS = ["query_key_value", "output", "up", "down"]


@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_adapters_learn_are_kept_and_are_merged(preset: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", preset)
    export(next((tmp_path / "run/checkpoints").iterdir()), tmp_path / "exported")
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    learned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert learned
    assert all("lora_" in name for name in learned)
    ids = torch.randint(6, tokenizer().vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(learned.values(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), tmp_path / "adapters"
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, expected)
    # What is merged is W + (alpha / r) B A.
    deltas = {}
    for name in (name for name in learned if ".lora_A" in name):
        delta = 2 * learned[name.replace("lora_A", "lora_B")] @ learned[name]
        deltas[name.partition(".lora_A")[0].removeprefix("base_model.model.")] = delta.detach()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in merged.state_dict().items():
        delta = deltas.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(tensor, before[name] + delta, rtol=1e-5, atol=1e-6)
    # A run of our own may begin with it.
    wanted = ModelConfig.model_validate(config(preset).model_dump() | {"init_from": tmp_path / "merged"})
    told: list[str] = []
    found = find_weights(wanted, tell=told.append)
    assert found is not None
    assert "has no tokenizer" in told[0]  # which is saved by itself
    model_of_run = IntegratorLanguageModel(wanted.with_vocab_size(tokenizer().vocab_size))
    load_weights(found.path, model_of_run, found.prefix)
    model_of_run.eval()
    with torch.no_grad():
        logits = model_of_run.logits(model_of_run(ids).hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
