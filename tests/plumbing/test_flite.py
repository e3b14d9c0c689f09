"""The flite corpus: sentences of a grammar, synthesised, with word times."""
import ctypes
import random
import re
import sys

import pytest

from audio import load_audio
from cli import BadInput
from conftest import engine
from corpora import flite
from data import load_manifest

needs_flite = pytest.mark.skipif(engine is None, reason="needs apt install flite")


def test_sentences_are_a_function_of_the_seed_and_of_plain_lower_case_words():
    def sentences(seed):
        return [flite.sentence(random.Random(seed + i)) for i in range(300)]

    first = sentences(0)
    again = sentences(0)
    other = sentences(1000)
    assert first == again != other
    assert len(set(first)) > 280
    for text in first:
        assert 3 <= len(text.split()) <= 14 and text.replace(" ", "").isalpha() and text.islower()
        assert not re.search(r"\ba [aeiou]", text)  # "an apple"


def test_more_sentences_begin_with_the_fewer_ones_and_all_differ():
    texts = flite.distinct_sentences(200, seed=0)
    assert len(set(texts)) == 200 and flite.distinct_sentences(50, seed=0) == texts[:50]


def test_the_grammar_has_no_slot_without_words():
    slots = {slot for template in flite.TEMPLATES for slot in template if slot.isupper()}
    assert slots == set(flite.NOUNS) | set(flite.WORDS)


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch):
    def missing(name, **options):
        raise OSError(f"{name}: cannot open shared object file")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BadInput, match="apt install flite"):
        flite.Flite()


@needs_flite
@pytest.mark.parametrize("voice", flite.VOICES)
def test_every_voice_gives_word_times_that_fit_the_sound(voice):
    wav, rate, words = engine.speak("the old farmer opened a box", voice)
    assert [word for word, _, _ in words] == "the old farmer opened a box".split()
    times = [time for _, start, end in words for time in (start, end)]
    assert times == sorted(times) and 0 < times[0] and times[-1] < len(wav) / rate

    # "farmer" is louder than the last 20 ms
    start, end = (int(time * rate) for time in words[2][1:])
    loud = abs(wav[start:end].astype(float)).mean()
    quiet = abs(wav[-rate // 50:].astype(float)).mean()
    assert loud > 5 * quiet


@needs_flite
def test_the_corpus_holds_out_sentences_and_comes_out_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(flite, "HELD_OUT", 3)
    monkeypatch.setattr(sys, "argv", ["corpora.flite", str(tmp_path), "--hours", "0.003",
                                      "--voices", "slt,kal16", "--processes", "1"])
    flite.main()
    train, valid = (load_manifest(tmp_path / f"{n}.jsonl") for n in ("train", "valid"))
    assert len(valid) == 6 and len(train) >= 4
    assert not {c.text for c in train} & {c.text for c in valid}
    clip = train[0]
    assert clip.words and clip.speaker in ("slt", "kal16") and clip.text
    assert load_audio(clip.audio, 16000).shape[1] == round(clip.duration * 16000)
    before = (tmp_path / "train.jsonl").read_text()
    flite.main()
    assert (tmp_path / "train.jsonl").read_text() == before


def test_an_unknown_voice_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["corpora.flite", "x", "--voices", "bob"])
    with pytest.raises(BadInput, match="bob.*slt"):
        flite.main()


def test_no_voice_at_all_is_a_mistake(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["corpora.flite", "x", "--voices", ","])
    with pytest.raises(BadInput, match="--voices: names none; valid: slt"):
        flite.main()
