"""Score any number of messages from files: `python -m operations.batch IN OUT`.

IN is a file, a folder or a pattern, here or where fsspec reaches, such as `s3://bucket/day/*.parquet`. OUT gets Parquet
files of scores, and at the end a manifest; `operations.scores.open_scores` opens it for whoever uses them. A run that
was ended, however that was, goes on when it is repeated. It uses all cores of this machine, or the Dask cluster that
DASK_SCHEDULER_ADDRESS names; each machine of that must have the project and the model, and reach IN and OUT.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import islice
from typing import Any

import dask
from distributed import Client, KilledWorker, wait
from distributed.comm import CommClosedError
from distributed.utils import silence_logging_cmgr
from tqdm import tqdm

from engine.saved import MODEL_PATH
from operations.parts import ROWS, Source, cut_all
from operations.scores import Run, finish, plan, score_part, taken

TICK = 10  # seconds between two lines on how far it is
CONFIG = {"distributed.scheduler.worker-saturation": 1.0, "distributed.worker.profile.enabled": False}
CONFIG["distributed.worker.preload"] = ["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"]  # we end them
# A process on each core, to which nobody else on this machine can send work.
CORES = {"processes": True, "threads_per_worker": 1, "security": True, "silence_logs": logging.CRITICAL}
CORES |= {"dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
Report = Callable[[float, str], None]  # is told how far it is, from 0 to 1 and in a sentence


def score_files(source: str, run: Run, report: Report) -> dict[str, Any]:
    """Score files of messages, and return the manifest.

    Args:
        source: IN.
        run: OUT, and how it is done: see `operations.scores.plan`.
        report: is called every ten seconds, unless a terminal shows how far it is, and at the end.

    Raises:
        OSError: something cannot be read or written, or the cluster is away.
        ValueError: a file is bad, and the message names each; the others are scored, but there is no manifest. Or
            nothing can be scored to this folder.
    """
    start = time.monotonic()
    with taken(run, source, report) as sources, dask.config.set(CONFIG), silence_logging_cmgr(logging.CRITICAL):
        try:
            with Client(**({} if dask.config.get("scheduler-address", None) else CORES)) as client:
                parts, bad = _score_all(client, run, sources, report)
        except (CancelledError, CommClosedError):
            raise ConnectionError("the scheduler of Dask has gone: start it, and repeat this to go on") from None
        rows, spam, errors = (sum(part[name] for part in parts) for name in ("rows", "spam", "errors"))
        new, seconds = sum(part["rows"] for part in parts if part["new"]), time.monotonic() - start
        counts = f"{rows:,} rows, {spam / max(rows - errors, 1):.1%} spam, {errors:,} errors"
        report(1, f"{counts}; {new:,} rows were scored in {seconds:.0f} s, {new / seconds:,.0f} rows/s")
        if bad:
            raise ValueError("; ".join(f"{name}: {' '.join(why.split())}" for name, why in bad.items()))
        return finish(run, source, sources, parts)


def _score_all(client: Client, run: Run, sources: list[Source], report: Report) -> tuple[list[dict], dict[str, str]]:
    """Have parts scored, some at a time; return what is told of each, in their order, and what is wrong with files."""
    done, bad, running, size, told = {}, {}, {}, 0, time.monotonic()
    parts, total = cut_all(sources, run.columns, run.rows, bad), max(1, sum(source.size for source in sources))
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        while True:
            workers = client.nthreads()
            free = max(2 * sum(workers.values()) - len(running), not running)  # one for each waits at hand
            for part in islice(parts, free):
                running[client.submit(score_part, part, run, retries=2, pure=False)] = part
            if not running:
                return [done[part] for part in sorted(done)], bad
            with suppress(TimeoutError):
                wait(list(running), TICK, "FIRST_COMPLETED")
            for future in [future for future in running if future.done()]:
                part = running.pop(future)
                size += part.size
                bar.update(part.size)
                if not (error := future.exception()):
                    done[part] = future.result()
                else:
                    why = "each worker that scored them was killed" if isinstance(error, KilledWorker) else error
                    bad[part.source.name] = f"rows {part.first:,} to {part.first + part.rows - 1:,}: {why}"
            far = f"{sum(part['rows'] for part in done.values()):,} rows, {len(workers)} workers"
            bar.set_postfix_str(far)
            if bar.disable and time.monotonic() >= told + TICK:
                told = time.monotonic()
                report(size / total, f"{size / total:.0%}: {far}")


def main() -> None:
    """Score what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m operations.batch", description=__doc__.partition("\n")[0])
    parser.add_argument("source", metavar="IN", help="file, folder, pattern or URL of Parquet, CSV or JSON lines")
    parser.add_argument("out", metavar="OUT", help="folder or URL for the scores")
    parser.add_argument("--text", default="text", metavar="NAME", help="column of the texts (default: text)")
    parser.add_argument("--id", metavar="NAME", help="column of the ids (default: file and row are the id)")
    parser.add_argument("--model", default=MODEL_PATH, help="saved model (default: that of the project)")
    parser.add_argument("--rows", default=ROWS, type=int, help="of a part (default: %(default)s)")
    args = parser.parse_args()
    try:
        run = plan(args.out, args.text, args.id, args.model, args.rows)
        score_files(args.source, run, lambda _, said: print(said, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on from here.")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    from operations.batch import main  # so that the workers know by name what they run

    main()
