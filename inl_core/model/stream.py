"""The residual stream as one second-order system: depth is its time, and each sub-layer takes one step.

    before the first step:  v = x_0 = embedding                    x = x_0 + b_in shift(x_0)
    step t = 1 .. 2L:       c = sub_layer_t(norm_t(x))             attention and feed-forward in turn: the candidate
                            v = alpha v + c + beta (mu - x) + A sin(gamma t + phi)
                            x = x + v + b shift(v) + r x_0

- Every coefficient is a learned vector (D,). `shift` is the token before, inside the document: zero at its first token.
  So velocity travels along the text (b, the transport) as it does through depth (alpha, the momentum).
- alpha, b, r and beta start at 0: with A = 0, too, the model starts as exactly a Transformer.
- Each term is a switch (ModelConfig.stream and .transport). Without any this is the Transformer: x = x + c.
- Of these vectors the optimizer takes larger steps: `training.optimizer.stream_rate_factor`.
- Where a sequence is split among devices, each needs one row (D,) a step from the device before it: its last token's v.
- Source: docs/model.md, "v5". Legend: B batch, S sequence, D d_model, L layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from inl_core.model.attention import Attention, KVCache, LayerCache, Rotary
from inl_core.model.dynamics import rms
from inl_core.model.excitation import Excitation
from inl_core.model.feed_forward import FeedForward, build_norm
from inl_core.model.trajectory import Trajectory
from inl_core.recipe import ModelConfig


def shift(v: Tensor, previous: Tensor | None, has_previous: Tensor | None) -> Tensor:
    """Each token's predecessor: v (B, S, D) -> (B, S, D).

    Args:
        previous: (B, 1, D), what precedes the first of these tokens; None is zero. It becomes the last of them.
        has_previous: (B, S, 1) bool, False at the first token of a document; None is True everywhere.
    """
    before = torch.cat((torch.zeros_like(v[:, :1]) if previous is None else previous, v[:, :-1]), dim=1)
    if previous is not None:
        previous.copy_(v[:, -1:])
    return before if has_previous is None else before * has_previous


def have_previous(positions: Tensor, document_ids: Tensor | None) -> Tensor:
    """(B, S, 1) bool: whether a token has one before it in its document, whose first token's position is 0."""
    found = positions > 0
    if document_ids is not None:
        found[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    return found[..., None]


class Shared(NamedTuple):
    """What one forward pass gives to all of its steps."""

    start: Tensor
    """x_0, the embedding, (B, S, D)"""
    amplitude: Tensor
    """A of the excitation, 0-dim"""
    rotary: Rotary | None
    mask: Tensor | None
    """As `Attention` wants them"""
    has_previous: Tensor | None
    """As `shift` wants it"""


class Entry(nn.Module):
    """What happens to the embedding before the first step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transport = nn.Parameter(torch.empty(config.d_model)) if config.transports_at("embedding") else None

    @torch.no_grad()
    def initialise(self) -> None:
        """No transport."""
        for parameter in self.parameters():
            parameter.zero_()

    def forward(self, x: Tensor, previous: Tensor | None, has_previous: Tensor | None) -> Tensor:
        """x_0 (B, S, D) -> x (B, S, D)."""
        if self.transport is None:
            return x
        return torch.addcmul(x, self.transport, shift(x, previous, has_previous))


class Coefficients(NamedTuple):
    """The coefficients of one step, each (D,); None where there is no such term."""

    alpha: Tensor | None
    beta: Tensor | None
    constant: Tensor | None
    """beta mu + A sin(gamma t + phi), what is the same for all tokens"""
    transport: Tensor | None
    anchor: Tensor | None


class Motion(nn.Module):
    """The arithmetic of a step. It has no parameters: `inl_core.kernels.apply` may put a faster one in its place."""

    def forward(
        self, own: Coefficients, x: Tensor, v: Tensor, candidate: Tensor, shared: Shared, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next x and v, from x, v and the candidate c, all (B, S, D); `previous` as in `shift`."""
        new_v = self.velocity(own, x, v, candidate)
        new_x = x + new_v
        if own.transport is not None:
            new_x = torch.addcmul(new_x, own.transport, shift(new_v, previous, shared.has_previous))
        if own.anchor is not None:
            new_x = torch.addcmul(new_x, own.anchor, shared.start)
        # Without momentum nothing reads the velocity, and a compiler need not know of a gradient that is always zero.
        return new_x, new_v.detach() if own.alpha is None else new_v

    def velocity(self, own: Coefficients, x: Tensor, v: Tensor, candidate: Tensor) -> Tensor:
        """alpha v + c + beta (mu - x) + A sin(gamma t + phi), (B, S, D)."""
        new_v = candidate
        if own.alpha is not None:
            new_v = torch.addcmul(new_v, own.alpha, v)
        if own.constant is not None:
            new_v = new_v + own.constant
        if own.beta is not None:
            new_v = torch.addcmul(new_v, own.beta, x, value=-1.0)
        return new_v


class Step(nn.Module):
    """The step that follows one sub-layer, and its coefficients."""

    time: Tensor

    def __init__(self, config: ModelConfig, sub_layer: str, time: int) -> None:
        super().__init__()

        def vector(is_there: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(config.d_model)) if is_there else None

        stream = config.stream
        self.index, self.kappa = time, stream.kappa if stream and stream.dynamic_alpha else None
        self.alpha = vector(bool(stream and stream.momentum))
        self.transport = vector(config.transports_at(sub_layer))
        self.anchor = vector(bool(stream and stream.anchor))
        self.beta = vector(bool(stream and stream.equilibrium))
        self.mu = vector(bool(stream and stream.equilibrium))
        self.excitation = Excitation(stream.excitation, config.d_model) if stream and stream.excitation else None
        self.motion = Motion()
        # A tensor, so that a compiler makes one code for all layers.
        self.register_buffer("time", torch.empty(1), persistent=False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Zeros, but for gamma and phi."""
        for parameter in self.parameters(recurse=False):
            parameter.zero_()
        if self.excitation is not None:
            self.excitation.initialise()

    def reset_buffers(self) -> None:
        """Fill what is derived from the configuration and not saved."""
        self.time.fill_(self.index)

    def forward(
        self, x: Tensor, v: Tensor, candidate: Tensor, shared: Shared, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next x and v, from x, v and the candidate c, all (B, S, D); `previous` as in `shift`."""
        return self.motion(
            self.coefficients(shared.amplitude),
            x,
            v if self.kappa is None else v * self.wake(x),
            candidate.to(x.dtype),
            shared,
            previous,
        )

    def coefficients(self, amplitude: Tensor) -> Coefficients:
        """What the tokens have in common, at A = `amplitude`."""
        constant = None if self.excitation is None else self.excitation.at(self.time, amplitude)[0]
        if self.beta is not None and self.mu is not None:
            towards_mu = self.beta * self.mu
            constant = towards_mu if constant is None else constant + towards_mu
        return Coefficients(self.alpha, self.beta, constant, self.transport, self.anchor)

    def wake(self, x: Tensor) -> Tensor:
        """1 - exp(-kappa rms(x - mu)), (B, S, 1): the share of alpha that is left near the equilibrium."""
        return -torch.expm1(-(self.kappa or 0.0) * rms(x if self.mu is None else x - self.mu))


class StreamBlock(nn.Module):
    """One layer: attention and a step, feed-forward and a step."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_attention = build_norm(config)
        self.attention = Attention(config)
        self.step_attention = Step(config, "attention", 2 * layer + 1)
        self.norm_feed_forward = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.step_feed_forward = Step(config, "feed_forward", 2 * layer + 2)

    def forward(self, x: Tensor, v: Tensor, shared: Shared, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """x and v, both (B, S, D), two steps later."""
        return self.feed(*self.attend(x, v, shared, cache), shared, cache)

    def trace(self, x: Tensor, v: Tensor, shared: Shared, cache: LayerCache | None) -> list[tuple[Tensor, Tensor]]:
        """x and v after each of the two steps."""
        middle = self.attend(x, v, shared, cache)
        return [middle, self.feed(*middle, shared, cache)]

    def attend(self, x: Tensor, v: Tensor, shared: Shared, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """The first step, whose candidate is attention's output."""
        candidate = self.attention(self.norm_attention(x), shared.rotary, shared.mask, cache)
        return self.step_attention(x, v, candidate, shared, None if cache is None else cache.previous[0])

    def feed(self, x: Tensor, v: Tensor, shared: Shared, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """The second step, whose candidate is the feed-forward's output."""
        candidate = self.feed_forward(self.norm_feed_forward(x))
        return self.step_feed_forward(x, v, candidate, shared, None if cache is None else cache.previous[1])


def stream_parameters(model: nn.Module) -> set[nn.Parameter]:
    """All that the entry and the steps of a model learn, mu and the excitation included."""
    own = (module for module in model.modules() if isinstance(module, Entry | Step))
    return {parameter for module in own for parameter in module.parameters()}


def flow(
    entry: Entry, blocks: list[StreamBlock], x: Tensor, shared: Shared, cache: KVCache | None, *, is_kept: bool
) -> list[tuple[Tensor, Tensor]]:
    """All 2L steps from the embedding x (B, S, D): x and v before the first and after each, or the last ones alone."""
    caches = cache.layers(x.shape[1]) if cache else [None] * len(blocks)
    previous = cache.previous[0] if cache is not None and cache.previous is not None else None
    x, v = entry(x, previous, shared.has_previous), x.view_as(x)
    path = [(x, v)]
    for block, own_cache in zip(blocks, caches, strict=True):
        if is_kept:
            path += block.trace(x, v, shared, own_cache)
            x, v = path[-1]
        else:
            x, v = block(x, v, shared, own_cache)
    return path if is_kept else [(x, v)]


def stream_trajectory(path: list[tuple[Tensor, Tensor]], steps: list[Step], amplitude: Tensor) -> Trajectory:
    """The trajectory of a stream in the words of an integrator's: T = 2L, gate = 1, alpha and beta one a channel.

    Its states also move by transport and by x_0, so x_{t+1} is not x_t + v_{t+1}.

    Args:
        path: x and v before the first step and after each, (B, S, D).
    """
    zero = torch.zeros_like(path[0][0])
    alpha, beta, candidate = [], [], []
    for step, (x, v), (_, new_v) in zip(steps, path, path[1:], strict=False):
        coefficients, wake = step.coefficients(amplitude), 1.0 if step.kappa is None else step.wake(x)
        alpha.append(zero if step.alpha is None else (step.alpha * wake).expand_as(x))
        beta.append(zero if step.beta is None else step.beta.expand_as(x))
        candidate.append(new_v - step.motion.velocity(coefficients, x, v * wake, zero))
    states, velocities = zip(*path, strict=True)
    return Trajectory(
        torch.stack(states),
        torch.stack(velocities),
        torch.stack(alpha),
        torch.stack(beta),
        torch.ones_like(zero).expand(len(steps), *zero.shape),
        torch.stack(candidate),
    )
