"""Our models' work: the trainer's step, a prefill into a cache, and generation, through the library's own code.

- The step is made of the trainer's pieces: micro-batches, LossModule with the recipe's losses, clipping, optimizers.
- Generation is `inl_core.inference.generate`, text and all, with a tokenizer of bytes and as many more tokens as the
  vocabulary needs, and no end-of-text token, so that every row runs to its last token.
"""

import string
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from inl_core.analysis.bench.parts import part
from inl_core.analysis.bench.settings import COMPILED_GENERATION, BenchSettings, Candidate
from inl_core.analysis.bench.work import TokenSource, Work, autocast, update
from inl_core.corpus.loader import Batch
from inl_core.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer
from inl_core.errors import RecipeError
from inl_core.inference.generate import GenerationSettings, generate
from inl_core.model import IntegratorLanguageModel
from inl_core.model.attention import Attention
from inl_core.model.feed_forward import FeedForward
from inl_core.model.integrator import Integrator
from inl_core.model.language_model import Embedding
from inl_core.training.cycles import regime
from inl_core.training.distributed import prepare_blocks
from inl_core.training.losses import AuxiliaryWeights
from inl_core.training.optimizers import build_optimizers
from inl_core.training.step import LossModule, MicroBatch, micro_batches

_PARTS = {Attention: "attention", Integrator: "integrator", FeedForward: "feed-forward", Embedding: "embedding"}
_DECODING = {
    "inl_core.inference.layer_step": {
        "attend": "attention",
        "feed_forward": "feed-forward",
        "integrator_step": "integrator",
    },
    "inl_core.inference.decoding": {"integrator_step": "integrator", "head_logits": "head"},
}
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def build_inl_work(candidate: Candidate, settings: BenchSettings, *, compiled: bool) -> Work:
    """The candidate's work; compiled as the trainer compiles it, block by block, or as generation compiles itself."""
    model = build_model(candidate, settings)
    recipe = candidate.recipe.training.model_copy(update={"compile": compiled and settings.task != "decode"})
    prepare_blocks(model.blocks, recipe)
    if settings.task == "train":
        run = _TrainingStep(candidate, settings, model)
    elif settings.task == "prefill":
        run = _Prefill(settings, model)
    else:
        is_uncached = candidate.kind == "uncached"
        run = _Uncached(settings, model) if is_uncached else _Generation(settings, model, compiled=compiled)
    functions: list[tuple[Any, str, str]] = [(model, "loss_sum" if settings.task == "train" else "logits", "head")]
    functions += _decoding_functions() if settings.task == "decode" else []
    parts = [(module, name) for module in model.modules() for kind, name in _PARTS.items() if isinstance(module, kind)]
    return Work(run, model, parts, functions)


def build_model(candidate: Candidate, settings: BenchSettings) -> IntegratorLanguageModel:
    """The candidate's model with its starting weights, in training mode for training."""
    with torch.device("meta"):
        model = IntegratorLanguageModel(candidate.config)
    model.to_empty(device=settings.device)
    model.initialise(settings.seed)
    return model.train(settings.task == "train")


def _decoding_functions() -> list[tuple[Any, str, str]]:
    """Where generation decodes with functions of its own and not with the modules: those, by the names it calls."""
    found = []
    for name, functions in _DECODING.items():
        if find_spec(name) is not None:
            module = import_module(name)
            found += [(module, function, part) for function, part in functions.items() if hasattr(module, function)]
    return found


class _TrainingStep:
    """One optimizer step, at the regime of the run's first."""

    def __init__(self, candidate: Candidate, settings: BenchSettings, model: IntegratorLanguageModel) -> None:
        self.recipe, self.settings, self.model = candidate.recipe.training, settings, model
        self.device = torch.device(settings.device)
        self.loss_module = LossModule(model, autocast(settings))
        self.optimizers = build_optimizers(model, self.recipe.optimizer, self.device)
        self.tokens = TokenSource(settings, model.vocab_size)
        self.weights = self._weights()

    def _weights(self) -> AuxiliaryWeights:
        losses, integrator = self.recipe.losses, self.model.config.integrator
        if integrator is None:
            return AuxiliaryWeights()
        now = regime(losses, self.recipe.cycle, 0, self.recipe.num_steps)
        return AuxiliaryWeights(
            now.lambda_mean,
            losses.lambda_speed,
            now.lambda_energy,
            balance=losses.lambda_balance if integrator.controller.experts > 1 else 0.0,
            energy_power=losses.energy_power,
            variance_weighted=losses.variance_weighted,
        )

    def __call__(self) -> None:
        with part("data"):
            rows = self.tokens.rows(self.settings.batch_size, self.settings.sequence_length + 1)
            batch = Batch(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]))
            micro_batch = self.recipe.micro_batch_size or self.settings.batch_size
            micro = micro_batches(batch, micro_batch, self.device)
            count = torch.tensor(float(batch.num_targets), device=self.device)
        whole = self._whole(micro, count) if self.weights.needs_whole_batch and len(micro) > 1 else None
        for one in micro:
            self.loss_module(one, self.weights, count, whole)["total"].backward()
        update(self.model, self.optimizers, self.recipe)

    @torch.no_grad()
    def _whole(self, micro: list[MicroBatch], count: Tensor) -> dict[str, Tensor]:
        """The pass without gradients that losses over the whole batch need (training/losses.py)."""
        found = [self.loss_module(one, self.weights, count, None) for one in micro]
        names = [name for name in ("moments", "loads") if name in found[0]]
        return {name: torch.stack([terms[name] for terms in found]).sum(0) for name in names}


class _Prefill:
    """A prompt into an empty cache in one pass, and the logits of its last position."""

    def __init__(self, settings: BenchSettings, model: IntegratorLanguageModel) -> None:
        self.settings, self.model = settings, model
        self.tokens = TokenSource(settings, model.vocab_size)

    @torch.inference_mode()
    def __call__(self) -> None:
        rows, length = self.settings.batch_size, self.settings.sequence_length
        with part("data"):
            ids = torch.from_numpy(self.tokens.rows(rows, length)).to(self.settings.device)
        with autocast(self.settings):
            cache = self.model.new_cache(rows, length)
            self.model.logits(self.model(ids, cache=cache).hidden[:, -1])


class _Generation:
    """Greedy generation of all rows side by side."""

    def __init__(self, settings: BenchSettings, model: IntegratorLanguageModel, *, compiled: bool) -> None:
        self.settings, self.model = settings, model
        self.modes: dict[str, Any] = {"compiled": compiled} if COMPILED_GENERATION else {}
        self.tokenizer = bench_tokenizer(model.vocab_size)
        letters = np.random.default_rng(settings.seed).choice(
            list(string.ascii_lowercase), (settings.batch_size, settings.prompt_tokens - 1)
        )
        self.prompts = ["".join(row) for row in letters]  # with bos each is prompt_tokens long

    def __call__(self) -> None:
        settings = self.settings
        wanted = GenerationSettings(
            max_new_tokens=settings.new_tokens, temperature=0.0, batch_size=settings.batch_size, **self.modes
        )
        with autocast(settings):
            done = generate(self.model, self.tokenizer, self.prompts, wanted)
        lengths = {(completion.prompt_tokens, len(completion.token_ids)) for completion in done}
        assert lengths == {(settings.prompt_tokens, settings.new_tokens)}, lengths


class _Uncached:
    """The same without a cache: every token runs all that stand before it again."""

    def __init__(self, settings: BenchSettings, model: IntegratorLanguageModel) -> None:
        self.settings, self.model = settings, model
        self.tokens = TokenSource(settings, model.vocab_size)

    @torch.inference_mode()
    def __call__(self) -> None:
        settings = self.settings
        ids = torch.from_numpy(self.tokens.rows(settings.batch_size, settings.prompt_tokens)).to(settings.device)
        with autocast(settings):
            for _ in range(settings.new_tokens):
                new = self.model.logits(self.model(ids).hidden[:, -1]).argmax(-1)
                ids = torch.cat((ids, new[:, None]), dim=1)


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
