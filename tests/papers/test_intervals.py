"""Intervals against the binomial, the normal, and themselves on any number of processes."""
import math

import numpy as np
import pytest

from intervals import (Figure, Figures, bootstrap, bootstrap_distance, drawn_evenly, exp_ratio,
                       geometric_mean, ratio_of_means)


def test_the_interval_of_a_share_is_the_binomials():
    """100 clips, half right: the draws are Binomial(100, 1/2) / 100, 95 % in 0.40 .. 0.60."""
    columns = [[i % 2, 1] for i in range(100)]
    found = bootstrap(columns, draws=20000)
    assert found.value == 0.5 and found.clips == 100
    assert found.low == pytest.approx(0.40, abs=0.01)
    assert found.high == pytest.approx(0.60, abs=0.01)


def test_two_clips_span_the_interval_and_one_has_none():
    assert bootstrap([[0, 1], [1, 1]]) == Figure(0.5, 0.0, 1.0, 2)
    assert bootstrap([[3, 4]]) == Figure(0.75, None, None, 1)


def test_equal_clips_leave_no_doubt():
    assert bootstrap([[2.0, 1]] * 7) == Figure(2.0, 2.0, 2.0, 7)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(400):
        values = rng.normal(1, 2, 60)
        found = bootstrap(np.stack([values, np.ones(60)], 1), draws=300, seed=seed)
        covered += found.low <= 1 <= found.high
    assert 0.91 <= covered / 400 <= 0.97


def test_a_long_clip_counts_as_often_as_a_short_one_is_drawn():
    """A word error rate is errors over all words, and not the mean of the clips' rates."""
    assert bootstrap([[1, 1], [0, 9]]).value == 0.1


def test_formulas_are_those_of_sums():
    assert bootstrap([[1.0, 1, 2.0, 1], [3.0, 1, 0.0, 0]], ratio_of_means).value == 1.0     # 2 / 2
    assert bootstrap([[math.log(8), 3], [0.0, 0]], exp_ratio).value == pytest.approx(2.0)
    assert bootstrap([[4.0, 9.0, 1], [4.0, 9.0, 1]], geometric_mean).value == 6.0


def test_repeats_of_a_clip_are_one_clip():
    """Fifty generations of two texts say little about a third text."""
    figures = Figures()
    for repeat in range(50):
        figures.add("facts", "speech", "a", 0, 1, repeat=repeat)
        figures.add("facts", "speech", "b", 1, 1, repeat=repeat)
    assert figures.read()["facts"]["speech"] == Figure(0.5, 0.0, 1.0, 2)


def test_it_does_not_matter_which_process_judged_a_clip():
    rng = np.random.default_rng(0)
    one = Figures()
    two = [Figures(), Figures()]
    for clip in range(20):
        for repeat in range(3):
            value = rng.normal()
            one.add("x", "music", f"{clip:02d}", value, 1, repeat=repeat)
            two[(clip + repeat) % 2].add("x", "music", f"{clip:02d}", value, 1, repeat=repeat)
    merged = Figures()
    merged.merge(two[::-1])
    assert merged.read() == one.read()


def test_figures_without_weight_are_left_out():
    figures = Figures()
    figures.add("wer generation", "speech", "a", 0, 0)
    assert figures.read() == {}


def test_the_interval_of_a_distance_stands_around_it():
    """A resampled set looks smaller, and so more distant: the mean of the draws is taken off."""
    values = np.random.default_rng(0).normal(size=40)

    def distance(counts):
        return counts @ values / counts.sum() + 5 * (counts > 1).any()

    found = bootstrap_distance(distance(np.ones(40)), distance, 40)
    plain = bootstrap(np.stack([values, np.ones(40)], 1))
    assert found.low == pytest.approx(plain.low, abs=0.05)
    assert found.high == pytest.approx(plain.high, abs=0.05)


def test_draws_without_a_distance_are_left_out():
    """Fault: of four clips some draws hold one clip only, and the interval of an MMD was NaN."""
    def distance(counts):
        return np.float64(1.0) if (counts > 0).sum() > 1 else np.float64(0) / np.float64(0)

    found = bootstrap_distance(1.0, distance, 4, draws=2000)
    assert (found.low, found.high) == (1.0, 1.0)


def test_a_figure_is_printed_with_its_interval():
    assert str(Figure(0.1614, 0.118, 0.2071, 40)) == "0.161 [0.118, 0.207]"
    assert str(Figure(0.5, clips=1)) == "0.500"
    assert Figure(0.5, 0.12345, 0.6, 3).ends() == [0.1235, 0.6]


def test_a_choice_of_clips_has_one_of_every_stretch_and_the_same_ones_again():
    chosen = drawn_evenly(list(range(100)), 10)
    assert [clip // 10 for clip in chosen] == list(range(10))
    assert chosen == drawn_evenly(list(range(100)), 10)
    assert drawn_evenly([1, 2], 9) == [1, 2] and drawn_evenly([], 9) == []


def test_a_choice_of_clips_has_all_the_voices_of_a_corpus_that_takes_them_in_turn():
    """Fault: every sixtieth clip of four voices in turn was of the first one."""
    voices = 1500 * ["slt", "rms", "awb", "kal16"]
    chosen = drawn_evenly(voices, 100)
    assert min(chosen.count(voice) for voice in set(voices)) >= 15
