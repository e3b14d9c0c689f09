"""Word times from Whisper's attention: from path to words, quiet ends, clips kept as they are."""
import json
import sys

import numpy as np
import pytest

from audio import save_audio
from cli import BadInput
from corpora import align
from data import load_manifest


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


def test_only_speech_with_a_text_and_without_words_is_aligned(tmp_path, monkeypatch, capsys):
    """Fault: what Whisper cannot process was left without words, and not counted."""
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
    assert "left without words: 1 clips over 30 s" in capsys.readouterr().out


def whisper_stub(encoder_rows):
    """An Aligner without its model: one token per letter, one encoder row per token."""
    class Model:
        model = None

        def feature_extractor(self, wav, padding):
            return np.ones((80, 2 * encoder_rows + 1), np.float64)

        def encode(self, mel):
            assert mel.shape == (1, 80, max(align.PADDED, 2 * encoder_rows))
            assert mel.dtype == np.float32 and mel.flags.c_contiguous
            assert mel.sum() == 80 * 2 * encoder_rows
            return "encoded"

        def align(self, encoded, start, tokens, rows, median_filter_width):
            assert (encoded, rows, median_filter_width) == ("encoded", 2 * encoder_rows, 7)
            path = [(i, i) for i in range(len(tokens[0]) + 1)]
            return [type("Result", (), {"alignments": path})]

    class Tokenizer:
        sot_sequence = [0]

        def encode(self, text):
            assert text[0] == " "
            return list(text[1:])

    aligner = align.Aligner.__new__(align.Aligner)
    aligner.model = Model()
    aligner.model.model = aligner.model
    aligner.tokenizer = Tokenizer()
    aligner.view = lambda mel: mel
    return aligner


@pytest.mark.parametrize("encoder_rows", [50, 400])
def test_times_count_from_the_end_of_the_silence_that_was_cut_off(encoder_rows):
    wav = np.zeros(32000)
    wav[8000:24000] = 0.5                                                         # 0.5 to 1.5 s
    assert whisper_stub(encoder_rows)(wav, "the old") == [["the", 0.5, 0.56], ["old", 0.56, 1.5]]


def test_what_whisper_cannot_process_has_no_words():
    aligner = whisper_stub(50)
    assert aligner(np.ones(16000 * 31), "the old") is None                        # over 30 s
    assert aligner(np.ones(300), "the old") is None                               # under 20 ms
    assert aligner(np.ones(16000), "a" * 441) is None                             # over 440 tokens


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(BadInput, match=r"pip install -e \.\[eval\]"):
        align.Aligner()
