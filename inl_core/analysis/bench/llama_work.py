"""The yardstick: LlamaForCausalLM of `transformers` in the same dimensions, used as its users use it.

- Random weights in float32, tied embeddings, sdpa attention, SwiGLU of the hidden width that the candidate names.
- Training: its own loss from labels, then the optimizer, clipping and precision of the candidate's recipe.
- Compiled: the whole model by `model.compile()` in training and prefill; in decoding, `generate` with a static cache
  compiles the decoding step itself. Eager decoding is `generate` with its default, growing cache.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from inl_core.analysis.bench.parts import Timed, part
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.work import Work, autocast, on_random_prompts, optimizer_step, random_rows
from inl_core.errors import RecipeError
from inl_core.recipe import ModelConfig


def require_transformers() -> None:
    """RecipeError where `transformers` is not installed."""
    if find_spec("transformers") is None:
        raise RecipeError('--against llama: transformers is not installed; pip install "inl[hf]"')


def import_llama() -> None:
    """Import what the work needs, so that memory can be counted from after it."""
    import_module("transformers.models.llama.modeling_llama")


def build_llama_work(candidate: Candidate, settings: BenchSettings, *, compiled: bool) -> Work:
    """The work of a Llama of the candidate's dimensions."""
    model, vocab_size = build_llama(candidate.config, settings), candidate.config.vocab_size or 0
    model.train(settings.task == "train")
    if settings.task == "train":
        run = _training_step(candidate, settings, model)
    elif settings.task == "prefill":
        read = lambda ids: model(input_ids=ids, use_cache=True, logits_to_keep=1)  # noqa: E731
        run = on_random_prompts(settings, vocab_size, read)
    else:
        run = on_random_prompts(settings, vocab_size, _generation(settings, model, compiled=compiled))
    if compiled and settings.task != "decode":
        model.compile()
    model.loss_function = model.loss_function  # makes it an attribute of this object, which can be timed
    timed: list[Timed] = [(model.model.embed_tokens, "forward", "embedding"), (model.lm_head, "forward", "head")]
    timed.append((model, "_loss_function", "head"))
    for layer in model.model.layers:
        timed += [(layer.self_attn, "forward", "attention"), (layer.mlp, "forward", "feed-forward")]
    return Work(run, model, timed)


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


def _training_step(candidate: Candidate, settings: BenchSettings, model: Any) -> Callable[[], None]:
    """One optimizer step with the recipe's settings, but always AdamW: Muon is for our blocks only."""
    recipe = candidate.recipe.training
    training = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"name": "adamw"})})
    draw = random_rows(settings, model.config.vocab_size)

    def differentiate() -> None:
        with part("data"):
            ids = torch.from_numpy(draw(settings.sequence_length)).to(settings.device)
            micro = ids.split(training.micro_batch_size or len(ids))
        for one in micro:
            with autocast(settings):
                loss = model(input_ids=one, labels=one).loss
            (loss / len(micro)).backward()

    return optimizer_step(model, training, settings, differentiate)


def _generation(settings: BenchSettings, model: Any, *, compiled: bool) -> Callable[[Tensor], None]:
    """Greedy `generate` of all rows side by side, with a cache."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": settings.new_tokens, "use_cache": True}
    if compiled:
        compilation = import_module("transformers").CompileConfig(mode="default")
        compilation._compile_all_devices = True  # otherwise it compiles on a GPU only
        options |= {"cache_implementation": "static", "compile_config": compilation}

    def decode(ids: Tensor) -> None:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert out.shape == (settings.batch_size, settings.context), out.shape

    return decode
