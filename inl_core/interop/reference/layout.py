"""What a reference file holds, found out from the names and shapes of its tensors alone.

- Two generations: `released` (RMSNorm, rotary positions, grouped queries, SwiGLU, no biases) and `earlier` (LayerNorm,
  sinusoidal positions, one fused attention matrix, GELU, biases). They share embedding, head, controller and mu.
- The fused matrix is called in_proj or qkv_proj; the embedding is factored through a rank, or one matrix.
- Every tensor of the file must be one that the model is made of, or one that is known not to matter. A file with any
  other tensor is refused, since its model would compute something that ours does not.
- Legend: V vocabulary, R embedding rank, D d_model, L layers, C controller width, H hidden width of the feed-forward.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inl_core.errors import ArtefactError, RecipeError

Shape = tuple[int, ...]
Generation = Literal["released", "earlier"]

GROUP_SIZE = 64
"""Dimensions that share one offset of mu, unless the file's number of offsets says otherwise."""
ROTARY_BASE = 10_000.0
"""What a file without rotary tables was made with, unless one says otherwise."""

SKIPPED = (
    (r"(^|\.)shared_controller\.", "the shared controller, which the reference builds and never calls"),
    (r"(^|\.)budget_allocator\.", "state of the budget allocator, which is only used for the layers' iterations"),
    (r"(^|\.)(rope|rotary\w*)\.|(^|\.)(inv_freq|cos_cached|sin_cached)$", "rotary tables, computed from the head size"),
    (r"^pos_encoding\.pe$", "the table of sinusoidal positions, computed from d_model"),
    (r"(^|\.)(avg_iterations|num_forwards|running_\w+)$", "running statistics, which no output depends on"),
)
"""Names of tensors that no output depends on, and why."""

_EMBEDDING, _PROJECTION = "token_embedding.embed_low.weight", "token_embedding.project_up.weight"
FULL_EMBEDDING = "token_embedding.weight"
_MARKS: dict[str, Generation] = {
    "layers.0.attention.q_proj.weight": "released",
    "layers.0.attention.in_proj_weight": "earlier",
    "layers.0.attention.qkv_proj.weight": "earlier",
}
_INV_FREQ, _COSINES, _SINUSOIDS = (
    "layers.0.attention.rope.inv_freq",
    "layers.0.attention.rope.cos_cached",
    "pos_encoding.pe",
)


@dataclass(frozen=True)
class Layout:
    """The file's dimensions and which of its tensors are needed."""

    generation: Generation
    vocab_size: int
    rank: int | None
    """Of the embedding; None where it is one matrix."""
    d_model: int
    num_layers: int
    key_value_dim: int
    """Rows of the key projection: KV heads times head size."""
    hidden_dim: int
    controller_width: int
    group_size: int
    """Dimensions that share one offset of mu."""
    fused: str
    """In the earlier generation, what the names of the fused attention matrix and its bias begin with."""
    integrator: str
    """The name of a layer's integrator: `inl.inl`, or `inl` where it is not wrapped for early stopping."""
    expected: dict[str, Shape]
    """Every tensor that the model is made of, and its shape."""
    skipped: dict[str, str]
    """Every other tensor of the file, and why it is not needed."""
    head_dim: int | None
    """The head size where the file has rotary tables."""
    max_seq_len: int | None
    """The longest context where the file has a table of positions."""


def read_layout(path: Path, shapes: Mapping[str, Shape], group_size: int | None = None) -> Layout:
    """The layout of a file whose tensors have these shapes; `path` is for the messages.

    Args:
        group_size: dimensions that share one offset of mu, where the number of offsets leaves it open.

    Raises:
        ArtefactError: it is no reference file, or a tensor is missing, unknown or of the wrong shape.
        RecipeError: the size of mu's groups that was given does not fit the file.
    """
    skipped = {name: reason for name in shapes if (reason := _reason_to_skip(name))}
    generation: Generation | None = next((kind for mark, kind in _MARKS.items() if mark in shapes), None)
    if generation is None:
        raise ArtefactError(
            f"{path}: holds no {' and no '.join(_MARKS)}, so it is not a language model of a reference generation "
            "(docs/import-reference.md names their tensors)"
        )
    file = _Shapes(path, shapes)
    embedding, vocab_size, d_model, rank = file.embedding()
    integrator = "inl.inl" if any(name.startswith("layers.0.inl.inl.") for name in shapes) else "inl"
    released = generation == "released"
    key_value_dim = file.matrix("layers.0.attention.k_proj.weight")[0] if released else d_model
    hidden_dim = file.matrix("layers.0.ff.w1.weight" if released else "layers.0.ff.0.weight")[0]
    controller_width = file.matrix(f"layers.0.{integrator}.controller.0.weight")[0]
    num_layers = len({found[1] for name in shapes if (found := re.match(r"layers\.(\d+)\.", name))})
    group_size = file.group_size(f"layers.0.{integrator}.mu_local_offsets", d_model, group_size)
    fused = "qkv_proj." if "layers.0.attention.qkv_proj.weight" in shapes else "in_proj_"
    norms = ("weight",) if released else ("weight", "bias")
    expected = embedding | {"lm_head.weight": (vocab_size, d_model)}
    expected |= {f"final_norm.{part}": (d_model,) for part in norms}
    of_a_layer = _integrator_shapes(integrator, d_model, controller_width, -(-d_model // group_size))
    of_a_layer |= {f"{norm}.{part}": (d_model,) for norm in ("norm_attn", "norm1", "norm2") for part in norms}
    if released:
        of_a_layer |= _released_shapes(d_model, key_value_dim, hidden_dim)
    else:
        of_a_layer |= _earlier_shapes(d_model, hidden_dim, fused)
    for layer in range(num_layers):
        tensors = {f"layers.{layer}.{name}": shape for name, shape in of_a_layer.items()}
        expected |= tensors
        if not tensors.keys() <= shapes.keys():
            break  # one missing tensor is enough to refuse the file, whose names may count to a million layers
    file.compare(expected, skipped)
    return Layout(
        generation=generation,
        vocab_size=vocab_size,
        rank=rank,
        d_model=d_model,
        num_layers=num_layers,
        key_value_dim=key_value_dim,
        hidden_dim=hidden_dim,
        controller_width=controller_width,
        group_size=group_size,
        fused=fused,
        integrator=integrator,
        expected=expected,
        skipped=skipped,
        head_dim=file.head_dim(d_model),
        max_seq_len=file.size(_COSINES, -2) or file.size(_SINUSOIDS, -2),
    )


@dataclass(frozen=True)
class _Shapes:
    """The shapes of the file's tensors, and the messages about what is wrong with them."""

    path: Path
    shapes: Mapping[str, Shape]

    def matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix; ArtefactError where the file has none of this name."""
        if name not in self.shapes:
            raise ArtefactError(self._missing(name))
        shape = self.shapes[name]
        if len(shape) != 2 or 0 in shape:
            raise ArtefactError(
                f"{self.path}: {name} has the shape {list(shape)} where a matrix is expected; "
                "export the file again from its model"
            )
        return shape[0], shape[1]

    def embedding(self) -> tuple[dict[str, Shape], int, int, int | None]:
        """The embedding's tensors, V, D and R."""
        if FULL_EMBEDDING in self.shapes:
            vocab_size, d_model = self.matrix(FULL_EMBEDDING)
            return {FULL_EMBEDDING: (vocab_size, d_model)}, vocab_size, d_model, None
        vocab_size, rank = self.matrix(_EMBEDDING)
        d_model = self.matrix(_PROJECTION)[0]
        return {_EMBEDDING: (vocab_size, rank), _PROJECTION: (d_model, rank)}, vocab_size, d_model, rank

    def group_size(self, name: str, d_model: int, given: int | None) -> int:
        """Dimensions that share one of mu's offsets: the usual ones, or what their number allows alone."""
        groups = self.size(name, 0) or -(-d_model // GROUP_SIZE)
        candidates = (given,) if given else (GROUP_SIZE, d_model // groups)
        fitting = [size for size in candidates if size > 0 and -(-d_model // size) == groups]
        if fitting:
            return fitting[0]
        problem = f"{name} has {groups} offsets for {d_model} dimensions"
        if given:
            raise RecipeError(f"--group-size {given}: {problem} in {self.path}; leave the option out, or correct it")
        raise ArtefactError(f"{self.path}: {problem}; give --group-size, the dimensions that share an offset")

    def size(self, name: str, axis: int) -> int | None:
        """Length of an axis of a tensor, None where the file does not have it."""
        shape = self.shapes.get(name, ())
        return shape[axis] if len(shape) >= abs(axis) else None

    def head_dim(self, d_model: int) -> int | None:
        """The head size where the file has rotary tables."""
        half = self.size(_INV_FREQ, -1)
        if half is None:
            return None
        if half == 0 or d_model % (2 * half):
            raise ArtefactError(
                f"{self.path}: {_INV_FREQ} is for heads of {2 * half}, which do not divide d_model {d_model}; "
                "export the file again from its model"
            )
        return 2 * half

    def compare(self, expected: Mapping[str, Shape], skipped: Mapping[str, str]) -> None:
        """Refuse a file whose tensors are not exactly the expected and the skipped ones."""
        problems = [self._missing(name) for name in expected if name not in self.shapes]
        for name, shape in self.shapes.items():
            if name not in expected and name not in skipped:
                problems.append(
                    f"{self.path}: {name} {list(shape)} is no tensor of the reference generations, so the model it "
                    "belongs to cannot be imported; remove it from the file if no output depends on it"
                )
            elif name in expected and not _fits(name, shape, expected[name]):
                problems.append(
                    f"{self.path}: {name} has the shape {list(shape)} where the other tensors call for "
                    f"{list(expected[name])}; export the file again from its model"
                )
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ArtefactError(problems[0] + more)

    def _missing(self, name: str) -> str:
        return f"{self.path}: {name} is missing; give the whole model in one file"


def _integrator_shapes(place: str, dim: int, width: int, num_groups: int) -> dict[str, Shape]:
    """The controller is Linear(3D -> C), ReLU, Linear(C -> 3D). The last group of mu may have fewer dimensions."""
    return {
        f"{place}.mu_global": (),
        f"{place}.mu_local_offsets": (num_groups,),
        f"{place}.controller.0.weight": (width, 3 * dim),
        f"{place}.controller.0.bias": (width,),
        f"{place}.controller.2.weight": (3 * dim, width),
        f"{place}.controller.2.bias": (3 * dim,),
    }


def _released_shapes(dim: int, key_value_dim: int, hidden: int) -> dict[str, Shape]:
    return {
        "attention.q_proj.weight": (dim, dim),
        "attention.k_proj.weight": (key_value_dim, dim),
        "attention.v_proj.weight": (key_value_dim, dim),
        "attention.out_proj.weight": (dim, dim),
        "ff.w1.weight": (hidden, dim),
        "ff.w3.weight": (hidden, dim),
        "ff.w2.weight": (dim, hidden),
    }


def _earlier_shapes(dim: int, hidden: int, fused: str) -> dict[str, Shape]:
    return {
        f"attention.{fused}weight": (3 * dim, dim),
        f"attention.{fused}bias": (3 * dim,),
        "attention.out_proj.weight": (dim, dim),
        "attention.out_proj.bias": (dim,),
        "ff.0.weight": (hidden, dim),
        "ff.0.bias": (hidden,),
        "ff.3.weight": (dim, hidden),
        "ff.3.bias": (dim,),
    }


def _fits(name: str, shape: Shape, expected: Shape) -> bool:
    """Whether a shape is the expected one; mu_global, a single number, may be stored as () or as (1,)."""
    return shape == expected or (name.endswith(".mu_global") and shape == (1,))


def _reason_to_skip(name: str) -> str | None:
    return next((reason for pattern, reason in SKIPPED if re.search(pattern, name)), None)
