"""One token a row: the model's own forward pass, with its weights laid out for it, eager or compiled.

    decoder = Decoder(model, options, rows=len(ids))
    prompt = decoder.prefill(ids, cache)            # all tokens of the prompts, in one pass
    step = decoder.step(tokens, cache)              # one token a row: step.logits, step.iterations

- A step runs a copy of the model that shares its weights and differs in this: linear layers in the layout that reads
  fastest (linear_layouts.py), and what does not change from token to token, the folded controller and the forcing,
  computed once.
- Compiled, a step is one graph, except where it depends on values or would take too long to compile; all decoders of
  the same configuration and shapes share it.
- Compiled, keys and values keep their full length behind a mask, so that nothing changes shape from token to token and
  nothing is compiled again; finished rows stay in the batch for the same reason.
- In bfloat16 the weights of the matrices are copied in that precision once, and keys and values are kept in it; the
  residual stream, norms and dynamics stay in float32, as under autocast in training.
- On a GPU a step that no value decides anything in is recorded and replayed (recording.py), compiled or not.
- Early stopping ends the loop once every row has stopped: with one row, at its own last iteration.
- Legend: B rows, S tokens, D d_model, V vocabulary, T iterations.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inl_core.inference.linear_layouts import SharedLinear, laid_out
from inl_core.inference.recording import RecordedStep
from inl_core.kernels.compilation import compile_parts, compiled_for
from inl_core.model import Integrator, IntegratorLanguageModel, KVCache, Options
from inl_core.model.controller import Controller, Head

_FEWEST_SLOTS = 256
_TOKENS_AT_ONCE = 16
_MOST_REPEATED = 24
"""Layers and iterations: each takes a graph a second or two longer to compile, where parts serve all layers."""
_PUT_ON = ("enter", "leave", "step", "step_with_gains", "forward")
"""What compilation and recomputation put on a module, which belongs to the original alone."""


class Predicted(NamedTuple):
    """Each row's logits for its next token, (B, V) in float32, and the mean iterations over layers, (B,)."""

    logits: Tensor
    iterations: Tensor


class Decoder:
    """Decodes with one model as it is now; in evaluation mode and under `torch.inference_mode`.

    Args:
        options: iterations and early stopping.
        rows: the largest batch it will run; the weights are laid out for it.
        compiled: let torch.compile generate the step's kernels at the first token; that takes tens of seconds.
        bf16: multiply matrices in bfloat16.
    """

    def __init__(
        self,
        model: IntegratorLanguageModel,
        options: Options,
        *,
        rows: int,
        compiled: bool = False,
        bf16: bool = False,
    ) -> None:
        self.model, self.options, self.is_compiled = model, options, compiled
        device = model.embedding.table.weight.device
        self.dtype = torch.bfloat16 if bf16 else None
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.is_recorded = device.type == "cuda" and not _depends_on_values(model, options)
        self.is_static = compiled or self.is_recorded
        """Whether nothing changes shape from token to token: not the cache, and not the number of rows."""
        self.tokens_at_once = _TOKENS_AT_ONCE if device.type == "cuda" else 1
        """After how many tokens their texts are looked at; until then a GPU is given one step after another."""
        self.slots = _FEWEST_SLOTS
        self.recorded: RecordedStep | None = None
        one_row = compiled and rows == 1
        with torch.inference_mode():
            self.steps = _sharing_copy(model, one_row=one_row, dtype=self.dtype)
            for integrator in self.steps.integrators():
                _fix(integrator, self.steps)
            up = None if model.head else model.embedding.project_up
            self.head_down = SharedLinear(up.weight.T.contiguous().to(self.dtype), None) if up else None
            table = (model.head or model.embedding.table).weight.to(self.dtype)
            self.head = laid_out(table, None, one_row=one_row)
        self.kind = (model.config, options, table.dtype, table.device, one_row)
        self.is_whole = compiled and _is_compiled_whole(model, options)
        if compiled and not self.is_whole:
            compile_parts(self.steps, any_shape=False)
            self.head = torch.compile(self.head, fullgraph=True)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `batch` rows of up to `slots` tokens; compiled, 256 or 512 or 1,024 ..., never shorter."""
        if self.is_static:
            while self.slots < slots:
                self.slots *= 2
            slots = self.slots
        return self.model.new_cache(batch, slots, self.dtype, is_static=self.is_static)

    def prefill(self, ids: Tensor, cache: KVCache) -> Predicted:
        """Run whole prompts (B, S), aligned to the right, in one pass."""
        with self.autocast:
            output = self.model(ids, cache=cache, options=self.options)
            return Predicted(self.model.logits(output.hidden[:, -1]), output.iterations()[:, -1])

    def step(self, tokens: Tensor, cache: KVCache) -> Predicted:
        """Run one token a row, (B,), and add it to the cache."""
        if not self.is_recorded:
            return self._whole_step(tokens, cache)
        if self.recorded is None or self.recorded.cache is not cache:
            self.recorded = RecordedStep(self._whole_step, cache)
        return Predicted(*self.recorded(tokens))

    def _whole_step(self, tokens: Tensor, cache: KVCache) -> Predicted:
        if self.is_whole:
            kind = (self.kind, cache.keys[0].shape, cache.padding is None)
            return compiled_for(kind, Decoder._step)(self, tokens, cache)
        return self._step(tokens, cache)

    def _step(self, tokens: Tensor, cache: KVCache) -> Predicted:
        output = self.steps(tokens[:, None], cache=cache, options=self.options)
        return Predicted(self.logits(output.hidden[:, -1]), output.iterations()[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, D) -> logits (B, V) in float32."""
        return self.head(hidden if self.head_down is None else self.head_down(hidden)).float()


def _depends_on_values(model: IntegratorLanguageModel, options: Options) -> bool:
    """Whether values decide what a step computes: which tokens stop early, a budget, an expert's tokens."""
    integrator = model.config.integrator
    if integrator is None:
        return False
    stops = options.early_stopping and integrator.early_stopping.convergence_threshold > 0
    return stops or model.budget is not None or integrator.controller.experts > 1


def _is_compiled_whole(model: IntegratorLanguageModel, options: Options) -> bool:
    """Whether a compiled step is one graph, which costs least a token; else the parts of its layers are compiled."""
    repeated = len(model.blocks)
    if _depends_on_values(model, options):
        return False
    if model.config.integrator:
        repeated += sum(budget.num_iterations for budget in model.budgets(options))
    return repeated <= _MOST_REPEATED


def _sharing_copy(module: Any, *, one_row: bool, dtype: torch.dtype | None) -> Any:
    """The same modules around the same parameters, except linear layers, which are laid out for decoding.

    Args:
        dtype: of the linear layers' weights; None leaves them as they are.
    """
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.to(dtype)
        return laid_out(module.weight.to(dtype), bias, one_row=one_row)
    copied = copy.copy(module)
    for name in _PUT_ON:
        copied.__dict__.pop(name, None)
    # Of a controller's matrices all but the context's are read as they are, by `Integrator.drive`; the decoder has its
    # own head, and a router chooses in the weights' own precision.
    as_they_are = ("state_velocity", "output") if isinstance(module, Controller) else ("head", "router")
    copied._modules = {
        name: child if child is None or name in as_they_are else _sharing_copy(child, one_row=one_row, dtype=dtype)
        for name, child in module._modules.items()
    }
    return copied


def _fix(integrator: Integrator, model: IntegratorLanguageModel) -> None:
    """Compute once what a layer's drive computes for each token: the folded controller and the forcing."""
    longest = 2 * max(integrator.config.num_iterations, model.config.num_iterations)
    integrator.excitation = _FixedForcing(integrator.excitation, longest, model.excitation_amplitude)  # type: ignore[assignment]
    controller = integrator.controller or model.controller
    if isinstance(controller, Controller):
        integrator.modulation = _FixedHead(integrator.modulation.fold(controller))  # type: ignore[assignment]


class _FixedHead(nn.Module):
    """A layer's modulation of one controller, folded once."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = Head(head.weight.contiguous(), head.bias.contiguous())

    def fold(self, controller: Controller) -> Head:
        """What was folded."""
        return self.head


class _FixedForcing(nn.Module):
    """A layer's excitation, its sines computed once."""

    def __init__(self, excitation: nn.Module, longest: int, amplitude: Tensor) -> None:
        super().__init__()
        self.excitation, self.table = excitation, excitation(longest, amplitude)

    def forward(self, num_iterations: int, amplitude: Tensor) -> Tensor:
        """The forcing of each iteration, (T, D)."""
        if num_iterations > len(self.table):
            return self.excitation(num_iterations, amplitude)
        return self.table[:num_iterations]
