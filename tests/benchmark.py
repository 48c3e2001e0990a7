"""How fast is it, and how well does it use this machine? Prints Markdown tables; progress goes to stderr.

    python tests/benchmark.py
    pip install denoising-diffusion-pytorch diffusers    # these are measured beside it where installed
    python tests/benchmark.py --tables contention evaluation    # what takes long, or all of the machine

Tasks run in turn (A B A B …), so that whatever else the machine is doing falls on all alike; a time is the median.
Training is a whole step (drawing a batch, forward, backward, clipping, optimiser, average), inference is one
evaluation of the network. FLOP are those of convolutions and matrix products, two a multiply-add, and three times the
forward pass's in training. "Of peak" compares them with a large matrix product in the same precision, itself one of
the tasks. That is a yardstick, not a bound: convolutions have short cuts, such as TF32 for float32 on CUDA.
"""

import itertools
import logging
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's root, whatever the working directory
import contestants
from contestants import name_of, ours, trainer

import config
import train
from src.utils import cores, devices, errors, flags

log = logging.getLogger("benchmark")
Task = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """What to measure, and for how long."""

    settings: dict[str, Any] = field(default_factory=dict)  # where they are not config.py's
    seconds: float = 5.0  # for each task, which gets `turns` turns at least
    turns: int = 3
    compiled: bool = True
    matrix: int = 0  # side of the matrices that show the peak; 0 = large for the device
    batch_sizes: Sequence[int] = (16, 32, 64, 128, 256)
    image_sizes: Sequence[int] = (16, 32, 64)
    steps: Sequence[int] = (0, 10, 20, 50)  # 0 = the sampler's own number
    samples: int = 32  # images whose sampling is timed
    many: Sequence[int] = (256, 2048)  # numbers of images whose sampling's memory is compared
    busy: Sequence[int] = (0, 1, 2)  # other processes beside a training
    scored: Sequence[int] = (1000, 10_000)  # numbers of images whose scoring's memory is compared
    threads: Sequence[int] = (1, 2)  # with which they are scored


QUICK = Plan(
    {"batch_size": 4, "unet_dim": 8, "unet_dim_mults": [1, 2], "val_size": 10}, seconds=0, turns=1, compiled=False,
    matrix=64, batch_sizes=(2, 4), image_sizes=(16, 32), steps=(0, 1, 2), samples=2, many=(2, 4),
    busy=(0, 1), scored=(4, 6), threads=(1,),
)  # fmt: skip


# ---- measuring ---------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds of a task: its first call, in which memory is claimed and code compiled, and the median of the rest."""

    first: float
    usual: float


def clock(task: Task) -> float:
    """Seconds that a call takes, what it starts on the GPU included."""
    start = time.perf_counter()
    task()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def alternate(what: str, tasks: dict[Any, Task], plan: Plan) -> dict[Any, Timing]:
    """Time the tasks, each called in turn; nan for one that this machine cannot do, lacking memory or a compiler."""
    log.info("measuring %s: %s", what, ", ".join(map(str, tasks)))
    first, times = {}, {}
    for key, task in tasks.items():
        try:
            first[key], times[key] = clock(task), []
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            log.warning("left out: %s (%s)", key, str(error).strip().splitlines()[0])
    end, turns = time.perf_counter() + plan.seconds * len(times), 0
    while turns < plan.turns or time.perf_counter() < end:
        turns += 1
        for key in times:
            times[key].append(clock(tasks[key]))
    failed = {key: Timing(math.nan, math.nan) for key in tasks if key not in times}
    return {key: Timing(first[key], statistics.median(times[key])) for key in times} | failed


def matrix_product(precision: torch.dtype, side: int, device: torch.device) -> Task:
    """A product of two square matrices."""
    a = torch.randn(side, side, device=device).to(precision)
    return lambda: a @ a


def sampling(run: train.Trainer) -> Task:
    """NUM_SAMPLES whole images, as a training draws them for its grids."""
    return lambda: run.sample_grid(SimpleNamespace(check=lambda: None))


def sampling_memory(settings: dict[str, Any], images: int) -> float:
    """Peak memory in MB of sampling that many images: on CUDA of all tensors, else of this whole process."""
    run = trainer(4096, **settings, num_samples=images, steps=2)  # more steps would need no more
    sampling(run)()
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device) / 1e6
    if sys.platform == "linux":  # where getrusage would give the parent's peak, if that was higher
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # on macOS in bytes


# ---- reporting ---------------------------------------------------------------------------------------------


def show_machine(run: train.Trainer, peak: dict[torch.dtype, float]) -> None:
    """What everything below was measured on."""
    name = platform.processor() or platform.machine()
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
    elif sys.platform == "linux" and (model := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())):
        name = model[1]
    print(f"- {name}; {torch.get_num_threads()} threads; torch {torch.__version__}")
    print(f"- PRECISION {run.args.precision} is {name_of(run.precision)} here")
    rates = (f"{rate:,.0f} GFLOP/s in {name_of(p)}" for p, rate in peak.items())
    print(f"- large matrix product: {', '.join(rates)}", flush=True)


def show_table(header: str, rows: Iterable[Sequence[str | float]]) -> None:
    """Print a Markdown table that reads well as plain text, too; numbers with three digits, counts with all."""

    def text(x: str | float) -> str:
        return x if isinstance(x, str) else f"{x:,}" if isinstance(x, int) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    cells = [header.split(" | "), *([text(x) for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    print()
    for first, *rest in [cells[0], rule, *cells[1:]]:
        print("|", " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]), "|", flush=True)


def compare(plan: Plan) -> None:
    """All contestants on the same batches, beside matrix products and the drawing of these batches."""
    default = trainer(**plan.settings)
    found = contestants.gather(default, plan.settings, plan.compiled)
    batches = contestants.batches(default)
    x_t, _ = next(batches)
    side = plan.matrix or (8192 if default.device.type == "cuda" else 2048)
    products = {p: f"{name_of(p)} matrix product" for p in (torch.bfloat16, torch.float32)}
    tasks = {"drawing a batch": lambda: next(batches)}
    tasks |= {name: matrix_product(p, side, default.device) for p, name in products.items()}
    for c in found:
        tasks |= c.tasks(batches, x_t)
    times = alternate("networks", tasks, plan)

    peak = {p: 2 * side**3 / 1e9 / times[name].usual for p, name in products.items()}
    show_machine(default, peak)
    for what, passes in ("training", 3), ("inference", 1):
        rows = []
        for c in found:
            timing, gflop = times[f"{what}, {c.name}"], passes * c.gflop(x_t)
            speed = len(x_t) / timing.usual
            share = f"{speed * gflop / peak[c.precision]:.0%}"
            rows.append((c.name, speed, c.parameters, gflop, speed * gflop, share, timing.first))
        columns = "images/s | parameters | GFLOP an image | GFLOP/s | of peak | first call, s"
        show_table(f"{what}, batches of {len(x_t)} | {columns}", rows)
    drawing, step = times["drawing a batch"].usual, times[f"training, {found[0].name}"].usual
    print(f"\nOf a training step, {drawing / step:.2%} is spent on drawing the batch ({1e3 * drawing:.2f} ms).")


def show_growth(setting: str, values: Sequence[int], plan: Plan) -> None:
    """The network's speed as one setting changes, the others being the default's."""
    runs = {value: trainer(**plan.settings | {setting: value}) for value in values}
    tasks, gflop = {}, {}
    for value, run in runs.items():
        batches, c = contestants.batches(run), ours(str(value), run)
        x_t, _ = next(batches)
        tasks |= c.tasks(batches, x_t)
        gflop[value] = c.gflop(x_t)
    times = alternate(setting, tasks, plan)
    rows = [
        (v, gflop[v], *(run.args.batch_size / times[f"{what}, {v}"].usual for what in ("training", "inference")))
        for v, run in runs.items()
    ]
    show_table(f"{setting} | GFLOP an image | training, images/s | inference, images/s", rows)


def show_sampling(plan: Plan) -> None:
    """Whole images a second, with the default sampler, as the steps grow."""
    runs = {n: trainer(**plan.settings, steps=n, num_samples=plan.samples) for n in plan.steps}
    times = alternate("sampling, steps", {n: sampling(run) for n, run in runs.items()}, plan)
    rows = [(n or "default", plan.samples / t.usual, t.usual) for n, t in times.items()]
    show_table(f"{config.SAMPLER}, steps | images/s | {plan.samples} images, s", rows)


def show_scoring(plan: Plan) -> None:
    """How fast Inception looks at images."""
    device = devices.pick_device(plan.settings["device"])
    images = contestants.noise(plan.samples, 1, 32, 32)
    times = alternate("scoring", {n: partial(look, images) for n, look in contestants.scorers(device).items()}, plan)
    show_table("scoring | images/s", [(name, len(images) / t.usual) for name, t in times.items()])


def show_memory(plan: Plan) -> None:
    """Peak memory of sampling, each number of images in a process of its own."""
    rows = []
    for images in plan.many:
        log.info("measuring memory: sampling %d images", images)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append((images, process.submit(sampling_memory, plan.settings, images).result()))
    show_table("sampled images | peak memory, MB", rows)


# How a training divides the cores with other programs: what is set in the environment before torch is loaded.
SHARING = {
    "as train.py chooses at its start": {},
    "a thread for each core": {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    "the same, OMP_WAIT_POLICY=PASSIVE": {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "OMP_WAIT_POLICY": "PASSIVE",
    },
    "the same, OMP_PROC_BIND=TRUE": {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_PROC_BIND": "TRUE"},
}


def training_speed(settings: dict[str, Any], seconds: float) -> float:
    """Images a second of a training, after a few steps to warm up."""
    cores.last = cores.read()
    time.sleep(2)  # as long as train.py takes to start
    cores.share(torch.device("cpu"))
    run = trainer(4096, **settings)
    step = ours("", run).train_step
    drawn = contestants.batches(run)
    for _ in range(3):
        step(*next(drawn))
    start, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() < start + seconds:
        step(*next(drawn))
        steps += 1
    return steps * run.args.batch_size / (time.perf_counter() - start)


def show_contention(plan: Plan) -> None:
    """A training's speed on the CPU beside busy processes, by how it divides the cores with them."""
    settings, speeds = plan.settings | {"device": "cpu"}, {(name, n): [] for name in SHARING for n in plan.busy}
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for busy in plan.busy:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for _ in range(plan.turns):
                for name, variables in SHARING.items():
                    log.info("measuring contention: %s, %d busy processes beside", name, busy)
                    with (
                        mock.patch.dict(os.environ, free | variables, clear=True),
                        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
                    ):
                        speed = process.submit(training_speed, settings, plan.seconds).result()
                    log.info("%.0f images/s", speed)
                    speeds[name, busy].append(speed)
        finally:
            for other in others:
                other.kill()
                other.wait()
    rows = [(name, *(statistics.median(speeds[name, n]) for n in plan.busy)) for name in SHARING]
    show_table("training, images/s | " + " | ".join(f"{n} busy processes" for n in plan.busy), rows)


def evaluation_memory(images: int, threads: int) -> float:
    """Peak memory in MB of an eval.py that generates and scores that many images."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(root / "eval.py"), "--checkpoint", str(root / "weights/fashion-mnist.pth")]
        command += ["--num_samples", str(images), "--steps", "2", "--device", "cpu", "--output_dir", folder]
        child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=2)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise errors.UserError(f"eval.py failed with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kilobytes elsewhere


def show_evaluation(plan: Plan) -> None:
    """Peak memory of eval.py and what the features take of it, by images and threads; needs the whole data set."""
    log.info("preparing: features of the test images and the classifier, which are computed once and kept")
    evaluation_memory(1, plan.threads[0])
    rows = []
    for threads, images in itertools.product(plan.threads, plan.scored):
        log.info("measuring memory: eval.py with %d images, %d threads", images, threads)
        rows.append((threads, images, evaluation_memory(images, threads), images * 2048 * 4 / 1e6))
        log.info("peak: %.0f MB", rows[-1][2])
    show_table("threads | images scored | peak memory, MB | their features, MB", rows)


TABLES: dict[str, Callable[[Plan], None]] = {
    "networks": compare,
    "batch_size": lambda plan: show_growth("batch_size", plan.batch_sizes, plan),
    "image_size": lambda plan: show_growth("image_size", plan.image_sizes, plan),
    "sampling": show_sampling,
    "scoring": show_scoring,
    "memory": show_memory,
    "contention": show_contention,
    "evaluation": show_evaluation,
}
USUAL = [name for name in TABLES if name not in ("contention", "evaluation")]


def main(plan: Plan, tables: Sequence[str] = USUAL) -> int:
    """Measure what `plan` says, printing each table when it is done; returns the exit status."""
    device = devices.pick_device(plan.settings.get("device", config.DEVICE))
    devices.make_current(device)  # the one that `clock` waits for
    for name in tables:
        TABLES[name](plan)
    return 0


def parse_args() -> tuple[Plan, list[str], bool]:
    """The plan that the command line asks for, its tables, and whether to be quiet."""
    parser = flags.Parser(config, __doc__.splitlines()[0], ["DEVICE"])
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="for each task (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds in all: does it still run?")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=USUAL, help=f"default: {' '.join(USUAL)}")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan(seconds=args.seconds)
    return replace(plan, settings=plan.settings | {"device": args.device}), args.tables, args.quiet


if __name__ == "__main__":
    PLAN, NAMES, QUIET = parse_args()
    logging.basicConfig(level=logging.WARNING if QUIET else logging.INFO, format="%(message)s", stream=sys.stderr)
    errors.run(partial(main, PLAN, NAMES), "benchmark.py", QUIET)
