"""Intervals of figures have their closed forms."""
import math

import numpy as np
import pytest

from intervals import bootstrap, jackknife


def test_the_bootstrap_of_equal_values_is_that_value():
    assert bootstrap([0.5] * 7) == (0.5, 0.5, 0.5)


def test_the_bootstrap_of_two_values_reaches_both():
    """A quarter of the resamples of (0, 1) hold 0 twice, another quarter 1 twice."""
    assert bootstrap([0.0, 1.0]) == (0.5, 0.0, 1.0)


def test_the_bootstrap_of_many_values_has_the_width_of_the_normal_interval():
    values = np.random.default_rng(1).standard_normal(2000)
    mean, low, high = bootstrap(values, draws=4000)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert mean == pytest.approx(values.mean(), abs=1e-12)
    assert (high - mean) / half == pytest.approx(1, rel=0.06)
    assert (mean - low) / half == pytest.approx(1, rel=0.06)


def test_the_bootstrap_repeats_with_its_seed():
    values = [0.1, 0.5, 0.4, 0.9, 0.2]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 2.0, 4.0, 7.0]
    value, low, high = jackknife(lambda items: sum(items) / len(items), values)
    error = np.std(values, ddof=1) / 2                                      # s / sqrt(n)
    assert value == 3.5
    assert (high - value, value - low) == pytest.approx((1.96 * error, 1.96 * error), abs=1e-12)


@pytest.mark.parametrize("call", [lambda: bootstrap([]), lambda: jackknife(sum, [1.0])])
def test_too_few_values_are_refused_with_their_number(call):
    with pytest.raises(ValueError, match="at least"):
        call()
