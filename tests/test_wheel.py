"""The wheel, and the layout of a Hugging Face kernel: built, and used outside of a checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from colt5_bench.records.results import load
from colt5_bench.request import NO_REPORT, REPORT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

OTHERS = ("transformers==5.24.0", "kernels==0.17.2")
"""Packages that a top-level package `kernels` of ours would break."""

TRAINING = """
import torch
import kernels, transformers.integrations.hub_kernels
from colt5.kernels import ConditionalRoutedAttention

assert callable(kernels.get_kernel) and not hasattr(kernels, "coor_descent")
torch.manual_seed(0)
sizes = dict(dim=32, light_dim_head=16, light_heads=2, light_window_size=8, heavy_dim_head=16, heavy_heads=2)
layer = ConditionalRoutedAttention(**sizes, num_heavy_tokens_q=16, num_heavy_tokens_kv=16)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
tokens = torch.randn(2, 64, 32)
for _ in range(3):
    loss = layer(tokens).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
"""

LOCAL_KERNEL = """
import sys
from pathlib import Path
import kernels
import torch

colt5 = kernels.get_local_kernel(Path(sys.argv[1]))
scores = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
print(colt5.kernels.coor_descent(scores, n_iters=20, k=8).sum().item())
assert colt5.kernels.ConditionalRoutedAttention
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", directory, ROOT, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel and other packages; it borrows those that take long to
    install."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory)
    found = directory / "bin" / "python"
    purelib = run(found, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory).strip()
    # Packages installed as a link to a checkout are not borrowed: their files count only in the first directory.
    (Path(purelib) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    # Few of thousands of modules are imported, so only these are compiled.
    install = (sys.executable, "-m", "pip", "--python", found, "install", "--quiet", "--no-compile")
    run(*install, "--no-deps", wheel, cwd=directory)
    run(*install, *OTHERS, cwd=directory)
    return found


def test_a_wheel_has_names_of_its_own_and_two_heavy_requirements(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.partition("/")[0] for name in names} - {f"{wheel.name.rsplit('-', 3)[0]}.dist-info"} == {
        "colt5",
        "colt5_bench",
    }
    assert {"colt5/py.typed", "colt5_bench/py.typed", "colt5/suites/thresholds.toml"} <= set(names)
    for package in ("kernels", "reference", "suites"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert {f"colt5/{source}" for source in sources} <= set(names)
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==).*$", metadata, flags=re.MULTILINE)
    assert sorted(required) == ["einops", "torch", "triton"]


def test_the_example_of_the_readme_runs_in_another_project(python, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    (example,) = (block for block in blocks if "from colt5." in block)
    ((name, shape),) = re.findall(r"^(\w+) = .*  # \((.+)\)$", example, flags=re.MULTILINE)
    assert run(python, "-c", f"{example}\nprint(*{name}.shape, sep=', ')", cwd=tmp_path).strip() == shape


def test_a_layer_trains_beside_packages_of_the_same_names(python, tmp_path):
    losses = list(map(float, run(python, "-c", TRAINING, cwd=tmp_path).split()))
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)


def test_suites_are_measured_outside_of_a_checkout(python, tmp_path):
    command = ("-m", "colt5_bench", "--suite", "coor_descent", "--preset", "smoke", "--device", "cpu")
    run(python, *command, "--impl", "reference", "--impl", "ours", cwd=tmp_path, **{REPORT: NO_REPORT})
    (results,) = (tmp_path / "reports").rglob("*.jsonl")
    measured = load(results)
    assert {record.status for record in measured.records} == {"ok"}
    assert {record.implementation for record in measured.records} == {"reference", "ours"}
    assert "coor_descent: " in run(python, "-m", "colt5_bench", "--list", cwd=tmp_path)


def test_hugging_face_kernels_load_the_layout_that_is_made_of_the_same_source(python, tmp_path):
    run(sys.executable, "setup.py", "--quiet", "hf_kernel", "--out", tmp_path, cwd=ROOT)
    assert (tmp_path / "build.toml").is_file()
    total = run(python, "-c", LOCAL_KERNEL, tmp_path, cwd=tmp_path, HF_HUB_OFFLINE="1")
    scores = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    from kernels import coor_descent

    assert float(total) == pytest.approx(coor_descent(scores, n_iters=20, k=8).sum().item())
