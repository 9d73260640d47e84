"""The workflow that comments on a pull request, tested with a fake GitHub."""

import json
import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml

WORKFLOWS = Path(__file__).parent.parent / ".github" / "workflows"
COMMENT = yaml.safe_load((WORKFLOWS / "comment.yml").read_text())

GH = """\
#!/usr/bin/env bash
# `gh api`: answers from a folder, by the last part of the path; writes what it is asked to change.
set -eu
method=GET path= filter=. body=
shift
while [ $# -gt 0 ]; do
  case $1 in
    --method) method=$2; shift ;;
    --jq) filter=$2; shift ;;
    -F) body=${2#body=@}; shift ;;
    -f) shift ;;
    --paginate) ;;
    *) path=$1 ;;
  esac
  shift
done
[ "$method" = GET ] && exec jq -r "$filter" "$ANSWERS/${path##*/}.json"
echo "$method $path" >> "$ANSWERS/changes"
cp "$body" "$ANSWERS/body"
"""

MARK = "<!-- verdict of regressions -->"
BOT = "github-actions[bot]"


@pytest.fixture
def comment(tmp_path, monkeypatch):
    """Run the script of the last step with given pull requests and comments; return its changes, and the body."""
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed, which gh has in it: apt-get install jq")
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    step = COMMENT["jobs"]["comment"]["steps"][-1]

    def run(pulls, comments, verdict="### No regression"):
        (tmp_path / "pulls.json").write_text(json.dumps(pulls))
        (tmp_path / "comments.json").write_text(json.dumps(comments))
        (tmp_path / "verdict.md").write_text(verdict)
        values = {"REPOSITORY": "o/r", "BRANCH": "them:b", "REVISION": "abc", "MARK": MARK, "GH_TOKEN": "none"}
        assert set(values) == set(step["env"])
        environment = os.environ | values | {"ANSWERS": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-e", "-c", step["run"]], check=True, cwd=tmp_path, env=environment, timeout=30)
        changes = tmp_path / "changes"
        if not changes.exists():
            return None, None
        return changes.read_text().strip(), (tmp_path / "body").read_text()

    return run


def pull(number, revision):
    return {"number": number, "head": {"sha": revision}}


@pytest.mark.parametrize(
    ("measured", "by_bot", "marked"), [*product((True, False), repeat=3)], ids=lambda value: "yes" if value else "no"
)
def test_the_verdict_is_one_comment_of_the_measured_revision(comment, measured, by_bot, marked):
    """Its own comment is changed; comments of others, or of another workflow, stay."""
    before = {"id": 5, "user": {"login": BOT if by_bot else "them"}, "body": f"{MARK if marked else 'words'}\nold"}
    changes, body = comment([pull(3, "other"), pull(7, "abc" if measured else "newer")], [before])
    if not measured:
        assert changes is None
    else:
        own = by_bot and marked
        assert changes == ("PATCH repos/o/r/issues/comments/5" if own else "POST repos/o/r/issues/7/comments")
        assert body == f"{MARK}\n### No regression"


@pytest.mark.parametrize("letter", ["a", "±", "→", "🡒"])
def test_a_long_verdict_is_cut_between_characters(comment, letter):
    _, body = comment([pull(7, "abc")], [], letter * 70000)
    lines = body.split("\n", 1)
    assert lines[0] == MARK
    assert set(lines[1]) == {letter}
    assert 60000 < len(body.encode()) < 65536


def test_it_follows_the_workflows_that_measure_and_gets_their_verdict():
    measuring = [yaml.safe_load(file.read_text()) for file in sorted(WORKFLOWS.glob("regressions*.yml"))]
    assert sorted(COMMENT[True]["workflow_run"]["workflows"]) == sorted(workflow["name"] for workflow in measuring)
    (downloaded,) = (step["with"] for step in COMMENT["jobs"]["comment"]["steps"] if "download" in step.get("uses", ""))
    for workflow in measuring:
        steps = workflow["jobs"]["check"]["steps"]
        (uploaded,) = (s["with"]["path"] for s in steps if s.get("with", {}).get("name") == downloaded["name"])
        (written,) = (s["run"].partition(" > ")[2] for s in steps if "--format markdown" in s.get("run", ""))
        assert uploaded == written.strip()
        assert Path(uploaded).name in COMMENT["jobs"]["comment"]["steps"][-1]["run"]


def test_it_runs_nothing_of_the_pull_request_and_has_the_standard_token_alone():
    """The name of a branch, which a stranger may choose, reaches the script as a variable."""
    text = (WORKFLOWS / "comment.yml").read_text()
    assert "checkout" not in text
    assert "secrets." not in text
    assert COMMENT["permissions"] == {"actions": "read", "pull-requests": "write"}
    assert all("${{" not in step.get("run", "") for step in COMMENT["jobs"]["comment"]["steps"])
