"""Storage apart from compute: the data goes to an object store over HTTP and comes back."""

import shutil
import subprocess
import sys
from pathlib import Path

from helpers import BUCKET


def test_push_wipe_and_pull(prepared, clone, bucket, tmp_path):
    project = clone(tmp_path / "clone")
    pointers = sorted(map(str, (project / "data").glob("*.csv.dvc")))
    files = [Path(pointer.removesuffix(".dvc")) for pointer in pointers]
    for file in files:
        shutil.copy2(prepared / "data" / file.name, file)
    content = [file.read_bytes() for file in files]

    def dvc(*arguments):
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    dvc("remote", "add", "--default", "--local", "s3", f"s3://{BUCKET}/spam")
    dvc("remote", "modify", "--local", "s3", "endpointurl", bucket)
    dvc("commit", "--force", *pointers)
    assert f"{len(files)} files pushed" in dvc("push", *pointers)

    shutil.rmtree(project / ".dvc" / "cache")
    for file in files:
        file.unlink()
    dvc("pull", *pointers)
    assert [file.read_bytes() for file in files] == content
    assert "in sync" in dvc("status", "--cloud", *pointers)
