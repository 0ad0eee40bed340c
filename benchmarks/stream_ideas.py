"""Train variants of v5 that are not in the model, as benchmarks/generations.py trains its arms.

    .venv/bin/python benchmarks/stream_ideas.py --check        # seconds: each starts as v5, and no token sees ahead
    .venv/bin/python benchmarks/stream_ideas.py --ideas v5 nesterov --seeds 0 1 --jobs 8 --results FILE
    .venv/bin/python benchmarks/stream_ideas.py --table --results FILE

An idea is put on a built model from outside. What it adds starts at zero, where the model is exactly v5:

- v5: nothing is changed, the control of all others.
- no-transport: no velocity of earlier tokens, the control of keys-values.
- nesterov: the sub-layers read x + n v, n (D,) for each of them (look-ahead).
- transport-2, transport-4: x also gets the velocities 2 (or 2, 3 and 4) tokens before, inside the document, each times
  a vector (D,), after the embedding and after each sub-layer.
- alpha-head, alpha-64: alpha_t = alpha + W norm(x_t), one number for the channels of a head, or for each 64 channels.
  `norm` is the sub-layer's own, so it costs one small product.
- keys-values: transport of keys and values instead of velocities: k_t + b_k k_{t-1} before the rotary positions, and
  v_t + b_v v_{t-1}.
- mixing: before each sub-layer, x and v become m_11 x + m_12 v and m_21 x + m_22 v, all m (D,), the identity at first.

The vectors learn as fast as v5's own (`training.optimizer.stream_rate_factor`), W as every matrix; none decays.
The recipe is that of the size 1M and the arm v5 in generations.yaml, and so are the lines of the results, but for the
FLOPs, which are counted for v5 alone. Decoding with a cache is not supported. Legend: B batch, S sequence, D d_model.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generations import Grid, is_settled, options_of_runs, read_lines, run_all
from generations_run import Job, recipe_of, train
from generations_tables import difference_text, mean_text
from torch import Tensor, nn

from inl_core.kernels.apply import apply
from inl_core.model import IntegratorLanguageModel
from inl_core.model.attention import LayerCache
from inl_core.model.stream import Entry, Shared, Step, StreamBlock, shift
from inl_core.training.optimizers import build_optimizers

SubLayer = Callable[[Tensor], Tensor]
Take = Callable[[Step, nn.Module, SubLayer, Tensor, Tensor, Shared], tuple[Tensor, Tensor]]
"""A step, the norm and the sub-layer before it, and x and v (B, S, D): the next x and v."""


def train_idea(job: Job, runs: Path, changes: Sequence[str], matmul: str | None) -> dict[str, Any]:
    """As `train`, where the job's arm is an idea."""
    line = train(dataclasses.replace(job, arm="v5"), runs / job.arm, changes, matmul, IDEAS[job.arm])
    if job.arm != "v5":
        del line["flops_per_token"]
    return line | {"arm": job.arm}


class IdeaGrid(Grid):
    """The same rate and seed of all ideas side by side."""

    train = staticmethod(train_idea)

    def jobs(self) -> Iterator[Job]:
        """All that were asked for."""
        for seed in self.arguments.seeds:
            for rate in self.arguments.rates:
                for idea in self.arguments.ideas:
                    yield Job("1M", idea, rate, seed)


def remove_transport(model: IntegratorLanguageModel) -> None:
    """Take away the entry's and the steps' transport; the model still tells them where documents begin."""
    for module in entry_and_steps(model):
        module.transport = None


def look_ahead(model: IntegratorLanguageModel) -> None:
    """Let the sub-layers read x + n v."""
    for step in model.steps():
        add_zeros(step, model.config.d_model)

    def take(step: Step, norm: nn.Module, sub_layer: SubLayer, x: Tensor, v: Tensor, shared: Shared):
        ahead = torch.addcmul(x, added(step), v)
        return step(x, v, sub_layer(norm(ahead)), shared, None)

    replace_steps(model, take)


def mix(model: IntegratorLanguageModel) -> None:
    """Mix x and v in each channel before each sub-layer."""
    for step in model.steps():
        add_zeros(step, 4, model.config.d_model)

    def take(step: Step, norm: nn.Module, sub_layer: SubLayer, x: Tensor, v: Tensor, shared: Shared):
        xx, xv, vx, vv = added(step)
        mixed_x = torch.addcmul(torch.addcmul(x, xx, x), xv, v)
        mixed_v = torch.addcmul(torch.addcmul(v, vx, x), vv, v)
        return step(mixed_x, mixed_v, sub_layer(norm(mixed_x)), shared, None)

    replace_steps(model, take)


def gate_momentum(model: IntegratorLanguageModel, channels: int | None) -> None:
    """Add W norm(x) to alpha, one number for so many channels; None is a head's."""
    channels = channels or model.config.head_dim
    groups = model.config.d_model // channels
    for block in stream_blocks(model):
        for norm in (block.norm_attention, block.norm_feed_forward):
            # A matrix outside of the step learns as the other matrices do, and with this name it does not decay.
            add_zeros(norm, groups, model.config.d_model, name="modulation")

    def take(step: Step, norm: nn.Module, sub_layer: SubLayer, x: Tensor, v: Tensor, shared: Shared):
        read = norm(x)
        gate = nn.functional.linear(read, norm.get_parameter("modulation"))  # (B, S, groups)
        extra = (gate.unsqueeze(-1) * v.unflatten(-1, (groups, channels))).flatten(-2)
        return step(x, v, sub_layer(read) + extra, shared, None)

    replace_steps(model, take)


def lengthen_transport(model: IntegratorLanguageModel, taps: int) -> None:
    """Let x also get the velocities of 2 to `taps` tokens before."""

    def move(module: nn.Module, x: Tensor, v: Tensor, has_previous: Tensor | None) -> Tensor:
        before = shift(v, None, has_previous)
        for coefficient in added(module):
            before = shift(before, None, has_previous)
            x = torch.addcmul(x, coefficient, before)
        return x

    def after_entry(module: nn.Module, given: tuple[Any, ...], x: Tensor) -> Tensor:
        start, _, has_previous = given
        return move(module, x, start, has_previous)

    def after_step(module: nn.Module, given: tuple[Any, ...], moved: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, v = moved
        return move(module, x, v, given[3].has_previous), v

    for module in entry_and_steps(model):
        add_zeros(module, taps - 1, model.config.d_model)
        module.register_forward_hook(after_entry if isinstance(module, Entry) else after_step)


def transport_keys_values(model: IntegratorLanguageModel) -> None:
    """Let keys and values get a share of those of the token before, and x none of its velocity."""
    remove_transport(model)
    width = 2 * model.config.key_value_heads * model.config.head_dim

    def attend(block: StreamBlock, x: Tensor, v: Tensor, shared: Shared, cache: LayerCache | None):
        assert cache is None
        attention, step = block.attention, block.step_attention
        packed = attention.query_key_value(block.norm_attention(x))
        queries, keys_values = packed.split((packed.shape[-1] - width, width), dim=-1)
        before = shift(keys_values, None, shared.has_previous)
        packed = torch.cat((queries, torch.addcmul(keys_values, added(step), before)), dim=-1)
        candidate = attention.output(attention.inner_attention(packed, shared.rotary, shared.mask, None))
        return step(x, v, candidate, shared, None)

    for block in stream_blocks(model):
        add_zeros(block.step_attention, width)
        block.attend = partial(attend, block)


IDEAS: dict[str, Callable[[IntegratorLanguageModel], None]] = {
    "v5": lambda model: None,
    "nesterov": look_ahead,
    "transport-2": partial(lengthen_transport, taps=2),
    "transport-4": partial(lengthen_transport, taps=4),
    "alpha-head": partial(gate_momentum, channels=None),
    "alpha-64": partial(gate_momentum, channels=64),
    "keys-values": transport_keys_values,
    "no-transport": remove_transport,
    "mixing": mix,
}


def stream_blocks(model: IntegratorLanguageModel) -> list[StreamBlock]:
    """The model's blocks."""
    return [block for block in model.blocks if isinstance(block, StreamBlock)]


def entry_and_steps(model: IntegratorLanguageModel) -> list[Entry | Step]:
    """All that has a transport."""
    return [module for module in model.modules() if isinstance(module, Entry | Step)]


def add_zeros(module: nn.Module, *shape: int, name: str = "added") -> None:
    """Give a module a parameter; those of the entry and the steps are in the optimizer's group of the stream."""
    like = next(module.parameters())
    module.register_parameter(name, nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype)))


def added(module: nn.Module) -> Tensor:
    """What `add_zeros` gave it."""
    return module.get_parameter("added")


def replace_steps(model: IntegratorLanguageModel, take: Take) -> None:
    """Let `take` do each sub-layer and its step."""

    def attend(block: StreamBlock, x: Tensor, v: Tensor, shared: Shared, cache: LayerCache | None):
        assert cache is None
        sub_layer = partial(block.attention, rotary=shared.rotary, mask=shared.mask, cache=None)
        return take(block.step_attention, block.norm_attention, sub_layer, x, v, shared)

    def feed(block: StreamBlock, x: Tensor, v: Tensor, shared: Shared, cache: LayerCache | None):
        return take(block.step_feed_forward, block.norm_feed_forward, block.feed_forward, x, v, shared)

    for block in stream_blocks(model):
        block.attend, block.feed = partial(attend, block), partial(feed, block)


def check(idea: str) -> None:
    """Raise where an idea does not start as v5, or a token's logits depend on what it must not see."""
    recipe = recipe_of(Job("1M", "v5", 3e-3, 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = recipe.data.tokenizer.vocab_size
    model = IntegratorLanguageModel(recipe.model.with_vocab_size(vocabulary)).to(device, torch.float64)
    model.initialise(0)
    apply(model)
    ids = torch.randint(0, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    places = torch.arange(24, device=device).expand(2, 24)
    first = 11  # of the second document
    packed = {
        "document_ids": (places >= first).long(),
        "positions": torch.where(places < first, places, places - first),
    }

    def logits(ids: Tensor, **documents: Tensor) -> Tensor:
        return model.logits(model(ids, **documents).hidden)

    before, names = logits(ids, **packed), {name for name, _ in model.named_parameters()}
    IDEAS[idea](model)
    assert torch.allclose(logits(ids, **packed), before, rtol=0.0, atol=1e-6), f"{idea}: does not start as v5"

    new = {name: parameter for name, parameter in model.named_parameters() if name not in names}
    logits(ids, **packed).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in new.values()), f"{idea}: nothing to learn from"
    optimizers = build_optimizers(model, recipe.training.optimizer, device)
    groups = [g for part in optimizers.parts for g in part.param_groups if new.keys() & set(g["param_names"])]
    assert not any(group["weight_decay"] for group in groups), f"{idea}: decays"

    with torch.no_grad():
        for parameter in new.values():
            parameter.normal_(std=0.3)
        assert not new or not torch.allclose(logits(ids, **packed), before), f"{idea}: changes nothing"
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        now = logits(ids, **packed)
        for place, end in ((17, 24), (4, first)):  # another token changes its document from its place on, and no more
            sees = (places >= place) & (places < end)
            changed = (logits(torch.where(places == place, (ids + 1) % vocabulary, ids), **packed) - now).abs().amax(-1)
            assert changed[~sees].max() < 1e-5 < changed[sees].max(), f"{idea}: sees ahead, or another document"
        difference = (logits(ids[:, first:]) - now[:, first:]).abs().max()
        assert difference < 1e-5, f"{idea}: a document is not computed as if alone"
    count, learning = sum(p.numel() for p in model.parameters()), ", ".join(group["label"] for group in groups)
    print(f"{idea:12} as it must be; {count:,} parameters, {sum(p.numel() for p in new.values()):,} new {learning}")


def print_table(results: Path) -> None:
    """Bits per byte of each idea at each rate, and what it differs from v5 by, run by run of the same rate and seed."""
    scores: dict[str, dict[Any, float]] = {}
    for line in filter(is_settled, read_lines(results)):
        if line["size"] != "1M" or line["share"] != 1.0:
            continue  # of another study
        score = line.get("bits_per_byte", math.inf)  # it became infinite
        scores.setdefault(line["arm"], {})[line["rate"], line["seed"]] = score
    rates = sorted({rate for runs in scores.values() for rate, _ in runs})
    print(f"| idea | {' | '.join(f'{rate:g}' for rate in rates)} | runs | less v5 |\n|---|{'---|' * (len(rates) + 2)}")
    for idea in filter(scores.get, IDEAS):
        runs = scores[idea]
        row = [mean_text(score for (its, _), score in runs.items() if its == rate) for rate in rates]
        less = "" if idea == "v5" else difference_text(runs, scores.get("v5", {}))
        print(f"| {idea} | {' | '.join(row)} | {len(runs)} | {less} |")


def main() -> None:
    """Check the ideas, print the results, or run what the results file has not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options_of_runs()]
    )
    parser.add_argument("--check", action="store_true", help="check the ideas instead of training them")
    parser.add_argument("--table", action="store_true", help="print what the results file has instead")
    parser.add_argument("--ideas", nargs="+", choices=list(IDEAS), default=list(IDEAS), help="(default: all)")
    parser.add_argument("--rates", nargs="+", type=float, default=[4.5e-3, 6e-3, 3e-3], help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("runs/ideas.jsonl"), help="the file of lines, added to")
    parser.set_defaults(runs=Path("runs/ideas"))
    arguments = parser.parse_args()
    if arguments.check:
        for idea in arguments.ideas:
            check(idea)
    elif arguments.table:
        print_table(arguments.results)
    else:
        run_all(IdeaGrid(arguments))


if __name__ == "__main__":
    main()
