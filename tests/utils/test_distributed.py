"""Two gloo processes under torchrun: the same training and the same images as one, and what happens when one dies."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SMALL, differences, read_samples, share_apart, torchrun_variables
from PIL import Image

from src.utils import checkpoint, distributed
from src.utils.devices import pick_device
from src.utils.distributed import World
from src.utils.errors import SettingError, UserError
from src.utils.torchrun import VARIABLES, Place, place

# With 8 channels every group of a GroupNorm would hold one, and take its bias out again: the gradient of such a bias
# is nothing but rounding, of which Adam makes whole steps.
NETWORK = "--unet_dim 16 --unet_dim_mults 1 2 --time_steps 50".split()
FLAGS = [*SMALL, *NETWORK, *"--ema_decay 0.9 --precision float32 --save_every 1 --log_every 1".split()]
FLAGS += "--accumulate 5 --learning_rate 1e-3 --lr_warmup 0 --lr_decay 0".split()
TOLERANCE = 2e-5  # of weights after 8 steps of 1e-3, as sums are taken in another order
TIMEOUT = 600  # seconds, for what takes 10 on an idle machine: two processes share the processor, with others perhaps


def torchrun(processes: int, script: str | Path, *flags: object) -> list[str]:
    """The command; one process needs no launcher, which would load torch once more."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *([*launcher, "--"] if processes > 1 else []), str(ROOT / script), *map(str, flags)]


def train_in(folder: Path, data: Path, processes: int, *flags: object) -> dict[str, Any]:
    """train.py in `folder`, to its end; its latest.pth."""
    if not folder.exists():
        shutil.copytree(data, folder / "data/fashion-mnist-tiny")
    command = torchrun(processes, "train.py", *FLAGS, *flags)
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("device ") == 1  # one of them speaks
    return checkpoint.load(folder / "checkpoints/latest.pth")


@pytest.fixture
def run(data, tmp_path) -> Callable[..., dict[str, Any]]:
    """`run(name, processes, *flags)`: `train_in` a folder of that name."""
    return lambda name, *how: train_in(tmp_path / name, data, *how)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory) -> Path:
    """The folder of a training of one epoch by one process; for reading only."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    train_in(folder, data, 1, "--epochs", 1)
    return folder


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    for part in ("model", "ema"):
        assert share_apart(a[part], b[part], TOLERANCE) < 0.001
    torch.testing.assert_close(torch.tensor(a["history"]["train"]), torch.tensor(b["history"]["train"]))
    torch.testing.assert_close(torch.tensor(a["history"]["val"]), torch.tensor(b["history"]["val"]))
    assert not differences(a["rng"], b["rng"])


def test_two_processes_train_as_one(run, one):
    alone, two = checkpoint.load(one / "checkpoints/latest.pth"), run("two", 2, "--epochs", 1)
    assert alone["step"] == 8
    assert_close(alone, two)
    assert differences(alone["model"], two["model"])  # else they would not have been two


def test_two_processes_distil_as_one(run, one):
    flags = ["--epochs", 1, "--objective", "consistency", "--init_from", one / "checkpoints/weights.pth"]
    alone, two = run("alone", 1, *flags), run("two", 2, *flags)
    assert_close(alone, two)
    assert differences(alone["model"], two["model"])
    assert not differences(alone["teacher"], two["teacher"])


@pytest.mark.parametrize(("size", "taken_down"), [("1", True), ("2", False)])
def test_one_of_several_processes_ends_without_taking_down_the_interpreter(size, taken_down, tmp_path):
    """With the interpreter gone, a thread of gloo's that lets go of a tensor would abort a run that was complete."""
    code = "import atexit; from src.utils import errors; atexit.register(print, 'taken down')\n"
    code += "def main(): print('result'); return 3\nerrors.run(main, 'train.py', True)"
    environment = {**ENVIRONMENT, "WORLD_SIZE": size}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "result\n" + "taken down\n" * taken_down, "")


@pytest.mark.slow
def test_two_processes_resume_to_the_bit_and_as_one_and_as_two_again(run):
    run("resumed", 2, "--epochs", 1)
    assert not differences(run("resumed", 2, "--epochs", 2), run("two", 2, "--epochs", 2))
    run("mixed", 2, "--epochs", 1)
    run("mixed", 1, "--epochs", 2)
    assert_close(run("mixed", 2, "--epochs", 3), run("one", 1, "--epochs", 3))


@pytest.mark.parametrize("edited", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["drawn", "edited"])
def test_two_processes_draw_the_images_of_one(one, tmp_path, edited):
    """Five images in batches of three: shares that do not come out even."""
    common = ["--checkpoint", one / "checkpoints/best.pth", "--device", "cpu", "--precision", "float32"]
    common += ["--num_samples", 5, "--batch_size", 3, "--steps", 4, "--class", "bag", "1", "--gif"]
    if edited:
        Image.new("L", (28, 28), 100).save(tmp_path / "grey.png")
        common += ["--start_from", "grey.png", "--strength", 0.5]
    for processes in (1, 2):
        command = torchrun(processes, "sample.py", *common, "--output_dir", tmp_path / str(processes))
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=TIMEOUT)
    by_one, by_two = tmp_path / "1", tmp_path / "2"
    assert sorted(p.name for p in by_one.iterdir()) == sorted(p.name for p in by_two.iterdir())
    assert abs(read_samples(by_one) - read_samples(by_two)).max() <= 1  # rounding, in batches of another size


@pytest.fixture
def start(data, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """`start(*flags)`: a long training of two processes, which has saved its first epoch."""
    running = []

    def start(*flags: object) -> subprocess.Popen[str]:
        shutil.copytree(data, tmp_path / "data/fashion-mnist-tiny")
        process = subprocess.Popen(
            torchrun(2, "train.py", *FLAGS, "--epochs", 1000, *flags),
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        until(lambda: (tmp_path / "checkpoints/latest.pth").exists())
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def until(holds: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(launcher: int) -> list[int]:
    """The process numbers of a launcher's training processes."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if "train.py" in Path(f"/proc/{child}/cmdline").read_text()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes as Linux lists them")


@needs_proc
def test_one_that_dies_ends_the_run_with_a_message_and_a_good_checkpoint(start, tmp_path):
    process = start()
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "train.py: error: another process of this run has gone" in output
    state = checkpoint.load(tmp_path / "checkpoints/latest.pth")
    assert state["epoch"] >= 1


@needs_proc
@pytest.mark.parametrize("first", [0, 1])
def test_a_stopped_run_saves_once_the_same_step_of_all(first, start, tmp_path, monkeypatch):
    """A signal to one of them, or to both: they stop after the same step, and one writes, however long that takes."""
    process = start("--save_every", 1000)
    for number in workers(process.pid)[first:]:
        os.kill(number, signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0 and output.count("SIGTERM: saved step") == 1
    state = checkpoint.load(tmp_path / "checkpoints/latest.pth")
    assert state["step"] == 8 * state["epoch"] + state["batch"]


def test_a_batch_that_cannot_be_divided_is_refused(data, tmp_path):
    command = torchrun(2, "train.py", *FLAGS, "--data_path", data, "--batch_size", 25, "--accumulate", 1)
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    assert "train.py: error: BATCH_SIZE is 25, and must be a multiple of 2" in done.stderr


@pytest.fixture
def pretend(monkeypatch) -> Callable[[int, int], None]:
    """`pretend(rank, size)`: from now on, torchrun has started this process as one of several."""

    def set_variables(rank: int, size: int) -> None:
        for name, value in torchrun_variables(rank, size).items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    "text",
    ["", "RANK=0", "WORLD_SIZE=1", "WORLD_SIZE=", "RANK= LOCAL_RANK=", "MASTER_ADDR=head MASTER_PORT=x"],
)
def test_variables_that_can_mean_one_process_only_mean_that(text, monkeypatch):
    set_only(text, monkeypatch)
    assert place() == Place(rank=0, size=1, local_rank=0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "RANK=1",
            "has RANK=1, without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: for a single process, unset",
        ),
        ("LOCAL_RANK=1", "without RANK, WORLD_SIZE"),
        ("WORLD_SIZE=2", "unset WORLD_SIZE;"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK= MASTER_ADDR=head MASTER_PORT=1", "without LOCAL_RANK: "),
        ("WORLD_SIZE=two", "has WORLD_SIZE=two, without RANK"),
        ("RANK=1 WORLD_SIZE=1", "has RANK=1, WORLD_SIZE=1, without"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=head MASTER_PORT=1", "which do not fit together: "),
        ("RANK=-1 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=head MASTER_PORT=1", "which do not fit together: "),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=x MASTER_ADDR=head MASTER_PORT=1", "which do not fit together: "),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=head MASTER_PORT=http", "which do not fit together: "),
    ],
)
def test_variables_of_torchrun_count_together_or_are_refused(text, reason, monkeypatch):
    """A process that took itself for the second of one would train, and write nothing."""
    set_only(text, monkeypatch)
    for use in (place, partial(pick_device, "cpu"), partial(World, torch.device("cpu"))):
        with pytest.raises(SettingError, match=reason):
            use()


def set_only(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (pair.split("=") for pair in text.split()):
        monkeypatch.setenv(name, value)


def test_a_process_whose_others_never_start_says_so(pretend, monkeypatch):
    """The variables of a run that is long over, still in the shell: all of them, and they fit together."""
    pretend(0, 2)
    with socket.create_server(("localhost", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setattr(distributed, "CONNECTION_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(UserError, match=r"process 0 of 2 cannot reach the others .*for a single process unset RANK"):
        World(torch.device("cpu")).__enter__()


def test_alone_everything_is_one_s_own_share():
    with World(torch.device("cpu")) as world:
        values = torch.arange(6.0)
        assert world.is_main and world.share(6) == slice(0, 6)
        assert world.equal_share(range(3)) == [0, 1, 2]
        assert torch.equal(world.mean(values), values) and torch.equal(world.gather(values), values)
        assert world.maximum(15) == 15


# ---- dividing ----------------------------------------------------------------------------------------------


def squares(indices: Sequence[int]) -> torch.Tensor:
    return torch.tensor(indices) ** 2


def test_alone_a_process_computes_every_batch_whole():
    asked = []

    def make(indices: Sequence[int]) -> torch.Tensor:
        asked.append(list(indices))
        return squares(indices)

    batches = list(World(torch.device("cpu")).divide(make, 7, 3))
    assert asked == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.tolist() for batch in batches] == [[0, 1, 4], [9, 16, 25], [36]]


@pytest.mark.parametrize(("size", "count", "batch_size"), [(2, 7, 3), (3, 10, 4), (4, 2, 64), (2, 8, 4)])
def test_divided_batches_are_those_of_one_process(size, count, batch_size, pretend, monkeypatch):
    """`gather` is replaced by one that computes the shares of all processes."""
    shares: list[int] = []

    def make(indices: Sequence[int]) -> torch.Tensor:
        shares.append(len(indices))
        return squares(indices)

    batches = []
    for rank in range(size):
        pretend(rank, size)
        world, whole = World(torch.device("cpu")), iter(range(0, count, batch_size))

        def gather(part: torch.Tensor, world: World = world, whole: Iterator[int] = whole) -> torch.Tensor:
            first = next(whole)
            indices, parts = range(first, min(first + batch_size, count)), []
            for other in range(world.size):
                process = World(torch.device("cpu"))
                process.rank = other
                parts.append(squares(process.equal_share(indices)))
            assert torch.equal(parts[world.rank], part)
            return torch.cat(parts)

        monkeypatch.setattr(world, "gather", gather)
        batches.append([batch.tolist() for batch in world.divide(make, count, batch_size)])
    expected = [squares(range(i, min(i + batch_size, count))).tolist() for i in range(0, count, batch_size)]
    assert batches == [expected] * size
    assert max(shares) == -(-min(batch_size, count) // size)


DIVIDING = """
import torch
from src.utils.distributed import World
with World(torch.device("cpu")) as world:
    asked = []
    def make(indices):
        asked.append(list(indices))
        return torch.tensor([[i, 10 * i] for i in indices])
    batches = [batch.tolist() for batch in world.divide(make, 5, 3)]
    print(f"process {world.rank}: {asked} {batches}\\n", end="")
    world.wait()
"""


def test_two_processes_divide_batches_and_both_get_all(tmp_path):
    (tmp_path / "dividing.py").write_text(DIVIDING)
    command, environment = torchrun(2, tmp_path / "dividing.py"), {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    batches = [[[0, 0], [1, 10], [2, 20]], [[3, 30], [4, 40]]]
    asked = [[0, 1], [3]], [[2, 2], [4]]
    assert sorted(done.stdout.splitlines()) == [f"process {i}: {asked[i]} {batches}" for i in (0, 1)]


DISAGREEING = """
import sys, torch
from src.utils.distributed import World
from src.utils.errors import UserError
with World(torch.device("cpu")) as world:
    world.agree("the same", "nothing")
    try:
        world.agree(world.rank, "their ranks")
    except UserError as error:
        print(f"process {world.rank}: {error}\\n", end="")
    world.wait()
"""


def test_processes_that_see_different_files_find_out_all_of_them(tmp_path):
    (tmp_path / "disagreeing.py").write_text(DISAGREEING)
    command, environment = torchrun(2, tmp_path / "disagreeing.py"), {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    reason = "the processes differ in their ranks: all machines must have the same files"
    assert sorted(done.stdout.splitlines()) == [f"process {rank}: {reason}" for rank in (0, 1)]


@pytest.mark.parametrize(("size", "count"), [(2, 5), (3, 7), (4, 2), (1, 3)])
def test_equal_shares_cover_everything_in_order_and_are_equal(pretend, size, count):
    shares = []
    for rank in range(size):
        pretend(rank, size)
        shares.append(World(torch.device("cpu")).equal_share(range(count)))
    assert len({len(share) for share in shares}) == 1
    assert [i for share in shares for i in share][:count] == list(range(count))


@pytest.mark.slow
def test_two_processes_score_as_one(one, tmp_path):
    """Seven images in batches of three, asked to be of two classes; the classifier is trained once and found again."""
    flags = ["--checkpoint", one / "checkpoints/weights.pth", "--classifier_only", "--device", "cpu"]
    flags += ["--data_path", one / "data/fashion-mnist-tiny", "--precision", "float32", "--class", "bag", "1"]
    flags += ["--num_samples", 7, "--batch_size", 3, "--steps", 4]
    environment, found = {**ENVIRONMENT, "TORCH_HOME": str(tmp_path / "torch")}, []
    for processes in (2, 1):
        command = torchrun(processes, "eval.py", *flags, "--output_dir", tmp_path / str(processes))
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=TIMEOUT)
        found.append(json.loads((tmp_path / str(processes) / "metrics.json").read_text())["scores"])
    two, alone = found
    assert alone["num_images"] == two["num_images"] == 7
    for name in ("class_histogram", "class_accuracy", "nearest_median_test"):
        assert alone[name] == two[name]
    for name in ("classifier_fd", "classifier_score_mean", "nearest_median"):
        assert two[name] == pytest.approx(alone[name], rel=1e-2)  # a pixel may be rounded to the next grey level
