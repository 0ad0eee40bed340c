"""The yardstick: LlamaForCausalLM of `transformers` in the same dimensions, used as its users use it.

- Random weights in float32, tied embeddings, sdpa attention, SwiGLU of the hidden width that the candidate names.
- Training: its own loss from labels, then the optimizer, clipping and precision of the candidate's recipe.
- Compiled: the whole model by `model.compile()` in training and prefill; in decoding, `generate` with a static cache
  compiles the decoding step itself. Eager decoding is `generate` with its default, growing cache.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from inl_core.analysis.bench.parts import part
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.work import TokenSource, Work, autocast, update
from inl_core.errors import RecipeError
from inl_core.recipe import ModelConfig
from inl_core.training.optimizers import build_optimizers


def require_transformers() -> None:
    """RecipeError where `transformers` is not installed."""
    if find_spec("transformers") is None:
        raise RecipeError('--against llama: transformers is not installed; pip install "inl[hf]"')


def import_llama() -> None:
    """Import what the work needs, so that memory can be counted from after it."""
    import_module("transformers.models.llama.modeling_llama")


def build_llama_work(candidate: Candidate, settings: BenchSettings, *, compiled: bool) -> Work:
    """The work of a Llama of the candidate's dimensions."""
    model = build_llama(candidate.config, settings)
    model.train(settings.task == "train")
    if settings.task == "train":
        run = _TrainingStep(candidate, settings, model)
    elif settings.task == "prefill":
        run = _Prefill(settings, model)
    else:
        run = _Generation(settings, model, compiled=compiled)
    if compiled and settings.task != "decode":
        model.compile()
    parts = [(model.model.embed_tokens, "embedding"), (model.lm_head, "head")]
    for layer in model.model.layers:
        parts += [(layer.self_attn, "attention"), (layer.mlp, "feed-forward")]
    model.loss_function = model.loss_function  # an attribute of this model, that a range can be put around
    return Work(run, model, parts, [(model, "_loss_function", "head")])


def build_llama(config: ModelConfig, settings: BenchSettings) -> Any:
    """The model with random weights."""
    transformers = import_module("transformers")
    torch.manual_seed(settings.seed)
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
        "use_cache": settings.task != "train",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys))
    return model.float().to(settings.device)


class _TrainingStep:
    """One optimizer step."""

    def __init__(self, candidate: Candidate, settings: BenchSettings, model: Any) -> None:
        self.recipe, self.settings, self.model = candidate.recipe.training, settings, model
        # The other model's kind of optimizer in its settings; Muon is for our blocks only.
        adamw = self.recipe.optimizer.model_copy(update={"name": "adamw"})
        self.optimizers = build_optimizers(model, adamw, torch.device(settings.device))
        self.tokens = TokenSource(settings, model.config.vocab_size)

    def __call__(self) -> None:
        with part("data"):
            rows = self.tokens.rows(self.settings.batch_size, self.settings.sequence_length)
            ids = torch.from_numpy(rows).to(self.settings.device)
            micro = ids.split(self.recipe.micro_batch_size or len(ids))
        for one in micro:
            with autocast(self.settings):
                loss = self.model(input_ids=one, labels=one).loss
            (loss / len(micro)).backward()
        update(self.model, self.optimizers, self.recipe)


class _Prefill:
    """A prompt into an empty cache in one pass, and the logits of its last position."""

    def __init__(self, settings: BenchSettings, model: Any) -> None:
        self.settings, self.model = settings, model
        self.tokens = TokenSource(settings, model.config.vocab_size)

    @torch.inference_mode()
    def __call__(self) -> None:
        with part("data"):
            rows = self.tokens.rows(self.settings.batch_size, self.settings.sequence_length)
            ids = torch.from_numpy(rows).to(self.settings.device)
        with autocast(self.settings):
            self.model(input_ids=ids, use_cache=True, logits_to_keep=1)


class _Generation:
    """Greedy `generate` of all rows side by side, with a cache."""

    def __init__(self, settings: BenchSettings, model: Any, *, compiled: bool) -> None:
        self.settings, self.model = settings, model
        self.tokens = TokenSource(settings, model.config.vocab_size)
        self.options: dict[str, Any] = {"do_sample": False, "max_new_tokens": settings.new_tokens, "use_cache": True}
        if compiled:
            compilation = import_module("transformers").CompileConfig(mode="default")
            compilation._compile_all_devices = True  # elsewhere than on a GPU it is off
            self.options |= {"cache_implementation": "static", "compile_config": compilation}

    @torch.inference_mode()
    def __call__(self) -> None:
        settings = self.settings
        ids = torch.from_numpy(self.tokens.rows(settings.batch_size, settings.prompt_tokens)).to(settings.device)
        with autocast(settings):
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **self.options)
        assert out.shape == (settings.batch_size, settings.context), out.shape
