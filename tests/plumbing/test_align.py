"""Word times from Whisper's attention: the path to words, the quiet ends, what is left alone."""
import json
import sys

import numpy as np
import pytest

from corpora import align
from cli import BadInput
from data import load_manifest, save_audio


def test_a_word_begins_at_the_first_row_of_its_first_token():
    path = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 3), (2, 4), (3, 9), (4, 10)]      # 4: end of text
    assert align.words_of_path(["the", "farmer", "sat"], [1, 2, 1], path, 0.5, 0.75) == [
        ["the", 0.5, 0.54], ["farmer", 0.54, 0.68], ["sat", 0.68, 0.75]]


def test_no_word_goes_beyond_the_end():
    words = align.words_of_path(["a", "b"], [1, 1], [(0, 0), (1, 90), (2, 99)], 0.0, 1.0)
    assert words == [["a", 0.0, 1.0], ["b", 1.0, 1.0]]


def test_quiet_ends_are_cut_at_35_decibels_below_the_loudest():
    wav = np.full(16000, 0.5 * 10 ** (-36 / 20), np.float32)
    wav[3200:9600] = 0.5
    assert align.loud_part(wav) == (3200, 9600)
    wav[12800:13120] = 0.5 * 10 ** (-34 / 20)
    assert align.loud_part(wav) == (3200, 13120)
    assert align.loud_part(np.zeros(16000, np.float32)) == (0, 16000)
    assert align.loud_part(np.ones(100, np.float32)) == (0, 100)                  # below one frame


def test_only_speech_with_a_text_and_without_words_is_aligned(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).normal(size=16000 * 31) * 0.1
    for name, seconds in (("short", 1), ("long", 31)):
        save_audio(tmp_path / f"{name}.wav", noise[:16000 * seconds], 16000)
    save_audio(tmp_path / "silent.wav", noise[:16000] * 0, 16000)
    rows = [{"audio": "silent.wav", "text": "a b"}, {"audio": "short.wav", "text": "a b"},
            {"audio": "long.wav", "text": "a b"},
            {"audio": "short.wav", "text": "a b", "kind": "music"}, {"audio": "short.wav"},
            {"audio": "short.wav", "text": "a b", "words": [["a", 0.0, 0.1], ["b", 0.1, 0.2]]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    class Fixed:
        def __init__(self, whisper, language, threads):
            assert (whisper, language, threads) == ("tiny", "en", 1)

        def __call__(self, wav, text):
            return [[word, 0.5, 0.6] for word in text.split()] if len(wav) == 16000 else None
    monkeypatch.setattr(align, "Aligner", Fixed)
    monkeypatch.setattr(sys, "argv", ["corpora.align", f"{tmp_path}/in.jsonl", "--out",
                                      f"{tmp_path}/out.jsonl", "--whisper", "tiny",
                                      "--threads", "1"])
    align.main()
    words = [c.words for c in load_manifest(tmp_path / "out.jsonl")]
    assert words == [None, [["a", 0.5, 0.6], ["b", 0.5, 0.6]], None, None, None,
                     [["a", 0.0, 0.1], ["b", 0.1, 0.2]]]


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(BadInput, match=r"pip install -e \.\[eval\]"):
        align.Aligner()
