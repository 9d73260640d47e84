"""`pytest suites/` measures with the harness."""

pytest_plugins = ("colt5_bench.pytest_plugin.plugin",)
