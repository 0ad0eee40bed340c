"""The configuration and the model as transformers sees them, around the model that the rest of this project trains.

- The model inside is `IntegratorLanguageModel`, with torch's own operations: this file translates arguments alone.
- A row may have padding on the left, which is hidden, or on the right, which later tokens would see; so only the last
  pass over a row may have any on the right.
- Legend: B batch, S tokens of this pass, M tokens so far, V vocabulary.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from inl_core.interop.huggingface.caching import InlCache
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.recipe import ModelConfig

REMOTE_CODE = "modeling_inl.py"
"""The file in an exported directory that transformers runs with trust_remote_code=True."""


class InlConfig(PreTrainedConfig):
    """What config.json of an exported directory holds.

    Attributes:
        inl: the model section of a recipe, complete. Whatever is left out is filled in as in a recipe.
        vocab_size: V, kept here and not in `inl`, because `resize_token_embeddings` changes it.
    """

    model_type = "inl"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - a dataclass field if it had a type

    def __init__(
        self,
        inl: dict[str, Any] | None = None,
        vocab_size: int = 32_000,
        *,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = dict(inl or {})
        self.vocab_size = given.pop("vocab_size", None) or vocab_size
        model = ModelConfig.model_validate(given)
        self.inl, self.use_cache = model.model_dump(mode="json") | {"vocab_size": None}, use_cache
        ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        derived = _names_elsewhere(model)
        super().__init__(**ids, **{key: value for key, value in kwargs.items() if key not in derived})
        for key, value in derived.items():
            setattr(self, key, value)
        module = Path(REMOTE_CODE).stem
        self.auto_map = {
            "AutoConfig": f"{module}.{InlConfig.__name__}",
            "AutoModelForCausalLM": f"{module}.{InlForCausalLM.__name__}",
        }

    @property
    def model(self) -> ModelConfig:
        """The configuration of the model inside."""
        return ModelConfig.model_validate(self.inl or {}).with_vocab_size(self.vocab_size)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the code that loads the model where only transformers is imported."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(Path(__file__).with_name(REMOTE_CODE), Path(save_directory, REMOTE_CODE))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: transformers would copy this package's own files into what it saves."""


def _names_elsewhere(model: ModelConfig) -> dict[str, Any]:
    """What other programs ask a configuration for, under their names; all of it follows from `inl`."""
    return {
        "hidden_size": model.d_model,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tie_head,
    }


class InlForCausalLM(PreTrainedModel, GenerationMixin):
    """An INL-LLM, or a Transformer of this project, with transformers' interface.

    Attributes:
        model: the model inside, of whose weights this one consists.
        options: of the model inside: the number of iterations, early stopping.
    """

    config_class = InlConfig
    config: InlConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "StreamBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # its cache cannot go back, which assisted decoding needs

    def __init__(self, config: InlConfig) -> None:
        super().__init__(config)
        self.model = IntegratorLanguageModel(config.model)
        self.options = Options()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill what was not read from a file: buffers that are not saved, and the weights of a model that is new."""
        if not isinstance(module, IntegratorLanguageModel):
            return super()._init_weights(module)
        saved = dict(module.state_dict(keep_vars=True))
        kept = {name: tensor.clone() for name, tensor in saved.items() if hasattr(tensor, "_is_hf_initialized")}
        if len(kept) < len(saved):
            module.initialise(int(torch.randint(2**31, ())))
            for name, tensor in kept.items():
                saved[name].copy_(tensor)
        module.reset_buffers()
        if not module.config.excites:
            module.excitation_amplitude.fill_(module.config.initial_amplitude)

    def get_input_embeddings(self) -> nn.Module:
        """The table (V, D), or (V, R) where the embedding is a product of two matrices."""
        return self.model.embedding.table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table in its place."""
        assert isinstance(value, nn.Embedding)
        self.model.embedding.table = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where the head uses the table."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        assert isinstance(new_embeddings, nn.Linear)
        self.model.head = new_embeddings

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing: transformers would copy this package's own files into what it saves."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """`generate` makes the cache of its models itself; this model's is of another kind."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model has a cache of its own; "
                "leave the argument out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = InlCache()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: InlCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, S, V) in float32, and the mean cross-entropy in nats of `labels` if they are given.

        Args:
            input_ids: (B, S).
            attention_mask: (B, M), 0 where there is padding; M counts the tokens in `past_key_values`, too.
            position_ids: (B, S). Where they start again, without a mask and a cache, another document begins.
            past_key_values: the cache of the tokens before these.
            labels: (B, S), the tokens themselves: they are shifted here. -100 does not count.
            use_cache: return a cache; None does so in evaluation mode.
            logits_to_keep: only the last so many tokens' logits, or those at these places; 0 is all.

        Raises:
            ValueError: an argument that this model cannot take; the message says which.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model takes input_ids, not inputs_embeds")
        if output_attentions or output_hidden_states:
            raise ValueError("this model returns logits only: leave output_attentions and output_hidden_states out")
        if past_key_values is not None and not isinstance(past_key_values, InlCache):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}: use inl_core.interop.huggingface.InlCache, or leave it out")
        hidden, cache = self._run(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        return result if return_dict is not False else result.to_tuple()

    def _run(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: InlCache | None,
        use_cache: bool | None,
    ) -> tuple[Tensor, InlCache | None]:
        """Hidden states (B, S, D), and the cache that holds these tokens, too; the arguments are those of `forward`."""
        past = 0 if cache is None else cache.get_seq_length()
        length = past + ids.shape[1]
        padding = left_padding(mask, past, length)
        if cache is not None and cache.own is not None:
            check_same_padding(padding, cache.own.padding, len(ids))
        self._check_context(length, padding)
        positions = None if positions is None else positions.expand(ids.shape)
        documents = None if past else document_ids(ids, padding, positions, mask)
        wants_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if wants_cache and cache is None and (documents is None or padding is not None):
            cache = InlCache()
        if cache is not None:
            own, documents = cache.prepared(self.model, ids, padding), None
        else:
            own = None
            if positions is None and padding is not None:
                positions = (torch.arange(ids.shape[1], device=ids.device) - padding[:, None]).clamp(min=0)
        output = self.model(ids, positions=positions, document_ids=documents, cache=own, options=self.options)
        return output.hidden, cache

    def _check_context(self, length: int, padding: Tensor | None) -> None:
        """Refuse a text that is longer than the tables of positions."""
        longest = self.config.max_position_embeddings
        if length > longest and length - (0 if padding is None else int(padding.min())) > longest:
            raise ValueError(f"a text of {length:,} tokens: this model's context holds {longest:,}; shorten it")


def left_padding(mask: Tensor | None, past: int, length: int) -> Tensor | None:
    """(B,) the leading tokens of each row that hold no text; None where no row has any.

    Args:
        mask: (B, M), as transformers has it.
        past: tokens before this pass.
        length: M, tokens after this pass.

    Raises:
        ValueError: the mask has another shape, or hides a token that later ones in the row would see.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != length:
        raise ValueError(f"attention_mask has the shape {tuple(mask.shape)}; it must be (batch, {length})")
    real = mask != 0
    starts = real.int().argmax(1)
    places = torch.arange(length, device=mask.device)
    # Only the first pass may have padding on the right: no token of it sees that.
    last = length - 1 - real.flip(1).int().argmax(1) if past == 0 else torch.full_like(starts, length - 1)
    if bool((~real & (places >= starts[:, None]) & (places <= last[:, None])).any()):
        raise ValueError("attention_mask hides tokens inside or after a text: pad on the left (padding_side='left')")
    return starts if bool(starts.any()) else None


def check_same_padding(padding: Tensor | None, before: Tensor | None, batch: int) -> None:
    """Refuse a mask that pads other tokens than the cache knows of."""
    zeros = torch.zeros(batch, dtype=torch.long)
    padding, before = (zeros if known is None else known.cpu() for known in (padding, before))
    if not torch.equal(padding, before):
        raise ValueError("attention_mask pads other tokens than when past_key_values was filled: give the whole mask")


def document_ids(ids: Tensor, padding: Tensor | None, positions: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B, S): which tokens may see each other, where padding or positions that start again divide a row; else None."""
    if padding is not None:
        return (torch.arange(ids.shape[1], device=ids.device) >= padding[:, None]).long()
    if positions is None or mask is not None:
        return None
    begins = positions[:, 1:] != positions[:, :-1] + 1
    if not bool(begins.any()):
        return None
    numbers = torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
    return numbers.expand(ids.shape)
