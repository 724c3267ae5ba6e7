"""What a backup consists of, and whether it is whole."""

import configparser
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from operations.store import ROOT, known_versions

MANIFEST = "manifest.json"
TIME = "%Y%m%dT%H%M%S-%fZ"  # in the names of backups, and of what they replace
TREES = ("spool", "days", "models", "mlruns")  # of the state's folder
SECRETS = ("key", "token")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a backup, all files of which are as it says.

    Raises:
        ValueError: they are not, or the backup cannot be read by this program.
    """
    try:
        about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, version = about["files"], about["version"]
        _ = about["store"], about["state"], about["serving"], {file["sha256"] for file in files.values()}
    except FileNotFoundError:
        raise ValueError(f"{path} is no backup: it has no {MANIFEST}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path / MANIFEST} is damaged: take another backup") from None
    found = {str(file.relative_to(path)) for file in list_files(path)}
    if wrong := sorted(found ^ files.keys()) or sorted(name for name in files if describe(path / name) != files[name]):
        raise ValueError(f"{path / wrong[0]} is not as it was backed up: take another backup")
    if version not in known_versions():
        raise ValueError(f"{path} has tables of version {version}, which this program does not know: use a newer one")
    return about


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files of a folder, if there is one; links to folders are left out, as is what goes away meanwhile."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(source, onerror=fail):
        to = target / Path(folder).relative_to(source)
        to.mkdir(parents=True)
        for name in names:
            with suppress(FileNotFoundError):
                shutil.copy2(Path(folder) / name, to / name)


def list_files(folder: Path) -> list[Path]:
    """Return the files of a backup, without its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def describe(path: Path) -> dict[str, Any]:
    """Return the size of a file, in bytes, and its sha256."""
    with open(path, "rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def dvc_remote() -> Path | None:
    """Return the folder of DVC's remote "offline", if it is one."""
    config, folder = configparser.ConfigParser(interpolation=None), ROOT / ".dvc"
    config.read([folder / "config", folder / "config.local"], encoding="utf-8")
    url = config.get("'remote \"offline\"'", "url", fallback=None)
    return folder / url if url and "://" not in url else None
