"""Our models' work: the trainer's step, a prefill into a cache, and generation, through the library's own code.

- The step is the trainer's own: micro-batches, the recipe's losses, clipping, optimizers.
- Generation is `inl_core.inference.generate`, text and all, with a tokenizer of bytes and as many more tokens as the
  vocabulary needs, and no end-of-text token, so that every row runs to its last token.
"""

import string
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from inl_core.analysis.bench.parts import Timed, part
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.work import Work, autocast, on_random_prompts, optimizer_step, random_rows
from inl_core.corpus.loader import Batch
from inl_core.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer
from inl_core.errors import RecipeError
from inl_core.inference.decoding import Decoder
from inl_core.inference.generate import GenerationSettings, generate
from inl_core.model import IntegratorLanguageModel
from inl_core.model.attention import Attention
from inl_core.model.block import Block
from inl_core.model.embedding import Embedding
from inl_core.model.feed_forward import FeedForward
from inl_core.model.integrator import Integrator
from inl_core.model.stream import StreamBlock
from inl_core.training.cycles import regime
from inl_core.training.distributed import World
from inl_core.training.execution import prepare_model
from inl_core.training.gradients import Gradients
from inl_core.training.layout import Layout
from inl_core.training.loss_module import LossModule, micro_batches
from inl_core.training.parallel import parallelize

_PARTS = {Attention: "attention", Integrator: "integrator", FeedForward: "feed-forward", Embedding: "embedding"}
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def build_inl_work(candidate: Candidate, settings: BenchSettings, *, compiled: bool) -> Work:
    """The candidate's work; compiled as the trainer compiles it, block by block, or as generation compiles itself."""
    model = build_model(candidate, settings)
    is_decode = settings.task == "decode"
    training = candidate.recipe.training.model_copy(update={"compile": compiled and not is_decode})
    prepare_model(model, training, bf16=settings.bf16)
    if settings.task == "train":
        run = _training_step(candidate, settings, model)
    elif is_decode and candidate.kind == "inl":
        run = _generation(settings, model, compiled=compiled)
    else:
        use = _without_cache(settings, model) if is_decode else _prefill(model)
        run = on_random_prompts(settings, model.vocab_size, use)
    return Work(run, model, _timed(model, settings, compiled=compiled))


def _timed(model: IntegratorLanguageModel, settings: BenchSettings, *, compiled: bool) -> list[Timed]:
    """What the parts of the time are called by. What stands inside a compiled function cannot be told apart."""
    if settings.task == "decode":  # generation copies the model's modules, so their classes are timed
        found: list[Timed] = [(Decoder, "logits", "head"), (model, "logits", "head")]
        return found + [(kind, "forward", name) for kind, name in _PARTS.items() if not compiled or kind is Integrator]
    found = [(model, "loss_sum" if settings.task == "train" else "logits", "head")]
    for module in model.modules():
        if compiled and isinstance(module, Block):
            entered = "attention and feed-forward" if module.feeds_candidate else "attention"
            found += [(module, "enter", entered), (module, "leave", "feed-forward")]
        elif compiled and isinstance(module, StreamBlock):
            found += [(module, "forward", "attention and feed-forward")]
        elif not (compiled and isinstance(module, Attention | FeedForward)):
            found += [(module, "forward", name) for kind, name in _PARTS.items() if isinstance(module, kind)]
    return found


def build_model(candidate: Candidate, settings: BenchSettings) -> IntegratorLanguageModel:
    """The candidate's model with its starting weights, in training mode for training."""
    with torch.device("meta"):
        model = IntegratorLanguageModel(candidate.config)
    model.to_empty(device=settings.device)
    model.initialise(settings.seed)
    return model.train(settings.task == "train")


def _training_step(candidate: Candidate, settings: BenchSettings, model: IntegratorLanguageModel) -> Callable[[], None]:
    """One optimizer step, with the loss weights of a run's first step."""
    training, world = candidate.recipe.training, World(0, 1, torch.device(settings.device))
    gradients = Gradients(parallelize(LossModule(model, autocast(settings)), Layout("one"), world), training)
    now = regime(training.losses, training.cycle, 0, training.num_steps)
    draw = random_rows(settings, model.vocab_size)

    def differentiate() -> None:
        with part("data"):
            rows = draw(settings.sequence_length + 1)
            batch = Batch(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]))
            parts = micro_batches(batch, training.micro_batch_size or settings.batch_size, world.device)
        gradients.backward(parts, now, 0, batch.num_targets)

    return optimizer_step(model, training, settings, differentiate)


def _prefill(model: IntegratorLanguageModel) -> Callable[[Tensor], Any]:
    """A prompt into an empty cache in one pass, and the logits of its last position."""
    return lambda ids: model.logits(model(ids, cache=model.new_cache(len(ids), ids.shape[1])).hidden[:, -1])


def _without_cache(settings: BenchSettings, model: IntegratorLanguageModel) -> Callable[[Tensor], None]:
    """Greedy decoding without a cache: for each new token the model reads the whole text again."""

    def decode(ids: Tensor) -> None:
        for _ in range(settings.new_tokens):
            new = model.logits(model(ids).hidden[:, -1]).argmax(-1)
            ids = torch.cat((ids, new[:, None]), dim=1)

    return decode


def _generation(settings: BenchSettings, model: IntegratorLanguageModel, *, compiled: bool) -> Callable[[], None]:
    """Greedy generation of all rows side by side."""
    rows, length = settings.batch_size, settings.prompt_tokens
    tokenizer = bench_tokenizer(model.vocab_size)
    letters = np.random.default_rng(settings.seed).choice(list(string.ascii_lowercase), (rows, length - 1))
    prompts = ["".join(row) for row in letters]  # each is `length` tokens long, with the token that begins a text
    wanted = GenerationSettings(
        max_new_tokens=settings.new_tokens, temperature=0.0, batch_size=rows, compiled=compiled, bf16=settings.bf16
    )

    def run() -> None:
        done = generate(model, tokenizer, prompts, wanted)
        lengths = {(completion.prompt_tokens, len(completion.token_ids)) for completion in done}
        assert lengths == {(length, settings.new_tokens)}, lengths

    return run


def bench_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, the special tokens, and further byte strings that no text is encoded to; eos is never produced.

    Raises:
        RecipeError: the vocabulary has no room for the bytes.
    """
    least = len(_ALPHABET) + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise RecipeError(f"--vocab-size {vocab_size}: generating text needs at least {least}, every byte and the ends")
    names = [*SPECIAL_TOKENS, *_ALPHABET]
    names += [f"{_ALPHABET[index % 64 + 32]}x{index}" for index in range(vocab_size - least)]
    model: Any = models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer = Tokenizer(backend)
    tokenizer.eos_id = -1
    return tokenizer
