"""Records name the measured code, however it was changed, hidden or started."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from itertools import combinations, count, product
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colt5_bench.commands import DONE, UNMEASURED, USAGE
from colt5_bench.records import provenance
from colt5_bench.records.parts import differences, merge
from colt5_bench.records.provenance import Code, Origin
from colt5_bench.records.results import load
from colt5_bench.request import NO_REPORT, REPORT
from colt5_bench.selection import SelectionError
from tests.attempts import first_good
from tests.colt5_bench.repository import commit, git

ROOT = Path(__file__).parents[3]
TOY = Path(__file__).parents[1] / "toy.py"

FILES = {
    "suites/toy.py": "print('measured')\n",
    "suites/two\nlines é.py": "print('beside it')\n",
    "notes.txt": "one\ntwo\n",
    "README.md": "one\n",
    "kernels/README.md": "one\n",
    "docs/hooks.py": "print('one')\n",
    ".gitignore": "ignored*\n",
}

CHANGES = {
    "edited": lambda root: (root / "notes.txt").write_text("one\n2\n"),
    "edited elsewhere": lambda root: (root / "suites" / "two\nlines é.py").write_text("one\n2\n"),
    "of equal length": lambda root: (root / "notes.txt").write_text("one\nTWO\n"),
    "staged": lambda root: [(root / "notes.txt").write_text("staged"), git(root, "add", ".")],
    "staged and edited": lambda root: [CHANGES["staged"](root), write(root / "notes.txt", "staged and edited")],
    "emptied": lambda root: (root / "notes.txt").write_text(""),
    "deleted": lambda root: (root / "notes.txt").unlink(),
    "a link": lambda root: [(root / "notes.txt").unlink(), (root / "notes.txt").symlink_to("suites")],
    "a directory": lambda root: [(root / "notes.txt").unlink(), write(root / "notes.txt" / "more.py", "")],
    "renamed": lambda root: git(root, "mv", "notes.txt", "renamed.txt"),
    "new": lambda root: write(root / "new.py", "new"),
    "new and empty": lambda root: write(root / "new.py", ""),
    "new below": lambda root: write(root / "kernels" / "deep" / "new.py", "new"),
    "new and staged": lambda root: [write(root / "other.py", "new"), git(root, "add", ".")],
    "a new link": lambda root: (root / "new.py").symlink_to("notes.txt"),
    "a new link elsewhere": lambda root: (root / "new.py").symlink_to("suites/toy.py"),
    "hidden from git": lambda root: [
        git(root, "update-index", "--assume-unchanged", "notes.txt"),
        write(root / "notes.txt", "hidden"),
    ],
    "results and code": lambda root: [save_results(root / "kernels"), write(root / "kernels" / "run.py", "")],
    "no results": lambda root: write(root / "out" / "data.jsonl", '{"kind": "data"}\n'),
    "as a document elsewhere": lambda root: write(root / "kernels" / "docs" / "new.py", "new"),
    "under a name like that of a document": lambda root: write(root / "new.md.py", "new"),
    "a file in place of the documents": lambda root: [shutil.rmtree(root / "docs"), write(root / "docs", "")],
    "a repository": lambda root: commit(Path(write(root / "inner" / "a.py", "")).parent),
    "a changed repository": lambda root: [CHANGES["a repository"](root), write(root / "inner" / "a.py", "changed")],
}
"""Differences from the committed state, by kind."""

NO_CHANGES = {
    "nothing": lambda root: None,
    "touched": lambda root: os.utime(root / "notes.txt", (0, 0)),
    "written again": lambda root: write(root / "notes.txt", FILES["notes.txt"]),
    "edited and back": lambda root: [CHANGES["staged"](root), write(root / "notes.txt", FILES["notes.txt"])],
    "permissions": lambda root: (root / "notes.txt").chmod(0o755),
    "line ends": lambda root: (root / "notes.txt").write_bytes(b"one\r\ntwo\r\n"),
    "ignored": lambda root: write(root / "suites" / "ignored.py", "new"),
    "results": lambda root: save_results(root / "out"),
    "results that begin": lambda root: write(root / "out" / "toy.jsonl", ""),
    "an empty directory": lambda root: (root / "new").mkdir(),
    "a document": lambda root: write(root / "README.md", "two\n"),
    "a document beside code": lambda root: write(root / "kernels" / "README.md", "two\n"),
    "a new document": lambda root: write(root / "suites" / "new.md", "new"),
    "no document": lambda root: (root / "kernels" / "README.md").unlink(),
    "staged documents": lambda root: [
        NO_CHANGES["a document"](root),
        NO_CHANGES["a new document"](root),
        git(root, "add", "."),
    ],
    "code of documents": lambda root: write(root / "docs" / "hooks.py", "print('two')\n"),
    "all documents": lambda root: shutil.rmtree(root / "docs"),
}

SETTINGS = {
    "diff.external": "false",
    "core.autocrlf": "true",
    "core.fileMode": "false",
    "core.quotePath": "true",
    "core.symlinks": "false",
    "color.ui": "always",
    "diff.noprefix": "true",
    "diff.renames": "copies",
    "status.showUntrackedFiles": "no",
    "status.relativePaths": "false",
    "core.fsmonitor": "false",
    "core.pager": "false",
    "diff.default.textconv": "true",
    "core.abbrev": "4",
}

ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def save_results(directory):
    write(directory / "toy.jsonl", '{"kind": "environment", "key": "1"}\n')
    for name in ("report.html", "plot.png", "plot.svg"):
        write(directory / name, directory.name)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes equal repositories, each in another directory. None of their packages has been imported yet."""
    numbers = count()
    for name in provenance.PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def made(kind="nothing"):
        root = tmp_path / f"repository-{next(numbers)}"
        for name, text in FILES.items():
            write(root / name, text)
        git(root.parent, "init", "--quiet", "--initial-branch=main", str(root))
        git(root, "add", ".")
        dated = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in dated.items():
                patch.setenv(name, value)
            git(root, "commit", "--quiet", "--message=one")
            ({**CHANGES, **NO_CHANGES}[kind])(root)
        return root

    return made


def described(root):
    return Code.of(root / "suites" / "toy.py").described


class TestChanges:
    @pytest.mark.parametrize("kind", NO_CHANGES)
    def test_of_no_code_are_none(self, made, kind):
        root = made(kind)
        assert described(root) == {"revision": git(root, "rev-parse", "HEAD").strip(), "dirty": False}

    @pytest.mark.parametrize("kind", CHANGES)
    def test_are_equal_wherever_they_are_made(self, made, kind):
        one, other = described(made(kind)), described(made(kind))
        assert one == other
        assert isinstance(one["dirty"], str)
        assert len(one["dirty"]) == 16

    def test_that_differ_have_different_names(self, made):
        names = {kind: provenance.named(described(made(kind))) for kind in CHANGES}
        assert [pair for pair in combinations(names, 2) if names[pair[0]] == names[pair[1]]] == []

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_are_the_same_whatever_is_set(self, made, setting):
        for kind in ("edited", "new", "line ends", "a link", "permissions"):
            root = made(kind)
            before = described(root)
            git(root, "config", setting, SETTINGS[setting])
            assert described(root) == before, kind

    def test_of_line_ends_by_git_are_none(self, made, tmp_path):
        clone = tmp_path / "clone"
        git(tmp_path, "clone", "--quiet", "-c", "core.autocrlf=true", str(made()), str(clone))
        assert b"\r\n" in (clone / "notes.txt").read_bytes()
        assert described(clone) == described(made())

    @pytest.mark.parametrize(
        "variables", [{"LC_ALL": "C"}, {"LANG": "de_DE.UTF-8", "LANGUAGE": "de"}, {"TZ": "Asia/Tokyo"}]
    )
    def test_are_the_same_in_any_locale(self, made, monkeypatch, variables):
        root = made("new")
        before = described(root)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert described(root) == before

    @given(
        st.lists(
            st.dictionaries(st.sampled_from(["notes.txt", "b.py", "c/d.py"]), st.text("ab\n", max_size=3)), max_size=6
        )
    )
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_are_equal_if_and_only_if_files_are(self, made, states):
        seen = {}
        root = made()
        for state in [{}, *states]:
            git(root, "clean", "--quiet", "--force", "-d")
            git(root, "checkout", "--quiet", ".")
            for name, text in state.items():
                write(root / name, text)
            whole = json.dumps({"notes.txt": FILES["notes.txt"], **state}, sort_keys=True)
            assert seen.setdefault(whole, described(root)) == described(root)
        assert len({str(each) for each in seen.values()}) == len(seen)

    @pytest.mark.alone
    def test_of_this_checkout_are_found_soon(self):
        def seconds():
            begun = perf_counter()
            Code.of(ROOT / "suites" / "__init__.py")
            return perf_counter() - begun

        assert first_good(seconds, lambda taken: taken < 0.3) < 0.3


class TestNamesOfChangedFiles:
    @pytest.fixture
    def named(self, made):
        """The names of files that a change touches, of those that count."""

        def named(change):
            root = made()
            suite = root / "suites" / "toy.py"
            before = Origin.of(suite)
            change(root)
            return Origin.of(suite).changed_files(before)["git"]

        return named

    @pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ""), (4, " and 1 more"), (9, " and 6 more")])
    def test_are_a_few(self, named, count, more):
        first = ", ".join(f"kernels/{number}.py" for number in range(min(count, 3)))
        files = [f"kernels/{number}.py" for number in range(count)]
        assert named(lambda root: [write(root / name, "new") for name in files]) == first + more

    @pytest.mark.parametrize("kind", NO_CHANGES)
    def test_are_none_if_nothing_changed(self, named, kind):
        assert named(NO_CHANGES[kind]) == ""

    def test_include_deleted_and_committed_files(self, named):
        assert named(CHANGES["deleted"]) == "notes.txt"
        committed = named(lambda root: [CHANGES["edited"](root), git(root, "commit", "--quiet", "-a", "-m", "two")])
        assert committed == "notes.txt"

    def test_are_in_one_line(self, named):
        assert named(CHANGES["edited elsewhere"]) == r"suites/two\nlines é.py"

    def test_are_unknown_without_a_revision(self, named):
        assert named(lambda root: shutil.rmtree(root / ".git")) == ""


@pytest.mark.parametrize("value", [".git", "", "suites", "nowhere"])
@pytest.mark.parametrize("variable", ELSEWHERE)
def test_the_environment_leads_to_no_other_repository(made, monkeypatch, variable, value):
    root, other = made("edited"), made("new")
    before = described(root)
    monkeypatch.setenv(variable, str(other / value))
    assert described(root) == before


def test_a_ceiling_hides_no_repository(made, monkeypatch):
    root = made()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", f"{root}:{root.parent}")
    assert "revision" in described(root)


def of_another_owner(root, patch):
    """The way in which git itself tests it: a real other owner would need root."""
    real = shutil.which("git")
    program = write(root.parent / "bin" / "git", f'#!/bin/sh\nGIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec {real} "$@"\n')
    program.chmod(0o755)
    patch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def without_git(root, patch):
    patch.setenv("PATH", str(root.parent / "nothing"))


def that_hangs(root, patch):
    program = write(root.parent / "bin" / "git", "#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    patch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    patch.setattr(provenance, "LONGEST_SECONDS", 0.1)


def without_commit(root, patch):
    shutil.rmtree(root / ".git")
    git(root, "init", "--quiet")


def ignoring_its_files(root, patch):
    git(root, "rm", "-r", "--quiet", "--cached", "suites")
    write(root / ".gitignore", "suites\n")
    git(root, "commit", "--quiet", "--all", "--message=two")


UNKNOWN = {
    "another owner": (of_another_owner, "does not trust", "git config --global --add safe.directory {root}"),
    "no git": (without_git, "cannot be started", "Install git"),
    "a git that hangs": (that_hangs, "does not answer", "git status"),
    "an export": (lambda root, patch: shutil.rmtree(root / ".git"), "not in a git repository", "Measure in a clone"),
    "no commit": (without_commit, "has no commit", "Commit"),
    "a worktree without its repository": (
        lambda root, patch: [shutil.rmtree(root / ".git"), write(root / ".git", "gitdir: /nowhere\n")],
        "not in a git repository",
        "Measure in a clone",
    ),
    "broken": (lambda root, patch: write(root / ".git" / "config", "["), "cannot read", "bad config"),
    "a bare repository": (lambda root, patch: git(root, "config", "core.bare", "true"), "cannot read", "work tree"),
    "an ignored copy": (ignoring_its_files, "git ignores", "in a clone"),
}
"""Kinds of checkout: how they are made, the recorded reason, and the advice."""


class TestUnknown:
    @pytest.mark.parametrize("kind", UNKNOWN)
    def test_says_why_and_what_to_do(self, made, monkeypatch, kind):
        prepare, reason, advice = UNKNOWN[kind]
        root = made()
        prepare(root, monkeypatch)
        origin = Origin.of(root / "suites" / "toy.py")
        assert list(origin.described["git"]) == ["unknown"]
        assert reason in origin.described["git"]["unknown"]
        assert str(root) not in json.dumps(origin.described)
        note = next(iter(origin.notes()))
        assert note.startswith(f"warning: the revision of {root} is unknown: ")
        assert advice.format(root=root) in note
        assert "\n" not in note

    @pytest.mark.parametrize("package", ["kernels", "reference"])
    @pytest.mark.parametrize("kind", ["nothing", "edited"])
    def test_is_that_of_code_of_two_checkouts(self, made, monkeypatch, package, kind):
        root, other = made(), made(kind)
        module = type(sys)(package)
        monkeypatch.setitem(sys.modules, package, module)
        module.__file__ = str(write(root / package / "__init__.py", ""))
        assert "revision" in Origin.of(root / "suites" / "toy.py").described["git"]
        module.__file__ = str(write(other / package / "__init__.py", ""))
        assert Origin.of(root / "suites" / "toy.py").described["git"] == {
            "unknown": f"{package} was imported from another place than the checkout of the suite"
        }


CODES = [
    {"revision": "abc", "dirty": False},
    {"revision": "abc", "dirty": "0123"},
    {"revision": "abc", "dirty": "4567"},
    {"revision": "def", "dirty": False},
    {"revision": "abc", "dirty": True},
    {"unknown": "it is not in a git repository"},
    {"unknown": "the code changed while it was measured", "began": {"revision": "abc", "dirty": False}, "ended": None},
    None,
]
CERTAIN = CODES[:4]


@pytest.mark.parametrize("one", CODES, ids=str)
@pytest.mark.parametrize("other", CODES, ids=str)
def test_only_what_is_known_and_equal_is_the_same_code(one, other):
    same = one == other and one in CERTAIN
    assert (not differences({"git": one}, {"git": other})) is same
    clean = {"git": CODES[0]}
    same = one == other and (one in CERTAIN or one is None)
    assert (not differences({**clean, "harness": one}, {**clean, "harness": other})) is same


INSTALLED = """\
#!{python}
import sys
from colt5_bench.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""

CONTROL = """
import os
with open(os.environ["SEEN"], "a") as seen:
    import colt5_bench.measuring.isolation
    print(colt5_bench.measuring.isolation.__file__, file=seen)


def changing(scores):
    with open(os.path.join(os.path.dirname(__file__), "..", "kernels", "new.py"), "a") as file:
        file.write("#")
    return 2 * scores


def documenting(scores):
    root = os.path.join(os.path.dirname(__file__), "..")
    os.makedirs(os.path.join(root, "docs"), exist_ok=True)
    for name in ("README.md", os.path.join("docs", "new.py")):
        with open(os.path.join(root, name), "a") as file:
            file.write("#")
    return 2 * scores



"""


WAYS = {
    "bench.py": ("python", "bench.py"),
    "-m": ("python", "-m", "colt5_bench"),
    "colt5-bench": ("colt5-bench",),
    "-P": ("python", "-P", "bench.py"),
    "-I": ("python", "-I", "bench.py"),
    "bench.py of the other": ("python", "../installed/bench.py"),
}
OWN_HARNESS = ("bench.py", "-m")
"""Ways to start, and those in which the checkout measures itself."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two checkouts, one of which is installed, as by `pip install --editable`."""
    parent = tmp_path_factory.mktemp("places")
    for name in ("installed", "here"):
        root = parent / name
        shutil.copytree(ROOT / "colt5_bench", root / "colt5_bench", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "bench.py", root)
        for package in ("reference", "kernels", "suites"):
            write(root / package / "__init__.py", f"# {name}\n")
        before, suite, after = TOY.read_text().rpartition("\n\nSUITE = ")
        # Its times are not needed, and take long to measure and to draw.
        after = after.replace("suite(", "suite(timed=False, ", 1)
        write(root / "suites" / "toy.py", f"{before}{CONTROL}{suite}{after}")
        write(root / ".gitignore", "__pycache__/\n")
        commit(root)
    venv.create(parent / "venv", symlinks=True)
    (packages,) = (parent / "venv" / "lib").glob("python*/site-packages")
    paths = [str(parent / "installed"), sysconfig.get_paths()["purelib"]]
    write(packages / "installed.pth", "\n".join(paths))
    python = parent / "venv" / "bin" / "python"
    write(parent / "venv" / "bin" / "colt5-bench", INSTALLED.format(python=python)).chmod(0o755)
    return parent


class TestStarting:
    @pytest.fixture
    def start(self, places, tmp_path):
        def start(way, *arguments, toy="good", place="here"):
            program, *rest = WAYS[way]
            variables = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("PYTEST_", "PYTHON", "GIT_", "TRITON_"))
            }
            return subprocess.run(
                [places / "venv" / "bin" / program, *rest, *arguments],
                cwd=places / place,
                env={**variables, "TOY": toy, "SEEN": str(tmp_path / "seen"), REPORT: NO_REPORT},
                capture_output=True,
                text=True,
                check=False,
                timeout=240,
            )

        yield start
        for name in ("here", "installed"):
            if (places / name / ".git").exists():
                git(places / name, "clean", "--quiet", "--force", "-d")
                git(places / name, "checkout", "--quiet", ".")

    def of(self, root):
        return Code.of(root / "suites" / "__init__.py").described

    @pytest.mark.parametrize(
        ("way", "situation"),
        # A situation does not depend on the way to start, but on the owner of the harness.
        [*((way, "changed") for way in WAYS), *product(("bench.py", "-I"), ("clean", "an export"))],
    )
    def test_in_any_way_names_the_revision_of_what_is_measured(self, places, start, request, way, situation):
        here, installed = places / "here", places / "installed"
        if situation == "changed":
            write(here / "kernels" / "__init__.py", f"# {way}")
            write(installed / "colt5_bench" / "new.py", f"# {way}")
        if situation == "an export":
            (here / ".git").rename(places / "kept")
            request.addfinalizer(lambda: (places / "kept").rename(here / ".git"))
        shown = start(way, "env", "--device", "cpu", "--json")
        assert shown.returncode == DONE, shown.stderr
        told = json.loads(shown.stdout)
        assert told["git"] == self.of(here)
        assert ("unknown" in told["git"]) is (situation == "an export")
        assert told["harness"] == (None if way in OWN_HARNESS else self.of(installed))
        assert shown.stderr.count("warning: the harness of ") == (way not in OWN_HARNESS)
        assert shown.stderr.count(f"the revision of {here} is unknown") == (situation == "an export")

    @pytest.mark.parametrize("way", ["bench.py", "colt5-bench", "-I"])
    def test_measures_with_the_harness_that_is_recorded(self, places, start, tmp_path, way):
        """In the process of the run, which imports the suite too, and in separate processes."""
        options = ("--suite", "toy", "--preset", "smoke", "--device", "cpu", "--quiet", "--out", str(tmp_path / "out"))
        run = start(way, *options, "--isolate")
        assert run.returncode == DONE, run.stderr
        (environment,) = load(tmp_path / "out").environments.values()
        harness = places / ("here" if way in OWN_HARNESS else "installed")
        assert environment["git"] == self.of(places / "here")
        assert environment["harness"] == (None if way in OWN_HARNESS else self.of(harness))
        seen = set((tmp_path / "seen").read_text().split())
        assert seen == {str(harness / "colt5_bench" / "measuring" / "isolation.py")}
        assert run.stderr.count("warning: the harness of ") == (way not in OWN_HARNESS)

    def test_code_that_changes_under_a_run_is_said_and_marked(self, places, start, tmp_path):
        options = ("--suite", "toy", "--preset", "smoke", "--device", "cpu", "--out", "out")
        before = self.of(places / "here")
        run = start("bench.py", *options, toy="good,changing")
        assert run.returncode == UNMEASURED
        after = self.of(places / "here")
        said = f"from {provenance.named(before)} to {provenance.named(after)}"
        assert f"toy: the code changed while it was measured: {said}, in kernels/new.py: " in run.stderr
        out = places / "here" / "out"
        (environment,) = load(out).environments.values()
        assert environment["git"]["began"] == before
        assert environment["git"]["ended"] == after
        assert environment["git"]["files"] == "kernels/new.py"
        assert environment["ceilings"]
        resumed = start("bench.py", *options, "--resume", toy="good,changing")
        assert resumed.returncode == USAGE
        assert "cannot be completed, because" in resumed.stderr

    def test_documents_that_change_under_a_run_are_no_change(self, places, start):
        here, options = places / "here", ("--suite", "toy", "--preset", "smoke", "--device", "cpu", "--out", "out")
        before = self.of(here)
        run = start("bench.py", *options, toy="good,documenting")
        assert run.returncode == DONE, run.stderr
        assert "##" in (here / "README.md").read_text()
        assert self.of(here) == before
        assert start("bench.py", *options, "--resume", toy="good,documenting").returncode == DONE

    def test_shards_and_completed_runs_are_of_one_code(self, places, start, tmp_path):
        here = places / "here"
        options = ("--suite", "toy", "--device", "cpu", "--quiet")
        write(here / "kernels" / "__init__.py", "# one change")
        # Results are not changes, even within the checkout.
        assert start("bench.py", *options, "--shard", "1/2", "--out", "1").returncode == DONE
        assert start("bench.py", *options, "--shard", "2/2", "--out", "2").returncode == DONE
        assert start("bench.py", *options, "--shard", "1/2", "--out", "1", "--resume").returncode == DONE
        assert len(merge([here / "1", here / "2"], tmp_path / "merged.jsonl").records) == 8
        write(here / "kernels" / "__init__.py", "# another one")
        refused = start("bench.py", *options, "--shard", "1/2", "--out", "1", "--resume")
        assert refused.returncode == USAGE
        assert "git.dirty" in refused.stderr
        assert start("bench.py", *options, "--shard", "2/2", "--out", "3").returncode == DONE
        with pytest.raises(SelectionError, match=r"git\.dirty"):
            merge([here / "1", here / "3"], tmp_path / "other.jsonl")
