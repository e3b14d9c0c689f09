"""sample.py and evaluate.py as a user calls them."""
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import unicodedata
import wave

import numpy as np
import pytest
import soundfile as sf
import torch

import sample as sample_script
import train
from calm import CALM
from cli import BadInput, Failure
from config import Config, build, open_run
from conftest import ROOT, run, write
from generate import to_int8
from output import Output
from sentences import sentences, texts_to_generate


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("trained"))
    done = run("train.py", "--config", write(folder), "--stages", '["vae", "lm"]',
               "--train.vae.steps", "2", "--train.lm.steps", "2")
    assert done.returncode == 0, done.stderr
    t = np.arange(16000) / 16000
    sf.write(f"{folder}/ref.wav", 0.3 * np.sin(2 * np.pi * 300 * t), 16000)
    return folder


def sample(folder, *arguments, out="x.wav"):
    done = run("sample.py", "--run", f"{folder}/run", "--threads", "1", "--seconds", "0.4",
               "--out", f"{folder}/{out}", *arguments)
    assert done.returncode == 0, done.stderr
    assert "x real time" in done.stdout and "first audio after" in done.stdout
    return sf.read(f"{folder}/{out}")[0]


def test_text_of_every_kind_becomes_sound_of_the_asked_length_at_most(trained):
    for kind in ("speech", "sound", "music"):
        wav = sample(trained, "--text", "two", "--kind", kind)
        assert 640 <= len(wav) <= 6400 and np.isfinite(wav).all()


def test_streaming_writes_the_same_samples(trained):
    """Also into a folder that is made for it. Fault: only without --stream was it made."""
    plain = sample(trained, "--text", "two", "--seed", "3")
    stream = sample(trained, "--text", "two", "--seed", "3", "--stream", out="new/a/stream.wav")
    np.testing.assert_allclose(stream, plain, atol=2 / 32768)


def test_a_streamed_file_is_a_whole_wav_after_every_piece(tmp_path):
    """Fault: until the end, and after a kill, its header said 0 samples."""
    path = str(tmp_path / "grows.wav")
    output = Output(path, 1, 16000, stream=True, comment="made by a test")
    for pieces in (1, 2):
        output.write(torch.full((1, 500), 1.5))
        with wave.open(path) as f:
            assert f.getnframes() == 500 * pieces
        assert sf.SoundFile(path).comment == "made by a test"
    output.close()
    assert sf.read(path, dtype="int16")[0].tolist() == [32767] * 1000


def test_a_stream_into_a_fifo_and_stdout_has_the_samples_of_a_file(trained):
    """Fault: "file does not start with RIFF id", and prints stood among the samples."""
    fifo = f"{trained}/fifo"
    os.mkfifo(fifo)
    heard = []
    reader = threading.Thread(target=lambda: heard.append(open(fifo, "rb").read()))
    reader.start()
    done = run("sample.py", "--run", f"{trained}/run", "--text", "two", "--seed", "3", "--seconds",
               "0.4", "--stream", "--out", fifo)
    assert done.returncode == 0 and "x real time" in done.stdout, done.stderr
    reader.join()
    piped = subprocess.run([sys.executable, "sample.py", "--run", f"{trained}/run", "--text", "two",
                            "--seed", "3", "--seconds", "0.4", "--stream", "--out", "-"], cwd=ROOT,
                           capture_output=True)
    assert piped.returncode == 0 and b"x real time" in piped.stderr
    plain = sample(trained, "--text", "two", "--seed", "3")
    for data in (*heard, piped.stdout):
        size = data.index(b"data") + 4
        assert data[4:8] == data[size:size + 4] == b"\xff" * 4
        wav = sf.read(io.BytesIO(data))[0]
        np.testing.assert_allclose(wav, plain, atol=2 / 32768)


def test_a_player_that_is_closed_ends_sampling_with_one_line(trained):
    """Fault: BrokenPipeError, a traceback."""
    child = subprocess.Popen([sys.executable, "sample.py", "--run", f"{trained}/run", "--text",
                              "two", "--stream", "--out", "-", "--seconds", "100"], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False)
    child.stdout.read(44)
    child.stdout.close()
    errors = child.stderr.read().decode()
    assert child.wait() == 1 and "its reader has gone after" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stream_that_is_killed_is_a_wav_up_to_there(trained, number):
    path = f"{trained}/killed_{number}.wav"
    child = subprocess.Popen([sys.executable, "sample.py", "--run", f"{trained}/run", "--text",
                              "two", "--stream", "--out", path, "--seconds", "100"], cwd=ROOT,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists(path) or os.path.getsize(path) < 4000:
        assert child.poll() is None
        time.sleep(0.001)
    assert sf.info(path).frames > 0                      # while it grows
    child.send_signal(number)
    assert child.wait() == -number
    wav = sf.read(path, dtype="int16")[0]
    with open(path, "rb") as f:
        header = f.read(400).index(b"data") + 8
    assert 0 <= os.path.getsize(path) - header - 2 * len(wav) <= 4 * 2 * 640
    assert not [name for name in os.listdir(trained) if name.endswith(".tmp")]


@pytest.mark.parametrize("stream", [True, False])
def test_a_latent_that_is_not_finite_is_named_and_not_played(trained, stream, monkeypatch):
    """Fault: in the file a NaN was -32768, a tone at full scale."""
    path = f"{trained}/poison_{stream}.wav"
    generate = CALM.generate

    def poisoned(self, *arguments, **options):
        for i, (x, ended) in enumerate(generate(self, *arguments, **options)):
            yield (torch.full_like(x, torch.nan) if i == 3 else x), torch.zeros_like(ended)

    monkeypatch.setattr(CALM, "generate", poisoned)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--run", f"{trained}/run", "--text", "two",
                                      "--seconds", "0.4", "--out", path]
                        + ["--stream"] * stream)
    with pytest.raises(Failure, match=r"lm: latent 3 \(0.12 s\) is not finite"):
        sample_script.main()
    assert os.path.exists(path) == stream
    if stream:
        wav = sf.read(path)[0]
        assert len(wav) == 3 * 640 - 480 and np.abs(wav).max() < 1


@pytest.mark.parametrize("stream", [True, False])
def test_peaks_are_limited_and_their_number_is_said(tmp_path, capsys, stream):
    out = Output(f"{tmp_path}/loud.wav", 1, 16000, stream=stream)
    for level in (0.5, -3.0):
        out.write(torch.full((1, 200), level))
    out.close()
    wav = sf.read(f"{tmp_path}/loud.wav")[0]
    assert np.abs(wav[:200] - 0.5).max() < 1e-4 and np.abs(wav[200:] + 1).max() < 1e-4
    assert "loud.wav: 200 samples above full scale (peak 3) were limited" in capsys.readouterr().out


def test_a_decoder_that_gives_infinity_is_named_with_the_moment(tmp_path):
    out = Output(f"{tmp_path}/inf.wav", 1, 16000, stream=True)
    out.write(torch.zeros(1, 1600))
    wav = torch.zeros(1, 1600)
    wav[..., 160] = torch.inf
    with pytest.raises(Failure, match="decoder: the audio is not finite from 0.110 s on"):
        out.write(wav)
    assert len(sf.read(f"{tmp_path}/inf.wav")[0]) == 1600


def without_roots_rights():
    """In a child: permissions hold for root too (prctl PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


@pytest.mark.long
def test_a_read_only_run_can_be_heard_judged_and_drawn(trained, tmp_path):
    """And where its picture would be written into it, one line says that it cannot."""
    shutil.copytree(f"{trained}/run", f"{tmp_path}/run")
    for folder, _, files in os.walk(f"{tmp_path}/run"):
        os.chmod(folder, 0o555)
        for name in files:
            os.chmod(f"{folder}/{name}", 0o444)

    reader = {"preexec_fn": without_roots_rights}
    for command in ("sample.py --run {0}/run --text two --seconds 0.4 --out {0}/x.wav",
                    "report.py losses {0}/run --out {0}/loss.png",
                    "evaluate.py --run {0}/run --limit 1 --repeats 1 --json {0}/f.json"):
        done = run(*command.format(tmp_path).split(), **reader)
        assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["f.json", "loss.png", "run", "x.wav"]
    refused = run("report.py", "losses", f"{tmp_path}/run", **reader)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "loss.png: cannot be written (Permission denied); correct its perm" in refused.stderr


def test_a_long_text_is_cut_behind_sentences_then_commas_then_words():
    fits = lambda text: len(text) <= 12
    pieces = sentences("One two. Three, four five, six. seven eight nine", fits)
    assert pieces == ["One two.", "Three,", "four five,", "six.", "seven", "eight nine"]
    assert sentences("One two. Three four. ".strip(), fits) == ["One two.", "Three four."]
    assert sentences("short", fits) == ["short"] and sentences("", fits) == [""]
    with pytest.raises(BadInput, match="data.text_len"):
        sentences("incomprehensibilities", fits)


def test_pieces_of_a_text_are_as_few_as_fit_and_cut_where_a_reader_would():
    """Fault: "Mr." and "e.g." ended sentences, and every short sentence was spoken by itself."""
    fits = lambda text: len(text) <= 40
    text = ("Mr. Smith paid 3.5 dollars, e.g. for J. Doe of the U.S. Army. He left. So. "
            "We did too. Yes!")
    assert sentences(text, fits) == ["Mr. Smith paid 3.5 dollars,",
                                     "e.g. for J. Doe of the U.S. Army.",
                                     "He left. So. We did too. Yes!"]
    fits = lambda text: len(text) <= 20
    assert sentences("See No. 5 there. He said no. Then Dr. Who left. Bye.", fits) == [
        "See No. 5 there.", "He said no.", "Then Dr. Who left.", "Bye."]


def test_a_text_without_spaces_is_cut_at_its_own_punctuation_and_else_between_letters():
    """Fault: long Chinese and Japanese texts were refused: one word of more than text_len bytes."""
    fits = lambda text: len(text.encode()) <= 63          # 21 letters
    assert sentences("今天天气很好。我们去公园散步吧，然后回家吃饭。" + "很" * 24, fits) == [
        "今天天气很好。", "我们去公园散步吧，然后回家吃饭。", "很" * 12, "很" * 12]
    thai = "ภาษาไทยเป็นภาษาที่ไม่มีการเว้นวรรค"
    pieces = sentences(thai, fits)
    assert "".join(pieces) == thai and all(map(fits, pieces))
    assert not any(unicodedata.category(piece[0]) == "Mn" for piece in pieces)


def generated_texts(text, kind="speech", prompt_text=None):
    cfg = build(Config, {"data": {"text_len": 20}})
    return texts_to_generate(text, kind, cfg.data, types.SimpleNamespace(monologue=False),
                             prompt_text)


def test_the_words_of_a_prompt_take_room_from_the_first_piece_alone():
    assert generated_texts(text="three four. five six seven.", prompt_text="one two") == [
        "one two three four.", "five six seven."]
    assert generated_texts(text="three.", prompt_text="one two") == ["one two three."]


def test_the_option_that_is_too_long_is_the_one_that_is_named():
    """Fault: with a long --prompt-text the error line was about --text."""
    for arguments, says in [
            ({"text": "six", "prompt_text": "x" * 21}, "--prompt-text: 21 bytes are more than"),
            ({"text": "seven", "prompt_text": "x" * 18},
             "--prompt-text: 18 bytes leave too little"),
            ({"text": "x" * 21, "prompt_text": "one"}, "--text: 'xxx.*' is longer than this run"),
            ({"text": "x" * 21, "kind": "sound"}, "--text: 21 bytes are more than"),
            ({"text": "x" * 18, "prompt_text": "one", "kind": "sound"},
             "--prompt-text and --text: 22 bytes are more than")]:
        with pytest.raises(BadInput, match=says):
            generated_texts(**arguments)


def test_a_long_text_is_spoken_sentence_by_sentence(trained):
    one = sample(trained, "--text", "two", out="one.wav")
    long = sample(trained, "--text", "two. one two one two, one two one two one two one two. one",
                  out="long.wav")
    assert len(one) < len(long)


def test_a_prompt_is_continued_and_stands_at_the_front(trained):
    wav = sample(trained, "--prompt", f"{trained}/ref.wav", "--kind", "sound",
                 "--prompt-seconds", "0.5", out="c.wav")
    assert 0.52 * 16000 + 640 <= len(wav) <= (0.52 + 0.4) * 16000
    other = sample(trained, "--prompt", f"{trained}/ref.wav", "--kind", "sound",
                   "--prompt-seconds", "0.5", "--seed", "1", out="d.wav")
    lead = 8320 - 480                                # 13 latents, less what the decoder owes
    np.testing.assert_allclose(wav[:lead], other[:lead], atol=2 / 32768)


def test_a_prompt_with_text_lends_its_voice_or_is_continued_by_the_new_words(trained):
    voice = sample(trained, "--prompt", f"{trained}/ref.wav", "--text", "two", out="v.wav")
    after = sample(trained, "--prompt", f"{trained}/ref.wav", "--prompt-text", "one",
                   "--text", "two", out="a.wav")
    assert len(voice) <= 6400 and len(after) <= 6400


def test_evaluation_prints_a_table_and_writes_figures(trained):
    done = run("evaluate.py", "--run", f"{trained}/run", "--limit", "2", "--repeats", "1",
               "--threads", "1", "--json", f"{trained}/f.json", "--wavs", f"{trained}/wavs")
    assert done.returncode == 0, done.stderr
    assert "reconstruction: facts right" in done.stdout and "chance" in done.stdout
    with open(f"{trained}/f.json") as f:
        figures = json.load(f)
    assert figures["vae"]["speech"]["original"] >= 0.9      # the oracle understands the synthesiser
    assert (set(figures["lm"]["facts"]) <= {"speech", "sound", "music"}
            and figures["lm"]["steps"] == 20)
    with open(f"{trained}/wavs/lm/speech.jsonl") as f:
        made = [json.loads(line) for line in f]
    assert len(made) == 2 and all(os.path.exists(f"{trained}/wavs/lm/{m['audio']}") for m in made)


@pytest.fixture(scope="module")
def universal(trained, tmp_path_factory):
    """AudioCALM on the VAE of the other run."""
    folder = str(tmp_path_factory.mktemp("universal"))
    config = write(folder)
    shutil.copytree(f"{trained}/run/toy", f"{folder}/run/toy")
    shutil.copy(f"{trained}/run/vae.pt", f"{folder}/run/vae.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--config", config, "--stages",
                                    '["vae", "audiocalm", "audiocalm_lsd"]',
                                    "--train.vae.steps", "2", "--train.audiocalm_lsd.batch", "4",
                                    "--train.audiocalm_lsd.steps", "1"])
        train.main()
    return folder


def test_audiocalm_trains_as_a_stage_and_speaks_through_the_same_commands(
        universal, monkeypatch, capsys):
    with open(f"{universal}/run/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    assert {"head", "stop", "valid_head_speech"} <= set().union(
        *(row for row in rows if row["stage"] == "audiocalm"))
    wavs = {}
    for name, more in (("plain", []), ("stream", ["--stream"]),
                       ("guided", ["--cfg", "2", "--steps", "2", "--kind", "music"]),
                       ("fast", ["--stage", "audiocalm_lsd", "--cfg", "2"])):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--run", f"{universal}/run", "--text", "two",
                                          "--seconds", "0.4", "--out", f"{universal}/x.wav",
                                          "--stage", "audiocalm"] + more)
        sample_script.main()
        assert "from audiocalm" in capsys.readouterr().out
        wavs[name] = sf.read(f"{universal}/x.wav")[0]
    np.testing.assert_allclose(wavs["stream"], wavs["plain"], atol=2 / 32768)
    assert 640 <= len(wavs["guided"]) <= 6400 and np.isfinite(wavs["guided"]).all()


def test_the_speech_expert_stays_on_disk_when_sound_or_music_is_asked_for(universal):
    size = lambda kind: sum(p.numel() for p in
                            open_run(f"{universal}/run", kind=kind)[2].parameters())
    assert size("speech") == size(None)
    assert size("sound") == size("music") == size(None) - 3 * 16 * 16


def test_audiocalm_is_judged_like_the_others(universal):
    done = run("evaluate.py", "--run", f"{universal}/run", "--what", "lm", "--limit", "1",
               "--repeats", "1", "--threads", "1", "--json", f"{universal}/f.json",
               "--stage", "audiocalm")
    assert done.returncode == 0, done.stderr
    with open(f"{universal}/f.json") as f:
        found = json.load(f)["audiocalm"]
    assert found["objective"] == "rectified_flow" and found["steps"] == 20
    assert set(found["length"]) == {"speech", "sound", "music"}


def test_int8_rounds_the_matrices_for_which_it_pays_and_says_so(trained, capsys, monkeypatch):
    """Fault: --int8 rounded matrices of any size; those of small models became slower (6.7 against
    12.2 times real time).
    """
    layers = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(255, 256))
    model = types.SimpleNamespace(matrices=lambda: [layers])
    assert to_int8(model) == 1
    assert [type(layer) is torch.nn.Linear for layer in layers] == [False, True]

    monkeypatch.setattr(sys, "argv", ["sample.py", "--run", f"{trained}/run", "--text", "two",
                                      "--int8", "--seconds", "0.4", "--out", f"{trained}/x.wav"])
    sample_script.main()
    assert "--int8: no matrix has 65536 weights" in capsys.readouterr().out


@pytest.mark.long
def test_int8_and_a_decoding_thread_give_sound_too(trained):
    plain = sample(trained, "--text", "two", "--seed", "3")
    thread = sample(trained, "--text", "two", "--seed", "3", "--parallel", out="p.wav")
    np.testing.assert_allclose(thread, plain, atol=2 / 32768)
    rounded = sample(trained, "--text", "two", "--seed", "3", "--int8", out="i.wav")
    assert np.isfinite(rounded).all() and len(rounded) >= 640


@pytest.mark.long
def test_in_fixed_memory_a_long_text_sounds_the_same(trained):
    text = "one two three four, five six seven eight, nine one two three"       # several pieces
    plain = sample(trained, "--text", text, "--seed", "3")
    fixed = sample(trained, "--text", text, "--seed", "3", "--fast", "static", out="f.wav")
    np.testing.assert_allclose(fixed, plain, atol=2 / 32768)


def test_sampling_is_timed_end_to_end(trained):
    done = run("-m", "tools.bench", "sample", "--config", f"{trained}/tiny.toml", "--repeats",
               "1", "--seconds", "0.4", "--threads", "1", "--json", f"{trained}/b.json")
    assert done.returncode == 0, done.stderr
    with open(f"{trained}/b.json") as f:
        figures = json.load(f)
    assert set(figures) == {"nanoCALM", "nanoCALM, parallel", "latent by latent", "static",
                            "nanoCALM int8", "nanoCALM int8, parallel"}
    for row in figures.values():
        assert min(row.values()) > 0
        assert row["first_audio_ms"] <= 400 / row["real_time_factor"]


@pytest.mark.parametrize("command", [
    "train.py", "sample.py", "evaluate.py", "report.py", "-m corpora.scan", "-m corpora.toy",
    "-m corpora.flite", "-m corpora.piper", "-m corpora.align", "-m tools.bench",
    "-m tools.convert", "-m tools.ablate", "-m tools.compare", "-m tools.studies",
    "-m tools.studies sweep", "-m tools.studies continue", "-m tools.studies draws"])
def test_every_command_explains_itself(command):
    done = run(*command.split(), "-h")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 8
