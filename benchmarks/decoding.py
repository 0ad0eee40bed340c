"""Decoding speed: v4 at T=2 against transformers' Llama of its dimensions, cached against uncached, early stopping.

    .venv/bin/python benchmarks/decoding.py
    .venv/bin/python benchmarks/decoding.py --threads 1 --rank 64 --rounds 5 --skip-uncached

d=512, 6 layers, 8 heads, 2 key-value heads, V=16384, fp32, random weights, a 32-token prompt, greedy. The arms take
turns in one process, so that a neighbour's load meets all of them; each figure is the median over rounds, with its
spread, in wall seconds and in the process's CPU seconds (the steadier of the two where cores are shared). Llama is its
own `generate`: eager with the growing cache, and with its forward compiled over a static cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from inl_core.documents.generation import continue_ids
from inl_core.inference.decoding import Decoder
from inl_core.inference.settings import GenerationSettings
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.recipe import ModelConfig

VOCAB, WIDTH, LAYERS = 16_384, 512, 6
Arms = dict[str, Callable[[], object]]


def ours(preset: str, rank: int | None, integrator: dict | None = None) -> IntegratorLanguageModel:
    """The benchmark's shape in one preset."""
    values = {
        "preset": preset,
        "d_model": WIDTH,
        "num_layers": LAYERS,
        "num_heads": 8,
        "num_kv_heads": 2,
        "feedforward_dim": 2048,
        "embedding_rank": rank,
    }
    config = ModelConfig.model_validate(values | ({"integrator": integrator} if integrator else {}))
    model = IntegratorLanguageModel(config.with_vocab_size(VOCAB))
    model.initialise(0)
    return model.eval()


def llama_arms(ids: torch.Tensor, new_tokens: int, compiled: bool) -> Arms:
    """transformers' Llama; nothing where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("transformers is not installed: no Llama")
        return {}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=1344,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    arguments = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)

    def arm(model: LlamaForCausalLM, **more: object) -> Callable[[], object]:
        return torch.inference_mode()(lambda: model.generate(ids, attention_mask=mask, **arguments, **more))

    arms = {"Llama": arm(LlamaForCausalLM(config).eval())}
    if compiled:
        model = LlamaForCausalLM(config).eval()
        model.forward = torch.compile(model.forward)
        arms["Llama compiled"] = arm(model, cache_implementation="static")
    return arms


def our_arms(model: IntegratorLanguageModel, ids: torch.Tensor, new_tokens: int, compiled: bool) -> Arms:
    """The model, eager and compiled."""
    settings = GenerationSettings(max_new_tokens=new_tokens, temperature=0)
    name = "v4" if model.config.integrator else "transformer"
    arms: Arms = {name: lambda: continue_ids(model, ids, settings)}
    if compiled:
        fast = GenerationSettings(max_new_tokens=new_tokens, temperature=0, compiled=True)
        arms[f"{name} compiled"] = lambda: continue_ids(model, ids, fast)
    return arms


def measure(title: str, arms: Arms, tokens: int, rounds: int) -> dict[str, float]:
    """Median wall seconds of each arm after one round unmeasured; prints all of them."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, run in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"\n{title}: {tokens} tokens, {rounds} rounds, {torch.get_num_threads()} threads")
    print(f"{'':20} {'tokens/s':>9} {'spread':>15} {'per CPU second':>15} {'spread':>15}")
    for name, pairs in seconds.items():
        cells = []
        for values in zip(*pairs, strict=True):
            rates = [tokens / value for value in values]
            cells.append(f"{statistics.median(rates):9.1f} {f'{min(rates):.1f}-{max(rates):.1f}':>15}")
        print(f"{name:20} {'       '.join(cells)}", flush=True)
    return {name: statistics.median(wall for wall, _ in pairs) for name, pairs in seconds.items()}


def stopping_threshold(model: IntegratorLanguageModel, ids: torch.Tensor, share: float) -> float:
    """The threshold at which tokens that decode use about (1 - share) of all iterations, by bisection."""
    low, high = 0.0, 10.0
    most = model.config.num_iterations
    for _ in range(14):
        middle = (low + high) / 2
        used = iterations_used(model, middle, ids)
        low, high = (low, middle) if used < (1 - share) * most else (middle, high)
    return high


def iterations_used(model: IntegratorLanguageModel, threshold: float, ids: torch.Tensor) -> float:
    """Mean iterations of the tokens in `ids` at one threshold."""
    set_threshold(model, threshold)
    with torch.inference_mode():
        return float(model(ids).iterations().mean())


def set_threshold(model: IntegratorLanguageModel, threshold: float) -> None:
    """Write the threshold into the model and its layers (the configuration is frozen: copies replace it)."""
    for integrator in model.integrators():
        stopping = integrator.config.early_stopping.model_copy(update={"convergence_threshold": threshold})
        integrator.config = integrator.config.model_copy(update={"early_stopping": stopping})
    model.config = model.config.model_copy(update={"integrator": model.integrators()[0].config})


def early_stopping(arguments: argparse.Namespace) -> None:
    """T=8 to the end, and with the threshold that saves 40% of the iterations, one row and eight."""
    model = ours("v4", arguments.rank, {"num_iterations": 8})
    text = continue_ids(model, torch.randint(5, VOCAB, (4, 32)), GenerationSettings(max_new_tokens=64, temperature=1.0))
    set_threshold(model, stopping_threshold(model, text, 0.4))
    for rows in (1, 8):
        ids = text[:1, :32].repeat(rows, 1)

        def run(stopping: bool, ids: torch.Tensor = ids) -> float:
            decoder = Decoder(model, Options(early_stopping=stopping), rows=len(ids))
            used, tokens = 0.0, text[0, 32:].tolist()
            with torch.inference_mode():
                cache = decoder.new_cache(len(ids), 32 + len(tokens))
                decoder.prefill(ids, cache)
                for token in tokens:
                    found = decoder.step(torch.full((len(ids),), token), cache)
                    found.logits.argmax(-1).tolist()
                    used += float(found.iterations.mean())
            return used / len(tokens)

        print(f"\niterations used at batch {rows}: {run(True):.2f} of {run(False):.2f}")
        arms: Arms = {"all iterations": lambda run=run: run(False), "early stopping": lambda run=run: run(True)}
        times = measure(f"T=8, batch {rows}", arms, rows * (text.shape[1] - 32), arguments.rounds)
        print(f"faster by {times['all iterations'] / times['early stopping'] - 1:.1%}")


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rank", type=int, help="a factored embedding in v4; default a full one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--eager", action="store_true", help="no compiled arms")
    parser.add_argument("--skip-uncached", action="store_true")
    parser.add_argument("--skip-stopping", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = ours("v4", arguments.rank)
    for rows in arguments.batches:
        ids = torch.randint(5, VOCAB, (rows, 32))
        arms = our_arms(model, ids, arguments.new_tokens, not arguments.eager)
        arms |= llama_arms(ids, arguments.new_tokens, not arguments.eager)
        times = measure(f"batch {rows}", arms, rows * arguments.new_tokens, arguments.rounds)
        best = [min((value for name, value in times.items() if name.startswith(who)), default=0) for who in ("v4", "L")]
        print(f"v4 / Llama, each at its best: {best[1] / best[0]:.2f}")
    if not arguments.skip_uncached:
        ids = torch.randint(5, VOCAB, (1, 32))
        settings = GenerationSettings(max_new_tokens=arguments.new_tokens, temperature=0)
        arms = {
            "cached": lambda: continue_ids(model, ids, settings),
            "uncached": lambda: continue_ids(model, ids, settings, use_cache=False),
        }
        times = measure("batch 1, v4 eager", arms, arguments.new_tokens, max(1, arguments.rounds // 3))
        print(f"cached / uncached: {times['uncached'] / times['cached']:.1f}")
    if not arguments.skip_stopping:
        early_stopping(arguments)


if __name__ == "__main__":
    main()
