"""What every command shares: one line for a mistake of the user, an argument parser that says it
so, and files that are written whole or not at all. Imports none of our files.

    def main():
        p = Parser(description=__doc__, ...)
        ...
        raise BadInput(f"--seed: {seed} is negative; use 0 or more")

    if __name__ == "__main__":
        cli(main)          ─►  stderr "error: --seed: -1 is negative; use 0 or more", exit status 2

Exit status of every command: 0 done, 2 the user's mistake (one line says which), 130 interrupted,
1 anything else.
"""
import argparse
import errno
import importlib.util
import math
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

# what requirements.txt installs and every command imports
PACKAGES = ("torch", "numpy", "soundfile", "soxr", "einops", "tqdm")
# errors of a disk that is full, or of a quota
FULL = (errno.ENOSPC, errno.EDQUOT)


def check_packages():
    """End a script with one line where a package is missing; call it before the imports."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed in {sys.executable}; activate the "
              "environment (source .venv/bin/activate) or pip install -r requirements.txt",
              file=sys.stderr)
        sys.exit(2)


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
    """The user's mistake, in one line: what is wrong, where, what to do."""


def cli(main):
    """Run main(). BadInput becomes one "error: ..." line on stderr, exit status 2; Ctrl-C 130; a
    full disk is one line too, exit status 1. Names that are not UTF-8 are printed with escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BadInput as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno not in FULL:
            raise
        print(f"error: {e.filename or 'a file'}: {e.strerror}; make room and run the command again",
              file=sys.stderr)
        sys.exit(1)


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


@contextmanager
def atomic(path):
    """`with atomic(path) as temp:` write to temp; it becomes path only if nothing goes wrong.

    Makes parent folders. Errors: BadInput where the file cannot be written."""
    temp = f"{path}.{os.getpid()}.tmp"
    if os.path.isdir(path):
        raise BadInput(f"{path}: is a folder; name a file in it")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(temp, "wb").close()
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); choose another place") from e

    try:
        yield temp
        os.replace(temp, path)
    finally:
        if os.path.exists(temp):
            os.remove(temp)


def check_writable(path):
    """Raise BadInput at the start, not after hours of work, where `path` cannot be written."""
    if os.path.isdir(path):
        raise BadInput(f"{path}: is a folder; name a file in it")
    new = not os.path.exists(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); choose another place") from e
    if new:
        os.remove(path)
