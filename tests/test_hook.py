"""The pre-commit hook, in scratch repositories: what it refuses, what it lets through, and what it tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

HOOKS = ROOT / "hooks"
PASSES = "def test_answer():\n    assert 6 * 7 == 42\n"
FAILS = "def test_answer():\n    assert 6 * 7 == 41\n"


class Repository:
    """A git repository with the hook, apart from the user's configuration and any repository around."""

    def __init__(self, top: Path, scratch: Path):
        self.top = top
        self.exports = scratch / "exports"
        self.exports.mkdir()
        outer = ("COV", "GIT_", "PYTEST_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)} | {
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "Author",
            "GIT_AUTHOR_EMAIL": "author@example.org",
            "GIT_COMMITTER_NAME": "Committer",
            "GIT_COMMITTER_EMAIL": "committer@example.org",
            "PATH": f"{scratch / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TMPDIR": str(self.exports),
        }
        write_python(scratch / "bin" / "python3", "path")
        top.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "core.hooksPath", "hooks")
        shutil.copytree(HOOKS, top / "hooks")
        (top / ".gitignore").write_text(".venv/\n")

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run a git command that must succeed and return what it printed."""
        return self.run(*arguments, cwd=cwd, check=True).stdout.strip()

    def run(self, *arguments: str, cwd: Path | None = None, check: bool = False):
        """Run a git command."""
        return subprocess.run(
            ["git", *arguments],
            cwd=cwd or self.top,
            env=self.environment,
            check=check,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stage(self, **files: str) -> None:
        """Write modules and add them, with the hook, to the index."""
        for name, text in files.items():
            (self.top / f"{name}.py").write_text(text)
        self.git("add", "--all")

    def commits(self) -> int:
        """Count the commits of the current branch."""
        log = self.run("rev-list", "--count", "HEAD")
        return int(log.stdout) if log.returncode == 0 else 0


def write_python(path: Path, name: str) -> None:
    """Write an interpreter that says its name and goes on as the one that runs these tests."""
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "python: {name}"\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path):
    """A repository in a path with spaces, with nothing committed; no exported folder may be left behind."""
    repository = Repository(tmp_path / "a path with spaces", tmp_path)
    yield repository
    assert list(repository.exports.iterdir()) == []


def assert_refused(commit: subprocess.CompletedProcess) -> None:
    """The commit was refused because its test fails, and the output shows which."""
    assert commit.returncode != 0, commit.stdout
    assert "assert (6 * 7) == 41" in commit.stdout
    assert "Commit refused: test.py fails on what is staged" in commit.stdout


def assert_accepted(commit: subprocess.CompletedProcess) -> None:
    """The commit was made after its tests passed."""
    assert commit.returncode == 0, commit.stdout
    assert "1 passed" in commit.stdout


def test_failing_test_blocks(repository):
    repository.stage(test=FAILS)
    assert_refused(repository.run("commit", "-m", "broken"))
    assert repository.commits() == 0


def test_passing_test_lets_through(repository):
    repository.stage(test=PASSES)
    assert_accepted(repository.run("commit", "-m", "sound"))
    assert repository.commits() == 1


@pytest.mark.parametrize("test", ["", "import missing_module\n", None], ids=["empty", "no import", "no file"])
def test_commit_without_a_test_that_runs_is_blocked(repository, test):
    repository.stage(other="") if test is None else repository.stage(test=test)
    commit = repository.run("commit", "-m", "untested")
    assert commit.returncode != 0
    assert "Commit refused" in commit.stdout


def test_no_verify_is_the_way_out(repository):
    repository.stage(test=FAILS)
    repository.git("commit", "--no-verify", "-m", "broken")
    assert repository.commits() == 1


def test_other_branch_is_not_tested(repository):
    repository.git("switch", "--quiet", "--create", "maintenance")
    repository.stage(test=FAILS)
    commit = repository.run("commit", "-m", "broken")
    assert commit.returncode == 0
    assert "python:" not in commit.stdout


def test_detached_head_is_not_tested(repository):
    repository.stage(test=PASSES)
    repository.git("commit", "-m", "sound")
    repository.git("switch", "--quiet", "--detach")
    repository.stage(test=FAILS)
    assert repository.run("commit", "-m", "broken").returncode == 0


@pytest.mark.parametrize("test", [PASSES, FAILS], ids=["passes", "fails"])
def test_from_a_subfolder(repository, test):
    subfolder = repository.top / "data" / "raw"
    subfolder.mkdir(parents=True)
    repository.stage(test=test)
    commit = repository.run("commit", "-m", "from below", cwd=subfolder)
    assert_accepted(commit) if test is PASSES else assert_refused(commit)


@pytest.mark.parametrize("test", [PASSES, FAILS], ids=["passes", "fails"])
def test_in_a_linked_worktree(repository, test, tmp_path):
    repository.stage(test=PASSES)
    repository.git("commit", "-m", "sound")
    repository.git("switch", "--quiet", "--create", "maintenance")
    write_python(repository.top / ".venv" / "bin" / "python", "of the main work tree")
    worktree = tmp_path / "linked work tree"
    repository.git("worktree", "add", str(worktree), "main")
    (worktree / "test.py").write_text(f"# changed\n{test}")
    commit = repository.run("commit", "--all", "-m", "from a worktree", cwd=worktree)
    assert_accepted(commit) if test is PASSES else assert_refused(commit)
    assert "python: of the main work tree" in commit.stdout


def test_project_environment_is_used(repository):
    write_python(repository.top / ".venv" / "bin" / "python", "of the project")
    repository.stage(test=PASSES)
    commit = repository.run("commit", "-m", "sound")
    assert_accepted(commit)
    assert "python: of the project" in commit.stdout
    assert "python: path" not in commit.stdout


def test_environment_of_a_linked_worktree_comes_first(repository, tmp_path):
    write_python(repository.top / ".venv" / "bin" / "python", "of the main work tree")
    repository.stage(test=PASSES)
    repository.git("commit", "-m", "sound")
    repository.git("switch", "--quiet", "--create", "maintenance")
    worktree = tmp_path / "linked"
    repository.git("worktree", "add", str(worktree), "main")
    write_python(worktree / ".venv" / "bin" / "python", "of the linked work tree")
    commit = repository.run("commit", "--allow-empty", "-m", "from a worktree", cwd=worktree)
    assert_accepted(commit)
    assert "python: of the linked work tree" in commit.stdout


def test_without_environment_python_of_the_path_is_used(repository):
    repository.stage(test=PASSES)
    commit = repository.run("commit", "-m", "sound")
    assert_accepted(commit)
    assert "python: path" in commit.stdout


def test_missing_pytest_says_what_to_do(repository):
    python = repository.top / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "$@"\n')
    python.chmod(0o755)
    repository.stage(test=PASSES)
    commit = repository.run("commit", "-m", "sound")
    assert commit.returncode != 0
    assert "has no pytest; install requirements.txt" in commit.stdout


def test_unstaged_fix_does_not_save_a_broken_commit(repository):
    repository.stage(test=FAILS)
    (repository.top / "test.py").write_text(PASSES)
    assert_refused(repository.run("commit", "-m", "broken"))


def test_untracked_file_does_not_save_a_broken_commit(repository):
    repository.stage(test="import answer\n" + PASSES)
    (repository.top / "answer.py").write_text("")
    commit = repository.run("commit", "-m", "broken")
    assert commit.returncode != 0
    assert "No module named 'answer'" in commit.stdout


def test_unstaged_break_does_not_block_a_sound_commit(repository):
    repository.stage(test=PASSES)
    (repository.top / "test.py").write_text(FAILS)
    assert_accepted(repository.run("commit", "-m", "sound"))


def test_work_tree_and_index_are_not_touched(repository):
    repository.stage(test=FAILS)
    (repository.top / "test.py").write_text(PASSES)
    (repository.top / "notes.txt").write_text("untracked")

    def state():
        files = {
            path.relative_to(repository.top): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in repository.top.rglob("*")
            if path.is_file() and ".git" not in path.parts
        }
        return files, repository.git("ls-files", "--stage")

    before = state()
    repository.run("commit", "-m", "broken")
    assert state() == before


def test_partial_commit_is_tested_as_it_will_be(repository):
    repository.stage(test="import answer\n" + PASSES, answer="")
    repository.git("commit", "-m", "sound")
    repository.stage(test="import answer\nassert answer.ANSWER == 42\n" + PASSES, answer="ANSWER = 42\n")
    commit = repository.run("commit", "-m", "only a part", "--", "test.py")
    assert commit.returncode != 0
    assert "has no attribute 'ANSWER'" in commit.stdout
    assert_accepted(repository.run("commit", "-m", "both parts", "--", "test.py", "answer.py"))


def test_git_in_a_test_does_not_act_on_the_repository(repository):
    """Git gives a hook GIT_DIR or GIT_INDEX_FILE; tests of a program that uses git must not inherit them."""
    repository.stage(
        test="import os, subprocess\n"
        "def test_git():\n"
        "    assert not {'GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE', 'GIT_PREFIX'} & set(os.environ)\n"
        "    subprocess.run(['git', 'init', '--quiet'], check=True)\n"
        "    subprocess.run(['git', 'add', 'test.py'], check=True)\n"
        "    names = subprocess.run(['git', 'ls-files'], check=True, capture_output=True, text=True).stdout\n"
        "    assert names == 'test.py\\n'\n"
    )
    tracked = repository.git("ls-files")
    assert_accepted(repository.run("commit", "--all", "-m", "sound"))
    assert repository.git("ls-files") == tracked


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupted_hook_refuses_and_leaves_no_folder(repository, signal):
    """The signal comes while the test runs, from the test itself; the fixture checks the folder."""
    repository.stage(test=f"import os, signal\ndef test_answer():\n    os.kill(os.getppid(), signal.{signal})\n")
    assert repository.run("commit", "-m", "interrupted").returncode != 0
    assert repository.commits() == 0


@pytest.mark.parametrize("test", [PASSES, FAILS], ids=["passes", "fails"])
def test_merge_into_main_is_tested(repository, test):
    repository.stage(test=PASSES)
    repository.git("commit", "-m", "sound")
    repository.git("switch", "--quiet", "--create", "feature")
    repository.stage(test=f"# changed\n{test}")
    repository.git("commit", "-m", "feature")
    repository.git("switch", "--quiet", "main")
    merge = repository.run("merge", "--no-ff", "-m", "merged", "feature")
    assert_accepted(merge) if test is PASSES else assert_refused(merge)
