from colt5_bench.measuring import fairness
from tests.measurements.watching import PARTS, watched


def test_each_part_of_watching_is_found_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("COLT5_BENCH_REPORT", "0")
    arguments = [
        "--suite",
        "combine",
        "--preset",
        "smoke",
        "--device",
        "cpu",
        "-k",
        "null=False",
        "--out",
        str(tmp_path),
    ]
    status, whole, seconds = watched(arguments)
    assert status == 0
    # A wait outside of other parts happens only after a fault.
    assert {*seconds} | {"Watch.wait"} == {"other_values"} | {
        name if owner is fairness else f"Watch.{name}" for owner, name in PARTS
    }
    assert 0 < sum(seconds.values()) < whole
