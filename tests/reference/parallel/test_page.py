"""The program of docs/parallel.md runs, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/parallel.md").read_text()


def test_the_program(tmp_path):
    (source,) = re.findall(r"^```python\n(# train.py\n.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"`torchrun (.*?)`", PAGE)
    (tmp_path / "train.py").write_text(source)
    *options, _ = command.split()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(tmp_path / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^\d+: (.*)$", done.stdout, flags=re.MULTILINE)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
