"""`inl bench`: figures against closed formulas, fairness of the comparison, output, and what it refuses."""

import gc
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.analysis.bench import comparison, llama_work, startup, worker
from inl_core.analysis.bench.ceiling import flops_per_token
from inl_core.analysis.bench.choosing import Choice, first_candidate, other_candidate
from inl_core.analysis.bench.inl_work import bench_tokenizer, build_inl_work
from inl_core.analysis.bench.measuring import PeakMemory, spread
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.worker import Facts, Worker, _Job
from inl_core.errors import InlError, RecipeError

D, L, H, K, V, F, S = 64, 2, 4, 2, 300, 192, 16
MODEL = {"d_model": D, "num_layers": L, "num_heads": H, "num_kv_heads": K, "vocab_size": V, "feedforward_dim": F}
SETTINGS = {"batch-size": 2, "mode": "eager", "rounds": 2, "warmup": 1, "steps": 1, "gemm-size": 64, "threads": 1}
DIMENSIONS = {"d-model": D, "layers": L, "heads": H, "kv-heads": K, "vocab-size": V, "feedforward-dim": F}
OPTIONS = (*(word for name, value in (DIMENSIONS | SETTINGS).items() for word in (f"--{name}", str(value))), "--json")
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def first(preset: str = "v4", **changes: Any) -> Candidate:
    return first_candidate(Choice(preset=preset, model={**MODEL, **changes}, batch_size=2, sequence_length=S))


class LocalWorker:
    """A worker that has no process of its own; `turns` gives it the seconds of its turns, where a test needs them."""

    turns: ClassVar[dict[str, list[float]]] = {}
    calls: ClassVar[list[str]] = []
    failing: ClassVar[set[str]] = set()

    def __init__(self, candidate: Candidate | None, mode: Any, settings: BenchSettings) -> None:
        self.candidate, self.mode, self.settings = candidate, mode, settings
        self.name = f"{candidate.name}, {mode}" if candidate else "matrix product"
        self.job: Any = None if self.name in self.turns else _Job(candidate, mode, settings)
        self.left = iter(self.turns.get(self.name, ()))

    def __enter__(self) -> "LocalWorker":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def start(self) -> Facts:
        if self.name in self.failing:
            raise InlError(f"{self.name}: does not compile here")
        return Facts(self.job.start() if self.job else 1, 1.0)

    def turn(self) -> float:
        self.calls.append(self.name)
        return self.job.turn() if self.job else next(self.left)

    def peak_memory(self) -> int:
        return self.job.peak_memory() if self.job else 100

    def profile(self) -> Any:
        return self.job.profile()


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> type[LocalWorker]:
    """The workers run in this process."""
    monkeypatch.setattr(comparison, "Worker", LocalWorker)
    monkeypatch.setattr(startup, "Worker", LocalWorker)
    monkeypatch.setattr(worker, "_PROFILED_REPETITIONS", 1)
    for name, empty in (("turns", {}), ("calls", []), ("failing", set())):
        monkeypatch.setattr(LocalWorker, name, empty)
    threads = torch.get_num_threads()
    gc.freeze()  # each worker collects garbage, and would look through everything the other tests imported
    yield LocalWorker
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def inl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """`inl bench` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["bench", *arguments])


# Figures -------------------------------------------------------------------------------------------------------------


def test_flops_equal_the_closed_formulas() -> None:
    attention = L * (D * D + 2 * D * (K * D // H) + D * D)
    scores = L * D * (S + 1)  # half of the window on average, two products
    head, width = V * D, 64
    # v4 applies W_h once, and W_x, W_v and three groups of outputs in each of two iterations; but it needs no gradient
    # of the velocity that the first layer starts with, which is zero. The hidden width 128 is 2/3 of 192.
    controller = D * width * L * (1 + 2 * 5)
    settings = BenchSettings("train", batch_size=2, sequence_length=S)
    v4 = first("v4")
    products = attention + scores + L * 3 * D * 128 + head + controller
    assert flops_per_token(v4, settings) == 3 * 2 * products - 2 * D * width
    transformer = other_candidate("transformer", v4)
    inner = 2 * (attention + scores + L * 3 * D * 128)
    assert flops_per_token(transformer, settings) == 3 * (inner + 2 * head)
    prefill = BenchSettings("prefill", batch_size=2, sequence_length=S)
    assert flops_per_token(transformer, prefill) == pytest.approx(inner + 2 * head / S)
    assert flops_per_token(transformer, BenchSettings("decode")) is None


@needs_transformers
def test_llama_has_the_dimensions_and_the_flops_that_are_counted_for_it() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    issue = {"d_model": 512, "num_layers": 6, "num_heads": 8, "num_kv_heads": 2, "feedforward_dim": 2048}
    assert other_candidate("llama", first(**issue)).config.hidden_dim == 1344
    llama = other_candidate("llama", first("v3", feedforward_dim=100))  # 2/3 of it is 66, rounded down to 64
    settings = BenchSettings("train", batch_size=2, sequence_length=S)
    model = llama_work.build_llama(llama.config, settings)
    per_layer = 2 * D * D + 2 * D * (K * D // H) + 3 * D * 64 + 2 * D
    assert sum(parameter.numel() for parameter in model.parameters()) == V * D + L * per_layer + D
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == torch.float32
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, S, dtype=torch.long))
    counted = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    products = sum(number for name, number in counted.items() if "attention" not in name)
    scores = 2 * L * D * (S + 1)
    assert flops_per_token(llama, settings) == 3 * (products / (2 * S) + scores)


def test_the_spread_is_median_and_quartiles() -> None:
    found = spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.p25, found.median, found.p75, found.values) == (2.0, 3.0, 4.0, (5.0, 1.0, 3.0, 2.0, 4.0))
    assert spread([7.0]).p25 == spread([7.0]).p75 == 7.0


def test_peak_memory_counts_what_lived_for_a_moment_until_it_is_reset() -> None:
    memory = PeakMemory(torch.device("cpu"))
    np.ones(8_000_000)  # 64 MB, freed at once
    assert 60e6 < memory.read() < 90e6
    memory.reset()
    assert memory.read() < 20e6


def test_a_generation_never_ends_early_and_its_prompt_has_the_length_asked_for() -> None:
    tokenizer = bench_tokenizer(V)
    assert tokenizer.vocab_size == V
    assert len(tokenizer.encode("hello")) == 5
    settings = BenchSettings("decode", batch_size=3, prompt_tokens=4, new_tokens=6)
    build_inl_work(first(), settings, compiled=False).run()  # the work itself asserts both


# The comparison ------------------------------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_rounds_ratios_and_turns_alternate(local: type[LocalWorker]) -> None:
    one = first()
    other = other_candidate("transformer", one)
    # The machine is four times as slow in the second round, which does not change the ratio within the round.
    local.turns = {f"{one.name}, eager": [1.0, 4.0, 3.0], "transformer, eager": [2.0, 8.0, 3.0]}
    settings = BenchSettings("train", rounds=3, mode="eager", gemm_size=0, parts=False)
    found = comparison.compare([one, other], settings)
    assert found.ratio is not None
    assert (found.ratio.values, found.ratio.median) == ((2.0, 2.0, 1.0), 2.0)
    assert found.outcomes[0].best.tokens_per_second.values == (1024.0, 256.0, 1024 / 3)
    assert found.memory_ratio == 1.0
    a, b = f"{one.name}, eager", "transformer, eager"
    assert local.calls == [a, b, b, a, a, b]


def test_best_takes_the_faster_mode_of_each_and_lives_with_one_that_fails(local: type[LocalWorker]) -> None:
    one = first()
    other = other_candidate("transformer", one)
    local.turns = {
        f"{one.name}, eager": [2.0],
        f"{one.name}, compiled": [1.0],
        "transformer, eager": [3.0],
        "transformer, compiled": [1.0],
    }
    local.failing = {"transformer, compiled"}
    settings = BenchSettings("train", rounds=1, gemm_size=0, parts=False)
    found = comparison.compare([one, other], settings)
    assert [outcome.best.mode for outcome in found.outcomes] == ["compiled", "eager"]
    assert found.ratio is not None
    assert found.ratio.median == 3.0
    assert found.outcomes[1].failures == {"compiled": "transformer, compiled: does not compile here"}
    with pytest.raises(InlError, match="does not compile"):
        comparison.compare([one, other], BenchSettings("train", rounds=1, mode="compiled", gemm_size=0))


def test_a_worker_is_a_process_whose_failure_is_one_line() -> None:
    settings = BenchSettings("decode", prompt_tokens=4, new_tokens=3, mode="eager")
    with Worker(first(vocab_size=100), "eager", settings) as process:
        with pytest.raises(RecipeError, match=r"^v4 T=2, eager: --vocab-size 100: generating text needs at least 262"):
            process.start()
        process._process.kill()
        with pytest.raises(InlError, match=r"was killed, probably for want of memory; try a smaller --batch-size$"):
            process.turn()


# The command ---------------------------------------------------------------------------------------------------------


def figures(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("task", ["train", "prefill", "decode"])
def test_json_says_what_was_measured_and_where(inl: Callable[..., Result], local: type[LocalWorker], task: str) -> None:
    more = ("--sequence-length", "16", "--prompt-tokens", "4", "--new-tokens", "3", "--against", "transformer")
    data = figures(inl(task, "--preset", "v4", *OPTIONS, *more))
    assert data["task"] == data["settings"]["task"] == task
    assert {"cpu", "cores", "threads", "device"} <= set(data["machine"])
    assert data["versions"]["torch"] == torch.__version__
    assert (data["settings"]["batch_size"], data["settings"]["sequence_length"]) == (2, 16)
    assert [candidate["name"] for candidate in data["candidates"]] == ["v4 T=2", "transformer"]
    for candidate in data["candidates"]:
        mode = candidate["modes"][candidate["best_mode"]]
        speed = mode["tokens_per_second"]
        assert speed["p25"] <= speed["median"] <= speed["p75"]
        assert len(speed["values"]) == 2
        assert mode["parts"]["shares"]["attention"] > 0
        tokens = 2 * (3 if task == "decode" else 16)
        assert speed["values"] == pytest.approx([tokens / seconds for seconds in mode["seconds"]["values"]])
        if task == "decode":
            assert mode["utilisation"] is candidate["flops_per_token"] is None
        else:
            rates = data["ceiling"]["flops_per_second"]["values"]
            done = [candidate["flops_per_token"] * speed for speed in speed["values"]]
            shares = [one / rate for one, rate in zip(done, rates, strict=True)]
            assert mode["utilisation"]["values"] == pytest.approx(shares)
    assert data["ratio"]["tokens_per_second"]["median"] > 0
    one = first(num_layers=2)
    assert (
        data["candidates"][0]["parameters"]
        == build_inl_work(one, BenchSettings("train"), compiled=False).num_parameters
    )


@needs_transformers
@pytest.mark.parametrize("task", ["train", "prefill", "decode"])
def test_llama_runs_every_task(inl: Callable[..., Result], local: type[LocalWorker], task: str) -> None:
    more = ("--sequence-length", "16", "--prompt-tokens", "4", "--new-tokens", "3", "--against", "llama")
    data = figures(inl(task, "--preset", "transformer", *OPTIONS, *more))
    llama = data["candidates"][1]
    assert (llama["name"], llama["kind"], llama["model"]["hidden_dim"]) == ("llama", "llama", 128)
    shares = llama["modes"]["eager"]["parts"]["shares"]
    assert {"attention", "feed-forward", "embedding", "head"} <= set(shares)
    assert ("optimizer" in shares) == (task == "train")
    assert sum(shares.values()) == pytest.approx(1.0, rel=1e-6)


def test_the_table_names_candidates_ratio_and_parts(inl: Callable[..., Result], local: type[LocalWorker]) -> None:
    result = inl("train", "--preset", "v4", *OPTIONS[:-1], "--sequence-length", "16", "--against", "transformer")
    assert result.exit_code == 0, result.output
    for text in ("v4 T=2, eager", "v4 T=2 / transformer:", "GFLOP/s in a 64 x 64 float32", "integrator", "2 x 16"):
        assert text in result.stdout, text


def test_iterations_and_overrides_change_the_model_they_are_for(
    inl: Callable[..., Result], local: type[LocalWorker]
) -> None:
    changes = ("--iterations", "3", "--set", "model.max_seq_len=40", "--against", "v4")
    changes += ("--against-set", "model.integrator.num_iterations=1", "--no-parts", "--sequence-length", "16")
    data = figures(inl("train", "--preset", "v4", *OPTIONS, *changes))
    assert [candidate["model"]["num_iterations"] for candidate in data["candidates"]] == [3, 1]
    assert [candidate["model"]["max_seq_len"] for candidate in data["candidates"]] == [40, 40]
    assert data["candidates"][0]["modes"]["eager"]["parts"] is None


def test_the_loader_is_measured_on_generated_text_where_nothing_is_prepared(inl: Callable[..., Result]) -> None:
    data = figures(inl("data", "--preset", "v4", "--rounds", "2", "--sequence-length", "32", "--json"))
    assert (data["data"], data["settings"]["sequence_length"]) == ("synthetic", 32)
    assert len(data["tokens_per_second"]["values"]) == 2
    assert data["num_tokens"] > 100_000


def test_startup_times_commands_and_the_first_step(
    inl: Callable[..., Result], local: type[LocalWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "COMMANDS", {"python": ("-c", "pass")})
    data = figures(inl("startup", "--preset", "v4", *OPTIONS, "--sequence-length", "16"))
    assert set(data["seconds"]) == {"python", "first training step, v4 T=2"}
    assert data["seconds"]["python"]["median"] > 0
    monkeypatch.setattr(startup, "COMMANDS", {"python": ("-c", "raise SystemExit('no')")})
    result = inl("startup", "--preset", "v4", *OPTIONS)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "python: no")


BAD = {
    ("train",): "inl bench needs a recipe or a model",
    ("train", "nowhere.yaml"): "nowhere.yaml: no such file",
    ("train", "a.yaml", "--preset", "v4"): "a.yaml together with --preset",
    ("train", "--preset", "v9"): "v9",
    ("train", "--preset", "v4", "--d-model", "30", "--heads", "4"): "num_heads 4 must divide d_model 30",
    ("train", "--preset", "transformer", "--iterations", "3"): "the transformer preset has no integrator",
    ("train", "--preset", "v4", "--against", "nothing"): "--against nothing: neither llama, uncached, v1, v2",
    ("train", "--preset", "v4", "--against", "uncached"): "--against uncached: only decoding has a cache",
    ("data", "--preset", "v4", "--against", "v3"): "inl bench data measures the loader alone",
    ("train", "--preset", "v4", "--against-set", "model.bias=true"): "nothing to override without --against",
    ("train", "--preset", "v4", "--against", "llama", "--against-set", "model.bias=true"): "takes no overrides",
    ("train", "--preset", "v4", "--rounds", "0"): "--rounds 0: must be at least 1",
    ("train", "--preset", "v4", "--gemm-size", "-1"): "--gemm-size -1: must be at least 0",
    ("decode", "--preset", "v4", "--set", "model.max_seq_len=256"): "288 positions are needed and model.max_seq_len",
    ("train", "--preset", "v4", "--set", "model.d_modle=3"): "did you mean 'd_model'",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_clear_error(inl: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    result = inl(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert BAD[arguments] in line


def test_without_transformers_llama_is_an_error_with_the_pip_line(
    inl: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_work, "find_spec", lambda name: None)
    result = inl("train", "--preset", "v4", "--against", "llama")
    assert (result.exit_code, result.stderr) == (
        2,
        '--against llama: transformers is not installed; pip install "inl[hf]"\n',
    )
