"""What decoding does on a GPU: bfloat16, several tokens at once, and recorded steps, with stand-ins for recording."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from inl_core.inference import decoding
from inl_core.inference.decoding import Decoder
from inl_core.inference.generate import GenerationSettings, generate
from inl_core.inference.recording import RecordedStep
from inl_core.model import Options
from tests.inference.tiny import tiny_model, tokenizer

PROMPTS = ["def greet(", "", "The quick brown fox jumps over"]


@pytest.mark.parametrize("preset", ["v4", "v5", "transformer"])
@pytest.mark.parametrize("more", [{}, {"embedding_rank": 16}], ids=["full table", "low rank"])
@torch.inference_mode()
def test_steps_in_bfloat16_are_those_of_autocast(preset, more):
    model = tiny_model(preset, **more).eval()
    ids = torch.randint(6, model.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, Options(), rows=2, bf16=True)
    cache = decoder.new_cache(2, 12)
    assert cache.keys[0].dtype == torch.bfloat16
    found = [decoder.prefill(ids[:, :5], cache), *(decoder.step(token, cache) for token in ids[:, 5:].unbind(1))]
    exact = model.logits(model(ids).hidden[:, 4:])
    logits = torch.stack([predicted.logits for predicted in found], 1)
    assert logits.dtype == torch.float32
    error = (logits - exact).norm() / exact.norm()
    assert 0 < error < 0.02  # bfloat16 has 8 bits; and something was rounded


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("is_static", [False, True])
def test_tokens_taken_several_at_once_are_the_same_text(monkeypatch, temperature, is_static):
    model = tiny_model("v5")
    settings = GenerationSettings(max_new_tokens=21, temperature=temperature, num_samples=2, batch_size=4)
    stop = generate(model, tokenizer(), PROMPTS, settings)[0].text[5:8]
    settings = replace(settings, stop=(stop,))  # so that rows end in the middle
    expected = generate(model, tokenizer(), PROMPTS, settings)
    monkeypatch.setattr(decoding.Decoder, "__init__", _as_on_a_gpu(decoding.Decoder.__init__, is_static))
    assert [row.token_ids for row in generate(model, tokenizer(), PROMPTS, settings)] == [
        row.token_ids for row in expected
    ]


def _as_on_a_gpu(initialise, is_static: bool):
    def changed(decoder, *given, **options):
        initialise(decoder, *given, **options)
        decoder.tokens_at_once, decoder.is_static = 8, is_static

    return changed


class _Graph:
    """A CUDA graph's stand-in: it takes no note of anything, and its replay does what the test gives it."""

    replay = None


def test_a_recorded_step_gives_what_the_step_would(monkeypatch):
    cache, calls = torch.zeros(1), []

    def step(tokens, cache):
        calls.append(len(calls))
        cache += tokens.sum()
        return (cache * 2,)

    @contextmanager
    def recording(graph: _Graph) -> Iterator[None]:
        before = cache.clone()
        yield
        cache.copy_(before)  # what is recorded is not computed

        def replay() -> None:
            [result] = step(recorded.tokens, cache)
            recorded.found[0].copy_(result)

        graph.replay = replay  # pyright: ignore - as the recording of a graph does

    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    recorded = RecordedStep(step, cache)
    found = [recorded(torch.tensor([float(number)]))[0] for number in (1, 2, 3)]
    assert [value.item() for value in found] == [2.0, 6.0, 12.0]  # and an earlier result is not written to again
