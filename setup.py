"""The build: what a checkout has as top-level packages becomes parts of one package `colt5`.

Installed as they are, `kernels`, `reference` and `suites` would stand in the way of others: Hugging Face has a package
`kernels`, too. So their imports of each other are made relative, and the wheel holds them as `colt5.kernels`,
`colt5.reference` and `colt5.suites`. The same rewriting makes the layout of a Hugging Face kernel: `make hf-kernel`.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

PACKAGES = ("kernels", "reference", "suites")

OPERATIONS = ("kernels", "reference")
"""Packages of a Hugging Face kernel: suites are for the harness."""

_NAMES = "|".join(PACKAGES)
_REWRITINGS = (
    (re.compile(rf"^(\s*)from ({_NAMES})\b", re.MULTILINE), r"\1from {up}\2"),
    (re.compile(rf"^(\s*)import ({_NAMES})$", re.MULTILINE), r"\1from {up} import \2"),
    (re.compile(rf'\bimport_module\("({_NAMES})"\)'), r'import_module("{up}\1", __package__)'),
)


def sources(packages: tuple[str, ...]) -> Iterator[Path]:
    """Files of packages, relative to the checkout."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".toml"):
                yield path.relative_to(ROOT)


def rewritten(path: Path) -> str:
    """The text of a file whose imports of the packages are relative.

    Raises:
        ValueError: an import has a form that is not rewritten.
    """
    text = (ROOT / path).read_text()
    if path.suffix != ".py":
        return text
    up = "." * (len(path.parent.parts) + 1)
    for pattern, replacement in _REWRITINGS:
        text = pattern.sub(replacement.format(up=up), text)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.partition(".")[0] in PACKAGES for name in names):
            raise ValueError(f"{path}:{node.lineno}: `{ast.unparse(node)}` cannot be made relative")
    return text


def write_package(directory: Path, packages: tuple[str, ...], docstring: str) -> list[Path]:
    """Write packages as parts of the package that a directory is; the files that were written."""
    contents = {Path("__init__.py"): f'"""{docstring}"""\n', Path("py.typed"): ""}
    contents |= {path: rewritten(path) for path in sources(packages)}
    for path, text in contents.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return [directory / path for path in contents]


class BuildPy(build_py):
    """Adds `colt5` to a wheel. An editable installation uses the packages of the checkout."""

    def run(self) -> None:
        """Copy the harness, and write the package."""
        super().run()
        self._written: list[Path] = []
        if not self.editable_mode:
            docstring = "Layers and operations of conditionally routed attention: `colt5.kernels`, `colt5.reference`."
            self._written = write_package(Path(self.build_lib) / "colt5", PACKAGES, docstring)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """All files of the wheel."""
        return [*super().get_outputs(include_bytecode), *map(str, self._written)]


class HfKernel(Command):
    """Write the layout of a Hugging Face kernel: `build.toml`, sources in `torch-ext/`, and a universal build."""

    description = "write the layout of a Hugging Face kernel"
    user_options = [("out=", None, "where to")]  # noqa: RUF012

    def initialize_options(self) -> None:
        """Set the default."""
        self.out = "build/hf-kernel"

    def finalize_options(self) -> None:
        """Nothing depends on other options."""

    def run(self) -> None:
        """Write all files."""
        out, version = Path(self.out), self.distribution.get_version()
        docstring = f"Fused Triton kernels for conditionally routed attention (CoLT5), colt5-bench {version}."
        for directory in (out / "torch-ext" / "colt5", out / "build" / "torch-universal"):
            write_package(directory, OPERATIONS, docstring)
            with (directory / "__init__.py").open("a") as file:
                file.write('\nfrom . import kernels, reference\n\n__all__ = ["kernels", "reference"]\n')
        toml = '[general]\nname = "colt5"\nversion = 1\nlicense = "MIT"\nbackends = ["cuda"]\n\n[torch-noarch]\n'
        (out / "build.toml").write_text(toml)
        metadata = {
            "id": "colt5",
            "name": "colt5",
            "version": 1,
            "license": "MIT",
            "python-depends": ["einops"],
            "backend": {"type": "cuda"},
        }
        (out / "build" / "torch-universal" / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        print(f"Hugging Face kernel: {out}")


setup(cmdclass={"build_py": BuildPy, "hf_kernel": HfKernel})
