"""The number of threads: as many as other programs leave cores free, and the same again when a training resumes."""

import logging

import pytest
import torch
from conftest import torchrun_variables

from src.utils import cores
from src.utils.cores import Reading, free_threads

TICKS = 100
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A Linux with four cores, three of which this process may use, that the test moves on in time."""

    class Machine:
        clock, own = 0.0, 0.0
        niced = 0.0  # seconds of programs on each core that yield to all others
        busy = dict.fromkeys(range(4), 0.0)  # seconds of each core
        threads = 3

        def later(self, seconds: float, own: float, **others: float) -> None:
            """Let time go by, in which this process computes on core 0 and others as told on cores c0, c1, …"""
            self.clock += seconds
            self.own += own
            self.busy[0] += own
            for name, used in others.items():
                self.busy[int(name[1:])] += used
            waited = round(self.clock * TICKS)  # for disks and other machines, all the time: of no account
            lines = [
                # user, nice, system, idle, iowait, irq, softirq, steal: what is used has four parts
                f"cpu{n} {used * 40:.0f} {self.niced * 100:.0f} {used * 30:.0f} 123 {waited} {used * 20:.0f} "
                f"{used * 10:.0f} {waited} 0 0"
                for n, used in self.busy.items()
            ]
            (tmp_path / "stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 12345", "ctxt 6"]))

        def set_threads(self, number: int) -> None:
            self.threads = number

    machine = Machine()
    machine.busy = dict(machine.busy)
    machine.later(1000, own=0, c0=400, c3=900)
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(cores.time, "monotonic", lambda: machine.clock)
    monkeypatch.setattr(cores.os, "times", lambda: (machine.own / 2, 0, 0, machine.own / 2, 0))  # half in children
    monkeypatch.setattr(cores.os, "nice", lambda increment: 0)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(cores.os, "sysconf", lambda name: TICKS)
    monkeypatch.setattr(cores, "most_threads", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
    monkeypatch.setattr(torch, "set_num_threads", machine.set_threads)
    monkeypatch.setattr(cores, "last", cores.read())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return machine


@pytest.mark.parametrize(
    ("others", "threads"),
    # No thread takes a core that another program uses half of the time; and half of them compute whatever they use.
    [(0, 8), (0.4, 8), (0.5, 7), (1.5, 6), (3, 5), (4, 4), (7.4, 4), (8, 4), (20, 4)],
)
def test_a_thread_for_each_free_core(others, threads):
    before, after = Reading(100, 5000, 30), Reading(102, 5000 + 2 * (others + 1), 32)  # two seconds, own use: one core
    assert free_threads(before, after, cores=8, most=8) == threads


@pytest.mark.parametrize(("others", "threads"), [(0, 2), (1, 1), (2, 1)])
def test_two_cores(others, threads):
    before, after = Reading(0, 0, 0), Reading(10, 10 * others, 0)
    assert free_threads(before, after, cores=2, most=2) == threads


def test_one_core_has_one_thread():
    assert free_threads(Reading(0, 0, 0), Reading(10, 10, 0), cores=1, most=1) == 1


def test_no_more_threads_than_physical_cores():
    before, after = Reading(0, 0, 0), Reading(10, 40, 10)  # three of sixteen logical cores are used by others
    assert free_threads(before, after, cores=16, most=8) == 8


def test_own_work_is_no_reason_to_have_fewer_threads(machine):
    machine.later(10, own=29, c3=10)  # all of the three cores, by this process; another program on the forbidden one
    cores.share(CPU)
    assert machine.threads == 3


def test_threads_follow_the_other_programs(machine, caplog):
    caplog.set_level(logging.INFO)
    machine.later(2, own=2, c1=2)
    cores.share(CPU)
    assert machine.threads == 2
    assert "2 of 3 threads" in caplog.text
    machine.later(300, own=600, c1=300)  # as before: nothing changes, nothing is said
    caplog.clear()
    cores.share(CPU)
    assert (machine.threads, caplog.text) == (2, "")
    machine.later(300, own=600, c1=30)  # the other program has ended
    cores.share(CPU)
    assert machine.threads == 3
    assert "3 of 3 threads" in caplog.text


def test_programs_that_yield_do_not_count_unless_this_one_yields_too(machine, monkeypatch):
    machine.niced += 2
    machine.later(2, own=2)
    cores.share(CPU)
    assert machine.threads == 3
    monkeypatch.setattr(cores.os, "nice", lambda increment: 10)
    monkeypatch.setattr(cores, "last", cores.read())
    machine.niced += 2
    machine.later(2, own=2)
    cores.share(CPU)
    assert machine.threads == 1


def test_a_gpu_needs_no_fewer_threads(machine):
    machine.later(2, own=2, c1=2)
    cores.share(torch.device("cuda"))
    assert machine.threads == 3


@pytest.mark.parametrize("variables", [{"OMP_NUM_THREADS": "3"}, torchrun_variables(0, 3)], ids=["set", "torchrun"])
def test_a_number_that_is_set_stays(machine, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    machine.later(2, own=2, c1=2)
    cores.share(CPU)
    assert machine.threads == 3


def test_a_moment_is_too_short_for_an_average(machine):
    machine.later(0.1, own=0.1, c1=0.1, c2=0.1)
    cores.share(CPU)
    assert machine.threads == 3
    machine.later(0.9, own=0.9, c1=0.9, c2=0.9)  # but it counts for the next
    cores.share(CPU)
    assert machine.threads == 1


def test_systems_that_do_not_tell_keep_all_threads(machine, monkeypatch):
    machine.later(2, own=2, c1=2)
    monkeypatch.delattr(cores.os, "sched_getaffinity")  # macOS, Windows
    cores.share(CPU)
    assert machine.threads == 3


def test_this_system_is_read():
    first = cores.read()
    if first is None:
        pytest.skip("no /proc/stat here")
    while (second := cores.read()).own < first.own + 0.2:
        sum(range(100_000))
    assert second.all - first.all > 0.1  # in ticks of 10 ms; this process's own time is among it
    assert second.clock - first.clock > 0.15
