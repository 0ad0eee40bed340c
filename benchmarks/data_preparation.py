"""Speed and memory of data preparation against the bare tokenizer: `python benchmarks/data_preparation.py --size 2GB`.

- The input is generated: JSON Lines of documents put together at random from the lines of builtin:python, so that the
  words are real and no two documents are equal.
- The tokenizer is trained beforehand and given to both, so that both do the same encoding.
- Preparation and bare encoding run in processes of their own; memory is the process's peak resident size.
- Bare is `encode_batch_fast` (no offsets; the faster of the library's two) on batches of 1,000 documents already in
  memory as strings, its result thrown away: no reading, hashing, ids or files.
"""

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from inl_core.corpus.preparation import prepare
from inl_core.corpus.reading.builtin import python_documents
from inl_core.corpus.tokenizer import train_tokenizer
from inl_core.recipe.data import DataSettings, TokenizerSettings

REQUIRED_SHARE, REQUIRED_MEMORY = 0.70, 1.5e9
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}


def generated_texts(num_bytes: int) -> Iterator[str]:
    """Documents of 1 to 20 blocks of 8 lines from the standard library, until they make `num_bytes`."""
    lines = [line for document in python_documents() for line in document.texts[0].splitlines(keepends=True)]
    blocks = ["".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
    generator = random.Random(0)
    while num_bytes > 0:
        text = "".join(generator.choices(blocks, k=generator.randint(1, 20)))
        num_bytes -= len(text.encode("utf-8"))
        yield text


def write_input(path: Path, num_bytes: int) -> int:
    """Write the rows; returns the bytes of their text."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for text in generated_texts(num_bytes):
            total += len(text.encode("utf-8"))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return total


def measure_prepare(source: Path, tokenizer: Path, output: Path, results: multiprocessing.Queue) -> None:
    """(seconds, peak bytes) of a whole preparation."""
    settings = DataSettings(sources=(str(source),), tokenizer=TokenizerSettings(file=tokenizer))
    begin = time.perf_counter()
    prepare(settings, output)
    results.put((time.perf_counter() - begin, _peak_memory()))


def measure_bare(tokenizer: Path, num_bytes: int, results: multiprocessing.Queue) -> None:
    """(seconds, encoded bytes) of the library's batch encoder."""
    import tokenizers

    texts = list(generated_texts(num_bytes))
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    backend.encode_special_tokens = True
    begin = time.perf_counter()
    for start in range(0, len(texts), 1000):
        backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    results.put((time.perf_counter() - begin, sum(len(text.encode("utf-8")) for text in texts)))


def in_process(function, *arguments: object) -> tuple[float, float]:
    """Run in a fresh process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    result = results.get()
    process.join()
    return result


def main() -> None:
    """Generate, measure, compare, and fail when a requirement is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="64MB", help="text to prepare, such as 200MB or 2GB (default %(default)s)")
    parser.add_argument("--bare-size", default="64MB", help="text for the bare encoder (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many counts (default %(default)s)")
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")
    options = parser.parse_args()
    size, bare_size = _bytes(options.size), min(_bytes(options.size), _bytes(options.bare_size))
    work = Path(tempfile.mkdtemp(prefix="inl-preparation-", dir=options.directory))
    try:
        train_tokenizer(generated_texts(10_000_000), vocab_size=2048).save(work / "tokenizer.json")
        num_bytes = write_input(work / "input.jsonl", size)
        prepared, bare, memory = 0.0, 0.0, 0.0
        for repeat in range(options.repeats):  # by turns, so that a busy machine slows both
            seconds, encoded = in_process(measure_bare, work / "tokenizer.json", bare_size)
            bare = max(bare, encoded / seconds)
            output = work / f"output-{repeat}"
            seconds, peak = in_process(measure_prepare, work / "input.jsonl", work / "tokenizer.json", output)
            prepared, memory = max(prepared, num_bytes / seconds), max(memory, peak)
            shutil.rmtree(output)
    finally:
        shutil.rmtree(work)
    print(f"text                {num_bytes / 1e6:10.1f} MB")
    print(f"bare batch encoder  {bare / 1e6:10.2f} MB/s")
    print(
        f"prepare             {prepared / 1e6:10.2f} MB/s  {prepared / bare:.0%} of bare, {REQUIRED_SHARE:.0%} required"
    )
    print(f"peak memory         {memory / 1e6:10.0f} MB    at most {REQUIRED_MEMORY / 1e6:.0f} allowed")
    if prepared < REQUIRED_SHARE * bare or memory > REQUIRED_MEMORY:
        sys.exit(1)


def _bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS:
        raise SystemExit(f"{text}: a size is a number and one of {', '.join(_UNITS)}")
    return int(float(number) * _UNITS[unit])


def _peak_memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
