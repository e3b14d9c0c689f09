"""Ctrl-C and SIGTERM, from a training's first line to its last: none swallowed, nothing lost.

    listen() ─► a signal ─┬─ anywhere: Interrupted at once, exit status 130
                          ├─ in held(): noted; asked() is true, and Interrupted comes at its end
                          └─ in cut_short(), within held(): that block ends, the rest is held
    a second signal ends the process as if nobody had listened

Imports nothing of ours, and no torch: train.py listens before its slow imports.
"""
import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STATUS = 130

# what on_signal does: "leave", "hold" or "cut"
mode = "leave"
# the signal that came, 0 = none
noted = 0


class Interrupted(SystemExit):
    """The way out after a signal: passes every `except Exception`, prints no traceback."""


class Cut(BaseException):
    """The way out of cut_short."""


def listen():
    """From here on signals of this process are answered as the docstring of the file says."""
    for number in SIGNALS:
        signal.signal(number, on_signal)


def stop_listening():
    """A signal ends the process at once: for what has nothing to lose, and may be inside a callback
    of C++, which no exception may leave.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def on_signal(number, frame):
    global noted
    noted = number
    stop_listening()
    if mode == "cut":
        raise Cut
    if mode == "leave":
        raise Interrupted(STATUS)


def asked():
    """Whether a signal has come."""
    return noted != 0


def tell():
    """Say it, once for all processes of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)


@contextlib.contextmanager
def held():
    """A block that no signal cuts in two; one that came ends the process behind it."""
    global mode
    before = mode
    mode = "hold"
    try:
        yield
    finally:
        mode = before
    if asked() and before == "leave":
        raise Interrupted(STATUS)


@contextlib.contextmanager
def cut_short():
    """Within held(): a block that a signal may end, where what follows answers it. Elsewhere it
    changes nothing.
    """
    global mode
    before = mode
    if mode == "hold":
        mode = "cut"
    try:
        yield
    except Cut:
        mode = before
    finally:
        mode = before


if __name__ == "__main__":
    print("signals.py is a library, used by train.py")
