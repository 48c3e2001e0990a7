"""What Linux and macOS have and Windows lacks is used only where it is there: tried with all of it taken away."""

import re
import subprocess
import sys

from conftest import ENVIRONMENT, ROOT

# The packages come first, for they know Windows; then nothing of ours may miss what is taken away.
WITHOUT_POSIX = """
import importlib, os, pkgutil, signal, sys
import filelock, matplotlib.figure, PIL.ImageFont, torch, torch_fidelity, torchmetrics.image.fid, torchvision
import torch.utils.data, torch.utils.tensorboard, tqdm.contrib.logging

for module in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[module] = None
for name in ("SIGHUP", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "pthread_kill", "alarm"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "fork", "getuid", "geteuid", "killpg", "mkfifo", "sched_getaffinity", "uname", "sysconf"):
    delattr(os, name)
open_file = os.open


def open_no_directory(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *args, **kwargs)


os.open = open_no_directory
"""

USE = """
from pathlib import Path

import src
modules = [importlib.import_module(module.name) for module in pkgutil.walk_packages(src.__path__, "src.")]
modules += [importlib.import_module(script) for script in ("train", "sample", "eval")]
assert len(modules) > 20

from src.data import images
from src.utils import checkpoint, lock
from src.utils.errors import UserError
from src.utils.signals import Interrupted, StopSignals

here = Path(sys.argv[1])
with lock.hold(here):
    checkpoint.save(here / "latest.pth", {"weights": torch.ones(3)})
    try:
        with lock.hold(here):
            raise AssertionError("two owners")
    except UserError as error:
        assert f"process {os.getpid()} is training in {here}" in str(error)
assert checkpoint.load(here / "latest.pth")["weights"].sum() == 3
assert sorted(path.name for path in here.iterdir()) == [".lock", "latest.pth"]

for number in (signal.SIGINT, signal.SIGTERM):
    with StopSignals() as signals:
        signals.check()
        signal.raise_signal(number)
        try:
            signals.check()
            raise AssertionError("not stopped")
        except Interrupted as stop:
            assert stop.number == number
assert images._processors() >= 1
print("done")
"""


def test_modules_lock_save_and_signals_do_without_what_windows_lacks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + USE, tmp_path], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_what_is_taken_away_is_missed():
    """The negative control: these lines worked before, and stood in this repository."""
    for line, missed in {
        "import fcntl": "fcntl",
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)": "SIGHUP",
        "os.close(os.open('.', os.O_RDONLY))": "Permission denied",
    }.items():
        quick = re.sub(r"^import (filelock|torch).*\n", "", WITHOUT_POSIX, flags=re.MULTILINE)
        done = subprocess.run([sys.executable, "-c", quick + line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and missed in done.stderr.splitlines()[-1]
