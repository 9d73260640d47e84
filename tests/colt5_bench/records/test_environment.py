import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench.records import environment
from colt5_bench.records.environment import THROTTLE_REASONS, GpuState, describe, device_name, gpu_state

CPU = torch.device("cpu")


class TestDescribe:
    def test_survives_json(self):
        described = describe(CPU)
        assert json.loads(json.dumps(described)) == described

    def test_has_what_a_result_depends_on(self):
        described = describe(CPU)
        assert described["python"] == sys.version.split()[0]
        assert described["torch"] == torch.__version__
        assert re.fullmatch(r"\d+\.\d+.*", described["packages"]["numpy"])
        assert described["cores"] >= 1
        assert described["threads"] == torch.get_num_threads()
        assert described["gpu"] is None
        assert abs(datetime.now(UTC) - datetime.fromisoformat(described["utc"])) < timedelta(minutes=1)

    def test_what_is_not_installed_is_none(self, monkeypatch):
        monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
        assert describe(CPU)["packages"] == {"no-such-package": None}

    def test_names_no_directory_of_the_machine(self, monkeypatch):
        home = str(Path.home())
        arguments = [f"{home}/checkout/bench.py", "--suite", "topk", "--out", f"{home}/mine", f"--file={home}/a/b.json"]
        monkeypatch.setattr(sys, "argv", [*arguments, "-k", "n=512"])
        described = describe(CPU)
        assert described["command"] == "bench.py --suite topk --out mine --file=b.json -k n=512"
        everything = json.dumps(described)
        for private in (home, str(Path.cwd()), *([os.environ["HOSTNAME"]] if os.environ.get("HOSTNAME") else [])):
            assert private not in everything


class TestGpuState:
    def test_there_is_none_on_a_cpu(self):
        assert gpu_state(CPU) is None

    def test_a_name_is_given_to_each_reason(self, monkeypatch):
        active = (
            THROTTLE_REASONS["hw_slowdown"] | THROTTLE_REASONS["sw_power_cap"] | pynvml.nvmlClocksEventReasonGpuIdle
        )
        monkeypatch.setattr(environment, "_nvml_handle", lambda device: "handle")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", lambda handle, which: 1500)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", lambda handle: active)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 350_500)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda handle, sensor: 61)
        assert gpu_state(torch.device("cuda")) == GpuState(1500, ("sw_power_cap", "hw_slowdown"), 350.5, 61)

    def test_what_one_question_is_not_answered_leaves_the_others(self, monkeypatch):
        def fail(*arguments):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        monkeypatch.setattr(environment, "_nvml_handle", lambda device: "handle")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", lambda handle, which: 1500)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", lambda handle: 0)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", fail)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda handle, sensor: 61)
        assert gpu_state(torch.device("cuda")) == GpuState(1500, (), None, 61)

    def test_nvml_that_fails_tells_nothing(self, monkeypatch):
        def fail(*arguments):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        monkeypatch.setattr(environment, "_nvml_handle", lambda device: "handle")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetClockInfo", fail)
        assert gpu_state(torch.device("cuda")) is None

    @pytest.mark.parametrize("reason", THROTTLE_REASONS)
    def test_all_reasons_but_the_power_limit_void_a_time(self, reason):
        assert GpuState(1000, (reason,)).throttled is (reason != "sw_power_cap")
        assert GpuState(1000, (reason, "hw_thermal_slowdown")).throttled
        assert not GpuState(1000, ()).throttled


def test_a_device_has_a_model_name():
    assert len(device_name(CPU)) > 2


@pytest.mark.gpu
class TestOnGpu:
    device = torch.device("cuda")

    def test_the_gpu_is_described(self):
        gpu = json.loads(json.dumps(describe(self.device)))["gpu"]
        assert gpu["name"] == device_name(self.device)
        assert gpu["multiprocessors"] > 1
        assert gpu["l2_bytes"] > 2**20
        assert gpu["memory_bytes"] > 2**30
        assert re.match(r"\d+\.", gpu["driver"])

    def test_the_clock_can_be_read(self):
        state = gpu_state(self.device)
        assert 100 < state.sm_clock_mhz < 5000


@given(
    directories=st.lists(st.text(st.sampled_from("ab=:, .'"), min_size=1), min_size=1, max_size=4),
    before=st.sampled_from(["", "--out=", "--option=a=", "-k=x:", "'", "a,"]),
)
def test_no_directory_stays_in_a_command_whatever_it_is_called(directories, before):
    secret = "/".join(["/home", "me-secret", *directories])
    argument = environment._without_directory(f"{before}{secret}/run.jsonl")
    assert argument == f"{before}run.jsonl"
