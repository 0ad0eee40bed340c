"""One training of benchmarks/generations.py, and the time of one step, in the process that calls them."""

import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SCORES = 8
"""How many times a run is scored on its way, besides the end."""


@dataclass(frozen=True)
class Job:
    """One training: `share` of the size's tokens."""

    size: str
    arm: str
    rate: float
    seed: int
    share: float = 1.0

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.size}-{self.arm}-{self.rate:g}-{self.seed}-{self.share:g}"


@cache
def study() -> dict[str, Any]:
    """generations.yaml."""
    return yaml.safe_load((HERE / "generations.yaml").read_text(encoding="utf-8"))


def recipe_of(job: Job, changes: Sequence[str] = ()) -> Any:
    """The recipe of a run; `changes` such as `training.compile=true` come last."""
    from inl_core.recipe.load import load_recipe

    size = study()["sizes"][job.size]
    keys = {
        "name": "generations",
        "training.seed": job.seed,
        "training.optimizer.learning_rate": job.rate,
        "training.precision": "fp32",
        "training.evaluation.final_tokens": None,
        "training.checkpoint.every": 0,
        "training.logging.every": 50,
        "training.logging.dynamics_every": 0,
        **_data(size["data"]),
        **size["set"],
        **study()["arms"][job.arm],
        **size.get("only", {}).get(job.arm, {}),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    recipe = load_recipe(HERE.parent / "recipes" / "tiny-transformer.yaml", [*overrides, *changes])
    steps = max(1, round(recipe.training.num_steps * job.share))
    lengths = [f"training.steps={steps}", "training.tokens=null", f"training.evaluation.every={-(-steps // SCORES)}"]
    return load_recipe(HERE.parent / "recipes" / "tiny-transformer.yaml", [*overrides, *changes, *lengths])


def train(
    job: Job, runs: Path, changes: Sequence[str], matmul: str | None, alter: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """Train and score the whole validation split; the line of the results.

    Args:
        alter: what is done to the model with its starting weights, before the trainer is built on it.
    """
    import downstream  # here, because it imports torch
    import torch

    from inl_core.model.flops import training_flops
    from inl_core.training.session import open_session
    from inl_core.training.trainer import Trainer

    matmul = _prepare_process(job.size, matmul)
    recipe, directory, start = recipe_of(job, changes), runs / job.name, time.perf_counter()
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed
    with open_session(recipe, directory) as session:
        data = session.open_data()
        trainer = session.build_trainer(data)
        parameters = _check_parameters(trainer.model, job, changes)
        if alter is not None:
            alter(trainer.model)
            parameters = sum(p.numel() for p in trainer.model.parameters())
            trainer = Trainer(trainer.model, data, trainer.run, trainer.world, trainer.observer)
        evaluation = trainer.fit()
        assert evaluation is not None
        length, rows = recipe.training.sequence_length, 4 * recipe.training.batch_size
        answers = downstream.score(trainer.model, data.directory, sequence_length=length, batch_size=rows)
    curve = [
        [row["step"], row["validation_bits_per_byte"]]
        for row in map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "validation_bits_per_byte" in row
    ][:-1]  # the last one is of the whole split, the others of its first tokens
    return dataclasses.asdict(job) | {
        "bits_per_byte": round(evaluation.bits_per_byte or math.nan, 5),
        "accuracy": round(evaluation.accuracy, 5),
        "validation_tokens": evaluation.tokens,
        "parameters": parameters,
        "steps": trainer.state.step,
        "tokens": trainer.state.tokens,
        "epochs": round(trainer.state.samples / trainer.loader.num_windows, 3),
        "seconds": round(trainer.state.seconds, 2),
        "seconds_in_all": round(time.perf_counter() - start, 2),
        "flops_per_token": training_flops(trainer.model.config, length),
        "curve": curve,
        "downstream": answers,
        "changes": list(changes),
        "data": data.train.fingerprint[:12],
        "device": _device_name(trainer.world.device),
        "torch": torch.__version__,
        "matmul": matmul,
    }


def time_arms(
    size: str, arms: list[str], changes: Sequence[str], matmul: str | None, runs: Path
) -> list[dict[str, Any]]:
    """Milliseconds of a training step of each arm, the arms by turns: the median of some rounds, and the fastest."""
    import torch

    from inl_core.training.interruption import StopSignal
    from inl_core.training.session import open_session

    matmul = _prepare_process(size, matmul)
    rounds, in_round = 9, 5
    with ExitStack() as open_runs, StopSignal() as stop:
        trainers, parameters = {}, {}
        for arm in arms:
            job = Job(size, arm, 3e-3, 0)
            directory = runs / f"time-{job.name}"
            shutil.rmtree(directory, ignore_errors=True)
            session = open_runs.enter_context(open_session(recipe_of(job, changes), directory))
            trainers[arm] = trainer = session.build_trainer(session.open_data())
            parameters[arm] = _check_parameters(trainer.model, job, changes)
            trainer.model.train()
            open_runs.callback(trainer.stepper.close)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(rounds + 2):  # the first two warm up, and compile
            for arm, trainer in trainers.items():
                is_gpu = trainer.world.device.type == "cuda"
                torch.cuda.synchronize() if is_gpu else None
                start = time.perf_counter()
                for step in range(turn * in_round, (turn + 1) * in_round):
                    trainer.stepper.take(step, stop)
                torch.cuda.synchronize() if is_gpu else None
                if turn >= 2:
                    seconds[arm].append((time.perf_counter() - start) / in_round)
        device = _device_name(next(iter(trainers.values())).world.device)
    shared = {"device": device, "torch": torch.__version__, "matmul": matmul, "changes": list(changes)}
    return [
        {"timed": arm, "size": size, "ms": round(1e3 * statistics.median(found), 3), "parameters": parameters[arm]}
        | {"fastest_ms": round(1e3 * min(found), 3)}
        | shared
        for arm, found in seconds.items()
    ]


def _data(directory: str | None) -> dict[str, Any]:
    """The data section that describes a prepared data set, which need not have been prepared on this machine."""
    if directory is None:
        return {}
    manifest = Path(directory) / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"{directory}: no data set here; make it with benchmarks/corpus.py")
    settings = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
    return {
        "data.directory": directory,
        "data.sources": settings["sources"],
        "data.tokenizer.vocab_size": settings["vocab_size"],
        "data.tokenizer.sample_bytes": settings["sample_bytes"],
        "data.validation_fraction": settings["validation_fraction"],
        "data.num_shards": settings["num_shards"],
    }


def _check_parameters(model: Any, job: Job, changes: Sequence[str]) -> int:
    """The model's parameters, which must be the Transformer's to within one percent."""
    from inl_core.analysis.planning.parameters import meta_model

    recipe = recipe_of(dataclasses.replace(job, arm="transformer"), changes)
    baseline = recipe.model.with_vocab_size(model.config.vocab_size)
    count, wanted = (sum(p.numel() for p in each.parameters()) for each in (model, meta_model(baseline)))
    if abs(count / wanted - 1) > 0.01:
        raise ValueError(f"{job.arm} at {job.size}: {count:,} parameters, the Transformer has {wanted:,}")
    return count


def _prepare_process(size: str, matmul: str | None) -> str:
    """Compute on one thread, and multiply matrices as asked for or as the size has it, which is returned."""
    import torch

    matmul = matmul or study()["sizes"][size]["matmul"]
    assert matmul
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(matmul)
    return matmul


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else "cpu"
