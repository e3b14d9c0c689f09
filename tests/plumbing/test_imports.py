"""The rooms of the house: imports point one way, and nothing imports what stands above it."""
import ast
import glob
import os

import pytest

from conftest import ROOT

# from the ground up: a file imports only files that stand before it
ORDER = ["signals", "cli", "locks", "weights", "schema", "checkpoint", "noise", "processes",
         "replay", "backbone", "moe", "adaln", "heads", "discrete", "layers", "vae", "gan",
         "remote", "decoder", "audio", "manifest", "data", "monologue", "prefetch", "shards",
         "encoding", "latents", "branches", "calm", "audiocalm", "optim", "corpora", "config",
         "page", "report", "prompts", "sentences", "generate", "output", "serve", "sample",
         "stages", "parallel", "plan", "checks", "corpora.scan", "trackers", "runs", "train",
         "intervals", "workers", "transcripts", "abx", "embeddings", "distances",
         "speech_metrics", "judges", "reconstruction", "figures", "generations",
         "evaluate", "tools"]
NOBODY_IMPORTS = {"train", "evaluate", "tools", "corpora.scan"}


def modules():
    """{name: path} of every source file, packages by their dotted name."""
    paths = [*glob.glob(f"{ROOT}/*.py"), *glob.glob(f"{ROOT}/corpora/**/*.py", recursive=True),
             *glob.glob(f"{ROOT}/tools/**/*.py", recursive=True)]
    names = (os.path.relpath(path, ROOT).removesuffix(".py").replace("/", ".") for path in paths)
    return dict(zip(names, paths))


def imports(path):
    """Dotted names of our modules that a file imports, wherever in it."""
    ours = set(modules())
    with open(path, encoding="utf8") as f:
        tree = ast.parse(f.read())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & ours


def room_of(name):
    """The place in ORDER of a file: its own, or its package's."""
    return name if name in ORDER else name.split(".")[0]


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_file_imports_only_what_stands_below_it(name):
    room = room_of(name)
    for other in imports(modules()[name]):
        below = room_of(other)
        if below == room:                                      # inside a package: no circle
            assert name not in imports(modules()[other])
        else:
            assert ORDER.index(below) < ORDER.index(room), f"{name} imports {other}"


def test_nobody_imports_the_programs():
    """tools may import evaluate, whose judges they share, and each other."""
    for name, path in modules().items():
        if not name.startswith("tools."):
            assert not {other for other in imports(path) if other in NOBODY_IMPORTS
                        or other.split(".")[0] in NOBODY_IMPORTS}, name


def test_each_paper_can_be_read_without_the_other():
    assert "calm" not in imports(modules()["audiocalm"])
    assert "audiocalm" not in imports(modules()["calm"])


def test_the_ground_floor_stands_alone():
    """backbone and heads can be read, and copied, without the rest of the house."""
    assert imports(modules()["adaln"]) == set()
    assert imports(modules()["backbone"]) == {"schema"}
    assert imports(modules()["replay"]) == {"noise"}
    assert imports(modules()["heads"]) == {"adaln", "noise", "schema"}
    assert imports(modules()["moe"]) == {"backbone"}
