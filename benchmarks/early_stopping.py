"""The early-stopping curve of a checkpoint: threshold, mean iterations, bits per byte, tokens per second.

    .venv/bin/python benchmarks/early_stopping.py runs/tiny --tokens 65536

Thresholds are quantiles of the residuals the checkpoint really has, so that the curve is covered whatever their scale.
The row nearest to 40% fewer iterations is marked. Tokens per second are those of decoding one row greedily.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from inl_core.inference.evaluate import evaluate
from inl_core.inference.generate import generate
from inl_core.inference.loading import find_checkpoint, load_model
from inl_core.inference.settings import GenerationSettings
from inl_core.inference.texts import default_window, open_default
from inl_core.model import IntegratorLanguageModel, Options


def residual_quantiles(model: IntegratorLanguageModel, ids: torch.Tensor, shares: list[float]) -> list[float]:
    """Residuals without the excitation's displacement, of all layers and iterations but the last, at `shares`."""
    with torch.inference_mode():
        layers = model.eval()(ids, options=Options(keep_trajectory=True, early_stopping=False)).layers
    found = []
    for integrator, layer in zip(model.integrators(), layers, strict=True):
        path = layer.trajectory
        assert path is not None
        forcing = integrator.excitation(len(path.alpha), model.excitation_amplitude)[:, None, None, :]
        moved = path.states[1:] - path.states[:-1] - integrator.stride * path.gate * forcing
        found.append(moved.square().mean(-1).sqrt()[:-1].flatten())
    return torch.quantile(torch.cat(found).float(), torch.tensor(shares)).tolist()


def set_threshold(model: IntegratorLanguageModel, threshold: float) -> None:
    """Stop tokens below `threshold` from here on."""
    for integrator in model.integrators():
        stopping = integrator.config.early_stopping.model_copy(update={"convergence_threshold": threshold})
        integrator.config = integrator.config.model_copy(update={"early_stopping": stopping})


def decoding_speed(loaded, num_tokens: int) -> float:
    """Tokens per second of one greedy row, after a warm-up."""
    settings = GenerationSettings(max_new_tokens=num_tokens, temperature=0.0)
    generate(loaded.model, loaded.tokenizer, ["def "], dataclasses.replace(settings, max_new_tokens=8))
    start = time.perf_counter()
    completion = generate(loaded.model, loaded.tokenizer, ["def "], settings)[0]
    return len(completion.token_ids) / (time.perf_counter() - start)


def main() -> None:
    """Print the curve as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    )
    arguments = parser.parse_args()
    loaded = load_model(find_checkpoint(arguments.checkpoint))
    text = open_default(loaded)
    window = default_window(loaded)
    first = next(iter(text.windows(window=window)))
    thresholds = [0.0, *residual_quantiles(loaded.model, torch.from_numpy(first.tokens), arguments.shares)]
    rows = []
    for threshold in thresholds:
        set_threshold(loaded.model, threshold)
        batches = text.windows(window=window, max_tokens=arguments.tokens)
        score = evaluate(loaded.model, batches, loaded.tokenizer.token_num_bytes)
        rows.append((threshold, score.iterations, score.bits_per_byte, decoding_speed(loaded, arguments.decode)))
    full, base = rows[0][1], rows[0][2]
    nearest = min(rows[1:], key=lambda row: abs(row[1] / full - 0.6))
    print("| threshold | mean iterations | fewer | bits per byte | change | decoding tokens/s |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        threshold, iterations, bits, speed = row
        mark = " <- 40%" if row is nearest else ""
        print(
            f"| {threshold:.5f} | {iterations:.3f} | {1 - iterations / full:.1%} | {bits:.4f} | "
            f"{bits / base - 1:+.2%} | {speed:,.0f} |{mark}"
        )


if __name__ == "__main__":
    main()
