"""Scores from what listeners preferred: the Bayesian Elo of CALM, appendix B.3.

    wins[A][B], how often A was preferred to B ─► S_A, 30 iterations ─► E_A = 400 log10 S_A + 2000
                                                  │
                     posterior Gamma(α_A, β_A) ───┴─► 95 % interval

    P(A > B) = S_A / (S_A + S_B) = 1 / (1 + 10^((E_B - E_A) / 400))                    eq. 4, 5
    S_A <- (α + w_A) / (β + Σ_{B≠A} n_AB / (S_A + S_B)),  α = β = 0.1, S_A = 1 at first    eq. 6

w_A: comparisons that A won; n_AB: comparisons of A and B. S_A is the mean of its posterior, a Gamma
distribution of shape α + w_A and of rate the denominator (eq. 7). Without comparisons E = 2000. At
the fixed point the mean of all S is α / β = 1, and for two systems S_A = (α + w_A) / (β + n / 2).
Thirty iterations settle the differences between systems; of three or more the common level may be
some points off (4.4 after 720 comparisons of six), which moves every system alike.

Source: CALM (arXiv 2509.06926) B.3; the iteration is of Caron & Doucet 2010.
Where this differs from the paper: eq. 7 prints w_{A,B} where eq. 6, and Caron & Doucet, have n_AB:
n_AB here. How ties count is not given: a tie is half a win for either.
Precision: float64.
"""
import math

import torch


def strengths(wins, alpha=0.1, beta=0.1, iterations=30):
    """wins (K, K) -> S (K,), and the shape and rate (K,) of its Gamma posterior.

    wins[a, b]: comparisons of a and b that a won, ties as half a win for either.
    """
    wins = torch.as_tensor(wins, dtype=torch.float64).clone().fill_diagonal_(0)
    compared = wins + wins.T                                                    # (K, K): n_AB
    shape = alpha + wins.sum(1)                                                 # (K,)

    S = torch.ones_like(shape)
    for _ in range(iterations):
        rate = beta + (compared / (S[:, None] + S)).sum(1)                      # CALM eq. 6
        S = shape / rate
    return S, shape, rate


def gamma_quantile(p, shape, rate):
    """The x with P(X < x) = p for X ~ Gamma(shape, rate): bisection of log x."""
    shape = torch.as_tensor(shape, dtype=torch.float64)
    low = -700.0
    high = 700.0
    for _ in range(80):
        middle = (low + high) / 2
        x = torch.tensor(math.exp(middle), dtype=torch.float64)
        if torch.special.gammainc(shape, x) < p:
            low = middle
        else:
            high = middle
    return math.exp(low) / float(rate)


def elo(wins, alpha=0.1, beta=0.1, base=2000, iterations=30):
    """wins (K, K), as for strengths -> K tuples (Elo, low, high); low and high: 95 % interval."""
    def scale(S):
        return 400 * math.log10(S) + base

    S, shape, rate = strengths(wins, alpha, beta, iterations)
    return [(scale(s), scale(gamma_quantile(0.025, a, b)), scale(gamma_quantile(0.975, a, b)))
            for s, a, b in zip(S.tolist(), shape.tolist(), rate.tolist())]
