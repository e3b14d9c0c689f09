"""What the README tells a newcomer to type works, on a tiny run in place of the trained one."""
import os
import re
import shlex
import shutil
import tomllib

import numpy as np
import pytest
import soundfile as sf

from conftest import ROOT, engine, run, write

with open(f"{ROOT}/README.md", encoding="utf8") as f:
    README = f.read()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines()
            if re.match(r"    (\.venv/bin/)?python ", line)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
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


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


def test_the_commands_of_the_readme_run_in_order(place):
    """data.py, flite.py and train.py (shortened), sample.py: as written but for the
    paths.
    """
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        words = [w.replace("RECORDINGS", f"{place}/recordings")
                 .replace("data/flite", f"{place}/flite") for w in words]
        words = [re.sub("out/(quickstart|audiocalm_quick|flite_tts)", f"{place}/run", w)
                 for w in words]
        if words[:2] == ["-m", "corpora.flite"]:
            if engine is None:
                continue
            words += ["--hours", "0.001", "--voices", "slt", "--processes", "1"]
        words = [f"{place}/{w}" if w in ("train.jsonl", "some.wav", "out/mine", "hello.wav") else w
                 for w in words]
        if words[0] == "train.py":                   # the same command with the tiny model
            words[words.index("--config") + 1] = f"{place}/tiny.toml"
            words += ["--train.vae.steps", "1", "--train.lm.steps", "1",
                      "--train.consistency.steps", "1"]
        if words[0] == "sample.py" and "--out" not in words:
            words += ["--out", f"{place}/out.wav"]
        done = run(*words)
        assert done.returncode == 0, (command, done.stderr)


def test_files_that_the_readme_shows_exist():
    shown = (re.findall(r"\]\(([^)h][^)]*)\)", README)
             + re.findall(r"`((?:configs|assets)/[\w./]+)`", README))
    missing = [path for path in shown if not os.path.exists(f"{ROOT}/{path}")]
    assert not missing


def test_an_installation_brings_packages_but_no_module_called_data_or_train():
    """The scripts run from a checkout: `pip install -e .[eval]` installs what they need."""
    with open(f"{ROOT}/pyproject.toml", "rb") as f:
        table = tomllib.load(f)["tool"]["setuptools"]
    assert table == {"packages": [], "py-modules": []}
