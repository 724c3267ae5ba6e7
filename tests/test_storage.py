"""Storage apart from compute: the data goes to an object store over HTTP and comes back."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "sms-data"
ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "student",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture
def bucket(monkeypatch):
    """The address of an S3-compatible server with an empty bucket."""
    import boto3

    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    yield endpoint
    server.stop()


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
