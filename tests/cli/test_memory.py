"""Running out of memory is told in one line: what was asked for, and which settings need less."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from inl_cli.console import errors_to_exit_codes
from inl_cli.memory import describe_out_of_memory, explains_memory, is_out_of_memory
from inl_core.recipe import Recipe

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
CPU += "400000000000000 bytes. Error code 12 (Cannot allocate memory)"
GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2 is free."
ERRORS = {
    "cpu": (RuntimeError(CPU), "400.0 TB"),
    "gpu": (torch.OutOfMemoryError(GPU), "20.00 GiB"),
    "python": (MemoryError(), "out of memory: "),
    "numpy": (
        MemoryError("Unable to allocate 728. TiB for an array with shape (1,)"),
        "728. TiB",
    ),
    "blas": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
}


@pytest.mark.parametrize(("error", "asked"), ERRORS.values(), ids=ERRORS.keys())
def test_a_command_without_memory_says_which_options_need_less(error, asked):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @errors_to_exit_codes
    def command(batch_size: int = 1, window: int = 2, seed: int = 3) -> None:
        raise error

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert asked in result.stderr
    assert "lower --batch-size or --window, or" in result.stderr


def test_what_torch_really_raises_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**17)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_training_without_memory_says_what_the_plan_needs():
    @explains_memory
    def train(name: str, recipe: Recipe) -> None:
        raise ERRORS["cpu"][0]

    model = {"d_model": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 128, "vocab_size": 300}
    values = {"name": "x", "model": model, "data": {"sources": ["x.txt"]}, "training": {"steps": 1}}
    with pytest.raises(RuntimeError) as caught:
        train("x", Recipe.model_validate(values))
    line = describe_out_of_memory(caught.value, train)
    assert "400.0 TB more could not be allocated" in line
    assert "kB for weights, gradients and moments" in line
    assert "training.micro_batch_size" in line
    assert "training.recomputation" in line
