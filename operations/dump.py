"""Dump the tables of a store in PostgreSQL to a file, and load them, by PostgreSQL's own programs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import sqlalchemy as sa


def dump_schema(connection: sa.Connection, snapshot: str, path: Path) -> None:
    """Dump the schema of a store as a transaction sees it.

    Args:
        connection: of the transaction, which stays open.
        snapshot: the name under which it exported what it sees.
        path: of the file to write.

    Raises:
        RuntimeError: it cannot be done; the message says why.
    """
    folder, schema = _programs(connection), connection.scalar(sa.text("SELECT current_schema()"))
    options = ["--format=custom", "--no-owner", "--no-privileges", f"--schema={schema}", f"--snapshot={snapshot}"]
    command = [folder / "pg_dump", *options, f"--file={path}", f"--dbname={_address(connection.engine)}"]
    done = subprocess.run(command, env=_environment(connection.engine), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"pg_dump failed: {_first_line(done.stderr)}")


def load_schema(engine: sa.Engine, path: Path, kept: str) -> None:
    """Load a dump into the database of a store, all or nothing.

    Args:
        engine: of the store.
        path: of the dump.
        kept: what the schema is called from then on that was there before.

    Raises:
        RuntimeError: it cannot be done; the message says why.
    """
    with engine.connect() as connection:
        folder, schema = _programs(connection), connection.scalar(sa.text("SELECT current_schema()"))
    begin = "BEGIN;" + (f'ALTER SCHEMA "{schema}" RENAME TO "{kept}";' if schema else "")
    # Without the last line, because pg_restore failed or this program was killed, psql leaves all as it was.
    script = 'echo "$1" && "$2" --no-owner --no-privileges --file=- "$3" && echo "COMMIT;"'
    options = ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null", "--file=-"]
    psql = [folder / "psql", *options, f"--dbname={_address(engine)}"]
    pipes = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        ["sh", "-c", script, "sh", begin, folder / "pg_restore", path], stdout=subprocess.PIPE, **pipes
    ) as lines:
        done = subprocess.run(psql, env=_environment(engine), stdin=lines.stdout, **pipes)
        lines.stdout.close()
        said = done.stderr + lines.stderr.read()
    if done.returncode or lines.returncode:
        raise RuntimeError(f"PostgreSQL did not take the dump: {_first_line(said)}")


def _programs(connection: sa.Connection) -> Path:
    """Return the folder of PostgreSQL's programs of the server's version.

    Raises:
        RuntimeError: they are not on this machine.
    """
    version = connection.connection.driver_connection.info.server_version // 10_000
    found = [Path(path).parent for path in [shutil.which("pg_dump")] if path]
    for folder in [*found, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]:
        if (folder / "pg_dump").exists():
            says = subprocess.run([folder / "pg_dump", "--version"], capture_output=True, text=True).stdout
            if re.search(rf"\) {version}\b", says):
                return folder
    raise RuntimeError(
        f"pg_dump, pg_restore and psql of PostgreSQL {version} are needed, that of the server: install "
        f"postgresql-client-{version}, or put them on PATH"
    )


def _address(engine: sa.Engine) -> str:
    """Return the address of a store as PostgreSQL's programs take it, without the password, which others could see."""
    return engine.url.set(drivername="postgresql").set(password=None).render_as_string()


def _environment(engine: sa.Engine) -> dict[str, str]:
    """Return the environment of PostgreSQL's programs, with the password."""
    return {**os.environ, **({"PGPASSWORD": engine.url.password} if engine.url.password else {})}


def _first_line(said: str) -> str:
    """Return the first line of what a program said."""
    return said.strip().partition("\n")[0] or "it did not say why; the disk may be full"
