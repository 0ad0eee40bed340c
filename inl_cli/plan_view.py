"""What `inl plan` shows: tables for people, and the same figures as plain values for --json."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from inl_cli.console import Console
from inl_cli.progress import amount

if TYPE_CHECKING:
    from inl_core.analysis.planning import ModelPlan


def plan_data(plan: "ModelPlan", *, has_schedule: bool) -> dict[str, Any]:
    """The plan as one object: what the tables show, unrounded, sizes in bytes."""
    settings, total = plan.recipe.training, plan.run.total_parameters
    data: dict[str, Any] = {
        "model": _model_facts(plan),
        "parameters": [
            {"part": part, "number": number, "share": number / total} for part, number in plan.run.parameters.items()
        ],
        "total_parameters": total,
        "non_embedding_parameters": plan.run.non_embedding_parameters,
        "optimisations": [{**asdict(saving), "change": saving.change} for saving in plan.savings],
        "flops_per_token": {
            "sequence_length": settings.sequence_length,
            "forward_by_part": plan.flops,
            "training": plan.run.flops_per_token,
            "training_by_iterations": plan.flops_by_iterations,
            "executed_by_recomputation": plan.flops_by_recomputation,
        },
        "kv_cache": [
            {
                "type": name,
                "bytes_per_token": size,
                "bytes_per_sequence": plan.cache_of_sequence,
                "bytes_at_max_seq_len": size * plan.config.max_seq_len + plan.cache_of_sequence,
            }
            for name, size in plan.cache.items()
        ],
        "states": {**asdict(plan.states), "total": plan.states.total},
        "memory": [{**asdict(row), "total": row.total} for row in plan.memory],
        "checkpoint": {"weights_bytes": plan.states.weights, "bytes": plan.states.checkpoint},
    }
    if has_schedule:
        data["checkpoint"]["kept_bytes"] = plan.run.disk_bytes
        data["schedule"] = {
            "steps": plan.run.num_steps,
            "tokens": plan.run.train_tokens,
            "tokens_per_parameter": plan.run.train_tokens / total,
            "epochs": plan.run.epochs or None,
            "total_flops": plan.run.total_flops,
        }
    return data


def show_model_plan(console: Console, plan: "ModelPlan", *, has_schedule: bool) -> None:
    """All tables, on stdout."""
    facts = [(name.replace("_", " "), value) for name, value in _model_facts(plan).items()]
    console.table("model", ("", ""), facts)
    for title, columns, rows in _tables(plan, has_schedule):
        console.write("\n")
        console.table(title, columns, rows)


def _model_facts(plan: "ModelPlan") -> dict[str, Any]:
    config = plan.config
    from inl_core.kernels import describe

    integrator = config.integrator
    is_uneven = integrator is not None and integrator.iterations_per_layer is not None
    stream = {"stream": f"{2 * config.num_layers} steps: {', '.join(config.stream_terms)}"}
    return {
        "preset": config.preset,
        "size": config.size,
        "d_model": config.d_model,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "key_value_heads": config.key_value_heads,
        "feed_forward": f"{config.feed_forward}, {config.hidden_dim:,} wide",
        "context": config.max_seq_len,
        "iterations": f"{config.mean_iterations:g} on average" if is_uneven else config.num_iterations or None,
        "controller_width": integrator.controller.width if integrator else None,
        **(stream if config.stream_terms else {}),
        "operations": describe(plan.operations),
        "embedding_rank": config.rank,
        "vocabulary": plan.vocabulary.size,
        "vocabulary_from": plan.vocabulary.source,
    }


Table = tuple[str, Sequence[str], list[tuple[Any, ...]]]
"""Title, columns, rows."""


def _tables(plan: "ModelPlan", has_schedule: bool) -> Iterator[Table]:
    """What follows the facts of the model."""
    run, states, settings = plan.run, plan.states, plan.recipe.training
    total, inner = run.total_parameters, run.non_embedding_parameters
    rows = [(part, count, f"{count / total:.1%}") for part, count in run.parameters.items()]
    rows += [("total", total, "100%"), ("total without embedding and head", inner, f"{inner / total:.1%}")]
    yield "parameters", ("part", "number", "share"), rows
    columns = ("part", "optimisation", "full", "optimised", "change", "in this model")
    savings = [
        (saving.part, saving.optimisation, saving.full, saving.optimised, f"{saving.change:+.1%}", saving.here)
        for saving in plan.savings
    ]
    yield "parameters without and with each optimisation", columns, savings
    yield from _flop_tables(plan)
    length = plan.config.max_seq_len
    once = plan.cache_of_sequence
    sizes = [(name, amount(size, "B"), amount(size * length + once, "B")) for name, size in plan.cache.items()]
    extra = f"with {amount(once, 'B')} of velocities a row" if once else "whatever T is"
    yield f"key-value cache, {extra}", ("type", "a token", f"a row of {length:,}"), sizes
    parts = {"weights": states.weights, "gradients": states.gradients, settings.optimizer.name: states.optimizer}
    yield "training state", ("", ""), [(name, amount(size, "B")) for name, size in parts.items()]
    yield _memory_table(plan)
    disk = [("weights alone", amount(states.weights, "B")), ("a checkpoint", amount(states.checkpoint, "B"))]
    if has_schedule:
        disk.append(("checkpoints kept at once, at most", amount(run.disk_bytes, "B")))
    yield "disk", ("", ""), disk
    if has_schedule:
        epochs = f"{run.epochs:.2f}" if run.epochs else "unknown: the data is not prepared"
        schedule = [
            ("steps", f"{run.num_steps:,} of {settings.batch_tokens:,} tokens"),
            ("tokens", f"{run.train_tokens:,}, {run.train_tokens / run.total_parameters:.1f} a parameter"),
            ("epochs", epochs),
            ("compute", f"{run.total_flops:.3g} FLOP"),
            ("recomputation", settings.recomputation),
            ("time", "measured by `inl train` before its first step, or by `inl bench train`"),
        ]
        yield "schedule", ("", ""), schedule


def _flop_tables(plan: "ModelPlan") -> Iterator[Table]:
    rows = [(part, flop_amount(count), flop_amount(3 * count)) for part, count in plan.flops.items()]
    rows.append(("total", flop_amount(sum(plan.flops.values())), flop_amount(plan.run.flops_per_token)))
    length = plan.recipe.training.sequence_length
    yield f"FLOPs of one token, windows of {length:,}", ("part", "forward", "training"), rows
    modes = [(f"recomputation {mode}", flop_amount(count)) for mode, count in plan.flops_by_recomputation.items()]
    yield "FLOPs the machine does for one token in training", ("", ""), modes
    if plan.flops_by_iterations:
        counts = [flop_amount(count) for count in plan.flops_by_iterations.values()]
        columns = ("", *(f"T = {iterations}" for iterations in plan.flops_by_iterations))
        yield "training FLOPs of one token at T iterations a layer", columns, [("training", *counts)]


def _memory_table(plan: "ModelPlan") -> Table:
    degrees = sorted({row.sharding for row in plan.memory})
    rows = []
    for mode in dict.fromkeys(row.recomputation for row in plan.memory):
        row = [row for row in plan.memory if row.recomputation == mode]
        sizes = [amount(entry.total, "B") for entry in row]
        rows.append((mode, amount(row[0].activations, "B"), amount(row[0].working, "B"), *sizes))
    passes = ", all of the gradient while passes add up" if any(row.gradient for row in plan.memory) else ""
    title = (
        f"memory of one device, {'bf16' if plan.bf16 else 'fp32'}, micro-batch {plan.memory[0].rows} x "
        f"{plan.recipe.training.sequence_length:,}, training state sharded over N devices (ddp: N = 1){passes}"
    )
    return title, ("recomputation", "activations", "working", *(f"N = {degree}" for degree in degrees)), rows


def flop_amount(count: float) -> str:
    """`12.3 MFLOP`, in powers of a thousand."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.4g} {units[power]}"
