"""An operation has one name in each package, without a registry, and versions are those of two files."""

import inspect
import re
import tomllib
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
OPERATIONS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/api.py"))

OTHER_SUITE = {"normalize_and_route": "layers", "segmented_coor_descent": "segments"}
"""Operations whose suite has another subject than the operation's name."""

VARIANT_OF = {
    "route_prefixes": ("route_prefixes", {"ranks"}),
    "segmented_coor_descent": ("coor_descent", {"checkpoint_segments"}),
}
"""Variants of another operation: the operation whose reference they share, and their additional arguments."""


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def tested_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_kernels_are_those_of_the_checkout():
    assert Path(import_module("kernels").__file__).parent == ROOT / "kernels"


def test_packages_export_their_operations():
    assert set(OPERATIONS) <= set(import_module("kernels").__all__)
    references = {VARIANT_OF.get(operation, (operation,))[0] for operation in OPERATIONS}
    assert references <= set(import_module("reference").__all__)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_has_a_reference_of_the_same_signature(operation):
    reference, extra = VARIANT_OF.get(operation, (operation, set()))
    ours = inspect.signature(getattr(import_module(f"kernels.{operation}"), operation))
    theirs = inspect.signature(getattr(import_module(f"reference.{reference}"), reference))

    assert extra <= set(ours.parameters)
    shared = [parameter for name, parameter in ours.parameters.items() if name not in extra]
    assert ours.replace(parameters=shared) == theirs


def test_operations_take_from_each_other_what_is_exported():
    graph = pytest.importorskip("grimp").build_graph("kernels")
    inside = {module for operation in OPERATIONS for module in graph.find_descendants(f"kernels.{operation}")}
    taken = {
        (importer, module)
        for module in inside
        for importer in graph.find_modules_that_directly_import(module)
        if importer.split(".")[1] != module.split(".")[1]
    }
    assert not taken


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_has_a_suite(operation):
    name = OTHER_SUITE.get(operation, operation)
    assert import_module(f"suites.{name}").SUITE.name == name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_has_tests(operation):
    assert (ROOT / f"tests/kernels/test_{operation}.py").exists()


def test_only_the_harness_is_distributed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(str(ROOT), include=settings["include"])
    assert "colt5_bench" in packages
    assert {package.split(".")[0] for package in packages} == {"colt5_bench"}


def test_every_dependency_has_a_tested_version(project, tested_versions):
    # Peers that `make install` leaves out are measured in any version, which the record names.
    extras = [each for name, each in project["optional-dependencies"].items() if not name.startswith("peers-")]
    requirements = [*project["dependencies"], *chain(*extras)]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
    assert [name for name in names if name not in tested_versions] == []


def test_development_tools_are_pinned_once(project, tested_versions):
    pins = dict(requirement.split("==") for requirement in project["optional-dependencies"]["dev"])
    assert pins == {name: tested_versions[name] for name in pins}
