"""What README.md, RESULTS.md and the pages of docs/ tell a newcomer to type works, on a tiny run.

A command in a block of sh is run. One whose comment begins with "takes" (long) or "needs" (data,
packages), and one inside a sentence, is only parsed: its config loads, its options exist.
"""
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib

import numpy as np
import pytest
import soundfile as sf

import train
from config import load
from conftest import ROOT, run, write
from tools import files


def read(name):
    with open(f"{ROOT}/{name}", encoding="utf8") as f:
        return f.read()


def commands(text):
    """[(words after "python", whether it is only parsed), ...] of a page, in its order."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            command, _, comment = line.partition(" #")
            long = comment.strip().startswith(("takes", "needs"))
            words = shlex.split(command)
            if words[0] == "torchrun":
                found.append((words[words.index("train.py"):], long))
            elif words[0] == "python":
                found.append((words[1:], long))
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += [(shlex.split(c), True) for c in re.findall(r"`python ([^`]+)`", sentences)]
    return found


PAGES = ("README.md", "RESULTS.md", "docs/recipes.md", "docs/gpus.md", "docs/differences.md")
COMMANDS = [command for name in PAGES for command in commands(read(name))]
RUN = [words for words, long in COMMANDS if not long]
PARSED = {" ".join(words): words for words, long in COMMANDS if long}.values()
WRITTEN = ("train.jsonl", "described.jsonl", "figures.json", "listen.html", "some.wav", "hello.wav",
           "out/mine")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny run and four recordings."""
    folder = str(tmp_path_factory.mktemp("readme"))
    done = run("train.py", "--config", write(folder), "--train.vae.steps", "2",
               "--train.lm.steps", "2", "--train.consistency.steps", "2")
    assert done.returncode == 0, done.stderr

    os.makedirs(f"{folder}/recordings")
    for i in range(4):
        sf.write(f"{folder}/recordings/{i}.wav", 0.3 * np.sin(np.arange(12000) / (9 + i)), 16000)
        with open(f"{folder}/recordings/{i}.txt", "w") as f:
            f.write("one two")
    shutil.copy(f"{folder}/recordings/0.wav", f"{folder}/some.wav")
    return folder


def test_the_pages_have_commands_of_both_sorts():
    assert len(RUN) >= 10
    assert len(PARSED) >= 30


def test_the_commands_run_in_order(place):
    """As written but for the paths; train.py with the tiny config."""
    for words in RUN:
        words = [word.replace("RECORDINGS", f"{place}/recordings")
                     .replace("out/quickstart", f"{place}/run") for word in words]
        words = [f"{place}/{word}" if word in WRITTEN else word for word in words]
        if words[0] == "train.py":
            words[words.index("--config") + 1] = f"{place}/tiny.toml"
            for stage in ("vae", "lm", "consistency"):
                words += [f"--train.{stage}.steps", "1"]
        if words[0] == "sample.py" and "--out" not in words:
            words += ["--out", f"{place}/out.wav"]

        done = run(*words)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("words", [w for w in PARSED if w[0] == "train.py"], ids=" ".join)
def test_the_config_of_a_long_training_loads(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    arguments, overrides = train.parse()
    cfg = load(arguments.config, overrides)
    if os.path.isdir(arguments.source or ""):                       # pretrained/
        train.start_from(cfg, arguments.source)


@pytest.mark.parametrize("words", [w for w in PARSED if w[0] != "train.py"], ids=" ".join)
def test_the_options_of_a_long_command_exist(words, monkeypatch, capsys):
    """Each --option of the command is in the -h text of its program or sub-command."""
    module = words[1] if words[0] == "-m" else None
    arguments = words[2:] if module else words[1:]
    first = [word for word in arguments[:1] if not word.startswith("-")]       # a sub-command
    monkeypatch.setattr(sys, "argv", [words[0], *first, "-h"])
    monkeypatch.delitem(sys.modules, module or "", raising=False)
    with pytest.raises(SystemExit) as stopped:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(f"{ROOT}/{words[0]}", run_name="__main__")
    text = capsys.readouterr().out
    assert stopped.value.code == 0

    # not --section.key, which goes to train.py, and not an option in quotes
    options = [word for word in arguments if re.fullmatch(r"--[\w-]+", word)]
    missing = [option for option in options if not re.search(rf"{option}\b(?!-)", text)]
    assert not missing


def test_the_rows_of_the_ablations_exist():
    with open(f"{ROOT}/configs/ablation.toml", "rb") as f:
        families = tomllib.load(f)
    shown = [words for words in PARSED if words[:2] == ["-m", "tools.ablate"]]
    assert shown
    for words in shown:
        family = families[words[3]]
        rows = words[words.index("--rows") + 1].split(",") if "--rows" in words else []
        assert not set(rows) - set(family["rows"]), words


def test_the_python_of_the_readme_runs_as_it_stands(place):
    [code] = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    code = code.replace("out/quickstart", f"{place}/run").replace("out/flite_tts", f"{place}/run")
    for name in ("hello.wav", "some.wav"):
        code = code.replace(f'"{name}"', f'"{place}/{name}"')
    names = {}
    exec(code, names)
    assert sf.info(f"{place}/hello.wav").frames == len(names["wav"]) > 0
    assert len(names["longer"]) > sf.info(f"{place}/some.wav").frames
    assert all(len(names[name]) > 0 for name in ("beeps", "chirp", "piece", "spoken"))


def test_targets_of_make_exist():
    targets = re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE)
    shown = {name for page in PAGES for name in re.findall(r"\bmake (\w+)(?=`| +#|$)", read(page),
                                                           re.MULTILINE)}
    assert shown and shown <= set(targets)


def test_files_that_the_pages_show_exist():
    shown = []
    for page in PAGES:
        text = read(page)
        links = re.findall(r"\]\(([^)#h][^)#]*)", text)
        shown += [os.path.join(os.path.dirname(page), link) for link in links]
        shown += re.findall(r"`((?:configs|assets|corpora|tools|tests)/[\w./]+)`", text)
    missing = [path for path in shown if not os.path.exists(f"{ROOT}/{path}")]
    assert not missing


def test_tags_that_the_readme_tells_to_search_for_are_found():
    rows = re.findall(r"^\| (`[^|]+`) \| `([\w/.]+)` \|", read("README.md"), re.MULTILINE)
    tags = [(tag, name) for cell, name in rows for tag in re.findall(r"`([^`]+)`", cell)]
    assert len(tags) >= 10
    missing = [(tag, name) for tag, name in tags if tag not in read(name)]
    assert not missing


def test_a_tag_stands_in_one_comment_of_its_file():
    """At the line that computes it: a search must not lead to five places."""
    rows = re.findall(r"^\| (`[^|]+`) \| `([\w/.]+)` \|", read("README.md"), re.MULTILINE)
    tags = [(tag, name) for cell, name in rows for tag in re.findall(r"`([^`]+)`", cell)]
    hits = {tag: len(re.findall(rf"^.*#.*{re.escape(tag)}\b", read(name), re.MULTILINE))
            for tag, name in tags if name != "discrete.py"}           # there a class has the tag
    assert set(hits.values()) == {1}, hits


def anchors(text):
    """GitHub's anchors of a page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.append(kept.replace(" ", "-"))
    return found


def test_links_to_sections_lead_somewhere():
    for page in (*PAGES, "LOG.md"):
        for target, anchor in re.findall(r"\]\(([\w./]*)#([^)]+)\)", read(page)):
            path = os.path.join(os.path.dirname(page), target) if target else page
            assert anchor in anchors(read(path)), (page, anchor)


def test_the_index_of_the_log_has_every_section():
    text = read("LOG.md")
    index, *sections = re.split(r"^## (?=\d{4}-)", text, flags=re.MULTILINE)
    linked = re.findall(r"^- (\d{4}-\d\d-\d\d) \[.*?\]\(#([^)]+)\): ", index, re.MULTILINE)
    dated = [(s[:10], anchors("# " + s.splitlines()[0])[0]) for s in sections]
    assert sorted(linked) == sorted(dated)
    assert [date for date, _ in linked] == sorted((date for date, _ in linked), reverse=True)


def test_the_tables_of_files_are_current():
    done = run("-m", "tools.files", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_table_of_files_is_found_and_rewritten():
    names = files.files_to_list()
    assert "heads.py" in names and "tools/files.py" in names and "tools/__init__.py" not in names

    current = files.update("".join(f"| `{name}` | 0 | about |\n" for name in names))
    assert files.problems(current) == []
    assert len(files.problems(current + "| `gone.py` | 9 | about |\n")) == 1
    assert len(files.problems(re.sub(r"(`heads.py` \| )\d+", r"\g<1>9", current))) == 1
    assert len(files.problems(current.replace("| `heads.py`", "| `moe.py`"))) >= 1


def test_an_installation_brings_packages_but_no_module_called_data_or_train():
    """The scripts run from a checkout: `pip install -e .[eval]` installs what they need."""
    with open(f"{ROOT}/pyproject.toml", "rb") as f:
        table = tomllib.load(f)["tool"]["setuptools"]
    assert table == {"packages": [], "py-modules": []}
