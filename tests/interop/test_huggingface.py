"""The transformers class by itself: new models, training, beams, padding, documents, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from inl_core.interop.huggingface import InlCache, InlConfig, InlForCausalLM
from tests.inference.tiny import tiny_model
from tests.interop.test_export import alone, random_ids


@pytest.fixture(scope="module")
def model() -> InlForCausalLM:
    own = tiny_model("v5")
    made = InlForCausalLM(InlConfig(inl=own.config.model_dump(mode="json")))
    made.model.load_state_dict(own.state_dict())
    return made.eval()


def test_a_new_model_is_initialised_as_ours_by_torchs_seed() -> None:
    config = InlConfig(inl={"preset": "v4", "d_model": 32, "num_layers": 2, "vocab_size": 99})
    models: list[Any] = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config))
    tables = [made.get_input_embeddings().weight for made in models]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert 0.09 < float(tables[0].detach().std()) < 0.12  # 0.6 / sqrt(32); transformers' own would be 0.02
    assert float(models[0].model.excitation_amplitude) == pytest.approx(0.03)


def test_it_trains_and_its_vocabulary_can_be_resized() -> None:
    made = InlForCausalLM(InlConfig(inl=tiny_model("v5").config.model_dump(mode="json"))).train()
    ids = random_ids(2, 16)
    output = made(ids, labels=ids)
    assert output.past_key_values is None
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    before = made.eval()(ids).logits
    made.resize_token_embeddings(310)
    assert made.config.vocab_size == made.config.model.vocab_size == 310
    torch.testing.assert_close(made(ids).logits[..., :300], before)


def test_beam_search_with_the_cache_finds_what_it_finds_without(model: InlForCausalLM) -> None:
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=4, max_new_tokens=8, use_cache=use_cache, do_sample=False)
        for use_cache in (True, False)
    ]
    assert torch.equal(beams[0], beams[1])


def test_the_cache_grows_and_its_rows_can_be_repeated(model: InlForCausalLM) -> None:
    ids, cache = random_ids(2, 40), InlCache()
    cache.prepared(model.model, ids[:, :1], None)
    assert cache.own is not None
    cache.own.keys, cache.own.values = ([one[:, :, :16] for one in kept] for kept in (cache.own.keys, cache.own.values))
    with torch.inference_mode():
        model(ids[:, :10], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        found = model(ids[:, 10:].repeat_interleave(2, 0), past_key_values=cache).logits
    assert (cache.batch_size, cache.get_seq_length()) == (4, 40)
    for row in range(4):
        torch.testing.assert_close(found[row], alone(model.model, ids[row // 2])[10:], atol=1e-5, rtol=0)


def test_padding_on_the_right_and_several_documents_in_a_row_do_not_mix(model: InlForCausalLM) -> None:
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    with torch.inference_mode():
        right = model(ids, attention_mask=mask).logits
        positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
        packed = model(ids[:1], position_ids=positions).logits
        last = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(right[0, :12], alone(model.model, ids[0, :12]), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[0, :8], alone(model.model, ids[0, :8]), atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[0, 8:], alone(model.model, ids[0, 8:]), atol=1e-5, rtol=0)
    torch.testing.assert_close(last[1], alone(model.model, ids[1])[-1:], atol=1e-5, rtol=0)


def hidden_inside(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    return mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda ids: {"attention_mask": hidden_inside(ids)}, "pad on the left"),
        (lambda ids: {"attention_mask": torch.ones(1, 5)}, r"it must be \(batch, 10\)"),
        (lambda ids: {"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        (lambda ids: {"inputs_embeds": torch.zeros(1, 10, 32)}, "takes input_ids, not inputs_embeds"),
        (lambda ids: {"output_hidden_states": True}, "returns logits only"),
        (lambda ids: {"input_ids": random_ids(1, 65)}, "context holds 64"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(model: InlForCausalLM, arguments: Any, message: str) -> None:
    ids = random_ids(1, 10)
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": ids} | arguments(ids)))


def test_a_cache_is_not_used_with_another_mask_or_for_other_decoding(model: InlForCausalLM) -> None:
    ids = random_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="give the whole mask"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows and input_ids 1"):
        model(ids[:1, :1], attention_mask=torch.ones(1, 11), past_key_values=model(ids).past_key_values)
    with pytest.raises(NotImplementedError, match="cannot be shortened"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="leave the argument out"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
