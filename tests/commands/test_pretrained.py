"""The shipped weights speak at once."""
import os

import pytest
import soundfile as sf

from conftest import ROOT, run
from sample import load
from transcripts import Recogniser, Words


def test_the_shipped_voice_says_a_sentence_of_the_right_length_and_level(tmp_path):
    text = "The old farmer quietly opened the green box."
    done = run("sample.py", "--run", f"{ROOT}/pretrained/voice", "--text", text,
               "--out", f"{tmp_path}/said.wav")
    assert done.returncode == 0, done.stderr

    wav, rate = sf.read(f"{tmp_path}/said.wav")
    assert rate == 16000 and 2.0 < len(wav) / rate < 4.0          # the voice takes 2.7 s
    loud = (wav ** 2).mean() ** 0.5
    assert 0.03 < loud < 0.12 and abs(wav).max() <= 1.0           # the corpus has an RMS of 0.06


def test_a_word_ends_and_a_text_that_does_not_fit_into_the_seconds_is_said_to_be_cut(tmp_path):
    """Fault: "No" was followed by six seconds of silence, and a cut text was not mentioned."""
    done = run("sample.py", "--run", f"{ROOT}/pretrained/voice", "--text", "No",
               "--out", f"{tmp_path}/no.wav")
    assert done.returncode == 0 and "note" not in done.stdout
    assert sf.info(f"{tmp_path}/no.wav").duration < 2.0

    done = run("sample.py", "--run", f"{ROOT}/pretrained/voice", "--text", "He opened the box.",
               "--seconds", "0.6", "--out", f"{tmp_path}/cut.wav")
    assert done.returncode == 0 and sf.info(f"{tmp_path}/cut.wav").duration == 0.6
    assert 'note: "He opened the box." was cut at 0.6 s; --seconds gives it more' in done.stdout


@pytest.mark.skipif("WHISPER" not in os.environ, reason="WHISPER names no faster-whisper model")
def test_the_shipped_voice_is_understood_by_whisper():
    """Needs the extra eval: WHISPER=base python -m pytest tests/commands/test_pretrained.py"""
    pytest.importorskip("faster_whisper")
    recogniser = Recogniser(os.environ["WHISPER"])
    words = Words("en")

    texts = ["The old farmer quietly opened the green box.", "The door was open all night.",
             "She walked slowly down the street.", "He gave the book to his brother."]
    model = load(f"{ROOT}/pretrained/voice", device="cpu")
    wrong = total = 0
    for text, wav in zip(texts, model.say(texts, seed=0)):
        errors, count = words.errors(text, recogniser.transcribe(wav))
        wrong += errors
        total += count
    assert total == 27 and wrong <= 5


def test_the_shipped_weights_are_small_and_hold_no_folder_of_a_machine():
    total = b""
    for name in ("vae.safetensors", "consistency.safetensors", "config.toml", "README.md"):
        with open(f"{ROOT}/pretrained/voice/{name}", "rb") as f:
            total += f.read()
    assert len(total) <= 16e6
    assert b'"manifest": "/' not in total and b'"init": "/' not in total
