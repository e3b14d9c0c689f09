"""Word errors, VERT and perplexity against counts by hand."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from transcripts import TextModel, Words, auto_bleu, self_bleu


@pytest.fixture(scope="module")
def words():
    pytest.importorskip("jiwer", reason="jiwer (extra eval) is not installed")
    pytest.importorskip("whisper_normalizer", reason="whisper-normalizer is not installed")
    return Words("en")


@pytest.mark.parametrize("text, transcript", [
    ("2", "two"), ("Mr. Brown", "mister brown"), ("Don't stop!", "do not stop"),
    ("colour", "color"), ("Twenty-one", "21"), ("Well, um, yes", "well yes"),
    ("Wait... no", "wait no")])
def test_other_spellings_are_no_errors(words, text, transcript):
    assert words.errors(text, transcript)[0] == 0


@pytest.mark.parametrize("text, transcript, errors, count", [
    ("a b c", "a b c", 0, 3), ("a b c", "", 3, 3), ("a b c", "a c", 1, 3),
    ("a b c d", "b c x d", 2, 4), ("a", "a b c", 2, 1), ("...", "a", 0, 0)])
def test_word_errors_are_the_fewest_edits_between_words(words, text, transcript, errors, count):
    assert words.errors(text, transcript) == (errors, count)


def test_other_languages_keep_their_letters_and_japanese_counts_them(words):
    assert Words("fr").errors("L'été, où?", "l'été où") == (0, 3)
    assert Words("ja").errors("こんにちは", "こんばんは") == (2, 5)


def test_auto_bleu_is_the_share_of_ngrams_that_return():
    """a b a b c: of 5 words the a's and b's return (4 / 5), of 4 pairs "a b" does (2 / 4)."""
    assert auto_bleu("a b a b c".split()) == pytest.approx(math.sqrt(4 / 5 * 2 / 4))
    assert auto_bleu("a b c".split()) == 0
    assert auto_bleu(["a"]) == 0


def test_an_ngram_does_not_repeat_itself_by_overlapping():
    """a a a: "a a" stands twice, but they share a word; left and right of each is one "a"."""
    assert auto_bleu(["a", "a", "a"]) == 0
    assert auto_bleu(["a"] * 4) == pytest.approx(math.sqrt(1 * 2 / 3))


def test_self_bleu_counts_what_the_others_have():
    """a b c against a b d and x: 2 of 3 words, 1 of 2 pairs; x is nowhere else."""
    found = self_bleu([["a", "b", "c"], ["a", "b", "d"], ["x", "x"]])
    assert found == pytest.approx([math.sqrt(2 / 3 * 1 / 2)] * 2 + [0])


def test_self_bleu_clips_a_word_to_the_most_that_one_other_has():
    """a a a a against "a a b" and "a a a b", not their sum: words 3 / 4, pairs 2 / 3."""
    found = self_bleu(["a a a a".split(), "a a b".split(), "a a a b".split()])
    assert found[0] == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    # of the second, the first has its two a's and the third its b
    assert found[1] == pytest.approx(math.sqrt(3 / 3 * 2 / 2))


def test_self_bleu_is_that_of_the_definition():
    """Every transcript against all others, one by one."""
    texts = [list(text) for text in itertools.product("ab", repeat=3)][:6] + [["a", "c"], ["c"]]
    expected = []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1:]
        shares = []
        for n in (1, 2):
            def grams(words, n=n):
                return [tuple(words[k:k + n]) for k in range(len(words) - n + 1)]
            own = grams(text)
            matched = sum(min(own.count(gram), max(grams(other).count(gram) for other in others))
                          for gram in set(own))
            shares.append(matched / max(1, len(own)))
        expected.append(math.sqrt(shares[0] * shares[1]))
    assert self_bleu(texts) == pytest.approx(expected)


def fake_text_model(bos):
    """Letters as tokens; a uniform model over 8 of them, sure that b (1) follows a (0)."""
    model = object.__new__(TextModel)
    model.device = "cpu"
    model.tokenizer = type("Letters", (), {
        "bos_token_id": bos,
        "__call__": lambda self, text, add_special_tokens: {"input_ids": [ord(c) - 97
                                                                        for c in text]}})()

    def logits(tokens):
        found = torch.zeros(*tokens.shape, 8)
        found[tokens == 0] = torch.tensor([-1e9, 0.0] + [-1e9] * 6)
        return SimpleNamespace(logits=found)
    model.model = logits
    return model


def test_perplexity_counts_the_tokens_that_are_predicted():
    nats, count = fake_text_model(7).surprise("cab")              # c and a cost log 8, b nothing
    assert (nats, count) == (pytest.approx(2 * math.log(8)), 3)
    nats, count = fake_text_model(None).surprise("cab")           # c is given
    assert (nats, count) == (pytest.approx(math.log(8)), 2)
    assert fake_text_model(None).surprise("c") == (0.0, 0)
