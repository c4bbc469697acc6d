import platform

import psutil

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
    while psutil.Process().cpu_times().user - before.own < 0.2:
        sum(range(10_000))
    after = environment.cpu_clock()
    own, everyone = after.own - before.own, after.everyone - before.everyone
    assert own > 0.1
    assert everyone > own - 0.1
