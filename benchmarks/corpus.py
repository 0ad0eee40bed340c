"""The larger corpus of docs/evidence.md: `builtin:python` and the Python sources of pinned packages, prepared.

    .venv/bin/python benchmarks/corpus.py                        # writes data/packages.jsonl and data/packages

- The rule: of each package in `PACKAGES`, as constraints.txt pins it, every .py file in the order of its path, without
  those below a folder for tests. Tests repeat much of the code that they test. One file is one document.
- Copies are dropped and the validation split is chosen by the preparation, as for any data set (inl_core/corpus).
- The standard library is that of the Python that runs this, so the numbers belong to that version of Python.
"""

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from inl_core.corpus.preparation import prepare
from inl_core.recipe.data import DataSettings, TokenizerSettings

PACKAGES = ("numpy", "pandas", "torch")
_TESTS = {"test", "tests", "testing", "conftest.py"}


def package_files(package: str) -> Iterator[tuple[str, str]]:
    """Name and text of every source file of an installed package that is no test."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package}: not installed; pip install -c constraints.txt {package}")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root.parent)
        if not _TESTS.intersection(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def write_sources(path: Path) -> None:
    """One row of JSON for each file, and a line of what each package gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for package in PACKAGES:
            count = size = 0
            for name, text in package_files(package):
                file.write(json.dumps({"text": text, "name": name}, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text.encode())
            print(f"{package} {version(package)}: {count:,} files, {size / 1e6:.1f} MB")


def main() -> None:
    """Write the sources and prepare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/packages"), help="where the data set goes")
    output = parser.parse_args().output
    sources = output.with_suffix(".jsonl")
    write_sources(sources)
    settings = DataSettings(
        sources=("builtin:python", str(sources)), tokenizer=TokenizerSettings(vocab_size=2048), validation_fraction=0.03
    )
    manifest = prepare(settings, output)
    for split, info in manifest.splits.items():
        print(f"{split}: {info.documents:,} documents, {info.tokens:,} tokens, {info.bytes:,} bytes")
    print(f"{manifest.duplicates:,} copies dropped; fingerprint {manifest.fingerprint[:12]}")


if __name__ == "__main__":
    main()
