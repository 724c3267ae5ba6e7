"""A server of PostgreSQL of one's own, for tests and measurements."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path


class Postgres:
    """A server that listens in its folder alone."""

    def __init__(self, folder: Path):
        """Make its cluster in an empty folder; if this is root, as the user postgres, as root it would not run.

        Raises:
            FileNotFoundError: PostgreSQL is not installed.
        """
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not programs:
            raise FileNotFoundError("PostgreSQL is not installed: apt-get install postgresql")
        self.programs, self.folder, self.process = programs[-1], folder, None
        self.user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        if self.user:
            shutil.chown(folder, "postgres", "postgres")
        self.run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--pgdata", folder / "data")

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run one of its programs to its end and return what it prints."""
        command = [*self.user, self.programs / program, *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            TimeoutError: it does not.
        """
        command = [*self.user, self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder, "-h", ""]
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        ready = [self.programs / "pg_isready", "--quiet", "-h", self.folder]
        deadline = time.monotonic() + 60
        while subprocess.run(ready).returncode:
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL does not answer: see {self.folder / 'log'}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End all its processes at once, as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def url(self, name: str) -> str:
        """Make an empty database and return its address."""
        self.run("createdb", "-h", self.folder, "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self.folder}"
