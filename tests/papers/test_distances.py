"""Distances between sets against their closed forms."""
import math

import numpy as np
import pytest
import torch

import distances
from cli import BadInput
from distances import (extrapolate, fad, fad_inf, frechet, gaussian, kl_divergence, mmd,
                       square_root)
from embeddings import MelEmbedding, embed_clip, windows
from intervals import Figure


def clips(rng, n, features, shift=0.0, scale=1.0, per_clip=2):
    """n clips of windows of N(shift, scale²)."""
    return [shift + scale * rng.normal(size=(per_clip, features)) for _ in range(n)]


def test_frechet_of_gaussians_in_one_dimension_is_that_of_means_and_deviations():
    one = np.array([[4.0]])
    nine = np.array([[9.0]])
    assert frechet(np.array([1.0]), one, np.array([3.0]), nine) == pytest.approx(4 + (2 - 3) ** 2)


def test_frechet_of_covariances_that_do_not_commute():
    """tr(A + B - 2 (A½ B A½)½) for 2 x 2: the trace of the root is √(tr AB + 2 √(det A det B))."""
    a = np.array([[2.0, 1.0], [1.0, 3.0]])
    b = np.array([[5.0, -2.0], [-2.0, 1.5]])
    root_trace = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-12)
    assert square_root(a) @ square_root(a) == pytest.approx(a)


def test_a_set_has_no_distance_to_itself():
    judged = clips(np.random.default_rng(0), 30, 5)
    found = fad(judged, judged)
    assert abs(found.value) < 1e-9 and found.low == 0.0
    assert mmd(judged, judged, paired=True).value == pytest.approx(0, abs=1e-12)


def test_counted_windows_have_the_moments_of_repeated_ones():
    x = np.random.default_rng(0).normal(size=(5, 3))
    counts = np.array([2, 0, 1, 3, 1])
    mean, covariance = gaussian(x, counts)
    repeated = np.repeat(x, counts, 0)
    assert mean == pytest.approx(repeated.mean(0))
    assert covariance == pytest.approx(np.cov(repeated.T))


def test_fad_inf_removes_the_bias_of_few_windows(monkeypatch):
    """Both sets N(0, 1) in 8 dimensions: the distance is 0, of 120 windows it is about 0.15."""
    monkeypatch.setattr(distances, "bootstrap_distance",
                        lambda value, *rest, **options: Figure(float(value)))
    rng = np.random.default_rng(0)
    reference = clips(rng, 2000, 8)
    plain = []
    infinite = []
    for _ in range(12):
        judged = clips(rng, 60, 8)
        plain.append(fad(judged, reference).value)
        infinite.append(fad_inf(judged, reference).value)
    assert np.mean(plain) > 0.12
    assert abs(np.mean(infinite)) < 0.03


def test_extrapolation_is_exact_on_a_line_in_one_over_n():
    sizes = np.array([50, 80, 100, 400])
    assert extrapolate(sizes, 3 + 7 / sizes) == pytest.approx(3.0)


def test_mmd_of_two_points_each_is_their_kernel():
    """x at 0 and 1, y at 0 and 2, width 2: k(0, 1) + k(0, 2) - (k00 + k02 + k10 + k12) / 2."""
    def k(distance):
        return math.exp(-distance ** 2 / 8)
    x = [np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]])]
    y = [np.array([[0.0], [2.0]]), np.array([[0.0], [2.0]])]
    width = distances.squared_distances(np.concatenate(y), np.concatenate(y))
    assert np.median(width[np.triu_indices(4, 1)]) == 4

    def within(d):                                   # of the six pairs two are equal points
        return (2 * 1 + 4 * k(d)) / 6
    across = (k(0) + k(2) + k(1) + k(1)) / 4
    assert mmd(x, y).value == pytest.approx(within(1) + within(2) - 2 * across)


def test_mmd_is_unbiased_however_few_windows_there_are():
    rng = np.random.default_rng(0)
    reference = clips(rng, 200, 4)
    same = [mmd(clips(rng, 4, 4), reference).value for _ in range(60)]
    assert abs(np.mean(same)) < 0.01
    assert mmd(clips(rng, 20, 4, shift=1.0), reference).value > 0.2


def test_kl_divergence_of_a_coin():
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergence(np.array([0.5, 0.5]), np.array([0.9, 0.1])) == pytest.approx(expected)
    assert kl_divergence(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0


def test_too_few_windows_are_refused_with_the_number_that_is_needed():
    rng = np.random.default_rng(0)
    many = clips(rng, 50, 8)
    few = clips(rng, 4, 8)
    with pytest.raises(BadInput, match="fad: needs 9 windows of each side for 8 dimensions, "
                                       "the judged clips have 8"):
        fad(few, many)
    with pytest.raises(BadInput, match="the reference clips have 8"):
        fad(many, few)
    assert fad(few, many, dims=3).value >= 0
    with pytest.raises(BadInput, match="fad_inf: needs 27 windows"):
        fad_inf(clips(rng, 12, 8), many)
    with pytest.raises(BadInput, match="fad_inf: needs 8 clips for subsets of several sizes, has 2"):
        fad_inf(clips(rng, 2, 8, per_clip=50), many)
    with pytest.raises(BadInput, match="mmd: needs 4 windows"):
        mmd(few[:1], many)
    with pytest.raises(BadInput, match="fad: on 9 dimensions, and the embedding has 8"):
        fad(many, many, dims=9)


def test_dimensions_are_the_references_principal_axes():
    """What the reference does not vary in is not seen on its first axis."""
    rng = np.random.default_rng(0)
    reference = [np.array([[10 * a, 0.01 * b]]) for a, b in rng.normal(size=(50, 2))]
    judged = [clip + [[0.0, 5.0]] for clip in reference]
    assert fad(judged, reference).value == pytest.approx(25, rel=1e-6)
    assert fad(judged, reference, dims=1).value == pytest.approx(0, abs=1e-3)


def test_the_last_window_counts_from_half_its_length_on():
    lengths = [[len(piece) for piece in windows(np.zeros(n), 10)] for n in (3, 14, 15, 20, 26)]
    assert lengths == [[3], [10], [10, 5], [10, 10], [10, 10, 6]]


def test_mel_hears_a_second_of_another_rate_alike():
    """A tone of 440 Hz at 16 and at 24 kHz; twice as loud is log10 2 more in every mean."""
    def tone(rate, gain=0.1):
        return gain * torch.sin(2 * math.pi * 440 * torch.arange(2 * rate) / rate)[None]
    model = MelEmbedding()
    one = embed_clip(model, tone(16000), 16000)
    other = embed_clip(model, tone(24000), 24000)
    assert one.shape == (2, 160)
    peak = one[0, :80].argmax()
    assert other[0, peak] == pytest.approx(one[0, peak], abs=0.01)
    louder = embed_clip(model, tone(16000, 0.2), 16000)
    assert louder[0, peak] - one[0, peak] == pytest.approx(math.log10(2), abs=1e-3)
    assert embed_clip(model, tone(16000)[:, :100], 16000).shape == (1, 160)
