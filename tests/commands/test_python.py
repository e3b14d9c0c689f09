"""A run from Python, and what the command line does with the same object."""
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch

import output
import sample
from audio import FORMATS, from_array, save_audio
from cli import BadInput
from conftest import ROOT
from generate import Voice, drop_front
from sample import load
from tools.convert import __main__ as convert
from untrained import untrained_run

LONG = "one two three four. five six seven eight. nine one two three four"     # two pieces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    untrained_run(folder)
    sf.write(folder / "ref.wav", 0.3 * np.sin(np.arange(32000) / 9), 16000, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(f"{folder}/run", device="cpu")


def speak(folder, monkeypatch, *arguments, out="x.wav"):
    """sample.py in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--run", f"{folder}/run", "--seconds", "0.4",
                                      "--device", "cpu", *arguments,
                                      *(["--out", f"{folder}/{out}"] if out else [])])
    sample.main()


# ---------------------------------------------------------------- the object

def test_say_gives_what_the_command_line_writes_and_stream_the_same_in_pieces(
        model, folder, monkeypatch):
    wav = model.say(LONG, seed=3)
    assert wav.dtype == np.float32 and wav.ndim == 1 and 0 < np.abs(wav).max() <= 1
    pieces = list(model.stream(LONG, seed=3))
    assert len(pieces) > 4
    np.testing.assert_array_equal(np.concatenate(pieces), wav)

    speak(folder, monkeypatch, "--text", LONG, "--seed", "3")
    np.testing.assert_allclose(sf.read(folder / "x.wav")[0], wav, atol=1 / 32768)


def test_a_list_gives_a_list_in_its_order(model):
    texts = ["two", LONG, "six", "three"]
    together = model.say(texts, seed=3)
    assert len(together) == 4 and all(wav.ndim == 1 for wav in together)
    np.testing.assert_array_equal(together[1], model.say(LONG, seed=3 + 1))
    np.testing.assert_allclose(together[3], model.say("three", seed=3 + 3), atol=1e-4)
    np.testing.assert_allclose(model.say(["six"], seed=3)[0], model.say("six", seed=3), atol=1e-4)
    assert model.say([]) == []


def test_texts_of_one_length_are_generated_together(model, monkeypatch):
    rows = []
    generate = model.lm.generate
    monkeypatch.setattr(model.lm, "generate", lambda text, **options: rows.append(len(text))
                        or generate(text, **options))
    model.say(["two", "three", "six", "one"])
    assert rows == [3, 1]


def test_a_continuation_begins_with_the_end_of_the_recording(model, folder):
    path = f"{folder}/ref.wav"
    wav = sf.read(path, dtype="float32")[0]
    longer = model.continue_(path, seconds=0.2, prompt_seconds=0.5, seed=1)
    assert 13 * 640 + 640 <= len(longer) <= (13 + 5) * 640        # 13 latents hold 0.5 s
    np.testing.assert_array_equal(
        longer, model.continue_(wav, seconds=0.2, prompt_seconds=0.5, seed=1))
    np.testing.assert_allclose(longer[:13 * 640 - 480], model.continue_(
        np.repeat(wav, 2), sample_rate=32000, seconds=0.2, prompt_seconds=0.5)[:13 * 640 - 480],
        atol=0.02)


def test_words_after_a_prompt_are_heard_alone(model, folder):
    pieces = list(model.stream("two", prompt=f"{folder}/ref.wav", prompt_text="one", seed=3))
    assert sum(map(len, pieces)) <= 0.4 * 16000
    front = list(drop_front([(np.arange(12).reshape(2, 6), 0), (np.ones((2, 3)), 1)], 7))
    assert [(piece.shape, extra) for piece, extra in front] == [((2, 0), 0), ((2, 2), 1)]


def test_a_voice_is_a_handle_or_its_recording(model, folder):
    voice = model.voice(f"{folder}/ref.wav")
    assert isinstance(voice, Voice) and voice.latents.shape == (1, 4, 4) and voice.speech == 0.16
    array = sf.read(folder / "ref.wav", dtype="float32")[0]
    for same in (array, array[None], torch.tensor(array)):
        assert torch.equal(model.voice(same).latents, voice.latents)
    assert model.voice(array, seconds=0.08).latents.shape == (1, 2, 4)
    one, other = model.say(["two", "two"], voice=voice)
    assert len(one) >= 640 and len(other) >= 640


def test_defaults_are_the_runs_own_and_can_be_changed(model, monkeypatch):
    assert (model.defaults["steps"], model.defaults["temperature"]) == (2, 0.8)
    seen = []
    generate = model.lm.generate
    monkeypatch.setattr(model.lm, "generate", lambda text, **options: seen.append(
        (options["steps"], options["temperature"])) or generate(text, **options))
    model.say("two", steps=3, temperature=None)
    monkeypatch.setitem(model.defaults, "temperature", 0.5)
    model.say("two")
    assert seen == [(3, 0.8), (2, 0.5)]


@pytest.mark.parametrize("arguments, says", [
    ({"text": " "}, "--text: is empty"), ({"text": "a" * 99}, "longer than this run was trained"),
    ({"text": "two", "kind": "smell"}, "--kind smell: .* was trained on"),
    ({"text": "two", "guide": 2.0}, "guide: is no option; choose from steps, temperature"),
    ({"text": "two", "voice": np.zeros(9000)}, r"--prompt \(an array\): is silent"),
    ({"text": "two", "voice": "none.wav"}, "none.wav: no such audio file"),
    ({"text": "two", "voice": np.full(9000, np.nan)}, "array: holds NaN"),
    ({"text": None, "prompt": np.zeros((9000, 2))}, "is no waveform")])
def test_a_mistake_is_told_when_the_method_is_called(model, arguments, says):
    """Not at the first piece of the stream."""
    with pytest.raises(BadInput, match=says):
        model.stream(**arguments)


def test_an_array_is_read_as_a_file_is(tmp_path):
    pcm = np.array([0, 16384, -32768, 32767], np.int16)
    assert from_array(pcm, 8000, 8000).tolist() == [[0, 0.5, -1, 32767 / 32768]]
    stereo = np.stack([np.ones(400), np.zeros(400)]).astype(np.float32)
    assert from_array(stereo, 8000, 8000, 1)[0, 0] == 0.5
    assert from_array(stereo, 8000, 16000, 2).shape == (2, 800)
    for wrong in (np.zeros((400, 2)), np.zeros(0), np.zeros((1, 2, 3)), np.array(["a"])):
        with pytest.raises(BadInput, match="is no waveform"):
            from_array(wrong, 8000, 8000)


# ---------------------------------------------------------------- files

def test_every_format_holds_the_samples_and_names_the_model(model, folder, monkeypatch):
    wav = model.say("two", seed=3, seconds=0.4)
    assert model.comment == "synthetic audio, generated by the nanoCALM model run (lm)"
    for suffix in FORMATS:
        speak(folder, monkeypatch, "--text", "two", "--seed", "3", out=f"f.{suffix}")
        if suffix == "raw":
            found = np.fromfile(folder / "f.raw", "<i2") / 32768
        else:
            with sf.SoundFile(folder / f"f.{suffix}") as file:
                assert file.comment == model.comment and file.software.startswith("nanoCALM")
                found = file.read()
        np.testing.assert_allclose(found, wav, atol=0.05 if suffix == "ogg" else 1 / 32768)

    for arguments in ([], ["--stream"]):
        speak(folder, monkeypatch, "--text", "two", "--no-comment", *arguments)
        assert sf.SoundFile(folder / "x.wav").comment == ""
        assert (folder / "x.wav").read_bytes()[36:40] == b"data"


def test_a_long_ogg_is_written(tmp_path):
    """libsndfile's Vorbis encoder overflows its stack with millions of samples in one call."""
    save_audio(tmp_path / "long.ogg", torch.zeros(1, 3_000_000), 16000)
    assert sf.info(tmp_path / "long.ogg").frames == 3_000_000


def test_sample_wav_is_not_overwritten_where_no_name_is_given(folder, tmp_path, monkeypatch):
    """Fault: a second call without --out replaced the first one's sample.wav."""
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        speak(folder, monkeypatch, "--text", "two", out=None)
    speak(folder, monkeypatch, "--text", "two", "--format", "flac", out=None)
    (tmp_path / "lines").write_text("one\ntwo")
    for _ in range(2):
        speak(folder, monkeypatch, "--texts", "lines", out=None)
    assert sorted(os.listdir(tmp_path)) == [
        "lines", "sample.flac", "sample.wav", "sample1.wav", "sample1_1.wav", "sample1_2.wav",
        "sample2.wav", "sample_1.wav", "sample_2.wav"]


def test_each_line_of_a_file_becomes_a_file(folder, monkeypatch, tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\n  two \nthree", encoding="utf8")
    speak(folder, monkeypatch, "--texts", f"{tmp_path}/lines.txt", "--seed", "3", out="l.flac")
    speak(folder, monkeypatch, "--text", "two", "--seed", "3", out="two.flac")
    files = [sf.read(folder / f"l_{i}.flac")[0] for i in (1, 2, 3)]
    np.testing.assert_array_equal(files[1], sf.read(folder / "two.flac")[0])
    assert output.numbered_names("a.wav", 10)[0] == "a_01.wav"


@pytest.mark.parametrize("arguments, says", [
    (["--texts", "none.txt"], "--texts none.txt: cannot be read"),
    (["--texts", "/dev/null"], "has no line of text"),
    (["--texts", f"{ROOT}/assets/table6.png"], "is not UTF-8"),
    (["--texts", "a", "--text", "b"], "--texts: give it or --text, not both"),
    (["--text", "b", "--out", "x.mp3"], "x.mp3: only .wav, .flac, .ogg, .raw are written"),
    (["--text", "b", "--out", "x.flac", "--stream"], "--stream: writes wav or raw, not flac"),
    (["--text", "b", "--out", "/dev/null", "--play"], "--play: needs files"),
    (["--text", "b", "--device", "cuda:99"], "--device cuda:99: not available here")])
def test_an_option_that_cannot_be_is_one_line(arguments, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--run", "x", *arguments])
    with pytest.raises(BadInput, match=says):
        sample.parse()


def test_raw_samples_go_through_a_pipe_alone(folder, model):
    done = subprocess.run([sys.executable, "sample.py", "--run", f"{folder}/run", "--text", "two",
                           "--seed", "3", "--out", "-", "--format", "raw", "--stream", "--device",
                           "cpu"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and b"16-bit little-endian samples, 16000 Hz" in done.stderr
    expected = np.round(model.say("two", seed=3) * np.float32(32767)).astype("<i2")
    assert done.stdout == expected.tobytes()


def test_a_player_that_is_there_plays_and_one_line_tells_where_none_is(
        folder, tmp_path, monkeypatch, capsys):
    def player(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)

    monkeypatch.setenv("PATH", str(tmp_path))
    speak(folder, monkeypatch, "--text", "two", "--play")
    assert "--play: none of aplay, afplay, ffplay, play is installed" in capsys.readouterr().out

    player("aplay", f'echo "$@" >> {tmp_path}/heard')
    speak(folder, monkeypatch, "--text", "two", "--play")
    assert (tmp_path / "heard").read_text() == f"-q {folder}/x.wav\n"
    assert "--play" not in capsys.readouterr().out

    player("play", "echo no sound card >&2; exit 3")
    speak(folder, monkeypatch, "--text", "two", "--play", out="x.flac")
    assert "--play: play could not play" in capsys.readouterr().out
    assert (tmp_path / "heard").read_text().count("\n") == 1      # aplay knows .wav alone


# ---------------------------------------------------------------- weights from the hub

def test_a_model_of_the_hub_is_taken_from_the_cache(folder, model, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    repository = tmp_path / "models--me--voice"
    monkeypatch.setattr(sys, "argv", ["convert", "export", f"{folder}/run", "--dtype", "fp32",
                                      "--out", f"{repository}/snapshots/{40 * 'a'}"])
    convert.main()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(40 * "a")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    for name in ("hf://me/voice", "hf://me/voice@main", f"hf://me/voice@{40 * 'a'}"):
        found = load(name, device="cpu")
        np.testing.assert_array_equal(found.say("two"), model.say("two"))
    assert "model me/voice@aaaa" in found.comment
    for name in ("hf://me/voice@v2", "hf://me/none"):
        with pytest.raises(BadInput, match=f"{name}: cannot be fetched"):
            load(name, device="cpu")


def test_a_name_that_is_none_and_a_missing_package_are_one_line(monkeypatch):
    for name in ("hf://voice", "hf://a/b/c", "hf://../voice@", "hf://"):
        with pytest.raises(BadInput, match="is no name of a model; write hf://user/repo"):
            load(name, device="cpu")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"the package huggingface_hub; pip install -e .\[hf\]"):
        load("hf://me/voice", device="cpu")
