"""What tests of the operations in C++ share: where they run, what stands in for them, and which operations ran."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inl_core.kernels import Choice, put
from inl_core.kernels.cpu import library
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig

_FOUND = library.library()
PRODUCTS = _FOUND.products if _FOUND else ()
"""The libraries whose matrix product can be called here."""
needs_library = pytest.mark.skipif(_FOUND is None, reason=library.why_missing())


@contextmanager
def without_library() -> Iterator[None]:
    """No operations in C++ inside, as on a machine whose torch has no MKL."""
    library.forget()
    try:
        with patch.object(library, "_mkl", lambda: None):
            yield
    finally:
        library.forget()


class OwnOperations(TorchDispatchMode):
    """The names of the operations of our own that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "inl":
            self.found.append(str(func.overloadpacket).removeprefix("inl."))
        return func(*args, **(kwargs or {}))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same ones in either precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build_model(preset: str = "v4", *, spread: float = 0.1, **changes) -> IntegratorLanguageModel:
    """A small plain model, for training, whose parameters have been moved away from their start."""
    values = {"preset": preset, "d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "max_seq_len": 64}
    if preset in ("v2", "v3"):
        changes["integrator"] = {"mu": {"group_size": 8}} | changes.get("integrator", {})
    model = IntegratorLanguageModel(ModelConfig.model_validate(values | changes))
    model.initialise(0)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += spread * draw(*parameter.shape, seed=index)
    return model.train()


def put_own(model: IntegratorLanguageModel, product: str = "MKL") -> IntegratorLanguageModel:
    """Every operation of our own put into a model, whatever is the fastest here."""
    way = Choice(f"C++ with {product}", "asked for by a test")
    put(model, {"attention": way, "integrator": way, "loss": Choice("inl's chunks", "asked for by a test")})
    return model


def some_ids(rows: int = 3, length: int = 40, vocabulary: int = 50) -> Tensor:
    """Token ids (B, S)."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def losses_and_gradients(model: IntegratorLanguageModel, ids: Tensor, **forward) -> dict[str, Tensor]:
    """The hidden states, the loss of predicting each token by itself, and the gradient of every parameter."""
    model.zero_grad()
    output = model(ids, **forward)
    loss = model.loss_sum(output.hidden, ids, output.table) / ids.numel()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"hidden": output.hidden.detach(), "loss": loss.detach(), **found}


def assert_alike(one: dict[str, Tensor], two: dict[str, Tensor], *, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Equal up to rounding, with the name of what is not."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=rtol, atol=atol, msg=lambda text, at=name: f"{at}: {text}")
