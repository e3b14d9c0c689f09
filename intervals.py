"""Figures over clips, each with its 95 % bootstrap interval.

    figures = Figures()
    figures.add("wer generation", "speech", clip, errors, words)      one clip's share
    figures.read()   {"wer generation": {"speech": Figure(0.161, 0.118, 0.207, 40)}}

Percentile bootstrap over clips (Efron & Tibshirani 1993, chapter 13). A figure is a formula of sums
over clips, f(Σ_i c_i) with the columns c_i of clip i; WER has c_i = (errors, words), f = their
ratio. A draw takes n of the n clips with replacement; the interval is the 2.5th to the 97.5th
percentile of f over 1000 draws. All generations of one text are one clip: repeats narrow an
interval less than new texts do. The interval is that of other clips, not of another training seed;
of one clip there is none.

bootstrap_distance() is for distances of sets, which a resampled set overestimates (its repeated
clips look like a smaller set): there the draws are moved so that their mean is the figure.

Precision: float64. The same seed gives the same interval, on any number of processes.
"""
import random
from dataclasses import dataclass

import numpy as np

import cli  # so that -h says what this file is

DRAWS = 1000
# of sets: each draw decomposes matrices
DISTANCE_DRAWS = 200
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Figure:
    """A figure, the ends of its 95 % interval (None: one clip), and over how many clips it is."""
    value: float
    low: float | None = None
    high: float | None = None
    clips: int = 0

    def __str__(self):
        if self.low is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def ends(self):
        """[low, high] to four decimals, for --json."""
        return None if self.low is None else [round(self.low, 4), round(self.high, 4)]


# ---------------------------------------------------------------------------- formulas of sums


def ratio(sums):
    """(..., 2): value / weight."""
    return sums[..., 0] / sums[..., 1]


def ratio_of_means(sums):
    """(..., 4): (value / weight) / (unit / weight of the unit)."""
    return ratio(sums[..., :2]) / ratio(sums[..., 2:])


def exp_ratio(sums):
    """(..., 2): exp(value / weight), as a perplexity."""
    return np.exp(ratio(sums))


def geometric_mean(sums):
    """(..., 3): √(mean of the first · mean of the second); the third column is the weight."""
    return np.sqrt(sums[..., 0] * sums[..., 1]) / sums[..., 2]


# ---------------------------------------------------------------------------- the bootstrap


def draw_counts(n, draws, seed):
    """How often each of n clips is in each draw -> (draws, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)


def bootstrap(columns, formula=ratio, draws=DRAWS, seed=0):
    """Columns (n clips, k) -> Figure of formula(their sum)."""
    columns = np.asarray(columns, np.float64)
    value = float(formula(columns.sum(0)))
    n = len(columns)
    if n < 2:
        return Figure(value, clips=n)

    # draws whose weights are all 0 have no figure
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = formula(draw_counts(n, draws, seed) @ columns)              # (draws,)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Figure(value, clips=n)
    low, high = np.percentile(drawn, PERCENTILES)
    return Figure(value, float(low), float(high), n)


def bootstrap_distance(value, distance, n, draws=DISTANCE_DRAWS, seed=0, least=-np.inf):
    """Figure of a distance of a set of n clips. value: of the whole set; distance(counts (n,)):
    of the set that has clip i counts[i] times; least: no such distance is smaller.
    """
    if n < 2:
        return Figure(float(value), clips=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.array([distance(counts) for counts in draw_counts(n, draws, seed)])

    # a draw of one window alone has no distance
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn - drawn.mean(), PERCENTILES)
    return Figure(float(value), float(max(least, value + low)), float(value + high), n)


# ---------------------------------------------------------------------------- the ledger


class Figures:
    """Sums by figure, kind of audio, clip and repeat."""

    def __init__(self, seed=0):
        self.seed = seed
        self.sums = {}                               # (figure, kind) -> {(clip, repeat): columns}
        self.formulas = {}                           # figure -> formula, by default ratio

    def add(self, figure, kind, clip, *columns, repeat=0, formula=ratio):
        """Add the columns of one wav; with the default formula (sum of values, their number).
        repeat: which of the wavs of one clip.
        """
        self.formulas[figure] = formula
        wavs = self.sums.setdefault((figure, kind), {})
        before = wavs.get((clip, repeat), [0.0] * len(columns))
        wavs[clip, repeat] = [a + float(b) for a, b in zip(before, columns)]

    def merge(self, others):
        """Become the union of several ledgers, of all processes."""
        for other in others:
            self.formulas |= other.formulas
            for key, wavs in other.sums.items():
                self.sums[key] = self.sums.get(key, {}) | wavs

    def read(self):
        """{figure: {kind: Figure}}, in the order in which the figures came. Sums are taken in the
        order of clips and repeats: it does not matter which process judged them.
        """
        found = {}
        for (figure, kind), wavs in self.sums.items():
            clips = {}
            for clip, repeat in sorted(wavs):
                columns = np.array(wavs[clip, repeat])
                clips[clip] = clips.get(clip, 0) + columns

            # weights of 0 give no figure
            with np.errstate(invalid="ignore", divide="ignore"):
                result = bootstrap(list(clips.values()), self.formulas[figure], seed=self.seed)
            if np.isfinite(result.value):
                found.setdefault(figure, {})[kind] = result
        return found


# ---------------------------------------------------------------- a choice of clips

def drawn_evenly(items, limit):
    """At most `limit` items from all over the list, in its order: one from a drawn place (seed 0)
    of each of as many equal stretches.

    Every sixtieth clip of a corpus that takes four voices in turn would be of one voice.
    """
    n = min(limit, len(items))
    draw = random.Random(0)
    return [items[draw.randrange(i * len(items) // n, (i + 1) * len(items) // n)]
            for i in range(n)]
