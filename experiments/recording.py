"""Recordings: the tables of one run, streamed into parquet files chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray


class Recording:
    """Parquet files in a folder, one a table; a chunk becomes a row group, so that memory stays bounded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, pq.ParquetWriter] = {}

    def write(self, table: str, columns: Mapping[str, NDArray[Any]]) -> None:
        """Append a chunk of columns of equal length."""
        batch = pa.record_batch([_column(values) for values in columns.values()], names=list(columns))
        if table not in self._writers:
            texts = [field.name for field in batch.schema if pa.types.is_string(field.type)]
            self._writers[table] = pq.ParquetWriter(
                self.folder / f"{table}.parquet", batch.schema, compression="zstd", use_dictionary=texts
            )
        self._writers[table].write_batch(batch)

    def close(self) -> None:
        """Finish the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _column(values: NDArray[Any]) -> pa.Array:
    """An arrow array over the memory of a numpy array. `pa.array` would do, but it imports pandas."""
    if values.dtype == object:
        return column(values.tolist())
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def column(values: Sequence[Any]) -> pa.Array:
    """An arrow array of flags, integers, numbers or texts, None for no value; of numbers if there is none."""
    kinds = {type(value) for value in values if value is not None}
    held = None
    if None in values:
        held = pa.py_buffer(np.packbits([value is not None for value in values], bitorder="little"))
    if kinds == {str} and held is None and len(set(values)) == 1:
        text = values[0].encode()
        ends = np.arange(len(values) + 1, dtype=np.int32) * np.int32(len(text))
        return pa.Array.from_buffers(
            pa.string(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(text * len(values))]
        )
    if kinds == {str}:
        encoded = {value: value.encode() for value in dict.fromkeys(values) if value is not None}
        parts = [encoded.get(value, b"") for value in values]
        ends = np.zeros(len(parts) + 1, np.int32)
        np.cumsum([len(part) for part in parts], out=ends[1:])
        buffers = [held, pa.py_buffer(ends), pa.py_buffer(b"".join(parts))]
        return pa.Array.from_buffers(pa.string(), len(values), buffers)
    if kinds == {bool}:
        flags = pa.py_buffer(np.packbits([bool(value) for value in values], bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), len(values), [held, flags])
    kind = np.int64 if kinds == {int} else np.float64
    data = np.array([value or 0 for value in values], kind)
    return pa.Array.from_buffers(pa.from_numpy_dtype(data.dtype), len(values), [held, pa.py_buffer(data)])
