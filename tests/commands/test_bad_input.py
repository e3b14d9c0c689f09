"""Every mistake of a user: one line on stderr that names it, exit code 2, no traceback."""
import errno
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import cli as cli_module
from cli import cli
from conftest import ROOT, write


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained run, a config and audio of every bad sort."""
    folder = str(tmp_path_factory.mktemp("bad"))
    write(folder)
    done = run("train.py", "--config", f"{folder}/tiny.toml", "--stages", '["vae", "lm"]',
               "--data.prompt_frames", "0", "--train.vae.steps", "1", "--train.lm.steps", "1")
    assert done.returncode == 0, done.stderr
    tone = 0.3 * np.sin(np.arange(8000) / 10)
    nan = tone.copy()
    nan[100] = np.nan
    for name, wav in (("good", tone), ("silent", tone * 0), ("nothing", tone[:0])):
        sf.write(f"{folder}/{name}.wav", wav, 16000)
    sf.write(f"{folder}/nan.wav", nan, 16000, subtype="FLOAT")
    for name, text in (("text.wav", "hello"), ("empty.wav", ""), ("broken.toml", "a = = 1"),
                       ("unknown.toml", "[vae]\nlatent_dims = 3\n"),
                       ("type.toml", '[vae]\nlatent_dim = "many"\n'),
                       ("broken.jsonl", '{"audio": \n'),
                       ("kind.jsonl", '{"audio": "good.wav", "kind": "noise"}\n'),
                       ("backwards.jsonl", '{"audio": "good.wav", "words": '
                                           '[["a", 0.2, 0.3], ["b", 0.1, 0.2]]}\n'),
                       ("behind.jsonl", '{"audio": "good.wav", "duration": 0.5, "words": '
                                        '[["a", 0.2, 0.3], ["b", 2.1, 2.2]]}\n'),
                       ("lines.txt", "hi\n\n" + "x" * 33 + "\n"),
                       ("good.jsonl", '{"audio": "good.wav"}\n'),
                       ("words.jsonl", '{"audio": "good.wav", "words": 3}\n'),
                       ("gone.jsonl", '{"audio": "gone.wav"}\n')):
        with open(f"{folder}/{name}", "w") as f:
            f.write(text)
    os.makedirs(f"{folder}/folder.wav")
    os.makedirs(f"{folder}/corrupt")
    with open(f"{folder}/run/vae.pt", "rb") as f, open(f"{folder}/corrupt/vae.pt", "wb") as g:
        g.write(f.read()[:5000])
    os.makedirs(f"{folder}/foreign")
    torch.save({"weights": torch.zeros(3)}, f"{folder}/foreign/vae.pt")
    os.makedirs(f"{folder}/hollow")
    os.makedirs(f"{folder}/vae_only")
    shutil.copy(f"{folder}/run/vae.pt", f"{folder}/vae_only/vae.pt")
    return folder


SAMPLE = "sample.py --run {0}/run --threads 1 --out {0}/x.wav"
TRAIN = "train.py --config {0}/tiny.toml"
CASES = [  # command line, what the line must say
    ("train.py", "--config"),
    ("train.py --config {0}/none.toml", "none.toml: no such file"),
    ("train.py --config {0}/broken.toml", "not readable as TOML"),
    ("train.py --config {0}/unknown.toml", "vae.latent_dims: unknown key; valid:"),
    ("train.py --config {0}/type.toml", "vae.latent_dim: expected int, got 'many'"),
    (TRAIN + " --vae.encoder fft", "vae.encoder: unknown 'fft'; valid: conv, stft"),
    (TRAIN + " --vae.ratios [4,7,4,4]", "stft_hop"),
    (TRAIN + " --lm.backbone.heads 3", "lm.backbone.heads"),
    (TRAIN + " --lm.head.objective diffusion", "objective"),
    (TRAIN + " --stages [\"tts\"]", "stages"),
    (TRAIN + " --device tpu", "device: unknown 'tpu'; valid: auto, cuda"),
    (TRAIN + " --train.lm.batch 0", "train.lm.batch: must lie in 1 .. 1000000, got 0"),
    (TRAIN + " --train.vae.micro_batch 3", "micro_batch: must divide batch"),
    (TRAIN + " --lm.noise 2.0", "lm.noise: must lie in 0 .. 1"),
    (TRAIN + " --lm.noise", "--lm.noise: needs a value"),
    (TRAIN + " fast", "'fast': expected --section.key value"),
    (TRAIN + " --vae.latent_dim 9",
     "trained with [vae] latent_dim = 4, the config now says latent_dim = 9"),
    (TRAIN + " --out {0}/new --stages [\"lm\"]", "new has no vae yet; put vae before them"),
    (TRAIN + " --out {0}/good.wav/x", "cannot be made"),
    (TRAIN + " --out {0}/new --data.manifest {0}/none.jsonl", "none.jsonl"),
    (TRAIN + " --out {0}/new --data.manifest {0}/broken.jsonl", "broken.jsonl"),
    (TRAIN + " --out {0}/new --data.manifest {0}/kind.jsonl", "noise"),
    (TRAIN + " --out {0}/new --data.manifest {0}/gone.jsonl", "gone.wav"),
    ("sample.py --run {0}/none --text hi", "no such folder"),
    (SAMPLE + " --text hi --fast graph", "--fast graph: is for --device cuda, not cpu"),
    (SAMPLE + " --text hi --fast compile --int8", "--int8: its matrices cannot be compiled"),
    ("-m tools.bench sample --device cpu --fast graph", "--fast graph: is for --device cuda"),
    ("sample.py --run {0}/hollow --text hi", "vae.pt: no such checkpoint"),
    ("sample.py --run {0}/corrupt --text hi", "not a readable checkpoint"),
    ("sample.py --run {0}/foreign --text hi", "not a nanoCALM checkpoint"),
    (SAMPLE, "give --text, --prompt or both"),
    (SAMPLE + " --text=", "--text: is empty"),
    (SAMPLE + " --text hi --kind noise", "invalid choice: 'noise'"),
    (SAMPLE + " --text hi --stage consistency", "has no 'consistency'; it has lm"),
    (SAMPLE + " --text " + "x" * 33, "is longer than this run was trained on"),
    (SAMPLE + " --kind sound --text " + "x" * 33, "33 bytes are more than this run was trained on"),
    (SAMPLE + " --text hi --seconds 0", "--seconds: must be a number above 0, got 0"),
    (SAMPLE + " --text hi --steps -1", "--steps: must be a whole number in 1 .. inf, got -1"),
    (SAMPLE + " --text hi --temperature -1", "--temperature: must be a number in 0 .. inf, got -1"),
    (SAMPLE + " --text hi --noise 2", "--noise: must be a number in 0 .. 1, got 2"),
    (SAMPLE + " --text hi --device cuda:99", "--device cuda:99: not available"),
    (SAMPLE + " --text hi --out {0}/good.wav/x.wav", "x.wav: cannot be written"),
    (SAMPLE + " --text hi --out {0}", "is a folder; name a .wav in it"),
    (SAMPLE + " --text hi --out=", "has an empty name"),
    (SAMPLE + " --texts {0}/lines.txt", "lines.txt, text 2: 'xxx"),
    ("sample.py --run {0} --text hi", "is a folder of runs; give one, e.g. {0}/corrupt"),
    ("evaluate.py --run {0}/run --what lm --manifest {0}/good.jsonl",
     "no held-out clip has a text to generate from"),
    ("-m corpora.scan check {0}/behind.jsonl", "'b' begins at 2.1 s, and the clip has 0.5 s"),
    (SAMPLE + " --text hi --out {0}/folder.wav", "folder.wav: is a folder"),
    (SAMPLE + " --text hi\udcff", "--text: is not UTF-8 at character 3"),
    (SAMPLE + " --text hi --out {0}/\udcff.wav", "--out: is not UTF-8"),
    (SAMPLE + " --prompt {0}/good.wav --text ho --prompt-text \ud800",
     "--prompt-text: is not UTF-8"),
    (SAMPLE + " --text hi --prompt-seconds 1", "--prompt-seconds: is for a --prompt without"),
    (SAMPLE + " --prompt {0}/none.wav", "none.wav"),
    (SAMPLE + " --prompt {0}/text.wav", "text.wav"),
    (SAMPLE + " --prompt {0}/empty.wav", "empty.wav"),
    (SAMPLE + " --prompt {0}/nothing.wav", "nothing.wav"),
    (SAMPLE + " --prompt {0}/nan.wav", "nan.wav"),
    (SAMPLE + " --prompt {0}/silent.wav", "silent.wav"),
    (SAMPLE + " --prompt {0}/good.wav --text hi", "trained without voice prompts"),
    (SAMPLE + " --prompt-text hi --text ho", "--prompt-text: needs --prompt"),
    ("evaluate.py --run {0}/none", "no such folder"),
    ("evaluate.py --run {0}/run --manifest {0}/gone.jsonl", "gone.wav"),
    ("evaluate.py --run {0}/run --repeats 0",
     "--repeats: must be a whole number in 1 .. inf, got 0"),
    ("evaluate.py --run {0}/run --metrics mos", "--metrics: unknown 'mos'; valid: pesq"),
    ("-m tools.convert mimi {0}/none.safetensors --out {0}/c", "no such file"),
    ("-m tools.convert mimi {0}/good.wav --out {0}/c", "not a readable .safetensors file"),
    ("-m tools.convert mimi {0}/good.wav --out {0}/run", "vae.pt exists"),
    (SAMPLE + " --text hi --threads -1", "-1 is no number of CPU threads"),
    ("-m tools.studies continue --run {0}/run", "judges whole seconds of new audio"),
    ("evaluate.py --run {0}/run --threads -1", "-1 is no number of CPU threads"),
    ("train.py --config {0}/tiny.toml --threads -1", "threads: must lie in 0 .. 1024"),
    ("-m corpora.scan check {0}/backwards.jsonl", "times of words must not go backwards"),
    ("-m tools.bench vae --config {0}/tiny.toml --repeats 0",
     "--repeats: must be a whole number in 1 .. inf, got 0"),
    ("-m tools.bench vae --config {0}/none.toml", "no such file"),
    ("-m tools.bench audiocalm --config {0}/tiny.toml --lengths 5 0",
     "--lengths: must be a number above 0, got 0"),
    ("-m tools.bench audiocalm --config {0}/tiny.toml --peer moshi",
     "unrecognized arguments: --peer moshi"),
    ("train.py --config {0}/tiny.toml --fresh --train.vae.optimizer sgd", "unknown 'sgd'; valid"),
    ("train.py --config {0}/tiny.toml --out {0}/d --vae.teacher {0}/none "
     "--vae.loss_weights.distill 1", "cannot be loaded"),
    ("-m corpora.scan scan {0}/none --out {0}/m.jsonl", "none"),
    # found by a newcomer
    (SAMPLE + " --text hi --threads 100000", "100000 is no number of CPU threads"),
    (SAMPLE + " --text hi --seed 99999999999999999999", "--seed"),
    (TRAIN + " --sample.temperature -1", "sample.temperature: must be at least 0"),
    (TRAIN + " --sample.noise 1.5", "sample.noise: must lie in 0 .. 1"),
    (TRAIN + " --train.consistency.teacher true --lm.head.objective rectified_flow "
     "--stages vae,lm,consistency",
     "train.consistency.teacher: is for lm.head.objective"),
    (TRAIN + " --train.consistency.teacher true --lm.head.objective consistency "
     "--stages vae,lm,consistency", "not \"consistency\"; set it to false"),
    (TRAIN + " --train.consistency.teacher false --train.consistency.guidance 2",
     "train.consistency.guidance: needs train.consistency.teacher = true"),
    (TRAIN + " --sample.texts.speach hi", "sample.texts"),
    (TRAIN + " --vae.loss_windows [0]", "gan.loss_windows: must lie in 8 .. 1000000, got 0"),
    (TRAIN + " --vae.context -1", "vae.context: must lie in 0 .. 100000, got -1.0"),
    (TRAIN + " --vae.loss_weights.mel -1", "gan.loss_weights.mel: must be at least 0"),
    (TRAIN + " --train.vae.betas [1.0,2.0]",
     "train.vae.betas: must be at least 0 and below 1, got 1.0"),
    (TRAIN + " --train.vae.weight_decay -1",
     "train.vae.weight_decay: must be at least 0, got -1.0"),
    (TRAIN + " --data.valid {0}/none.jsonl", "data.valid"),
    (TRAIN + " --out {0}/new --train.lm.init {0}/none.pt",
     "none.pt: no such checkpoint; train that run first"),
    (TRAIN + " --fre", "--fre: needs a value"),
    (TRAIN + " --out=", "out: names the run folder, it is empty"),
    ("-m corpora.scan describe {0}/good.jsonl --out {0}/x.jsonl --rewritten {0}/none.jsonl",
     "none.jsonl: cannot be read"),
    ("-m corpora.scan check {0}/words.jsonl", "words must be [[word, start, end], ...]; it is 3"),
    ("-m tools.studies sweep --run {0}/run --setting noise --values 0,1.5",
     "--values 0,1.5: must be a number in 0 .. 1, got 1.5"),
    ("-m tools.studies sweep --run {0}/run --setting steps --values 1.5",
     "--values 1.5: must be a whole number in 1 .. inf, got 1.5"),
    ("-m tools.studies sweep --run {0}/run", "--setting"),
    ("-m tools.studies draws --run {0}/run --repeats 1",
     "--repeats: must be a whole number in 2 .. inf, got 1"),
    ("-m tools.studies draws --run {0}/vae_only", "has no language model"),
    ("-m tools.studies", "required: sweep|continue|draws"),
    ("evaluate.py --run {0}/run --what continue", "invalid choice: 'continue'"),
    ("evaluate.py --run {0}/run --wavs {0}/good.wav", "overview.png: cannot be written"),
    ("evaluate.py --run {0}/run --temperature nan",
     "--temperature: must be a number in 0 .. inf, got nan"),
    ("evaluate.py --run {0}/vae_only --what lm", "has no language model"),
    ("evaluate.py --run {0}/run --stage lm2", "has no 'lm2'"),
    ("evaluate.py --run {0}/run --json {0}/good.wav/x.json", "x.json: cannot be written"),
    ("evaluate.py --run {0}/run --json {0}", "is a folder; name a file in it"),
    ("report.py losses {0}/run --out {0}", "is a folder; name a file in it"),
    ("report.py mask {0}", "is a folder; name a file in it"),
    ("-m tools.ablate configs/ablation.toml toy --json {0}/good.wav/x.json",
     "x.json: cannot be written"),
    ("-m tools.bench vae --config {0}/tiny.toml --json {0}/good.wav/x.json",
     "x.json: cannot be written"),
    ("-m corpora.align {0}/none.jsonl --out {0}/a.jsonl", "none.jsonl: no such manifest"),
    ("-m corpora.toy --say bonjour --out {0}/x.wav", "bonjour"),
    ("-m corpora.toy --out {0}/t --voices 99", "voices"),
]


@pytest.mark.parametrize("command, says", CASES, ids=[c[:90] for c, _ in CASES])
def test_a_mistake_is_answered_with_one_line_and_exit_code_2(
        place, monkeypatch, capsys, command, says):
    """In this process, as `python <script>` does it: one import of torch instead of fifty."""
    script, *arguments = [part.format(place) for part in command.removeprefix("-m ").split(" ")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    name = script.removesuffix(".py")
    if os.path.isdir(name.replace(".", "/")):            # a package: its __main__.py is what runs
        name += ".__main__"
    with pytest.raises(SystemExit) as end:
        cli(importlib.import_module(name).main)
    # no progress bars
    lines = [line for line in capsys.readouterr().err.split("\n") if line and "\r" not in line]
    assert end.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert says.format(place) in lines[0]


@pytest.mark.parametrize("name, commands", [
    ("adaln", ["train", "sample", "evaluate"]), ("layers", ["train", "sample", "evaluate"]),
    ("moe", ["train", "sample", "evaluate"]), ("optim", ["train"]), ("judges", ["evaluate"])])
def test_a_file_that_is_no_command_says_who_uses_it(name, commands):
    """Fault: `python heads.py -h` printed nothing."""
    done = run(f"{name}.py", "-h")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name}.py is a library, used by ")
    users = [name for name in ("train", "sample", "evaluate") if f"{name}.py" in done.stdout]
    assert users == commands and len(done.stdout.splitlines()) == 1


def test_every_file_that_is_no_command_imports_what_says_so():
    """Fault: adaln.py and layers.py did not."""
    files = [path for path in Path(ROOT).glob("*.py")
             if path.name != "cli.py" and not cli_module.is_command(path)]
    assert len(files) > 15
    assert [path.name for path in files if "cli" not in cli_module.imported(path)] == []


def test_a_full_disk_is_one_line(tmp_path, capsys):
    """Fault: a traceback."""
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "out/run/vae.pt")
    with pytest.raises(SystemExit) as end:
        cli(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == ("error: out/run/vae.pt: No space left on device; make room "
                                       "and run the command again\n")


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_a_missing_package_is_named_in_one_line(script):
    """Fault: without the environment a newcomer got a traceback."""
    without = ("import runpy, importlib.util as u; find = u.find_spec; "
               "u.find_spec = lambda name: None if name in ('torch', 'soxr') else find(name); "
               f"runpy.run_path('{script}', run_name='__main__')")
    done = run("-c", without)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: torch, soxr not installed in ")
    assert "source .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_is_a_word_and_130(script):
    """Fault: in the first two seconds it printed fifteen lines of traceback."""
    # the signal comes where torch is about to be imported; a shell's background job ignores it
    pressed = ("import builtins, os, runpy, signal, sys; load = builtins.__import__; "
               "signal.signal(signal.SIGINT, signal.default_int_handler); "
               "builtins.__import__ = lambda name, *rest: (name == 'torch' and "
               "os.kill(os.getpid(), signal.SIGINT), load(name, *rest))[1]; "
               f"sys.argv[1:] = ['--run', 'none']; runpy.run_path('{script}', run_name='__main__')")
    done = run("-c", pressed)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_the_shell_sees_exit_code_2_and_no_traceback():
    done = run("train.py", "--config", "none.toml")
    assert (done.returncode == 2
            and done.stderr == "error: config none.toml: no such file; see configs/\n")
