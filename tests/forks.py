"""Trainings in forks of the test's process, where a test may wrap any function of the program."""
import os
import re
import signal
import socket
import sys
import time

import cli
import runs
import signals
import train


def no_picture(path, *_):
    with open(path, "wb") as f:
        f.write(b"a picture")


def child(arguments, prepare, rank, world, port, files):
    """What a fork does: train.py with these arguments, its output in files -> never."""
    status = 1
    try:
        for number, path in zip((1, 2), files):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w")
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        runs.draw_spectrograms = no_picture
        runs.draw_losses = lambda out: no_picture(f"{out}/loss.png")
        sys.argv = ["train.py", *arguments]
        signals.listen()
        prepare(rank)
        cli.cli(train.main)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def training(tmp_path, *arguments, prepare=lambda rank: None, world=1):
    """Run train.py in `world` forks -> [(exit status, stdout, stderr)]; 60 s at most.

    prepare(rank): called in the fork before the training.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [(f"{tmp_path}/stdout{rank}", f"{tmp_path}/stderr{rank}") for rank in range(world)]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            child(arguments, prepare, rank, world, port, files[rank])
        pids.append(pid)

    ends = []
    deadline = time.monotonic() + 60
    for pid, paths in zip(pids, files):
        ended = 0
        while not ended:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        printed, errors = (without_bars(path) for path in paths)
        ends.append((os.waitstatus_to_exitcode(status), printed, errors))
    return ends


def without_bars(path):
    """The text of a file without progress bars."""
    with open(path, newline="") as f:
        text = re.sub(r"\r[^\n]*?\d+%\|[^\n]*?\]|\r", "", f.read())
    return "".join(f"{line}\n" for line in text.splitlines() if line.strip())


def before(owner, name, call, action):
    """Let `action` happen before the call-th call of owner.name."""
    real = getattr(owner, name)
    calls = []

    def wrapped(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            action()
        return real(*arguments, **options)
    setattr(owner, name, wrapped)
