"""Token ids -> longer token ids: the documents' `generate`, with the decoder and the sampler of `inl generate`.

This is for ids, which need no tokenizer; inl_core/inference/generate.py is for texts.
"""

import random

import torch
from torch import Tensor

from inl_core.inference.decoding import Decoder
from inl_core.inference.sampling import Sampler
from inl_core.inference.settings import GenerationSettings
from inl_core.model import IntegratorLanguageModel, Options


def continue_ids(
    model: IntegratorLanguageModel,
    ids: Tensor,
    settings: GenerationSettings,
    *,
    use_cache: bool = True,
    eos: int | None = None,
) -> Tensor:
    """Continue every row of `ids` (B, S): (B, S + n) with n <= max_new_tokens.

    The model runs in eval mode, and is in the mode it was in afterwards.

    Args:
        use_cache: False computes the whole text again for every token.
        eos: the id that ends a row; an ended row is filled with it until all others have ended.

    Raises:
        ValueError: no ids, or no room for max_new_tokens in the context.
        NonFiniteError: the logits are not finite.
    """
    _check_room(ids, settings.max_new_tokens, model.config.max_seq_len)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            found = _continue(model, ids, settings, use_cache, eos)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found.clone()  # an inference tensor could not be trained on


def _check_room(ids: Tensor, max_new_tokens: int, max_seq_len: int) -> None:
    if ids.is_meta:
        raise ValueError("ids: are on the meta device, which holds shapes and no values, so nothing can be generated")
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"ids {tuple(ids.shape)}: expected (B, S) with at least one token")
    room = max_seq_len - ids.shape[1] + 1  # the last token needs no place: nothing is predicted from it
    if max_new_tokens > room:
        raise ValueError(
            f"{ids.shape[1]} tokens and {max_new_tokens} new ones exceed the model's context, max_seq_len "
            f"{max_seq_len}; shorten the prompt or set max_new_tokens to {max(room, 0)} or less"
        )


def _continue(
    model: IntegratorLanguageModel, ids: Tensor, settings: GenerationSettings, use_cache: bool, eos: int | None
) -> Tensor:
    nothing = torch.empty(0, dtype=torch.long, device=ids.device)
    sampler = Sampler(settings, banned=nothing, prompts=ids, vocab_size=model.vocab_size)
    rows = [random.Random(f"{settings.seed}/{row}") for row in range(ids.shape[0])]
    decoder = Decoder(model, Options(), rows=len(ids), compiled=settings.compiled) if use_cache else None
    cache = decoder.new_cache(ids.shape[0], ids.shape[1] + settings.max_new_tokens - 1) if decoder else None
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    chosen = None
    for _ in range(settings.max_new_tokens):
        if decoder is None or cache is None:
            logits = model.logits(model(ids).hidden[:, -1])  # (B, V)
        else:
            logits = (decoder.prefill(ids, cache) if chosen is None else decoder.step(chosen, cache)).logits
        draws = torch.tensor([row.random() for row in rows], dtype=torch.float64, device=ids.device)
        chosen = sampler(logits, draws)
        sampler.check()
        if eos is not None:
            chosen = chosen.masked_fill(ended, eos)
            ended |= chosen == eos
        ids = torch.cat((ids, chosen[:, None].to(ids.dtype)), dim=1)
        if bool(ended.all()):
            break
    return ids
