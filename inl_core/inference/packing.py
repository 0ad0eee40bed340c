"""A model's weights as decoding reads them: derived tensors computed once, matrices in the layout that reads fastest.

- On a CPU that layout is oneDNN's, chosen by it for few rows: a token's products are little but the matrices' way from
  memory, and MKL takes twice to three times as long on some processors (docs/performance.md). It is a copy.
- A compiled step of one row takes the matrices as they are: what the compiler makes of them reads faster still.
- Once a generation, not once a token: the controller's output matrix with each layer's modulation folded in, mu, the
  forcing of every iteration, rotary tables as wide as a head.
- Plain tensors in named tuples, no modules: one compiled function serves every layer.
- Legend: D d_model, F head size, C controller width, V vocabulary, T iterations, G output groups, M positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inl_core.model import IntegratorLanguageModel
from inl_core.model.controller import Controller, num_groups
from inl_core.model.feed_forward import FeedForward
from inl_core.model.integrator import Integrator
from inl_core.model.language_model import Block
from inl_core.recipe import IntegratorConfig

_FEWEST_REORDERED = 2**17
"""Elements: 0.5 MB."""
_ROWS_EXPECTED = 8
"""oneDNN's layout for 1 row is bad for more; the one for 8 is good from 1 to 32."""


class Matrix(NamedTuple):
    """A linear map: weight (out, in), bias (out,) or None; `is_reordered`: the weight is in oneDNN's layout."""

    weight: Tensor
    bias: Tensor | None = None
    is_reordered: bool = False


_Layout = Callable[[Matrix], Matrix]


class Norm(NamedTuple):
    """A norm over D: weight and bias (D,); RMS norm or layer norm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    is_rms: bool


class Network(NamedTuple):
    """A feed-forward: `up` holds gate and up projection where it is gated."""

    up: Matrix
    down: Matrix
    is_gated: bool


class Dynamics(NamedTuple):
    """One layer's integrator, its controller folded in."""

    context: Matrix
    """(C, D)"""
    of_state: Tensor
    """W_x (C, D)"""
    of_velocity: Tensor
    """W_v (C, D)"""
    output: Matrix
    """(GD, C)"""
    mu: Tensor
    forcing: Tensor
    """(T, D)"""
    activation: str
    kappa: float | None
    """None: alpha is not dynamic."""
    beta_max: float | None
    stride: float
    """dt velocity_scale"""
    num_iterations: int


class Layer(NamedTuple):
    """One block. `norm_state`, `dynamics` are None without an integrator, `norm_feed_forward` where that feeds it."""

    norm_attention: Norm
    query_key_value: Matrix
    attention_output: Matrix
    num_kv_heads: int
    head_dim: int
    norm_state: Norm | None
    dynamics: Dynamics | None
    gain: Tensor | None
    """(D,) on the state's change; None: the state itself is read out."""
    norm_feed_forward: Norm | None
    network: Network


class Packed(NamedTuple):
    """What a decoding step reads besides the embedding and the final norm."""

    layers: tuple[Layer, ...]
    norm_final: Norm
    head_down: Matrix | None
    """P^T (R, D) of a factored tied head."""
    head: Matrix
    """(V, D or R)"""
    rotary: Tensor | None
    """(2, M, F): cosines, and sines whose first half is negative; None with sinusoidal positions."""


def can_pack(model: IntegratorLanguageModel) -> bool:
    """Whether decoding knows the model: every preset but mixtures and budgets that are not uniform."""
    integrator = model.config.integrator
    return model.budget is None and (integrator is None or integrator.controller.experts == 1)


def pack(model: IntegratorLanguageModel, num_iterations: int | None, *, rows: int, compiled: bool = False) -> Packed:
    """The weights as they are now: a later change of the model is not seen.

    Args:
        num_iterations: T instead of the configured one.
        rows: the largest batch they are for; other batches only take longer.
        compiled: for functions that torch.compile takes.
    """
    assert can_pack(model)
    reorder = _as_it_is if compiled and rows == 1 else _reorder
    layers = tuple(
        _layer(block, model.controller, model.excitation_amplitude, num_iterations, reorder) for block in model.blocks
    )
    factored = model.head is None and model.embedding.project_up is not None
    up = model.embedding.project_up
    return Packed(
        layers,
        _norm(model.norm_final),
        Matrix(up.weight.T.contiguous()) if factored and up is not None else None,
        reorder(Matrix((model.head or model.embedding.table).weight)),
        _rotary(model.position_table) if model.config.positions == "rope" else None,
    )


def _layer(
    block: nn.Module, shared: nn.Module | None, amplitude: Tensor, num_iterations: int | None, reorder: _Layout
) -> Layer:
    assert isinstance(block, Block)
    attention = block.attention
    return Layer(
        norm_attention=_norm(block.norm_attention),
        query_key_value=reorder(_matrix(attention.query_key_value)),
        attention_output=reorder(_matrix(attention.output)),
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        norm_state=_norm(block.norm_state) if block.norm_state else None,
        dynamics=_dynamics(block.integrator, shared, amplitude, num_iterations) if block.integrator else None,
        gain=block.layer_gain,
        norm_feed_forward=_norm(block.norm_feed_forward) if block.norm_feed_forward else None,
        network=_network(block.feed_forward, reorder),
    )


def _dynamics(
    integrator: Integrator, shared: nn.Module | None, amplitude: Tensor, num_iterations: int | None
) -> Dynamics:
    config: IntegratorConfig = integrator.config
    controller = shared or integrator.controller
    assert isinstance(controller, Controller)
    of_state, of_velocity = controller.state_velocity.weight.split(controller.dim, dim=1)
    total = num_iterations or config.num_iterations
    head = integrator.modulation.fold(controller)
    assert head.weight.shape[0] == num_groups(config) * controller.dim
    return Dynamics(
        context=_matrix(controller.context),
        of_state=of_state.contiguous(),
        of_velocity=of_velocity.contiguous(),
        output=Matrix(head.weight, head.bias.contiguous()),
        mu=integrator.equilibrium(),
        forcing=integrator.excitation(total, amplitude),
        activation=config.controller.activation,
        kappa=config.kappa if config.dynamic_alpha else None,
        beta_max=config.beta_max,
        stride=integrator.stride,
        num_iterations=total,
    )


def _network(feed_forward: FeedForward, reorder: _Layout) -> Network:
    return Network(reorder(_matrix(feed_forward.up)), reorder(_matrix(feed_forward.down)), feed_forward.gated)


def _matrix(linear: nn.Linear) -> Matrix:
    return Matrix(linear.weight, linear.bias)


def _norm(norm: nn.Module) -> Norm:
    if isinstance(norm, nn.RMSNorm):
        assert norm.eps is not None
        return Norm(norm.weight, None, norm.eps, True)
    assert isinstance(norm, nn.LayerNorm)
    return Norm(norm.weight, norm.bias, norm.eps, False)


def _rotary(table: Tensor) -> Tensor:
    cos, sin = table
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def _as_it_is(matrix: Matrix) -> Matrix:
    return matrix


def _reorder(matrix: Matrix) -> Matrix:
    """In oneDNN's layout, where it has one: large float32 matrices on a CPU. Small ones would not gain from it."""
    weight = matrix.weight
    has_layout = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not has_layout or weight.numel() < _FEWEST_REORDERED:
        return matrix
    return Matrix(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED), matrix.bias, is_reordered=True)
