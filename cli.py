"""What every command shares: one line for a mistake of the user, an argument parser that says it
so, and files that are written whole or not at all. Imports none of our files.

    def main():
        p = Parser(description=__doc__, ...)
        ...
        raise BadInput(f"--seed: {seed} is negative; use 0 or more")

    if __name__ == "__main__":
        cli(main)          ─►  stderr "error: --seed: -1 is negative; use 0 or more", exit status 2

Exit status of every command: 0 done, 2 the user's mistake or a storage that does not take a file,
130 interrupted, 1 a run or model that went wrong; one line says which.

Every file goes through one writer:

    with atomic("out/run/vae.pt") as temp:     vae.pt.PID.calm.tmp ─► fsync ─► renamed to vae.pt
        torch.save(state, temp)                a link stays a link; /dev/null, a FIFO are written
                                               through; after an error the old file is untouched
"""
import argparse
import errno
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:                     # not on Windows
    fcntl = None

# what requirements.txt installs and every command imports
PACKAGES = ("torch", "numpy", "soundfile", "soxr", "einops", "tqdm")
# what to do about an error of the storage
ROOM = "make room and run the command again"
ELSEWHERE = "choose another place"
ADVICE = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: "raise the limit of a file's size (ulimit -f) or choose another place",
    errno.EROFS: ELSEWHERE,
    errno.EACCES: "correct its permissions or choose another place",
    errno.EPERM: "correct its permissions or choose another place",
    errno.EIO: "check the disk and run the command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and run the command again",
    errno.ENFILE: "close other programs and run the command again",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def check_packages():
    """End a script with one line where a package is missing; call it before the imports, which
    Ctrl-C then ends as it ends cli().
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed in {sys.executable}; activate the "
              "environment (source .venv/bin/activate) or pip install -r requirements.txt",
              file=sys.stderr)
        sys.exit(2)


def leave(number, frame):
    """The answer to Ctrl-C while there is nothing to lose: a line, and the end."""
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def explain_library():
    """End `python heads.py -h` with what the file is: a file that is no command has no -h."""
    file = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    home = Path(__file__).resolve().parent
    if file.parent != home or not {"-h", "--help"} & set(sys.argv[1:]) or is_command(file):
        return
    users = [path.name for path in sorted(home.glob("*.py"), reverse=True)
             if is_command(path) and file.stem in imported(path)]
    print(f"{file.name} is a library, used by {', '.join(users) or 'tools'}; README.md lists every "
          "command")
    sys.exit()


def is_command(path):
    """Whether a source file of ours is run by itself."""
    return "\nif __name__ ==" in path.read_text(encoding="utf-8")


def imported(path):
    """Names of the files beside a source file that it imports, also through others."""
    found = set()
    waiting = [path]
    while waiting:
        source = waiting.pop().read_text(encoding="utf-8")
        for name in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE):
            other = path.with_name(f"{name}.py")
            if name not in found and other.is_file():
                found.add(name)
                waiting.append(other)
    return found


explain_library()                       # every file imports this one, some through others


class BadInput(Exception):
    """The user's mistake, in one line: what is wrong, where, what to do. Exit status 2."""


class Failure(Exception):
    """A run or a model that went wrong, in one line: what, where, what to do. Exit status 1."""


def cli(main, outlives_screen=False):
    """Run main(). BadInput and errors of the storage become one "error: ..." line on stderr, exit
    status 2; Failure exit status 1; Ctrl-C 130. Names that are not UTF-8 are printed with escapes.

    outlives_screen: main goes on where its output can no longer be printed (a closed terminal,
    `| head`); other commands then end with exit status 1.
    """
    prepare_screen(outlives_screen)
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except BadInput as e:
        end(e, 2)
    except Failure as e:
        end(e, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # what is still in the buffer has no reader either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        end("nobody reads the output any more; stopped", 1)
    except OSError as e:
        if e.errno not in ADVICE:
            raise
        end(f"{e.filename or 'a file'}: {e.strerror}; {ADVICE[e.errno]}", 2)


def end(message, status):
    """One line on stderr, and the end of the program."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


class LastingFile(io.FileIO):
    """An open file descriptor; what can no longer be written to it is dropped."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_screen(lasting=False):
    """Make stdout and stderr print any name; lasting: and outlive a closed terminal or pipe."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        # None: it was closed before the start; nobody else shall get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if lasting and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = io.BufferedWriter(LastingFile(descriptor, "w", closefd=False))
            stream = io.TextIOWrapper(raw, stream.encoding, line_buffering=stream.line_buffering)
            setattr(sys, name, stream)
        stream.reconfigure(errors="backslashreplace")


def print_to_stderr():
    """From now on stdout's text goes to stderr -> the path of the real stdout, for data."""
    if sys.__stdout__ is None:
        raise BadInput("--out -: stdout is closed")
    sys.stdout.flush()
    data = os.dup(1)
    os.dup2(2, 1)
    return f"/dev/fd/{data}"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are BadInput: one line instead of a usage text and a line."""

    def error(self, message):
        raise BadInput(f"{message} (see {self.prog} -h)")


def threads(text):
    """The argparse type of --threads: a number of CPU threads, 0 = torch's choice."""
    if not text.isdecimal() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text} is no number of CPU threads, use 0 to 1024")
    return int(text)


def number(type_, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite number (type_: int or float) in low .. high and above `above`."""
    noun = "a whole number" if type_ is int else "a number"
    valid = f"above {above}" if above > -math.inf else f"in {low} .. {high}"

    def parse_number(text):
        try:
            value = type_(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value > above and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"must be {noun} {valid}, got {text}")
        return value

    return parse_number


# ---------------------------------------------------------------- files

TEMP = re.compile(r"\.(\d+)\.calm\.tmp$")        # how the names of temporary files end
cleaned = set()                                  # folders in which this process has looked


@contextmanager
def atomic(path, sync=True):
    """`with atomic(path) as temp:` write to temp; it becomes path only if nothing goes wrong.

    temp lies beside path, is on the disk before it gets path's name, and is removed after an error.
    Makes parent folders. A link stays a link: the file that it names is replaced. A device or FIFO
    is written through. sync=False: for many files that can be made again, does not wait for the
    disk. Errors: BadInput where path cannot be written; the old file is then untouched.
    """
    path = os.fspath(path)
    with write_errors(path):
        if is_stream(path):
            with tempfile.NamedTemporaryFile() as temp, open(path, "wb") as stream:
                yield temp.name
                shutil.copyfileobj(temp, stream)
            return

        target = os.path.realpath(path)
        file = open_temp(target)
        try:
            yield file.name
            if sync:
                os.fsync(file.fileno())
            file.close()
            os.replace(file.name, target)
            if sync:
                sync_folder(os.path.dirname(target))
        finally:
            file.close()
            if os.path.exists(file.name):
                os.remove(file.name)


def write_file(path, content, sync=True):
    """Write bytes or text as a whole file (atomic)."""
    with atomic(path, sync) as temp, open(temp, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)


def append_line(path, line):
    """Add one line to a text file with one call; on a full disk none of it stays."""
    path = os.fspath(path)
    data = line.encode() + b"\n"
    with write_errors(path), open(path, "ab", buffering=0) as f:
        before = f.seek(0, os.SEEK_END)
        try:
            written = f.write(data)
            if written < len(data):
                f.write(data[written:])          # raises what stopped the first call
        except OSError:
            f.truncate(before)
            raise


def check_writable(path):
    """Raise BadInput at the start, not after hours of work, where `path` cannot be written."""
    path = os.fspath(path)
    if not path:
        raise BadInput("the file to write has an empty name; give it one")
    with write_errors(path):
        if not is_stream(path):
            with open_temp(os.path.realpath(path)) as file:
                os.remove(file.name)
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


@contextmanager
def write_errors(path):
    """Errors of the storage, also those that torch hides in its own, become one line on path."""
    try:
        if os.path.isdir(path):
            raise BadInput(f"{path}: is a folder; name a file in it")
        yield
    except BrokenPipeError:
        raise
    except Exception as e:
        error = e
        while error is not None and not isinstance(error, OSError):
            error = error.__context__

        # none, or of another file that was read meanwhile
        others = error is None or error.filename and not is_beside(error.filename, path)
        if isinstance(e, BadInput) or others:
            raise
        old = "; the old file is untouched" if os.path.isfile(path) else ""
        raise BadInput(f"{path}: cannot be written ({error.strerror or error}); "
                       f"{ADVICE.get(error.errno, ELSEWHERE)}{old}") from e


def is_beside(name, path):
    """Whether an error about `name` is about writing `path`: itself, its temporary, a parent."""
    target = os.path.realpath(path)
    name = os.path.abspath(os.fsdecode(name))
    folder = os.path.dirname(target)
    return (name in (os.path.abspath(path), target) or f"{folder}{os.sep}".startswith(name)
            or os.path.dirname(name) == folder and bool(TEMP.search(name)))


def is_stream(path):
    """Whether a path names a device, a FIFO or an open descriptor (/dev/stdout), and no file."""
    if os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def open_temp(target):
    """A new temporary file beside target, open and locked. Makes parent folders, and removes what
    dead processes have left in this one.
    """
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    if folder not in cleaned:
        clean_temps(folder)
        cleaned.add(folder)

    # a file that is there is replaced only where it may be written
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    # 60 characters of the name, so that it does not get too long
    temp = f"{folder}{os.sep}{name[:60]}.{os.getpid()}.calm.tmp"
    file = open(temp, "wb")
    if fcntl:
        try_lock(file)
    if os.path.exists(target):
        shutil.copymode(target, temp)
    return file


def try_lock(file):
    """Whether an open file could be locked; the lock ends with the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:                         # taken, or a file system without locks
        return False
    return True


def clean_temps(folder):
    """Remove the temporary files of dead processes from a folder."""
    if fcntl is None:
        return
    for name in os.listdir(folder):
        match = TEMP.search(name)
        if match and is_abandoned(f"{folder}{os.sep}{name}", int(match[1])):
            os.remove(f"{folder}{os.sep}{name}")


def is_abandoned(temp, pid):
    """Whether the writer of a temporary file is dead: no other process here has its number, and
    nobody, on this machine or another, holds its lock.
    """
    if pid != os.getpid() and is_running(pid):
        return False
    try:
        with open(temp, "rb+") as file:
            return try_lock(file)
    except OSError:                         # gone meanwhile, or not ours
        return False


def is_running(pid):
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sync_all():
    """Wait until everything written with sync=False is on the disk."""
    if os.name == "posix":
        os.sync()


def sync_folder(folder):
    """Put the names of a folder on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno != errno.EINVAL:         # a file system without it
            raise
    finally:
        os.close(descriptor)
