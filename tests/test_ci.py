"""What CI leaves out: pages alone, slow tests. It may leave out what it can tell, and nothing else."""

import ast
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from tests.conftest import is_left_out
from verify import ROOT

RUN, CHANGED = ROOT / ".ci" / "run", ROOT / ".ci" / "changed"
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")


@pytest.fixture
def repository(tmp_path):
    """A branch of three commits, of which origin/main has one."""

    def git(*arguments):
        return subprocess.run([*GIT, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    for name in ("first", "code.py", "README.md"):
        (tmp_path / name).write_text(name)
        git("add", name)
        git("commit", "-q", "-m", name)
    git("update-ref", "refs/remotes/origin/main", "HEAD~2")
    return SimpleNamespace(folder=tmp_path, git=git)


def changed(folder, **environment):
    own = {name: value for name, value in os.environ.items() if name != "CI_BASE" and not name.startswith("GIT_")}
    done = subprocess.run([CHANGED], cwd=folder, env=own | environment, check=True, capture_output=True, text=True)
    return done.stdout.split()


def test_all_commits_of_a_branch_count_and_what_is_not_committed(repository):
    assert changed(repository.folder) == ["README.md", "code.py"]
    (repository.folder / "new.py").write_text("")
    (repository.folder / "first").write_text("another")
    assert changed(repository.folder) == ["README.md", "code.py", "first", "new.py"]


def test_on_main_it_is_everything_or_what_ci_says_was_there_before(repository):
    repository.git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert changed(repository.folder) == ["*"]
    assert changed(repository.folder, CI_BASE="HEAD~2") == ["README.md", "code.py"]


@pytest.mark.parametrize("why", ["no such commit", "the first commit", "no repository", "nothing changed", "a shallow clone"])
def test_what_cannot_be_told_is_everything(repository, tmp_path_factory, why):
    folder, environment = repository.folder, {}
    if why == "no such commit":
        environment["CI_BASE"] = "0" * 40
    elif why == "the first commit":
        repository.git("checkout", "-q", "--detach", "HEAD~2")
    elif why == "nothing changed":
        repository.git("commit", "-q", "--allow-empty", "-m", "empty")
        environment["CI_BASE"] = "HEAD~1"
    else:
        folder = tmp_path_factory.mktemp("other")
        if why == "a shallow clone":
            repository.git("clone", "-q", "--depth", "1", f"file://{repository.folder}", str(folder / "clone"))
            folder = folder / "clone"
    assert changed(folder, GIT_CEILING_DIRECTORIES=str(folder.parent), **environment) == ["*"]


PAGES = re.search(r"^PAGES='(.*)'", RUN.read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md", "docs/gate.md", "docs/upstream/mlx_vlm.md"])
def test_pages(path):
    assert re.search(PAGES, path)


@pytest.mark.parametrize(
    "path", ["*", "glm_dsa/rope.py", "docs/upstream/mlx_lm_groups.py", "reference/trained/interleaved/README.md", "docs/blocks.py",
             "verify/records/judged.jsonl", "tests/field/README.md", "constraints.txt", "Makefile", ".ci/run"]
)  # fmt: skip
def test_what_is_no_page(path):
    assert not re.search(PAGES, path)


# -- slow tests


def item(*subjects):
    mark = SimpleNamespace(args=subjects) if subjects else None
    config = SimpleNamespace(rootpath=ROOT)
    return SimpleNamespace(path=ROOT / "tests" / "test_x.py", config=config, get_closest_marker=lambda _: mark)


def test_a_slow_test_runs_where_its_subject_changed():
    assert is_left_out(item("verify/drift"), ["glm_dsa/rope.py"])
    for path in ("verify/drift/session.py", "tests/test_x.py", "*"):
        assert not is_left_out(item("verify/drift"), ["glm_dsa/rope.py", path])
    assert not is_left_out(item(), ["glm_dsa/rope.py"])


def marks():
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.slow":
                yield file.name, [ast.literal_eval(argument) for argument in node.args]


def test_every_slow_test_has_subjects_and_they_are_there():
    found = list(marks())
    assert len(found) > 10
    for file, subjects in found:
        assert subjects, file
        assert not [s for s in subjects if not list(ROOT.glob(f"{s}*"))], file


# -- the run itself, with another make and python in the place of its own

STUB = '#!/bin/sh\necho "did $*"\ncase "$*" in *"$FAILS"*) exit 3;; esac\n'


@pytest.fixture
def ci(repository):
    """run(what fails, what a commit touches) -> (exit status, output)."""
    folder = repository.folder
    (folder / ".ci").mkdir()
    for file in (RUN, CHANGED):
        shutil.copy(file, folder / ".ci")
    for stub in ("bin/make", ".venv/bin/python"):
        (folder / stub).parent.mkdir(parents=True)
        (folder / stub).write_text(STUB)
        (folder / stub).chmod(0o755)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_pages.py").write_text('ROOT / "README.md"\n')
    (folder / "tests" / "test_others.py").write_text("hypothesis.settings(max_examples=3)\n")
    repository.git("add", "-A")
    repository.git("commit", "-q", "-m", "ci")
    repository.git("update-ref", "refs/remotes/origin/main", "HEAD")

    def run(fails, path):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("changed")
        repository.git("add", "-A")
        repository.git("commit", "-q", "-m", path)
        own = {name: value for name, value in os.environ.items() if name != "CI_BASE" and not name.startswith("GIT_")}
        own |= {"PATH": f"{folder / 'bin'}:{own['PATH']}", "FAILS": fails}
        done = subprocess.run([folder / ".ci" / "run"], env=own, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


STEPS = [
    "--silent .venv/.ready", "--silent lint", "-m pytest verify/", "-m verify judge --changed",
    "-m tests.carried --drift --changed", "-m pytest tests/",
]  # fmt: skip


def test_all_of_it_runs_and_is_shown(ci):
    status, out = ci("nothing", "glm_dsa/rope.py")
    assert status == 0, out
    assert [step for step in STEPS if f"did {step}" not in out] == [], out
    assert out.strip().splitlines()[-1].startswith("== passed")


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_fails_the_run_and_the_others_are_shown(ci, step):
    status, out = ci(step, "glm_dsa/rope.py")
    assert status == 1, out
    assert "FAILED, exit status 3" in out
    assert out.strip().splitlines()[-1].startswith("== FAILED")
    assert (out.count("\ndid ") == len(STEPS)) == (step != STEPS[0]), "without an environment nothing else runs"


def test_a_change_of_pages_is_linted_and_its_pages_are_tested(ci):
    status, out = ci("nothing", "docs/gate.md")
    assert status == 0, out
    assert "tests/test_pages.py" in out
    assert "tests/test_others.py" not in out
    assert "pytest verify/" not in out
    assert ci("tests/test_pages.py", "README.md")[0] == 1
