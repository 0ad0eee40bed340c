"""What `inl bench` shows: the figures as plain values for --json, and the same as tables."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from inl_cli.console import Console, to_plain
from inl_cli.plan_view import flop_amount
from inl_cli.progress import amount

if TYPE_CHECKING:
    from inl_core.analysis.bench.comparison import Comparison, Measured, Outcome
    from inl_core.analysis.bench.loading import LoaderSpeed
    from inl_core.analysis.bench.settings import BenchSettings, Candidate

_MODEL = ("preset", "d_model", "num_layers", "num_heads", "key_value_heads", "hidden_dim", "vocab_size", "max_seq_len")


def comparison_data(comparison: "Comparison") -> dict[str, Any]:
    """One object: settings, ceiling, candidates with their modes, and the ratios."""
    settings, ceiling, ratio = comparison.settings, comparison.ceiling, comparison.ratio
    data = {
        "settings": settings,
        "ceiling": {"flops_per_second": ceiling, "size": settings.gemm_size} if ceiling else None,
        "candidates": [_outcome_data(outcome) for outcome in comparison.outcomes],
        "ratio": {"tokens_per_second": ratio, "peak_memory": comparison.memory_ratio} if ratio else None,
    }
    return to_plain(data)


def loader_data(settings: "BenchSettings", candidate: "Candidate", speed: "LoaderSpeed") -> dict[str, Any]:
    """The loader's speed and the shape of its batches."""
    training = candidate.recipe.training
    shape = {"batch_size": training.batch_size, "sequence_length": training.sequence_length}
    return to_plain({"settings": {**shape, "rounds": settings.rounds}, **asdict(speed)})


def _outcome_data(outcome: "Outcome") -> dict[str, Any]:
    config = outcome.candidate.config
    return {
        "name": outcome.candidate.name,
        "kind": outcome.candidate.kind,
        "model": {**{key: getattr(config, key) for key in _MODEL}, "num_iterations": config.mean_iterations or None},
        "parameters": outcome.best.facts.num_parameters,
        "flops_per_token": outcome.flops_per_token,
        "best_mode": outcome.best.mode,
        "modes": {mode: _mode_data(measured) for mode, measured in outcome.modes.items()},
        "failures": outcome.failures,
    }


def _mode_data(measured: "Measured") -> dict[str, Any]:
    parts = measured.parts
    shares = {"profiled_seconds": parts.seconds, "seconds": parts.by_part, "shares": parts.shares} if parts else None
    return {
        "tokens_per_second": measured.tokens_per_second,
        "seconds": measured.seconds,
        "peak_memory_bytes": measured.peak_memory,
        "utilisation": measured.utilisation,
        "seconds_to_ready": measured.facts.seconds_to_ready,
        "parts": shares,
    }


def show_comparison(console: Console, data: dict[str, Any]) -> None:
    """Speed, then ratios, then time by part."""
    measured = [
        (candidate, mode, figures) for candidate in data["candidates"] for mode, figures in candidate["modes"].items()
    ]
    rows = []
    for candidate, mode, figures in measured:
        is_taken = len(candidate["modes"]) > 1 and mode == candidate["best_mode"]
        use = figures["utilisation"]
        rows.append(
            (
                f"{candidate['name']}, {mode}{' (taken)' if is_taken else ''}",
                candidate["parameters"],
                _spread(figures["tokens_per_second"], "{:,.0f}"),
                _spread(figures["seconds"], "{:.4g}"),
                amount(figures["peak_memory_bytes"], "B"),
                _spread(use, "{:.1%}") if use else "n/a",
            )
        )
    columns = ("", "parameters", "tokens/s", "seconds", "peak memory", "of the ceiling")
    console.table(_title(f"{data['task']}, {_work(data)}", data["settings"]["rounds"], data), columns, rows)
    for candidate in data["candidates"]:
        for mode, reason in candidate["failures"].items():
            console.warn(f"{mode} could not be measured: {reason}")
    _show_ratio(console, data)
    found = [(f"{candidate['name']}, {mode}", figures["parts"]) for candidate, mode, figures in measured]
    _show_parts(console, [(name, parts) for name, parts in found if parts])


def _show_ratio(console: Console, data: dict[str, Any]) -> None:
    lines = []
    if data["ceiling"]:
        rate = data["ceiling"]["flops_per_second"]["median"]
        size, kind = data["ceiling"]["size"], "bfloat16" if data["settings"]["bf16"] else "float32"
        lines.append(f"ceiling: {flop_amount(rate)}/s in a {size:,} x {size:,} {kind} matrix product")
    if data["ratio"]:
        names = " / ".join(candidate["name"] for candidate in data["candidates"][:2])
        lines.append(f"{names}: {_spread(data['ratio']['tokens_per_second'], '{:.3f}')} in tokens/s")
        if memory := data["ratio"]["peak_memory"]:
            lines.append(f"{names}: {memory:.3f} in peak memory")
    console.write("".join(f"\n{line}" for line in lines) + "\n" * bool(lines))


def _show_parts(console: Console, found: list[tuple[str, dict[str, Any]]]) -> None:
    if not found:
        return
    names = list(dict.fromkeys(part for _, parts in found for part in parts["seconds"]))
    cells = [(name, *(_part(parts, name) for _, parts in found)) for name in names]
    cells.append(("all", *(f"{parts['profiled_seconds'] * 1000:.4g} ms" for _, parts in found)))
    console.write("\n")
    title = "time by part of one profiled repetition, forward and backward; compiled: each part by itself"
    console.table(title, ("", *(name for name, _ in found)), cells)


def _part(parts: dict[str, Any], name: str) -> str | None:
    seconds = parts["seconds"].get(name)
    return None if seconds is None else f"{parts['shares'][name]:.1%}  {seconds * 1000:.4g} ms"


def show_loader(console: Console, data: dict[str, Any]) -> None:
    """The loader's speed, in one line."""
    settings, mask = data["settings"], "with" if data["document_mask"] else "without"
    what = f"data, {settings['batch_size']} x {settings['sequence_length']} tokens, {mask} document mask"
    rows = [(data["data"], data["num_tokens"], _spread(data["tokens_per_second"], "{:,.0f}"))]
    console.table(_title(what, settings["rounds"], data), ("data", "tokens", "tokens/s"), rows)


def show_startup(console: Console, data: dict[str, Any]) -> None:
    """The seconds of each thing that was started."""
    rows = [(name, _spread(seconds, "{:.3f}")) for name, seconds in data["seconds"].items()]
    console.table(_title("startup", data["rounds"], data), ("", "seconds"), rows)


def _work(data: dict[str, Any]) -> str:
    settings = data["settings"]
    if data["task"] == "decode":
        return f"{settings['batch_size']} x ({settings['prompt_tokens']} + {settings['new_tokens']}) tokens"
    return f"{settings['batch_size']} x {settings['sequence_length']} tokens"


def _title(what: str, rounds: int, data: dict[str, Any]) -> str:
    machine, versions = data["machine"], data["versions"]
    return (
        f"{what}, {rounds} rounds: median (quartiles)\n{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['device']}, torch {versions['torch']}"
    )


def _spread(found: dict[str, Any], form: str) -> str:
    low, high = form.format(found["p25"]), form.format(found["p75"])
    return f"{form.format(found['median'])} ({low} - {high})"
