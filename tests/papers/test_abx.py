"""ABX on latents whose words can be told apart, or cannot."""
import numpy as np
import pytest

from abx import Item, abx_errors, distance, items_of
from data import Clip


def unit(*degrees):
    """Unit vectors in the plane (T, 2)."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def total(errors):
    """The error of {clip: (errors, weights)}."""
    wrong = sum(e for e, _ in errors.values())
    return wrong / sum(w for _, w in errors.values())


def test_the_distance_is_the_mean_angle_along_the_cheapest_path():
    assert distance(unit(0), unit(90)) == pytest.approx(0.5)
    assert distance(unit(0, 0, 90), unit(0, 90)) == pytest.approx(0, abs=1e-7)   # warped
    assert distance(unit(0, 90), unit(90)) == pytest.approx(0.25)                # (90 + 0) / 2
    assert distance(unit(0, 60), unit(60, 0)) == pytest.approx(distance(unit(60, 0), unit(0, 60)))


def test_words_that_differ_are_told_apart_and_equal_ones_are_chance():
    items = [Item("bat", "s", f"bat{i}", unit(0, 10 + i)) for i in range(3)]
    items += [Item("bit", "s", f"bit{i}", unit(90, 80 - i)) for i in range(3)]
    assert total(abx_errors(items, across=False)) == 0

    same = [Item(word, "s", f"{word}{i}", unit(0)) for word in ("bat", "bit") for i in range(3)]
    assert total(abx_errors(same, across=False)) == 0.5


def test_one_wrong_triple_is_counted_by_hand():
    """bat at 0 and 50 degrees, bit at 40 and 100; every X has one A, and two B's."""
    items = [Item("bat", "s", "a0", unit(0)), Item("bat", "s", "a1", unit(50)),
             Item("bit", "s", "b0", unit(40)), Item("bit", "s", "b1", unit(100))]
    errors = abx_errors(items, across=False)
    # X = 0: A at 50, B at 40 is nearer (1 of 2); X = 50: A at 50 off, B 10 and 50 off (1, a tie)
    # X = 40: A 60 off, B 40 and 10 off (2 of 2); X = 100: A 60 off, B 100 and 50 off (1 of 2)
    by_clip = {clip: e / w for clip, (e, w) in errors.items()}
    assert by_clip == pytest.approx({"a0": 0.5, "a1": 0.75, "b0": 1.0, "b1": 0.5})
    assert total(errors) == pytest.approx((0.5 + 0.75 + 1.0 + 0.5) / 4)


def test_across_speakers_x_is_of_another_one():
    """Latents that know the speaker and not the word: right within, wrong across."""
    items = [Item(word, speaker, f"{word}{speaker}{i}", unit(voice + sound))
             for word, sound in (("bat", 0), ("bit", 20))
             for speaker, voice in (("s", 0), ("t", 20)) for i in range(2)]
    assert total(abx_errors(items, across=False)) == 0
    # bat of t at 20: A bat of s at 0, B bit of s at 20 is nearer; bit of t at 40: A bit of s at 20
    assert total(abx_errors(items, across=True)) == pytest.approx(0.5)


def test_the_order_of_the_clips_does_not_matter():
    rng = np.random.default_rng(0)
    items = [Item(word, speaker, f"{word}{speaker}{i}", unit(*rng.uniform(0, 180, 3)))
             for word in "abc" for speaker in "st" for i in range(13)]
    shuffled = [items[i] for i in rng.permutation(len(items))]
    assert abx_errors(items, across=True, seed=3) == abx_errors(shuffled, across=True, seed=3)


def test_a_word_said_once_has_no_partner():
    items = [Item("bat", "s", "a", unit(0)), Item("bit", "s", "b", unit(90))]
    assert abx_errors(items, across=False) == {}
    assert abx_errors(items, across=True) == {}


def test_a_word_has_the_latents_whose_middle_lies_in_it():
    """10 per second; from 0.26 to 0.54: the middles 0.35 and 0.45, not 0.25."""
    latents = np.arange(1.0, 9)[:, None]
    clip = Clip("a.wav", "Bat, bit", speaker="s", words=[["Bat,", 0.26, 0.54], ["bit", 0.71, 0.72],
                                                         ["late", 2.0, 2.5]])
    items = items_of(clip, "a", np.concatenate([latents, 0 * latents], 1), 10)
    assert [(item.label, len(item.latents)) for item in items] == [("bat", 2), ("bit", 1)]
    assert np.linalg.norm(items[0].latents, axis=1) == pytest.approx([1, 1])
    assert items_of(Clip("b.wav"), "b", latents, 10) == []
