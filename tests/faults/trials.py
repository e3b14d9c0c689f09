"""What every kind of fault shares: commands in forked processes, and run folders to compare.

    home/stages/vae, lm, ...   the run folder after each stage of an uninterrupted training
    home/work/run              where every trial happens: a copy of one of them

A command runs in a fork of this process, which has imported torch already: it starts in
milliseconds and not in seconds, and any of its functions can be made to fail first.
"""
import builtins
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback

import torch

import signals
import train
from cli import cli, write_file
from config import WALL_CLOCK
from report import draw_losses, draw_spectrograms
from tests.conftest import TINY
from tests.faults.mutate import same_state

STAGES = ["vae", "lm", "consistency", "audiocalm"]
PATIENCE = 60.0                     # seconds after which a process counts as hanging
PICTURES = (draw_losses, draw_spectrograms)


class Home:
    """Uninterrupted trainings of all stages, and a place for trials.

    processes: how many train together (gloo). seconds[stage]: how long it took; operations[stage]:
    how many named file operations it did.
    """

    def __init__(self, folder, stages, processes):
        self.folder = str(folder)
        self.stages = stages
        self.processes = processes
        self.out = f"{folder}/work/run"
        self.config = f"{folder}/work/tiny.toml"
        self.seconds = {}
        self.operations = {}
        os.makedirs(self.out)
        with open(self.config, "w") as f:
            f.write(TINY.format(out=self.out))

        for stage in stages:
            count = f"{folder}/count"
            start = time.monotonic()
            status, text = self.train(stage, prepare=lambda: count_operations(self.out, count))
            assert status == 0, text
            self.seconds[stage] = time.monotonic() - start
            with open(count) as f:
                self.operations[stage] = int(f.read())
            shutil.copytree(self.out, f"{folder}/stages/{stage}")

    def reset(self, stage, finished=False):
        """The run folder as it was before (after: finished) a stage."""
        shutil.rmtree(self.out)
        i = self.stages.index(stage) + finished
        if i:
            shutil.copytree(f"{self.folder}/stages/{self.stages[i - 1]}", self.out)
        else:
            os.makedirs(self.out)

    def start(self, stage, prepare=lambda: None, *options):
        """Begin the command that trains the stages up to `stage` -> [Child] of every process."""
        stages = json.dumps(self.stages[:self.stages.index(stage) + 1])
        arguments = ["train.py", "--config", self.config, "--stages", stages, *options]
        environment = {}
        if self.processes > 1:
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                           "WORLD_SIZE": str(self.processes)}
        return [Child(train.main, arguments, f"{self.folder}/screen{rank}", prepare,
                      environment | {"RANK": str(rank)}) for rank in range(self.processes)]

    def train(self, stage, prepare=lambda: None, *options):
        """Train up to a stage -> (the first exit status that is not 0, else 0; the screen)."""
        children = self.start(stage, prepare, *options)
        status = [child.wait() for child in children]
        return (next((s for s in status if s), 0),
                "".join(child.screen() for child in children))

    def difference(self, stage):
        """What differs from the uninterrupted training after a stage, in words; "" for nothing.

        Weights, averages and optimizers bitwise; the rows of log.jsonl but for the speed; no
        temporary file.
        """
        whole = f"{self.folder}/stages/{stage}"
        for name in self.stages[:self.stages.index(stage) + 1]:
            states = [torch.load(f"{folder}/{name}.pt", weights_only=True)
                      for folder in (whole, self.out)]
            for key in ("step", "done", "model", "ema", "optimizers"):
                if not same_state(*(state[key] for state in states)):
                    return f"{name}.pt: {key} differs"
        if rows(whole) != rows(self.out):
            return "log.jsonl differs"
        left = temporary(self.out)
        return f"left behind: {left}" if left else ""


class Child:
    """One command in a forked process, its screen in a file; prepare() runs in it first."""

    def __init__(self, main, arguments, screen, prepare=lambda: None, environment=None):
        self.path = screen
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.work(main, arguments, prepare, environment or {}))

    def work(self, main, arguments, prepare, environment):
        """What the child does -> its exit status; 70 after a traceback."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        sys.argv = arguments
        try:
            signals.listen()
            draw_nothing()
            prepare()
            cli(main, outlives_screen=True)
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        sys.stderr.flush()
        return status

    def wait(self, patience=PATIENCE):
        """-> exit status, minus the signal that killed it, or "hangs"."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.003)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return "hangs"

    def screen(self):
        with open(self.path, errors="replace") as f:
            return f.read()


def draw_nothing():
    """Pictures of this process are empty files: drawing takes most of the time of a tiny stage."""
    def draw_spectrograms(path, *_, **__):
        write_file(path, b"")

    def draw_losses(run, path=None, panels=None):
        write_file(path or f"{run}/loss.png", b"")

    for module in list(sys.modules.values()):
        for function in (draw_spectrograms, draw_losses):
            if getattr(module, function.__name__, None) in PICTURES:
                setattr(module, function.__name__, function)


def free_port():
    """A TCP port that nobody uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rows(out):
    """The rows of log.jsonl without the speed, which is wall-clock."""
    with open(f"{out}/log.jsonl") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK}
                for line in f]


def temporary(out):
    """Temporary files below a folder."""
    return [name for _, _, names in os.walk(out) for name in names if name.endswith(".tmp")]


def complaint(status, screen, allowed):
    """What is wrong with how a command ended; "" where it is one of the allowed statuses and, if it
    failed, said so in one line of at most three on a screen.
    """
    if status not in allowed:
        return f"exit status {status}, not {allowed}: {screen[-300:]!r}"
    if "Traceback" in screen:
        return f"a traceback: {screen[-300:]!r}"
    errors = [line for line in screen.splitlines() if line.startswith("error: ")]
    if status in (1, 2) and (len(errors) != 1 or len(errors[0]) > 600):
        return f"{len(errors)} error lines: {screen[-300:]!r}"
    return ""


# ---------------------------------------------------------------- file operations

def at_operations(out, act):
    """Call act(number, path, done) before (done false) and after each named file operation on the
    run folder: opening a file to write, fsync, rename, remove. Sticks to this process.
    """
    number = 0

    def watched(name, function):
        def operation(*arguments, **options):
            nonlocal number
            path = path_of(name, arguments, options)
            if not path.startswith(out):
                return function(*arguments, **options)
            number += 1
            mine = number
            act(mine, path, False)
            result = function(*arguments, **options)
            act(mine, path, True)
            return result
        return operation

    builtins.open = watched("open", builtins.open)
    for name in ("fsync", "replace", "remove"):
        setattr(os, name, watched(name, getattr(os, name)))


def path_of(name, arguments, options):
    """The file that an operation writes; "" for one that only reads."""
    if name == "open":
        mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
        reads = not set(mode) & set("wax+")
        return "" if reads or isinstance(arguments[0], int) else os.fsdecode(arguments[0])
    if name == "fsync":
        descriptor = arguments[0] if isinstance(arguments[0], int) else arguments[0].fileno()
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return os.fsdecode(arguments[-1])


def count_operations(out, path):
    """Write to `path` how many named file operations this process has done so far."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    at_operations(out, lambda number, *_: os.pwrite(file, str(number).encode(), 0))


def kill_at(out, number, done):
    """Kill this process before (after: done) its file operation `number`."""
    def act(at, _, after):
        if at == number and after == done:
            os.kill(os.getpid(), signal.SIGKILL)
    at_operations(out, act)


def fail_at(out, number, code, sticks):
    """File operation `number` of this process fails with an error of the storage; sticks: all after
    it too, but for removals.
    """
    def act(at, path, after):
        if not after and (at == number or sticks and at > number and os.path.exists(path) is False):
            raise OSError(code, os.strerror(code), path)
    at_operations(out, act)


def limit_files(size):
    """No file of this process may grow beyond `size` bytes: what a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def generator(kind, seed):
    """Random numbers of one trial."""
    return random.Random(f"{kind} {seed}")
