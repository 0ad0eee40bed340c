"""docs/sizes.md, as `inl plan --all-sizes` writes it: the documents' figures beside ours, and why they differ.

- Every number but the documents' own is computed here; a test holds the committed page against it.
"""

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from inl_cli.console import Console
from inl_cli.plan_view import flop_amount, show_model_plan
from inl_cli.progress import amount

if TYPE_CHECKING:
    from inl_core.analysis.planning import ModelPlan
    from inl_core.analysis.planning.activations import Recomputation
    from inl_core.analysis.planning.memory import Memory
    from inl_core.recipe import ModelConfig

_HEAD = """# Sizes: the documents' figures beside ours

Written by `inl plan --all-sizes > docs/sizes.md`; a test holds this file against that command. Parameters are counted
on the real modules on the meta device and FLOPs from the equations. Activations are what autograd saves in a forward
pass on fake tensors, which tests compare with real ones. Nothing on this page was measured on a GPU, and none of the
models above `tiny` was trained.

Documents 000, 001 and 002 describe v3, v2 and v1 ([docs/model.md](model.md)). Their vocabulary is 50,000, and so it is
here.

## The documents' shares of parameters
"""

_SHARES = """
All hold, and follow from the definitions: V D against V R + R D with R = D/8; L controllers against one, with a scale
and a bias a layer and output group left over; D values a layer against 1 + D/64; gamma, phi and their sines on a tenth
of the dimensions. They are shares of their part. The last row of the table of optimisations says what they come to in
the whole model, of which embedding, controllers, mu and excitation are 9% here.
"""

_PARAMETERS = """
## Parameters of every size

`12 L D^2` is the weights of attention (4 D^2) and of a feed-forward of width 4 D (8 D^2) in all blocks: what v1 and v2
hold besides embedding, controllers and norms. The differences are ours against the documents'.
"""

_PARAMETERS_EXPLAINED = """
Where they differ, and why:

- **Standard against v1.** No one formula gives the documents' column. large (303M) is 12 L D^2 alone, without an
  embedding. xlarge (808M) is below its own 12 L D^2 (906M). 3B is called after a count that 2048 x 40 with a 4 D
  feed-forward does not reach: its blocks hold 2.0B. small and medium are below v1's count with 50,000 tokens, whose
  embedding alone is 25.6M and 38.4M. We keep the dimensions, on which the documents agree, and count.
- **Optimised against v2.** The four optimisations touch embedding, controllers, mu and excitation only. The documents'
  optimised figures for medium, large, xlarge, 7B and 13B are below 12 L D^2, which none of the four reduces: a constant
  27 to 30% off the standard column cannot come from them. They take half of small, which is therefore smaller here than
  in the documents, and 6% of 3B.
- **v3** has grouped queries (a quarter of the key and value heads) and no biases, and so fewer weights than v2. The
  documents give key and value heads for 3072x32 alone; the other sizes follow it.
- **v4** has a full embedding, one controller of three output groups, and a feed-forward rounded down to 64.
- Context does not enter: rotary and sinusoidal positions have no parameters.
"""

_COSTS = """
## What each size costs (v4, as in the recipes)

One window of the size's whole context, bf16 autocast over float32 weights, AdamW, documents masked. *State* is weights,
gradients and moments, 16 bytes a parameter. *Activations* and *working* memory are one device's. FLOPs are a token's,
forward and backward.
"""

_COSTS_EXPLAINED = """
The mask that keeps attention inside documents is S x S for each window and layer and is kept without recomputation: at
4,096 tokens as much as a bf16 tensor of 4,096 channels. `inl plan` shows the same for any other window, micro-batch and
precision, and for state sharded over 2 to 32 devices; `inl train` itself keeps the whole state on every device.
"""

_MEMORY = """
## Training memory: the documents' -65%

Document 002 says that low-rank embeddings and recomputation leave 30 to 40% of the training memory, document 001 35%.
One device, one window of the whole context, bf16; the standard model is v1 without recomputation, the optimised v2 with
`block`:
"""

_MEMORY_EXPLAINED = """
So the documents' share is reached, and more where activations dominate, which they do because v1 and v2 run many
iterations and all are kept. There is no one share: recomputation removes nearly all activations and nothing of the
state, and only in small does the low-rank embedding weigh. The price is one more forward pass of the blocks.
"""

_OTHERS = """
## What is not reproduced

- **Training FLOPs -20 to -30% against a Transformer (document 000).** The integrator adds its controller to the same
  block, so at equal dimensions a token costs more, not less: see below. A saving would have to come from needing fewer
  tokens or parameters for the same loss, which is docs/evidence.md's subject.
- **Memory -40 to -60% against a Transformer (document 000).** At equal dimensions the state is equal within a percent,
  and the iterations are kept besides; only recomputation brings the activations down, and it does so in a Transformer
  too.
- **GPU memory of document 001's table** (5.2B in 25 GB, 9.8B in 45 GB, 22B in 90 GB, 75B in 300 GB) is 4 to 5 bytes a
  parameter: float32 weights alone, hence inference. Training needs 16 bytes a parameter before the first activation.
- **Speeds** are measured, not planned: docs/performance.md.
"""


def sizes_page() -> str:
    """The whole page, Markdown."""
    return "\n".join(part.strip("\n") + "\n" for part in _parts())


def _parts() -> Iterable[str]:
    from inl_core.recipe.sizes import SIZES

    yield _HEAD
    yield from _shares()
    yield _PARAMETERS
    yield _parameter_table()
    yield _PARAMETERS_EXPLAINED
    yield _COSTS
    yield _cost_table(list(SIZES))
    yield _COSTS_EXPLAINED
    yield _MEMORY
    yield _memory_table(("small", "3B", "13B"))
    yield _MEMORY_EXPLAINED
    yield _OTHERS
    yield _flops_table(("small", "3B", "13B", "3072x32"))


def _shares() -> Iterable[str]:
    """The documents' shares beside ours, and the command that prints them, with all it prints."""
    from inl_core.analysis.planning.documents import CLAIM_DIMENSIONS, CLAIMS, VOCABULARY

    plan = _plan("v2", **CLAIM_DIMENSIONS, integrator={"backend": "eager"})  # the same words on every machine
    ours = {saving.part: saving for saving in plan.savings}
    rows = [
        (claim.text, f"{claim.change:+.0%}", f"{ours[claim.part].change:+.1%}", ours[claim.part].full,
         ours[claim.part].optimised)
        for claim in CLAIMS
    ]  # fmt: skip
    yield _markdown(("optimisation", "documents", "ours", "full", "optimised"), rows)
    keys = CLAIM_DIMENSIONS | {"integrator.backend": "eager"}
    settings = " ".join(f"--set model.{key}={value}" for key, value in keys.items())
    yield f"```\n$ inl plan --preset v2 {settings} --vocab-size {VOCABULARY}\n{_printed(plan)}\n```"
    yield _SHARES


def _parameter_table() -> str:
    from inl_core.analysis.planning.documents import DOCUMENTED

    rows = []
    for entry in DOCUMENTED:
        counts = {preset: _parameters(_config(preset, entry.size)) for preset in ("v1", "v2", "v3", "v4")}
        config = _config("v1", entry.size)
        rows.append(
            (
                entry.size,
                f"{config.d_model} x {config.num_layers}",
                _millions(12 * config.num_layers * config.d_model**2),
                _millions(entry.standard),
                _compared(counts["v1"], entry.standard),
                _millions(entry.optimised),
                _compared(counts["v2"], entry.optimised),
                _millions(counts["v3"]),
                _millions(counts["v4"]),
            )
        )
    columns = ("size", "D x L", "12 L D^2", "documents, standard", "v1", "documents, optimised", "v2", "v3", "v4")
    return _markdown(columns, rows)


def _cost_table(sizes: Sequence[str]) -> str:
    rows = []
    for size in sizes:
        plan = _plan("v4", size=size)
        memory = {row.recomputation: row for row in plan.memory if row.sharding == 1}
        rows.append(
            (
                size,
                plan.config.max_seq_len,
                flop_amount(plan.run.flops_per_token),
                amount(plan.cache["bfloat16"], "B"),
                amount(plan.states.total, "B"),
                amount(plan.states.checkpoint, "B"),
                *(amount(memory[mode].activations, "B") for mode in ("none", "integrator", "block")),
                amount(memory["block"].working, "B"),
                amount(memory["block"].total, "B"),
            )
        )
    columns = ("size", "context", "training", "cache a token, bf16", "state", "checkpoint", "activations, none")
    return _markdown((*columns, "`integrator`", "`block`", "working, `block`", "total, `block`"), rows)


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
    from inl_core.analysis.planning import training_flops

    rows = []
    for size in sizes:
        cells = []
        for config in (_config(preset, size) for preset in ("v3", "v4")):
            plain = _config("transformer", size).model_copy(update={"embedding_rank": config.embedding_rank})
            ours, theirs = (training_flops(model, config.max_seq_len) for model in (config, plain))
            cells += [config.num_iterations, flop_amount(theirs), flop_amount(ours), f"{ours / theirs - 1:+.1%}"]
        rows.append((size, *cells))
    columns = [f"{preset}{name}" for preset in ("v3", "v4") for name in (": T", ", Transformer", "", ", change")]
    return (
        "Training FLOPs of a token, beside a Transformer of the same dimensions and the same embedding (v3's is low "
        "rank):\n\n" + _markdown(("size", *columns), rows)
    )


def _config(preset: str, size: str) -> "ModelConfig":
    from inl_core.analysis.planning.documents import VOCABULARY
    from inl_core.recipe import ModelConfig

    return ModelConfig.model_validate({"preset": preset, "size": size, "vocab_size": VOCABULARY})


def _plan(preset: str, **model: Any) -> "ModelPlan":
    from inl_core.analysis.planning import plan_model, recipe_of_model
    from inl_core.analysis.planning.documents import VOCABULARY

    return plan_model(recipe_of_model({"preset": preset, "vocab_size": VOCABULARY, **model}))


def _device(preset: str, size: str, mode: "Recomputation") -> "Memory":
    """One device's memory for one window of the size's context, bf16."""
    from inl_core.analysis.planning import recipe_of_model
    from inl_core.analysis.planning.documents import VOCABULARY
    from inl_core.analysis.planning.memory import memory_table, trace_modes

    recipe = recipe_of_model({"preset": preset, "size": size, "vocab_size": VOCABULARY})
    modes: tuple[Recomputation, ...] = ("none",) if mode == "none" else ("none", mode)
    saved = trace_modes(recipe, recipe.model, bf16=True, modes=modes)
    table = memory_table(recipe, recipe.model, saved, bf16=True, degrees=(1,))
    return next(row for row in table if row.recomputation == mode)


def _parameters(config: "ModelConfig") -> int:
    from inl_core.analysis.planning import count_parameters, meta_model

    return sum(count_parameters(meta_model(config)).values())


def _printed(plan: "ModelPlan") -> str:
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
