"""docs/sizes.md, as `inl plan --all-sizes` writes it: the documents' figures beside ours, and why they differ.

- The words are those of sizes_page.md; the tables are computed here. A test holds the committed page against both.
"""

import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inl_cli.console import Console
from inl_cli.plan_view import flop_amount, show_model_plan
from inl_cli.progress import amount
from inl_core.analysis.planning import (
    ModelPlan,
    count_parameters,
    meta_model,
    plan_model,
    recipe_of_model,
    training_flops,
)
from inl_core.analysis.planning.activations import Recomputation
from inl_core.analysis.planning.documents import CLAIM_DIMENSIONS, CLAIMS, DOCUMENTED, VOCABULARY
from inl_core.analysis.planning.memory import Memory, memory_table, trace_modes
from inl_core.recipe import ModelConfig
from inl_core.recipe.sizes import SIZES


def sizes_page() -> str:
    """The whole page, Markdown."""
    tables = {
        "shares": _shares(),
        "parameters": _parameter_table(),
        "costs": _cost_table(list(SIZES)),
        "memory": _memory_table(("small", "3B", "13B")),
        "flops": _flops_table(("small", "3B", "13B", "3072x32")),
    }
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(**tables)


def _shares() -> str:
    """The documents' shares beside ours, and the command that prints them, with all it prints."""
    plan = _plan("v2", **CLAIM_DIMENSIONS)
    ours = {saving.part: saving for saving in plan.savings}
    rows = []
    for claim in CLAIMS:
        saving = ours[claim.part]
        rows.append((claim.text, f"{claim.change:+.0%}", f"{saving.change:+.1%}", saving.full, saving.optimised))
    table = _markdown(("optimisation", "documents", "ours", "full", "optimised"), rows)
    settings = " ".join(f"--set model.{key}={value}" for key, value in CLAIM_DIMENSIONS.items())
    return f"{table}\n\n```\n$ inl plan --preset v2 {settings} --vocab-size {VOCABULARY}\n{_printed(plan)}\n```"


def _parameter_table() -> str:
    rows = []
    for entry in DOCUMENTED:
        configs = {preset: _config(preset, entry.size) for preset in ("v1", "v2", "v3", "v4", "v5")}
        counts = {preset: sum(count_parameters(meta_model(config)).values()) for preset, config in configs.items()}
        dim, layers = configs["v1"].d_model, configs["v1"].num_layers
        rows.append(
            (
                entry.size,
                f"{dim} x {layers}",
                _millions(12 * layers * dim**2),
                _millions(entry.standard),
                _compared(counts["v1"], entry.standard),
                _millions(entry.optimised),
                _compared(counts["v2"], entry.optimised),
                _millions(counts["v3"]),
                _millions(counts["v4"]),
                _millions(counts["v5"]),
            )
        )
    columns = ("size", "D x L", "12 L D^2", "documents, standard", "v1", "documents, optimised")
    columns += ("v2", "v3", "v4", "v5")
    return _markdown(columns, rows)


def _cost_table(sizes: Sequence[str]) -> str:
    rows = []
    for size in sizes:
        plan = _plan("v5", size=size)
        memory = {row.recomputation: row for row in plan.memory if row.sharding == 1}
        kept = [memory[mode].activations for mode in ("none", "block")]
        block = memory["block"]
        sizes_in_bytes = (plan.cache["bfloat16"], plan.states.total, plan.states.checkpoint, *kept)
        cells = [amount(number, "B") for number in (*sizes_in_bytes, block.working, block.total)]
        rows.append((size, plan.config.max_seq_len, flop_amount(plan.run.flops_per_token), *cells))
    columns = ("size", "context", "training", "cache a token, bf16", "state", "checkpoint", "activations, none")
    return _markdown((*columns, "`block`", "working, `block`", "total, `block`"), rows)


def _memory_table(sizes: Sequence[str]) -> str:
    rows = []
    for size in sizes:
        full, small = _device("v1", size, "none"), _device("v2", size, "block")
        of_activations = (small.activations + small.working) / (full.activations + full.working) - 1
        changes = (of_activations, small.states / full.states - 1, small.total / full.total - 1)
        totals = (amount(full.total, "B"), amount(small.total, "B"))
        rows.append((size, *totals, *(f"{change:+.0%}" for change in changes)))
    return _markdown(("size", "standard", "optimised", "activations and working", "state", "all"), rows)


def _flops_table(sizes: Sequence[str]) -> str:
    rows = []
    for size in sizes:
        cells = []
        for config in (_config(preset, size) for preset in ("v3", "v4", "v5")):
            plain = _config("transformer", size).model_copy(update={"embedding_rank": config.embedding_rank})
            ours, theirs = (training_flops(model, config.max_seq_len) for model in (config, plain))
            cells += [config.num_iterations] if config.integrator else []
            cells += [flop_amount(theirs), flop_amount(ours), f"{ours / theirs - 1:+.1%}"]
        rows.append((size, *cells))
    columns = [f"{preset}{name}" for preset in ("v3", "v4") for name in (": T", ", Transformer", "", ", change")]
    columns += ["v5, Transformer", "v5", "v5, change"]
    return _markdown(("size", *columns), rows)


def _config(preset: str, size: str) -> ModelConfig:
    return ModelConfig.model_validate({"preset": preset, "size": size, "vocab_size": VOCABULARY})


def _plan(preset: str, **model: Any) -> ModelPlan:
    return plan_model(recipe_of_model({"preset": preset, "vocab_size": VOCABULARY, **model}))


def _device(preset: str, size: str, mode: Recomputation) -> Memory:
    """One device's memory for one window of the size's context, bf16."""
    recipe = recipe_of_model({"preset": preset, "size": size, "vocab_size": VOCABULARY})
    modes: tuple[Recomputation, ...] = ("none",) if mode == "none" else ("none", mode)
    saved = trace_modes(recipe, recipe.model, bf16=True, modes=modes)
    table = memory_table(recipe, recipe.model, saved, bf16=True, degrees=(1,))
    return next(row for row in table if row.recomputation == mode)


def _printed(plan: ModelPlan) -> str:
    """What `inl plan` prints, in ASCII."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        show_model_plan(Console(), plan, has_schedule=False)
    return "\n".join(line.rstrip() for line in text.getvalue().replace(chr(0x2500), "-").splitlines())


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    lines = [columns, ["---", *(["--:"] * (len(columns) - 1))], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _millions(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _compared(number: int, documented: float | None) -> str:
    return _millions(number) + (f" ({number / documented - 1:+.0%})" if documented else "")
