"""Pages of docs describe what the code has: fields of records, sections that docstrings cite, all exported names."""

import re
import tomllib
from dataclasses import fields
from fnmatch import fnmatch
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
import torch

from colt5_bench.loading import describe_guest
from colt5_bench.measuring.host import HostSeconds
from colt5_bench.measuring.roofline import Ceilings
from colt5_bench.records import environment, provenance
from colt5_bench.records.provenance import Code
from colt5_bench.records.results import SCHEMA_VERSION, Divergence, Record, Timing, load
from colt5_bench.request import Request
from colt5_bench.selection import Guest

ROOT = Path(__file__).parent.parent
RECORDS = (ROOT / "docs" / "records.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()

FOLDERS = ("colt5_bench", "kernels", "reference", "suites", "tests")
CODE = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")) if file != Path(__file__)]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def described(title):
    """The names in the first column of the table below a heading."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", RECORDS, flags=re.DOTALL | re.MULTILINE)[1]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("type_", [Record, Timing, Divergence])
def test_all_fields_of_records_are_described_in_their_order(type_):
    assert described(type_.__name__) == [field.name for field in fields(type_)]


def test_the_schema_is_named():
    assert f"The schema has version {SCHEMA_VERSION}." in RECORDS


@pytest.fixture(scope="module")
def baselines():
    return [load(file) for file in sorted((ROOT / "reports" / "baselines").glob("*.jsonl"))]


def test_all_of_an_environment_is_described(baselines, tmp_path):
    """For the committed lines, with and without a GPU, and for a run now."""
    code = Code.of(Path(__file__)).described
    changed = provenance.changed({"git": code}, {"git": {**code, "dirty": "0"}}, {"git": "kernels/new.py"})["git"]
    code = code | Code.of(tmp_path / "folder" / "file.py").described | changed
    ceilings = {field.name: {"any": 1} if field.name == "products" else 1 for field in fields(Ceilings)}
    now = {
        "key": "",
        **environment.describe(torch.device("cpu")),
        **dict.fromkeys(provenance.FIELDS, code),
        provenance.SUITE_FILE: "",
        provenance.GUESTS: {"mine": describe_guest(Guest.parse(f"mine={__file__}:described"))},
        "options": Request().of_results("any"),
        "expected": 0,
        "ceilings": ceilings,
        "host": {field.name: 1 for field in fields(HostSeconds)},
        "data": "0123456789abcdef",
    }
    lines = [now, {**now, "harness": None}, *(line for run in baselines for line in run.environments.values())]
    found = set(chain.from_iterable(environment.flat(line) for line in lines)) - {"kind"}
    both_ways(described("Environment"), found)


def test_all_facts_of_a_kernel_are_described(baselines):
    kernels = [kernel for run in baselines for record in run.records for kernel in record.kernels]
    both_ways(described("Kernel"), set(chain.from_iterable(environment.flat(kernel) for kernel in kernels)))


def both_ways(names, found):
    """Each name is found and each found name is described, by itself or by a pattern."""
    assert not [name for name in found if not any(fnmatch(name, pattern) for pattern in names)]
    assert not [pattern for pattern in names if not any(fnmatch(name, pattern) for name in found)]


def cited():
    """Each section of docs/design.md that a text of the code cites, with the file."""
    for file in CODE:
        text = " ".join(re.sub(r"^\s*#", "", line).strip() for line in file.read_text().splitlines())
        for first, last in re.findall(r"docs/design\.md,? sections? (\d+)(?: (?:to|and) (\d+))?", text):
            yield from ((file.relative_to(ROOT).as_posix(), int(number)) for number in (first, last) if number)


def test_cited_sections_of_the_design_are_there():
    sections = {int(number) for number in re.findall(r"^## (\d+)\. ", DESIGN, flags=re.MULTILINE)}
    citations = list(cited())
    assert citations
    assert not [each for each in citations if each[1] not in sections]


def test_the_design_is_cited_by_its_page_and_section():
    """There is no other form of citation, and no citation without a section."""
    loose = r"\bDESIGN\b|docs/design\.md(?!,? sections? \d)"
    texts = {file: " ".join(file.read_text().replace("#", " ").split()) for file in CODE}
    assert not [file.relative_to(ROOT).as_posix() for file, text in texts.items() if re.search(loose, text)]


@pytest.mark.parametrize("package", ["kernels", "reference"])
def test_all_that_is_exported_has_a_page(package):
    """Pages list names by their defining module. Layers of `kernels` are those of `reference`."""
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api" / f"{package}.md").read_text(), flags=re.MULTILINE)
    module = import_module(package)
    exported = {getattr(module, name) for name in module.__all__}
    if package == "kernels":
        exported = {each for each in exported if each.__module__ != "kernels.layers"}
    objects = [getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in shown]
    assert exported <= set(objects)


def test_the_changelog_begins_with_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1] == version


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_files_that_pages_name_are_there(page):
    """Checked for files in a folder of code; `<op>` stands for any operation."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)}|docs|reports/baselines)/[\w./<>-]*)`", page.read_text())
    assert not [name for name in named if not any(ROOT.glob(name.replace("<op>", "coor_descent")))]


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_sentences_begin_with_their_subject(page):
    """Questions are exempt."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->|^#.*?$", "\n\n", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )|\|", text)
    sentences = chain.from_iterable(re.split(r"(?<=[.:?!])\W* ", " ".join(each.split())) for each in paragraphs)
    assert not [each for each in sentences if re.match(r"\W*(What|That of|Of|Which)\b[^?]*$", each)]
