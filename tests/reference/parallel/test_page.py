"""The program of docs/parallel.md runs, and its loss falls."""

import os
import re
import socket
import sys
from pathlib import Path

from tests.reference.parallel.ranks import CONTEXT

PAGE = (Path(__file__).parents[3] / "docs/parallel.md").read_text()


def program(source, rank, ranks, port, out):
    """Run it as one of the ranks that torchrun starts, which these variables distinguish."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    sys.stdout = (out / f"{rank}.txt").open("w")
    exec(compile(source, "train.py", "exec"), {"__name__": "__main__"})
    sys.stdout.close()


def test_the_program(tmp_path):
    (source,) = re.findall(r"^```python\n(# train.py\n.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    ranks = int(re.search(r"`torchrun --nproc-per-node=(\d+) train.py`", PAGE)[1])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=program, args=(source, rank, ranks, port, tmp_path)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * ranks
    losses = [float(loss) for loss in re.findall(r"^\d+: (.*)$", (tmp_path / "0.txt").read_text(), flags=re.MULTILINE)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
