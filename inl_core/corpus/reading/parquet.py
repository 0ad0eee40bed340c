"""A Parquet file -> documents and bad rows, in bounded memory whatever the file holds.

- A value of 16 MB that is stored once, in a dictionary, may be the value of a million rows. So columns are read as
  dictionaries, and the size of each row is computed before the row is made.
- A row that cannot be used becomes a BadRow; a damaged file raises an ArtefactError that names the row group.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from inl_core.corpus.reading.compression import REPLACE, Expansion
from inl_core.corpus.reading.jsonl import MAX_LINE
from inl_core.corpus.reading.pieces import split_row
from inl_core.corpus.reading.rows import FORMS, BadRow, Form, Item, Note, document_from_row, infer_form, missing_columns
from inl_core.errors import ArtefactError
from inl_core.files import open_regular

_BATCH_BYTES, _BATCH_ROWS = 16 << 20, 8192
_VALUE_BYTES = 64  # memory of a Python object besides its text

# What pyarrow raises for damaged data: errors of its own, and plain ones from the libraries under it.
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError, TypeError, NotImplementedError)


def read_parquet(
    path: Path, name: str, compression: str | None, note: Note, forms: Sequence[Form] = FORMS
) -> Iterator[Item]:
    """The documents of the file; which of the `forms` its rows have is told by the names of its columns."""
    del compression  # Parquet is compressed inside, column by column
    chosen: list[Form] = []

    def choose(names: Sequence[str]) -> tuple[str, ...]:
        form = infer_form(names, forms)
        if form is None:
            raise ArtefactError(
                f"{name}: has none of the columns {missing_columns(forms)}; "
                f"has {', '.join(names[:12])}; name the one with the text (--text-column, or data.columns.text)"
            )
        note(f"Parquet, {form.label}")
        chosen.append(form)
        return *form.columns, *(column for column in form.optional if column in names)

    for origin, row in parquet_rows(path, name, choose):
        yield from split_row(row if isinstance(row, BadRow) else document_from_row(row, chosen[0], origin))


def parquet_rows(
    path: Path, name: str, choose: Callable[[Sequence[str]], Sequence[str]]
) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """("file:row", the values of the wanted columns, or a BadRow) for every row.

    Args:
        choose: is given the names of all columns and returns those that are wanted.

    Raises:
        ArtefactError: the file or a row group cannot be read, two wanted columns have one name, or the data unpacks
            to too much.
    """
    number = 0
    expansion = Expansion(name, path.stat().st_size)
    with open_regular(path) as raw:
        file, columns = _open(raw, name, choose)
        for group in range(file.num_row_groups):
            _check_claims(file, group, columns, expansion)
            try:
                size = _rows_at_once(file, group, columns)
                for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                    for row in _rows(batch, expansion):
                        number += 1
                        origin = f"{name}:{number}"
                        yield origin, BadRow(origin, row) if isinstance(row, str) else row
            except ArtefactError:
                raise
            except _DAMAGE as error:
                where = f"{name}: row group {group} of {file.num_row_groups}"
                raise ArtefactError(f"{where} cannot be read ({_first_line(error)}); {REPLACE}") from None


def _open(
    raw: BinaryIO, name: str, choose: Callable[[Sequence[str]], Sequence[str]]
) -> tuple[pq.ParquetFile, list[str]]:
    """The file, opened so that its text columns are read as dictionaries, and the names of the wanted columns."""
    try:
        file = pq.ParquetFile(raw, pre_buffer=False)
        names = file.schema_arrow.names
    except _DAMAGE as error:
        raise ArtefactError(f"{name}: not a readable Parquet file ({_first_line(error)}); {REPLACE}") from None
    columns = [*choose(names)]
    if twice := [column for column in columns if names.count(column) > 1]:
        raise ArtefactError(f"{name}: has several columns called {twice[0]}; rename all but one")
    wanted = [chunk for group in range(file.num_row_groups) for chunk in _chunks(file, group, columns)]
    texts = {chunk.path_in_schema for chunk in wanted if chunk.physical_type == "BYTE_ARRAY"}
    texts -= {chunk.path_in_schema for chunk in wanted if _is_incremental(chunk)}
    return pq.ParquetFile(raw, metadata=file.metadata, read_dictionary=[*texts], pre_buffer=False), columns


def _check_claims(file: pq.ParquetFile, group: int, columns: list[str], expansion: Expansion) -> None:
    """ArtefactError when the file's own description says that a row group unpacks to too much.

    This has to be known beforehand, since pyarrow unpacks whole pages.
    """
    for chunk in _chunks(file, group, columns):
        repeated = chunk.num_values if "." in chunk.path_in_schema else 0
        claimed = Expansion(f"{expansion.name}: row group {group}", expansion.packed_size)
        claimed.add(max(chunk.total_uncompressed_size, 8 * repeated))


def _rows_at_once(file: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """The number of rows that make about _BATCH_BYTES, so that wide rows do not fill the memory."""
    chunks = _chunks(file, group, columns)
    if any(map(_is_incremental, chunks)):
        return 1
    num_rows, size = file.metadata.row_group(group).num_rows, sum(chunk.total_uncompressed_size for chunk in chunks)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * num_rows // max(1, size)))


def _chunks(file: pq.ParquetFile, group: int, columns: list[str]) -> list[pq.ColumnChunkMetaData]:
    metadata = file.metadata.row_group(group)
    chunks = (metadata.column(index) for index in range(metadata.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]


def _is_incremental(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether a value may be stored as its difference from the value before, so that its size is not known beforehand.

    Columns that are stored so cannot be read as dictionaries.
    """
    return any(encoding.startswith("DELTA") for encoding in chunk.encodings)


def _rows(batch: pa.RecordBatch, expansion: Expansion) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch as Python dictionaries; in the place of a row that cannot be one, a string that says why."""
    sizes = sum((_sizes(column) for column in batch.columns), np.zeros(len(batch), dtype=np.int64))
    expansion.add(int(sizes.sum()))
    if sizes.sum() <= MAX_LINE:
        try:
            yield from _plain(batch).to_pylist()
            return
        except _DAMAGE:
            pass  # one of the rows is damaged: below, each is tried alone
    for index, size in enumerate(sizes.tolist()):
        if size > MAX_LINE:
            yield f"longer than {MAX_LINE >> 20} MiB"
            continue
        try:
            (row,) = batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            row = f"not UTF-8: {error.reason}"
        except _DAMAGE as error:
            row = f"cannot be read: {_first_line(error)}"
        yield row


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with plain columns in the place of dictionaries: making Python values of these is faster."""
    columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _sizes(array: Any) -> np.ndarray:
    """(n,) int64: about how many bytes of memory each row takes as Python values."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        sizes = _sizes(array.dictionary)
        return sizes[pc.fill_null(array.indices, 0).to_numpy(zero_copy_only=False)] if len(sizes) else _ones(array)
    if pa.types.is_struct(kind):
        return sum(map(_sizes, array.flatten()), _ones(array))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        ends = np.concatenate([[0], np.cumsum(_sizes(array.values))])[array.offsets.to_numpy()]
        return np.diff(ends) + _VALUE_BYTES
    if pa.types.is_fixed_size_list(kind):
        inner = _sizes(array.flatten())
        return _ones(array) + (int(inner.sum()) if len(inner) else 0)  # an upper bound
    if kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        lengths = pc.fill_null(pc.call_function("binary_length", [array]), 0)
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64) + _VALUE_BYTES
    if kind in (pa.string_view(), pa.binary_view()):
        return _sizes(array.cast(pa.large_binary()))
    return _ones(array)


def _ones(array: Any) -> np.ndarray:
    return np.full(len(array), _VALUE_BYTES, dtype=np.int64)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
