"""Keep the tables of files in docs/files.md current: python -m tools.files [--check]

    docs/files.md   <!-- files -->
                | `heads.py` | 590 | ... |          ◄── lines of heads.py
                | `tools/bench/` | 680 | ... |      ◄── lines of all its .py files
                <!-- /files -->

Without options it rewrites the column of lines. --check writes nothing and fails where a count is
off by more than 10 percent, a row names a file that does not exist, or a .py file at the top level,
in corpora/ or in tools/ has no row.

Exit status: 0 done, 1 --check found something, 2 the user's mistake (one line says which).
"""
import argparse
import os
import re
import sys
from pathlib import Path

from cli import BadInput, Parser, cli, write_file

HOME = Path(__file__).resolve().parent.parent
TABLES = re.compile(r"(<!-- files -->\n)(.*?)(<!-- /files -->)", re.DOTALL)
ROW = re.compile(r"^\| `([\w./]+)` \| *(\d*) *\|", re.MULTILINE)


def count_lines(name):
    """The lines of a file, or of all .py files in a folder; None where there is no such path."""
    path = HOME / name
    if not path.exists():
        return None
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf8").splitlines()) for file in files)


def files_to_list():
    """Names of the .py files and packages that the tables must have, without __init__.py."""
    names = []
    for folder in ("", "corpora", "tools"):
        for path in sorted((HOME / folder).iterdir()):
            name = path.relative_to(HOME).as_posix()
            if path.suffix == ".py" and path.name != "__init__.py":
                names.append(name)
            elif folder and (path / "__init__.py").exists():
                names.append(f"{name}/")
    return names


def problems(tables):
    """Sentences about what is stale in the tables, one per problem."""
    written = {name: int(lines or 0) for name, lines in ROW.findall(tables)}
    found = [f"{name}: has no row in docs/files.md; add one between the markers"
             for name in files_to_list() if name not in written]

    for name, lines in written.items():
        actual = count_lines(name)
        if actual is None:
            found.append(f"{name}: does not exist; remove its row from docs/files.md")
        elif abs(lines - actual) > 0.1 * actual:
            found.append(f"{name}: docs/files.md says {lines} lines, it has {actual}; "
                         "run python -m tools.files")
    return found


def update(tables):
    """The tables with the current number of lines in each row whose file exists."""
    def row(match):
        name, lines = match.groups()
        actual = count_lines(name)
        return f"| `{name}` | {lines if actual is None else actual} |"

    return ROW.sub(row, tables)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing, report what is stale")
    a = p.parse_args()

    page = HOME / "docs/files.md"
    text = page.read_text(encoding="utf8")
    match = TABLES.search(text)
    if match is None:
        raise BadInput("docs/files.md: has no tables between <!-- files --> and <!-- /files -->")

    if a.check:
        found = problems(match[2])
        print("\n".join(found) if found else "docs/files.md: the tables of files are current")
        sys.exit(1 if found else 0)

    write_file(page, TABLES.sub(lambda m: m[1] + update(m[2]) + m[3], text))


if __name__ == "__main__":
    cli(main)
