"""Run nginx with the configuration of docs/nginx.conf before the service, as an ordinary process."""

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.bench import ROOT, end, free_port
from benchmarks.floods import HOST, Target


def find_nginx() -> str | None:
    """Return the path of nginx, which is not in everybody's PATH, or None."""
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@contextmanager
def proxied(service: Target, folder: Path) -> Iterator[Target]:
    """Run nginx with docs/nginx.conf before a service, with a certificate of its own, and yield it.

    Raises:
        ValueError: the configuration has none of what an operator changes in it.
        subprocess.CalledProcessError: nginx does not accept it.
    """
    key, certificate, written = folder / "key.pem", folder / "certificate.pem", folder / "nginx.conf"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=spam", "-addext", f"subjectAltName=IP:{HOST}"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    port = free_port()
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = (ROOT / "docs" / "nginx.conf").read_text(encoding="utf-8")
    for theirs, ours in {
        "user www-data;": f"user {getpass.getuser()};",
        "/run/nginx.pid": f"{folder}/nginx.pid",
        "/var/log/nginx/": f"{folder}/",
        "http {": f"http {{ {temporary}",
        "server 127.0.0.1:5000;": f"server {HOST}:{service.port};",
        "listen 80;": f"listen {HOST}:{free_port()};",
        "listen 443 ssl;": f"listen {HOST}:{port} ssl;",
        "/etc/ssl/certs/spam.example.org.pem": str(certificate),
        "/etc/ssl/private/spam.example.org.key": str(key),
    }.items():
        if theirs not in configuration:
            raise ValueError(f"docs/nginx.conf has no {theirs!r}")
        configuration = configuration.replace(theirs, ours)
    written.write_text(configuration, encoding="utf-8")
    log = folder / "nginx.log"
    command = [find_nginx(), "-c", written, "-e", log, "-g", "daemon off;"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while True:
            with suppress(ValueError):
                target = Target.of(f"https://{HOST}:{port}", process.pid, certificate)
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise subprocess.CalledProcessError(process.wait(), command, log.read_text())
            time.sleep(0.02)
        yield target
    finally:
        end(process)
