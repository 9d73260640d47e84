import subprocess
import sys

import pandas as pd
import pytest

from colt5_bench.case import FORWARD, FORWARD_BACKWARD
from colt5_bench.profiling import nsight
from colt5_bench.profiling.nsight import NsightError
from colt5_bench.profiling.profiler import Point

OURS = Point("toy", "rows=2,n=8", FORWARD_BACKWARD, "ours")
FAST = Point("toy", "rows=2,n=8", FORWARD, "ours_fast")
WANTED = [OURS, FAST]

RANGES = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"


def stack(point, phase):
    names = (f"{point.suite} {point.case} | {point.direction}", point.implementation, point.label(phase))
    return "7 " + " ".join(f'""colt5-bench:{name}:none:none:none:none:none:none""' for name in names)


NCU = f'''==PROF== Connected to process 4711
"ID","Process ID","Kernel Name","{RANGES}","Block Size","dram__bytes_read.sum","gpu__time_duration.sum"
"","","","","","byte","ns"
"0","4711","_forward_kernel","{stack(OURS, "forward")}","(128, 1, 1)","1,048,576","2,500"
"1","4711","_backward_kernel","{stack(OURS, "backward")}","(128, 1, 1)","2,097,152","5,000"
"2","4711","fill","7 ""<default domain>:elsewhere:none""","(32, 1, 1)","0","900"
"3","4711","_forward_kernel","{stack(FAST, "forward")}","(64, 1, 1)","524,288","1,250"
'''

NSYS = f"""Processing [nsys.sqlite] with [nvtx_kern_sum.py]...

NVTX Range,Style,PID,TID,NVTX Inst,Kern Inst,Total Time (ns),Avg (ns),Kernel Name
":{OURS.label("backward")}",PushPop,1,1,3,3,15000,5000.0,_backward_kernel
:ours,PushPop,1,1,1,3,15000,5000.0,_backward_kernel
"colt5-bench:{FAST.label("forward")}",PushPop,1,1,3,3,3750,1250.0,"fill(int, float)"

"""


class TestReading:
    def test_metrics_of_a_kernel_stand_beside_its_case(self):
        kernels = nsight.read_ncu(NCU, WANTED)
        assert list(kernels.columns[:6]) == ["suite", "case", "direction", "implementation", "phase", "ID"]
        rows = kernels[["case", "direction", "implementation", "phase", "Kernel Name"]].to_numpy().tolist()
        assert rows == [
            [*OURS[1:], "forward", "_forward_kernel"],
            [*OURS[1:], "backward", "_backward_kernel"],
            [*FAST[1:], "forward", "_forward_kernel"],
        ]
        assert kernels["dram__bytes_read.sum [byte]"].tolist() == [1048576, 2097152, 524288]
        assert kernels["gpu__time_duration.sum [ns]"].tolist() == [2500, 5000, 1250]

    def test_times_of_a_kernel_stand_beside_its_case(self):
        kernels = nsight.read_nsys(NSYS, WANTED)
        rows = kernels[["implementation", "phase", "Kernel Name", "Total Time (ns)"]].to_numpy().tolist()
        assert rows == [
            ["ours", "backward", "_backward_kernel", 15000],
            ["ours_fast", "forward", "fill(int, float)", 3750],
        ]

    @pytest.mark.parametrize("read", [nsight.read_ncu, nsight.read_nsys])
    @pytest.mark.parametrize("text", ["", "==PROF== No kernels were profiled\n"])
    def test_what_holds_no_table_is_empty(self, read, text):
        assert read(text, WANTED).empty

    def test_a_report_without_ranges_has_no_kernels_of_ours(self):
        assert nsight.read_ncu(NCU.replace("Push/Pop_Range", "elsewhere"), WANTED).empty

    def test_kernels_of_other_ranges_are_left_out(self):
        assert nsight.read_ncu(NCU, [OURS._replace(case="rows=2,n=80")]).empty


@pytest.fixture
def tool(monkeypatch):
    """A tool that writes its report, then shows the given table; and the list of its commands."""
    started = []

    def answer(shown, *, log="", report=True, status=0, shows=0):
        def run(command, **options):
            started.append(command)
            if "colt5_bench" not in command:
                return subprocess.CompletedProcess(command, shows, shown, "cannot read it")
            options["stdout"].write(log)
            if report:
                option = next(name for name in ("--export", "--output") if name in command)
                with open(command[command.index(option) + 1], "w"):  # noqa: PTH123
                    pass
            return subprocess.CompletedProcess(command, status)

        monkeypatch.setattr(subprocess, "run", run)
        return started

    return answer


class TestStarting:
    @pytest.mark.parametrize(("start", "shown", "rows"), [(nsight.ncu, NCU, 3), (nsight.nsys, NSYS, 2)])
    def test_a_run_is_profiled_in_ranges_and_its_kernels_are_kept(self, tool, tmp_path, start, shown, rows):
        started = tool(shown)
        seen = start(["--suite=toy"], WANTED, tmp_path / "out")
        assert seen.complete
        assert all(file.is_file() for file in seen.files)
        assert len(pd.read_csv(seen.files[0])) == rows
        profiled = started[0][started[0].index(sys.executable) :]
        assert profiled[1:] == [
            *("-m", "colt5_bench", "run", "--suite=toy", "--profile", "nvtx", "--out", str(tmp_path / "out"))
        ]

    def test_clocks_are_left_alone(self, tool, tmp_path):
        started = tool(NCU)
        nsight.ncu(["--suite=toy"], WANTED, tmp_path)
        command = started[0]
        assert command[command.index("--clock-control") + 1] == "none"

    def test_a_point_that_failed_is_no_reason_to_lose_the_others(self, tool, tmp_path):
        tool(NCU, status=1)
        seen = nsight.ncu(["--suite=toy"], WANTED, tmp_path)
        assert not seen.complete
        assert len(pd.read_csv(seen.files[0])) == 3

    def test_that_may_not_read_the_counters_says_so(self, tool, tmp_path):
        log = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n==PROF== Done\n"
        tool("", log=log, report=False, status=1)
        with pytest.raises(NsightError, match=r"ncu ended with status 1 and wrote no report; .*ERR_NVGPUCTRPERM"):
            nsight.ncu(["--suite=toy"], WANTED, tmp_path)

    def test_that_saw_no_kernel_says_so(self, tool, tmp_path):
        tool("==PROF== No kernels", log="the last line\n\n")
        with pytest.raises(NsightError, match=r"ncu contains no kernel of the profiled calls; .* says: the last line"):
            nsight.ncu(["--suite=toy"], WANTED, tmp_path)

    def test_a_report_that_cannot_be_shown_is_an_error(self, tool, tmp_path):
        tool("", shows=3)
        with pytest.raises(NsightError, match="nsys stats ended with status 3: cannot read it"):
            nsight.nsys(["--suite=toy"], WANTED, tmp_path)
