"""The Bayesian Elo of CALM's appendix B has its closed forms."""
import math

import pytest
import torch

from tools.elo import elo, gamma_quantile, strengths


def scale(S):
    return 400 * math.log10(S) + 2000


def test_without_votes_every_system_has_2000():
    assert [e for e, _, _ in elo(torch.zeros(3, 3))] == [2000, 2000, 2000]


def test_two_systems_reach_the_fixed_point_in_closed_form():
    """(β + n / (S_A + S_B)) S_A = α + w_A; the sum over A and B gives S_A + S_B = 2 α / β = 2."""
    (a, _, _), (b, _, _) = elo([[0, 7], [3, 0]])
    assert a == pytest.approx(scale(7.1 / 5.1), abs=1e-9)
    assert b == pytest.approx(scale(3.1 / 5.1), abs=1e-9)


def test_other_priors_move_the_fixed_point_as_their_closed_form():
    S, _, _ = strengths([[0, 9], [1, 0]], alpha=2.0, beta=0.5, iterations=400)
    assert S.tolist() == pytest.approx([11 / (0.5 + 10 / 8), 3 / (0.5 + 10 / 8)], abs=1e-9)


def test_the_mean_strength_at_the_fixed_point_is_one():
    wins = torch.tensor([[0, 8, 5, 9], [2, 0, 6, 7], [5, 4, 0, 5], [1, 3, 5, 0]])
    S, _, _ = strengths(wins, iterations=20000)
    assert S.mean() == pytest.approx(1, abs=1e-9)


def test_thirty_iterations_settle_differences_and_leave_the_level_a_little_off():
    """720 comparisons of six systems: the weak prior pulls the common level back only slowly."""
    wins = torch.tensor([[24 + 3 * (a - b) if a != b else 0 for b in range(6)] for a in range(6)])
    after = 400 * strengths(wins)[0].log10()
    fixed = 400 * strengths(wins, iterations=50000)[0].log10()
    torch.testing.assert_close(after.diff(), fixed.diff(), atol=0.006, rtol=0)
    assert (after - fixed).mean() == pytest.approx(4.43, abs=0.01)


def test_three_systems_that_beat_each_other_in_a_circle_are_equal():
    assert [e for e, _, _ in elo([[0, 4, 0], [0, 0, 4], [4, 0, 0]])] == pytest.approx([2000] * 3)


def test_a_tie_is_half_a_win_for_either():
    ties = [[0, 2.5], [2.5, 0]]
    assert [e for e, _, _ in elo(ties)] == pytest.approx([2000, 2000], abs=1e-9)
    assert elo(ties)[0][1] > elo([[0, 0], [0, 0]])[0][1]            # but five votes tell something


def test_quantiles_of_an_exponential_and_of_a_chi_squared_distribution():
    assert gamma_quantile(0.3, 1.0, 2.0) == pytest.approx(-math.log(0.7) / 2, rel=1e-9)
    assert gamma_quantile(0.025, 5.0, 0.5) == pytest.approx(3.246973, rel=1e-6)
    assert gamma_quantile(0.975, 5.0, 0.5) == pytest.approx(20.483177, rel=1e-6)


def test_the_interval_is_that_of_the_posterior_and_narrows_with_votes():
    few = elo([[0, 3], [1, 0]])[0]
    many = elo([[0, 300], [100, 0]])[0]
    shape, rate = 3.1, 0.1 + 4 / 2
    assert few[1] == pytest.approx(scale(gamma_quantile(0.025, shape, rate)), abs=1e-9)
    assert few[2] == pytest.approx(scale(gamma_quantile(0.975, shape, rate)), abs=1e-9)
    assert many[2] - many[1] < (few[2] - few[1]) / 5
