"""Word times by comparison with a synthetic voice: the path, the words, flite's reading of texts."""
import json
import sys

import numpy as np
import pytest

from audio import save_audio
from cli import BadInput
from conftest import engine
from corpora import align, warping
from corpora.warping import Warper, cepstra, warp, where_words_begin, words_from
from data import load_manifest

needs_flite = pytest.mark.skipif(engine is None, reason="Debian's flite is not installed")


def test_the_path_of_a_sequence_whose_values_are_held_is_known():
    x = np.array([[0.0], [0.0], [5.0], [9.0], [9.0], [9.0]])
    y = np.array([[0.0], [5.0], [5.0], [9.0]])
    path, distance = warp(x, y)
    assert distance == 0 and path[0] == (0, 0) and path[-1] == (5, 3)
    assert all(x[i] == y[j] for i, j in path)
    assert all((i2 - i1, j2 - j1) in {(1, 1), (1, 0), (0, 1)}
               for (i1, j1), (i2, j2) in zip(path, path[1:]))


def test_the_distance_of_the_path_is_the_least_of_all_paths():
    """Against the recursion written out, in float64."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(5, 3))
    d = np.sqrt(((x[:, None] - y) ** 2).sum(-1))

    def least(i, j):
        if i < 0 or j < 0:
            return np.inf
        if i == j == 0:
            return 2 * d[0, 0]
        return min(least(i - 1, j - 1) + 2 * d[i, j], least(i - 1, j) + d[i, j],
                   least(i, j - 1) + d[i, j])
    path, distance = warp(x, y)
    found = 2 * d[0, 0] + sum((1 + (i2 > i1 and j2 > j1)) * d[i2, j2]
                              for (i1, j1), (i2, j2) in zip(path, path[1:]))
    assert found == pytest.approx(least(6, 4), abs=1e-12)
    assert distance == pytest.approx(found / 12, abs=1e-12)


def test_a_word_begins_in_the_middle_of_the_frames_that_meet_its_first_one():
    path = [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (5, 3)]
    assert where_words_begin(path, [0, 1, 2, 3]) == [0.5, 2.0, 4.0, 5.0]
    assert where_words_begin(path, [-4, 99]) == [0.5, 5.0]             # beyond the loud part


def test_words_without_sound_have_no_length_and_none_goes_back_or_beyond_the_end():
    times = np.array([[0.1, 0.3], [np.nan, np.nan], [0.25, 0.5], [0.6, 0.9]])
    assert words_from(["a", "-", "b", "c"], times, 0.8) == [
        ["a", 0.1, 0.3], ["-", 0.3, 0.3], ["b", 0.3, 0.5], ["c", 0.6, 0.8]]


def test_cepstra_do_not_depend_on_the_level():
    wav = np.sin(np.arange(8000) ** 1.5 / 200)
    wav += 0.1 * np.random.default_rng(0).normal(size=8000)
    assert cepstra(wav).shape == (48, 26)
    assert np.abs(cepstra(wav) - cepstra(0.5 * wav)).max() < 0.05


@needs_flite
def test_flite_reads_numbers_quotes_and_dashes_and_says_where_each_word_of_the_text_is():
    text = "Dr. Smith’s x-ray – it costs 25 ... 你好 no"
    samples, words = engine.speak_text(text, "rms")
    spoken = dict(zip(text.split(), words))
    assert [word for word, found in spoken.items() if found is None] == ["–", "...", "你好"]
    found = [word for word in words if word]
    assert all(a[1] <= b[0] for a, b in zip(found, found[1:]))
    assert found[-1][1] <= len(samples) / 16000
    assert spoken["25"][1] - spoken["25"][0] > 0.5                      # "twenty five"


@needs_flite
def test_a_voice_that_is_not_among_the_references_is_aligned_as_it_was_spoken(monkeypatch):
    """Nine of ten words of awb within 0.1 s by the three others."""
    monkeypatch.setattr(warping, "VOICES", ("slt", "rms", "kal16"))
    sentences = ["the old farmer quietly opened the green box",
                 "please inspect that ancient umbrella", "she walked slowly down the street"]
    aligner = Warper()
    errors = []
    for sentence in sentences:
        samples, _, words = engine.speak(sentence, "awb")
        silence = np.zeros(8000)
        wav = np.concatenate([silence, samples / 32768, silence])
        found = aligner(wav, sentence)
        assert [word for word, _, _ in found] == sentence.split()
        errors += [abs(start - 0.5 - exact) for (_, start, _), (_, exact, _) in zip(found, words)]
    assert np.quantile(errors, 0.9) < 0.1


@needs_flite
def test_what_cannot_be_aligned_has_no_words():
    aligner = Warper()
    noise = np.random.default_rng(0).normal(size=16000 * 31) * 0.1
    assert aligner(noise, "too long") is None
    assert aligner(noise[:300], "hi") is None
    assert aligner(noise[:16000], "...") is None
    assert aligner(noise[:160000], "no") is None                       # a word in ten seconds


@needs_flite
def test_the_command_aligns_by_flite_and_refuses_other_languages(tmp_path, monkeypatch, capsys):
    samples, _, _ = engine.speak("the door was open", "awb")
    save_audio(tmp_path / "a.wav", samples / 32768, 16000)
    (tmp_path / "in.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "The door was open."}))

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["corpora.align", f"{tmp_path}/in.jsonl", "--out",
                                          f"{tmp_path}/out.jsonl", "--by", "flite", *arguments])
        align.main()
    command()
    [clip] = load_manifest(tmp_path / "out.jsonl")
    assert [word for word, _, _ in clip.words] == ["The", "door", "was", "open."]
    assert "1 of 1 clips aligned" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--language de: flite speaks English alone"):
        command("--language", "de")
