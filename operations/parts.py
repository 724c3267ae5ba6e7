"""Files of messages, and the parts of them that are scored one by one: Parquet, CSV and JSON lines, here or on S3.

The number of a row counts from 1; in a table the header is row 1, as in a spreadsheet.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import PurePath
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

ROWS = 50_000  # of a part, as a rule
BATCH = 5_000  # rows of Parquet that are in memory twice
ENDINGS = (".csv", ".jsonl", ".json", ".parquet")
BOM = "\xef\xbb\xbf"  # bytes with which some programs begin UTF-8
csv.field_size_limit(2**24)  # characters; a field that is longer has a quotation mark that nothing closes


class Source(NamedTuple):
    """A file of messages, as it was when it was found."""

    url: str
    name: str  # within the input
    size: int  # bytes
    state: str  # another one where the content has changed


class Part(NamedTuple):
    """Some rows of a file, one after the other."""

    source: Source
    first: int  # number of the first row
    rows: int
    offset: int  # where they begin: bytes, in Parquet rows
    size: int  # bytes, in Parquet a share of those of the file
    header: tuple[str, ...]


def find_sources(address: str) -> list[Source]:
    """Find the files that an address names: of one file, of a folder with all in it, or a pattern.

    Files and folders whose names begin with a dot or an underscore are left out in a folder.

    Raises:
        OSError, ImportError: what is there cannot be listed.
        ValueError: there is nothing.
    """
    fs, path = url_to_fs(address)
    fs.invalidate_cache()
    if fs.isdir(path):
        root, found = path.rstrip("/"), fs.find(path, detail=True)
    elif fs.exists(path):
        root, found = path.rpartition("/")[0], {path: fs.info(path)}
    else:
        root, found = re.split(r"[*?\[]", path)[0].rpartition("/")[0], fs.glob(path, detail=True)
    sources = []
    for path, about in sorted(found.items()):
        name = path[len(root) + 1 :]
        if about["type"] != "directory" and not re.search(r"(^|/)[._]", name):
            about = fs.info(path) if about.get("islink") else about
            state = about.get("ETag") or about.get("mtime") or about.get("LastModified")
            sources.append(Source(fs.unstrip_protocol(path), name, about["size"], str(state)))
    if not sources:
        raise ValueError(f"there are no files to score at {address}")
    return sources


def cut_all(sources: Iterable[Source], columns: Iterable[str], rows: int, bad: dict[str, str]) -> Iterator[Part]:
    """Cut files into parts, one at a time.

    Args:
        sources: the files.
        columns: names that each must have.
        rows: of a part, at most.
        bad: is told what is wrong with a file that cannot be cut; no more is cut of a file that is in it.
    """
    for source in sources:
        try:
            for part in cut(source, columns, rows):
                if source.name in bad:
                    break
                yield part
        except (OSError, ValueError, csv.Error) as error:
            bad[source.name] = str(error)


def cut(source: Source, columns: Iterable[str], rows: int) -> Iterator[Part]:
    """Cut a file into parts, one at a time.

    Args:
        source: the file.
        columns: names that it must have.
        rows: of a part, at most.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read, is not what its name says, or lacks a column.
    """
    ending = PurePath(source.name).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"its name must end in {', '.join(ENDINGS)}")
    fs, path = url_to_fs(source.url)
    if ending == ".parquet":
        with fs.open(path, "rb") as file:
            about = pq.ParquetFile(file)
            header, total = _check(about.schema_arrow.names, columns), about.metadata.num_rows
            for start in range(0, total, rows):
                count = min(rows, total - start)
                yield Part(source, start + 1, count, start, source.size * count // total, header)
    else:  # what the bytes of a text mean is seen when it is read
        with fs.open(path, "r", encoding="latin-1", newline="\n") as file:
            yield from _cut_lines(file, source, columns, rows, ending == ".csv")


def _cut_lines(file: TextIO, source: Source, columns: Iterable[str], rows: int, is_csv: bool) -> Iterator[Part]:
    """Cut a table, a row of which may have several lines, or JSON lines."""
    start = place = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(place)

    def lines() -> Iterator[str]:
        nonlocal place
        for line in file:
            place += len(line)
            yield line

    records, first = lines(), 1
    if is_csv:
        records, first = csv.reader(records, strict=True), 2
        header = [_decode(name.encode("latin-1"), start) for name in next(records, [])]
        start = place
    else:
        line = next(records, None)
        if line is None:
            return
        header, records = list(_parse(_decode(line.encode("latin-1"), start))), chain([line], records)
    header = _check(header, columns)
    while count := sum(1 for _ in zip(range(rows), records)):  # noqa: B905 - stops before it takes a row too many
        yield Part(source, first, count, start, place - start, header)
        first, start = first + count, place


def _check(header: Iterable[str], columns: Iterable[str]) -> tuple[str, ...]:
    """Return the names of a file's columns, which must include some."""
    header = tuple(header)
    for name in columns:
        if header.count(name) != 1:
            raise ValueError(f"it must have one column {name!r}, or another must be named; it has {', '.join(header)}")
    return header


def _decode(content: bytes, offset: int) -> str:
    """Return the text of a piece of a file, which begins after so many bytes."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {offset + error.start + 1:,} is not UTF-8") from None


def _parse(line: str) -> dict[str, Any]:
    """Return the JSON object that a line holds."""
    with suppress(ValueError, RecursionError):
        if isinstance(row := json.loads(line), dict):
            return row
    raise ValueError("a line must hold a JSON object")


def read(part: Part, columns: Iterable[str]) -> Iterator[dict[str, Any] | str | None]:
    """Read the rows of a part.

    Args:
        part: made by `cut`.
        columns: names of those that are wanted; there may be others.

    Yields:
        The columns of each row, or what is wrong with the row, or None where it is blank.

    Raises:
        OSError, ValueError, csv.Error: the part cannot be read.
    """
    fs, path = url_to_fs(part.source.url)
    ending = PurePath(part.source.name).suffix.lower()
    if ending == ".parquet":
        with fs.open(path, "rb") as file:
            yield from _read_parquet(pq.ParquetFile(file), part, columns)
        return
    text = _decode(fs.cat_file(path, start=part.offset, end=part.offset + part.size), part.offset)
    if ending == ".csv":
        for cells in csv.reader(io.StringIO(text, newline="\n"), strict=True):
            if len(cells) == len(part.header):
                yield dict(zip(part.header, cells, strict=True))
            else:
                yield f"the row has {len(cells)} fields, and the header {len(part.header)}" if cells else None
    else:
        for line in text.split("\n"):
            try:
                yield _parse(line) if line.strip() else None
            except ValueError as error:
                yield str(error)


def _read_parquet(file: pq.ParquetFile, part: Part, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read the rows of a part from the groups that hold them."""
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    first, last = np.searchsorted(ends, [part.offset, part.offset + part.rows - 1], "right")
    skipped, left = part.offset - (ends[first - 1] if first else 0), part.rows
    groups = range(first, last + 1)
    for batch in file.iter_batches(BATCH, row_groups=groups, columns=list(columns), use_threads=False):
        rows = batch.slice(min(skipped, len(batch)), left)
        yield from rows.to_pylist()
        skipped, left = max(0, skipped - len(batch)), left - len(rows)
        if not left:
            return
