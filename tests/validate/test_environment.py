import platform

from validate import environment


def test_the_machine_describes_itself():
    here = environment.describe()
    assert here.logical_cores >= 1
    assert here.affinity
    assert here.cpu
    assert here.memory_bytes > 2**28
    assert len(here.load_average) == 3
    assert here.versions["python"] == platform.python_version()
    assert "numpy" in here.versions


def test_processor_time_of_this_process_is_part_of_everyones():
    before = environment.cpu_clock()
    # Long enough for the kernel's 10 ms ticks.
    while environment.cpu_clock().own - before.own < 0.2:
        sum(range(10_000))
    after = environment.cpu_clock()
    own, everyone = after.own - before.own, after.everyone - before.everyone
    assert own > 0.1
    assert everyone > own - 0.1


def test_gpus_are_as_nvidia_smi_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 570.1, 2040 MHz, 6251 MHz, 0x0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.describe().gpus == ("NVIDIA L4, 570.1, 2040 MHz, 6251 MHz, 0x0",)
    program.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert environment.describe().gpus == ()


def test_frequency_and_throttling_are_known_or_none():
    frequency, throttled = environment.clock_frequency(), environment.throttle_count()
    assert frequency is None or 100 < frequency < 10_000
    assert throttled is None or throttled >= 0
