"""Folders of scores: what the workers of a batch write, and how to know that all of it is there.

The name of a file of scores begins with a key of the file of messages, in the state that it was in, and of the model
and options; so a file that has that name need not be written again. A manifest comes last. Who uses the scores opens
them by `open_scores`, which takes no folder without one.
"""

import fcntl
import hashlib
import io
import json
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from sklearn.base import BaseEstimator

from engine.fields import LONGEST_TEXT
from engine.linear import LinearModel
from engine.saved import MODEL_PATH, load_card, load_scorer
from operations.archive import MANIFEST
from operations.parts import ROWS, Part, Source, find_sources, read
from operations.store import ROOT, locked
from score import score_batch

TEXT = pa.string()
SCHEMA = pa.schema({"id": TEXT, "propensity": pa.float64(), "prediction": pa.bool_(), "sha256": TEXT, "error": TEXT})
OURS = re.compile(r"([0-9a-f]{16})-\d+\.parquet(\.[0-9a-f]{32})?|manifest\.json\.[0-9a-f]{32}")


class Run(NamedTuple):
    """What all parts of a batch have in common."""

    out: str  # address of the folder of scores
    text: str  # name of the column of texts
    id: str | None  # name of the column of ids; without one, file and row are the id
    model: str  # its path; a relative one begins at the folder of the project
    sha256: str  # of the model
    threshold: float
    rows: int  # of a part, at most

    @property
    def columns(self) -> list[str]:
        """The columns that each file must have."""
        return [name for name in (self.text, self.id) if name is not None]

    def key(self, source: Source) -> str:
        """Return what the names of a file's scores begin with."""
        about = [source.name, source.size, source.state, self.text, self.id, self.sha256, self.threshold, self.rows]
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()


def plan(out: str, text: str = "text", id_: str | None = None, model: str | Path = MODEL_PATH, rows: int = ROWS) -> Run:
    """Return what a run is to do.

    Args:
        out: folder of the scores, or its address.
        text: name of the column of texts.
        id_: name of the column of ids; without one, file and row are the id.
        model: path of the model; its card lies beside it.
        rows: of a part, at most; how much is lost when a worker is killed, and how many files there are.

    Raises:
        OSError, ValueError: the card of the model cannot be read, or the rows are none.
    """
    if rows < 1:
        raise ValueError(f"a part must have at least one row, not {rows}")
    card, (fs, folder), path = load_card(model), url_to_fs(out), Path(model).resolve()
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path  # for machines with the project elsewhere
    return Run(fs.unstrip_protocol(folder), text, id_, str(path), card["sha256"], card["threshold"], rows)


# Writing


def score_part(part: Part, run: Run) -> dict[str, Any]:
    """Score a part and write its scores, unless they are there.

    Returns:
        The "file" of the scores, its "sha256", its number of "rows", how many of them are "spam" and how many have
        "errors", and whether it is "new".

    Raises:
        OSError, ValueError, csv.Error: the part cannot be read, the model is not here, or the scores cannot be written.
    """
    fs, folder = url_to_fs(run.out)
    name = f"{run.key(part.source)}-{part.first:012}.parquet"
    with suppress(FileNotFoundError, pa.ArrowInvalid):  # the latter where it is damaged
        return {"file": name, **_describe(fs.cat_file(f"{folder}/{name}")), "new": False}
    rows = enumerate(read(part, run.columns), part.first)
    checked = [_check(row, f"{part.source.name}:{number}", run) for number, row in rows if row is not None]
    results = iter(score_batch([text for _, text, error in checked if not error], _load(run), run.threshold))
    scores = [(None, None) if error else next(results) for _, _, error in checked]
    columns = {
        "id": [id_ for id_, _, _ in checked],
        "propensity": [propensity for _, propensity in scores],
        "prediction": [prediction for prediction, _ in scores],
        "sha256": [run.sha256] * len(checked),
        "error": [error for _, _, error in checked],
    }
    content = io.BytesIO()
    pq.write_table(pa.table(columns, SCHEMA), content, compression="zstd")
    _write(fs, f"{folder}/{name}", content.getvalue())
    return {"file": name, **_describe(content.getvalue()), "new": True}


def _check(row: dict[str, Any] | str, place: str, run: Run) -> tuple[str, str | None, str | None]:
    """Return the id of a row, its text, and what is wrong with it or None; where it has no id, its place is the id."""
    if isinstance(row, str):
        return place, None, row
    id_, text = place if run.id is None else row.get(run.id), row.get(run.text)
    if not _is_id(id_):
        return place, None, f"{run.id} must be a string or a whole number, for it is the id"
    if not isinstance(text, str):
        return str(id_), None, f"{run.text} must be a string, not {'null' if text is None else type(text).__name__}"
    if len(text) > LONGEST_TEXT:
        return str(id_), None, f"{run.text} has at most {LONGEST_TEXT} characters, not {len(text)}"
    return str(id_), text, None


def _is_id(value: Any) -> bool:
    """Tell whether a value can be an id; half a surrogate pair cannot be stored."""
    if not isinstance(value, str):
        return isinstance(value, int) and not isinstance(value, bool)
    with suppress(UnicodeEncodeError):
        return bool(value.encode())
    return False


@lru_cache(maxsize=1)
def _load(run: Run) -> BaseEstimator | LinearModel:
    """Return the model of a run, which each worker's machine must have."""
    path = ROOT / run.model
    model = load_scorer(path)
    if load_card(path)["sha256"] != run.sha256:
        raise ValueError(f"{path} on {socket.gethostname()} is not the model of this run: copy that one there")
    return model


def _describe(content: bytes) -> dict[str, Any]:
    """Return what a file of scores holds; pyarrow.ArrowInvalid if it is damaged."""
    table = pq.read_table(io.BytesIO(content), columns=["prediction", "error"])
    counts = {"spam": pc.sum(table["prediction"]).as_py() or 0, "errors": len(table) - table["error"].null_count}
    return {"sha256": hashlib.sha256(content).hexdigest(), "rows": len(table), **counts}


def _write(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file under another name first, so that it is there whole or not at all."""
    temporary = f"{path}.{uuid4().hex}"
    try:
        fs.pipe_file(temporary, content)
        fs.mv(temporary, path)
    finally:
        if fs.exists(temporary):
            fs.rm_file(temporary)


# The folder


@contextmanager
def taken(run: Run, source: str, report: Callable[[float, str], None]) -> Iterator[list[Source]]:
    """Take the folder of a run, alone where it lies on this machine.

    Args:
        run: its manifest is removed, and whatever is unfinished.
        source: address of the input.
        report: is told if unfinished scores of another run are removed.

    Yields:
        The files of the input.

    Raises:
        OSError, ImportError: input or folder are away.
        ValueError: there is no input, or the folder is taken, or it holds what must not go.
    """
    sources, (fs, folder) = find_sources(source), url_to_fs(run.out)
    if any(source.url.startswith(f"{run.out}/") for source in sources):
        raise ValueError(f"some of the input lies in {folder}, where the scores are to go: name another folder")
    fs.makedirs(folder, exist_ok=True)
    with ExitStack() as stack:
        if isinstance(fs, LocalFileSystem):
            try:
                stack.enter_context(locked(Path(folder), fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(f"another run writes to {folder}: wait until it has ended") from None
        keys, finished = {run.key(source) for source in sources}, _read_manifest(fs, folder)
        if finished:
            if not {OURS.fullmatch(part["file"])[1] for part in finished["parts"]} <= keys:
                raise ValueError(
                    f"{folder} holds the scores of another state of the input, or by another model or options: name "
                    "another folder, or remove that one"
                )
            fs.rm_file(f"{folder}/{MANIFEST}")
        if removed := _tidy(fs, folder, keys):
            report(0, f"The scores of another state of the input, or by another model, are removed: {removed} files")
        yield sources


def _tidy(fs: AbstractFileSystem, folder: str, keys: set[str]) -> int:
    """Remove unfinished files, and scores of other keys than these; return how many of the latter there were."""
    fs.invalidate_cache()
    found = [(path, OURS.fullmatch(path.rpartition("/")[2])) for path in fs.find(folder, maxdepth=1)]
    others = [path for path, name in found if name and name[1] and name[1] not in keys]
    for path in {*others, *(path for path, name in found if name and name[2])}:
        fs.rm_file(path)
    return len(others)


def finish(run: Run, source: str, sources: Sequence[Source], parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest of a run, all parts of which are scored, and return it.

    Args:
        run, source: as `taken` was given them.
        sources: as it found them.
        parts: what `score_part` returned for each part.

    Raises:
        ValueError: the input has changed in the meantime.
    """
    if find_sources(source) != sources:
        raise ValueError(f"{source} has changed in the meantime: repeat the run")
    fs, folder = url_to_fs(run.out)
    _tidy(fs, folder, {run.key(source) for source in sources})  # what was left by workers that were killed
    counts = {name: sum(part[name] for part in parts) for name in ("rows", "spam", "errors")}
    files = [{"name": source.name, "size": source.size, "state": source.state} for source in sources]
    parts = [{name: value for name, value in part.items() if name != "new"} for part in parts]
    about = {"sha256": run.sha256, "threshold": run.threshold, **counts, "files": files, "parts": parts}
    _write(fs, f"{folder}/{MANIFEST}", json.dumps(about, indent=1).encode())
    return about


def open_scores(address: str) -> ds.Dataset:
    """Open the scores of a batch, if all of them are there as they were written.

    Args:
        address: of the folder.

    Returns:
        A dataset with the columns of `SCHEMA`, which reads a file after the other.

    Raises:
        OSError: the folder cannot be read.
        ValueError: the batch has not ended well, or a file is not as it was written.
    """
    fs, folder = url_to_fs(address)
    about = _read_manifest(fs, folder)
    if about is None:
        raise ValueError(f"{address} has no {MANIFEST}, so scores are missing: repeat the batch that writes them")
    paths = [f"{folder}/{part['file']}" for part in about["parts"]]
    for path, part in zip(paths, about["parts"], strict=True):
        if not fs.exists(path) or hashlib.sha256(fs.cat_file(path)).hexdigest() != part["sha256"]:
            raise ValueError(f"{path} is not as the batch wrote it: repeat the batch")
    return ds.dataset(paths, SCHEMA, filesystem=fs)


def _read_manifest(fs: AbstractFileSystem, folder: str) -> dict[str, Any] | None:
    """Return the manifest in a folder, or None; ValueError if it is none of scores."""
    try:
        about = json.loads(fs.cat_file(f"{folder}/{MANIFEST}"))
        _ = [part["sha256"] for part in about["parts"] if OURS.fullmatch(part["file"])[1]]
        return about
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{folder}/{MANIFEST} is no manifest of scores: name another folder") from None
