"""The benchmark on tiny sizes, so that it runs when someone wants its numbers."""

import math
from dataclasses import replace

import benchmark
import contestants
import pytest
import torch
from torch import nn

from src.diffusion import Diffusion
from src.utils import devices

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_prints_every_table_whole(monkeypatch, capsys):
    monkeypatch.setattr(contestants, "PEERS", ())
    monkeypatch.setattr(contestants, "scorers", lambda device: {"mean": torch.Tensor.numel, "sum": torch.Tensor.sum})
    plan = replace(benchmark.QUICK, settings=benchmark.QUICK.settings | {"device": "cpu"}, many=(2,))
    assert benchmark.main(plan) == 0
    printed = capsys.readouterr().out
    tables = [block.splitlines() for block in printed.split("\n\n") if block.startswith("|")]
    assert [len(rows) - 2 for rows in tables] == [2, 2, 2, 2, 3, 2, 1]
    assert all(len({len(row) for row in rows}) == 1 for rows in tables), "columns do not line up"
    assert "nan" not in printed and "GFLOP/s in float32" in printed and "drawing the batch" in printed


def test_a_training_beside_busy_processes_is_measured_in_processes_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SHARING", {"one thread": {"OMP_NUM_THREADS": "1"}})
    assert benchmark.main(replace(benchmark.QUICK, busy=(1,)), ["contention"]) == 0
    speed = capsys.readouterr().out.splitlines()[-1].split("|")[2]
    assert float(speed.replace(",", "")) > 0


def test_tasks_take_turns_and_one_without_memory_is_left_out():
    calls = []

    def fail():
        raise torch.OutOfMemoryError("no memory")

    tasks = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "c": fail}
    times = benchmark.alternate("turns", tasks, replace(benchmark.QUICK, turns=3))
    assert "".join(calls) == "abababab"  # a first call of each, and three more
    assert times["a"].usual >= 0 and math.isnan(times["c"].usual)


def test_operations_are_counted_in_convolutions_and_attention():
    def predict(x, t):
        q = conv(x).flatten(2).transpose(1, 2)[:, None]  # (1, 1, 64 tokens, 8 channels)
        return nn.functional.scaled_dot_product_attention(q, q, q)

    conv = nn.Conv2d(1, 8, 3, padding=1)
    contestant = contestants.Contestant("", conv, print, predict, Diffusion(10, "linear"), lambda: conv)
    convolution, attention = 2 * 9 * 8 * 64, 2 * (2 * 64 * 64 * 8)
    assert contestant.gflop(torch.zeros(5, 1, 8, 8)) == pytest.approx((convolution + attention) / 1e9)


def test_compiling_is_asked_of_the_network_that_is_trained_and_not_of_the_count(monkeypatch):
    monkeypatch.setattr(devices, "can_compile", lambda device: True)  # slow
    run = contestants.trainer(64, **benchmark.QUICK.settings, compile=True)
    assert run.learner.model._compiled_call_impl is not None
    assert contestants.ours("", run).gflop(torch.zeros(1, 1, 32, 32)) > 0


@pytest.mark.parametrize("peer", contestants.PEERS, ids=lambda p: p.__name__)
def test_a_training_step_moves_the_weights_of_the_others_too(peer):
    pytest.importorskip(peer.__name__)
    contestant = peer(torch.device("cpu"))
    before = [p.detach().clone() for p in contestant.network.parameters()]
    contestant.train_step(torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.long))
    assert any(not torch.equal(a, b) for a, b in zip(before, contestant.network.parameters(), strict=True))
    assert contestant.predict(torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])).shape == (2, 1, 32, 32)
