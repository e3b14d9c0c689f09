"""One owner at a time: DIR/.lock says who writes to a folder.

    with owned("out/run", "another training writes to it"):     the second one is refused,
    with owned("data/toy", "it is being made", wait=True):      or waits, and says for whom

The lock is the kernel's (flock): it ends with its process, however that ends, so that a file left
by a dead one means nothing. Its text, "process 4711 on alpha since 2026-11-27 04:22:25", is for
people. Some network file systems have no flock: then nothing is locked, which is said.
"""
import contextlib
import os
import re
import socket
import time

from cli import BadInput

try:
    import fcntl
except ImportError:
    fcntl = None                        # Windows

# seconds for the children of a dead process, which hold its lock until they notice
CHILDREN_END = 10


@contextlib.contextmanager
def owned(folder, what, wait=False, say=print):
    """Own a folder, which must be there, for the length of the block.

    what: a sentence about the other owner; wait: until it is done, instead of BadInput.
    """
    if fcntl is None:
        yield
        return
    path = os.path.join(folder, ".lock")
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); use another folder") from None

    with file:
        try:
            take(file, folder, what, wait, say)
        except OSError as e:
            say(f"{folder}: this file system has no locks ({e.strerror}); see to it that nothing "
                "else writes there")
        file.truncate(0)
        file.seek(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since "
                   f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


def take(file, folder, what, wait, say):
    """Lock an open file, or BadInput that names its owner. OSError where nothing can be locked."""
    patience = None
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip()

        # the first time: who it is, and how long to wait
        if patience is None:
            patience = CHILDREN_END if is_dead(owner) else 0
            began = time.monotonic()
            if wait:
                say(f"{folder}: {what} ({owner}); waiting")
        if not wait and time.monotonic() - began >= patience:
            raise BadInput(f"{folder}: {what} ({owner}); wait for its end or use another folder")
        time.sleep(0.1)


def is_dead(owner):
    """Whether the process that wrote a lock's text was one of this machine and has ended."""
    found = re.match(r"process (\d+) on (\S+) since", owner)
    if not found or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False                    # somebody else's, and alive
    return False


if __name__ == "__main__":
    print("locks.py is a library, used by train.py and corpora/toy.py")
