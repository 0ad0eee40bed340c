"""`inl check equivalence`: every way of computing a checkpoint's logits gives the same ones, up to rounding.

- The reference is each text alone, whole, by torch's own operations in evaluation mode.
- A difference is the largest one of any logit, divided by the largest logit of the reference. Tokens take all their
  iterations: whether a token stops early may hang on the last bit, and its logits then differ by far more than that.
- Legend: B texts, S tokens of each, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from inl_core.errors import RecipeError
from inl_core.inference.checkpoint_files import CONFIG, TOKENIZER
from inl_core.inference.decoding import Decoder
from inl_core.inference.loading import LoadedModel, load_model
from inl_core.inference.texts import Text
from inl_core.kernels import apply
from inl_core.kernels.compilation import compile_parts
from inl_core.kernels.cpu.library import find_compilers
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.training.checkpoint_writing import save_weights
from inl_core.training.execution import recompute

FEWEST_TOKENS = 8
NUM_TEXTS = 3
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""By the type of the weights; 0.05 for others, which have about three digits."""
_ALL_ITERATIONS = Options(early_stopping=False)

Pairs = Iterator[tuple[Tensor, Tensor]]
"""(found, expected) logits or gradients of one shape."""


@dataclass(frozen=True)
class WayCheck:
    """One way of computing the logits."""

    name: str
    what: str
    difference: float | None
    """Relative to the largest logit; None where the way was left out."""
    tolerance: float
    seconds: float = 0.0
    left_out: str = ""
    """Why it was left out."""

    @property
    def passed(self) -> bool:
        """Whether it was left out, or its difference is within the tolerance; NaN is not."""
        return self.difference is None or self.difference <= self.tolerance


@torch.no_grad()
def check_equivalence(
    loaded: LoadedModel,
    text: Text,
    work: Path,
    *,
    num_tokens: int,
    tolerance: float | None = None,
    compiled: bool = True,
    tell: Callable[[str], None] = lambda name: None,
) -> list[WayCheck]:
    """Compute the logits of the beginning of a text in every way, and compare each with the reference.

    Args:
        text: its first windows are the texts.
        work: an empty directory.
        num_tokens: S.
        tolerance: the largest difference that passes; None is that of the weights' type (TOLERANCES).
        compiled: whether to try the ways that torch.compile makes, which take tens of seconds.
        tell: hears the name of each way before it is tried.

    Raises:
        RecipeError: S is too small, or larger than the model's context.
    """
    if num_tokens < FEWEST_TOKENS:
        raise RecipeError(f"tokens {num_tokens}: must be at least {FEWEST_TOKENS}")
    dtype = loaded.model.embedding.table.weight.dtype
    within = TOLERANCES.get(dtype, 0.05) if tolerance is None else tolerance
    ways = _Ways(loaded, _texts(text, num_tokens), work)
    why_not = "" if compiled else "as asked for"
    if compiled and ways.ids.device.type == "cpu" and not find_compilers():
        why_not = "no C++ compiler is here"
    found = []
    for name, what, run in ways.all():
        if why_not and name.startswith("compiled"):
            found.append(WayCheck(name, what, None, within, left_out=why_not))
            continue
        tell(name)
        start = time.perf_counter()
        difference = ways.difference(run())
        found.append(WayCheck(name, what, difference, within, time.perf_counter() - start))
    return found


def _texts(text: Text, num_tokens: int) -> Tensor:
    """(B, S), the text's first windows; the same ones again where it is too short."""
    batch = next(text.windows(window=num_tokens, batch_size=NUM_TEXTS, max_tokens=num_tokens * NUM_TEXTS))
    ids = torch.from_numpy(batch.tokens).to(text.loaded.model.embedding.table.weight.device)
    return ids[torch.arange(NUM_TEXTS) % len(ids)]


class _Ways:
    """The ways, each of which gives pairs of what it found and what it should have found."""

    def __init__(self, loaded: LoadedModel, ids: Tensor, work: Path) -> None:
        self.loaded, self.ids, self.work, self.model = loaded, ids, work, loaded.model
        self.plain = self._again()
        apply(self.plain, operations="plain")
        self.reference = torch.cat([self._logits(self.plain, row[None]) for row in ids])
        self.scale = float(self.reference.abs().max())

    def all(self) -> list[tuple[str, str, Callable[[], Pairs]]]:
        """(name, what it is, how to compute it) of each way."""
        return [
            ("operations", "each text alone, by the operations chosen for this machine", self._operations),
            ("batched", "the texts side by side", self._batched),
            ("packed", "two texts in one window, behind a document mask, as in training", self._packed),
            ("cached", "half of each text at once, then token by token, as in generation", self._cached),
            ("chunked", "each text in four pieces, with a cache", self._chunked),
            ("padded", "texts of different length side by side, padded on the left", self._padded),
            ("recomputed", "in training mode, with recomputation of the blocks", self._recomputed),
            ("recomputed gradient", "the gradient of the loss, with recomputation and without", self._gradient),
            ("saved", "written as a checkpoint of weights alone, and read again", self._saved),
            ("compiled", "the blocks compiled by torch.compile", self._compiled),
            ("compiled cached", "as cached, by the compiled decoding step", partial(self._cached, compiled=True)),
        ]

    def difference(self, pairs: Pairs) -> float:
        """The largest difference; NaN if there is one."""
        found = [(one - other).abs().max() / max(self.scale, 1e-30) for one, other in pairs]
        return float(torch.stack(found).max())

    def _again(self) -> IntegratorLanguageModel:
        """The same model once more, to be changed."""
        return load_model(self.loaded.path, self.ids.device).model

    def _logits(self, model: IntegratorLanguageModel, ids: Tensor, **arguments: Tensor) -> Tensor:
        return model.logits(model(ids, options=_ALL_ITERATIONS, **arguments).hidden)

    def _operations(self) -> Pairs:
        for row, expected in zip(self.ids, self.reference, strict=True):
            yield self._logits(self.model, row[None])[0], expected

    def _batched(self) -> Pairs:
        yield self._logits(self.model, self.ids), self.reference

    def _packed(self) -> Pairs:
        length = self.ids.shape[1]
        half, rest = length // 2, length - length // 2
        packed = torch.cat([self.ids[0, :half], self.ids[1, :rest]])[None]
        documents = torch.tensor([[0] * half + [1] * rest], dtype=torch.int32, device=packed.device)
        positions = torch.tensor([[*range(half), *range(rest)]], device=packed.device)
        found = self._logits(self.model, packed, document_ids=documents, positions=positions)[0]
        yield found, torch.cat([self.reference[0, :half], self.reference[1, :rest]])

    def _cached(self, *, compiled: bool = False) -> Pairs:
        half = self.ids.shape[1] // 2
        yield self._decoded(self.ids, half, None, compiled=compiled), self.reference[:, half - 1 :]

    def _decoded(self, ids: Tensor, prompt: int, padding: Tensor | None, *, compiled: bool = False) -> Tensor:
        """(B, S - prompt + 1, V): the logits from the prompt's last token on."""
        with torch.inference_mode():
            decoder = Decoder(self.model, _ALL_ITERATIONS, rows=len(ids), compiled=compiled)
            cache = decoder.new_cache(*ids.shape)
            cache.padding = padding
            found = [decoder.prefill(ids[:, :prompt], cache)]
            found += [decoder.step(ids[:, place], cache) for place in range(prompt, ids.shape[1])]
            return torch.stack([predicted.logits for predicted in found], dim=1)

    def _chunked(self) -> Pairs:
        cache = self.model.new_cache(len(self.ids), self.ids.shape[1])
        for chunk, expected in zip(self.ids.chunk(4, dim=1), self.reference.chunk(4, dim=1), strict=True):
            output = self.model(chunk, cache=cache, options=_ALL_ITERATIONS)
            yield self.model.logits(output.hidden), expected

    def _padded(self) -> Pairs:
        length = self.ids.shape[1]
        half, skipped = length // 2, [row * length // 8 for row in range(len(self.ids))]
        found = self._decoded(self.ids, half, torch.tensor(skipped, device=self.ids.device))
        for row, skip in enumerate(skipped):
            yield found[row], self._logits(self.plain, self.ids[row : row + 1, skip:])[0, half - 1 - skip :]

    def _recomputed(self) -> Pairs:
        model = self._again().train()
        recompute(model, "block")
        with torch.enable_grad():
            yield self._logits(model, self.ids).detach(), self.reference

    def _gradient(self) -> Pairs:
        found = [self._gradients_of(mode) for mode in ("block", "none")]
        scale = max(float(gradient.abs().max()) for gradient in found[1]) or 1.0
        for one, other in zip(*found, strict=True):
            yield one / scale * self.scale, other / scale * self.scale

    def _gradients_of(self, mode: str) -> list[Tensor]:
        model = self._again().train()
        recompute(model, mode)
        with torch.enable_grad():
            output = model(self.ids[:, :-1], options=_ALL_ITERATIONS)
            model.loss_sum(output.hidden, self.ids[:, 1:].contiguous(), output.table).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    def _saved(self) -> Pairs:
        names = [name for name in (CONFIG, TOKENIZER, "recipe.yaml") if (self.loaded.path / name).is_file()]
        documents = {name: (self.loaded.path / name).read_text(encoding="utf-8") for name in names}
        save_weights(self.work / "saved", self.model, documents)
        yield self._logits(load_model(self.work / "saved", self.ids.device).model, self.ids), self.reference

    def _compiled(self) -> Pairs:
        model = self._again()
        compile_parts(model)
        yield self._logits(model, self.ids), self.reference
