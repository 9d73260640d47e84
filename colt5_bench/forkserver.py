"""What the server imports that processes are forked from: it ends with the run, and they end with it."""

import os

from colt5_bench.processes import die_with

die_with(os.getppid())
