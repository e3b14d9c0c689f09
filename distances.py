"""Distances between sets of audio, over vectors of their windows (embeddings.py).

    judged clips ────► (n, F) ─┐
                               ├─► fad, fad_inf, mmd     in the mean, or in everything a kernel sees
    reference clips ─► (m, F) ─┘

fad: Fréchet distance of two Gaussians (Dowson & Landau 1982; of audio embeddings: Kilgour et al.
  2019; CALM Tables 4 to 7, AudioCALM),
      ‖μ - μ_r‖² + tr(Σ + Σ_r - 2 (Σ_r^½ Σ Σ_r^½)^½),   Σ with n - 1.
  Few windows give too large a distance (by about c / n), and one cannot estimate F · F covariances
  from fewer than F + 1 windows: then it is refused, unless it is asked for on the first k principal
  axes of the reference. Compare systems at the same n, k and embedding only.
fad_inf: that bias removed (Chong & Forsyth 2020; Gui et al. 2024): the distance of random subsets
  of the judged clips against 1 / windows is a line, whose end at 1/n = 0 is the figure. Subsets are
  drawn without replacement, since a set drawn with replacement has the full set as its limit.
  The bias of a small reference stays.
mmd: squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3), with a Gaussian kernel
  as wide as the median distance within the reference; as audio distance KAD (Chung et al. 2025). It
  is near 0 for equal distributions at any n, also slightly below: prefer it under 500 windows.
kld: Σ p log(p / q) over the tags of a classifier, p of the real clip, q of the judged one (Kreuk et
  al. 2023, AudioGen); a mean over pairs of clips with the same text.

Intervals are over the judged clips; the reference is the yardstick and stays as it is.
Precision: float64.
"""
import numpy as np

from cli import BadInput
from intervals import bootstrap_distance, drawn_evenly

# of fad_inf: sizes of subsets, from a quarter of the clips to all of them, and subsets per size
SIZES = 8
SUBSETS = 8
# windows of each side for mmd: its matrices have their square
MMD_WINDOWS = 4000
# windows of each side that mmd needs
MMD_LEAST = 4


# ---------------------------------------------------------------------------- two Gaussians


def gaussian(x, counts=None):
    """Mean (F,) and covariance (F, F) of windows (n, F), window i taken counts[i] times."""
    counts = np.ones(len(x)) if counts is None else counts
    n = counts.sum()
    mean = counts @ x / n
    centred = x - mean
    return mean, (counts[:, None] * centred).T @ centred / (n - 1)


def square_root(matrix):
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet(mean, covariance, reference_mean, reference_covariance):
    """The Fréchet distance of two Gaussians."""
    root = square_root(reference_covariance)
    return frechet_to(mean, covariance, reference_mean, root)


def frechet_to(mean, covariance, reference_mean, root):
    """The same, to a reference whose covariance has the square root `root`."""
    # the trace of a square root is the sum of the roots of the eigenvalues
    values = np.linalg.eigvalsh(root @ covariance @ root)
    shared = np.sqrt(values.clip(0)).sum()
    traces = np.trace(covariance) + (root * root).sum()
    return ((mean - reference_mean) ** 2).sum() + traces - 2 * shared


def principal_axes(reference, k):
    """The first k principal axes of windows (m, F) -> (F, k)."""
    _, _, axes = np.linalg.svd(reference - reference.mean(0), full_matrices=False)
    return axes[:k].T


# ---------------------------------------------------------------------------- sets of clips


def stack(clips):
    """[(n_i, F), ...] -> windows (n, F) in float64, and the clip of each window (n,)."""
    owner = np.repeat(np.arange(len(clips)), [len(clip) for clip in clips])
    return np.concatenate(clips).astype(np.float64), owner


def refuse_too_few(metric, counts, need, why, what_to_do):
    """BadInput where one of {side: windows} has fewer windows than `need`."""
    for side, count in counts.items():
        if count < need:
            raise BadInput(f"{metric}: needs {need} windows {why}, the {side} clips have {count}; "
                           f"{what_to_do}")


def check_fad(metric, judged, reference, dims):
    """Windows of both sides, on the principal axes where dims is not 0; BadInput: too few."""
    x, owner = stack(judged)
    y, _ = stack(reference)
    features = y.shape[1]
    k = dims or features
    if k > features:
        raise BadInput(f"{metric}: on {dims} dimensions, and the embedding has {features}; take "
                       "fewer")
    refuse_too_few(metric, {"judged": len(x), "reference": len(y)}, k + 1,
                   f"of each side for {k} dimensions", "give more clips, or fewer dimensions")
    if dims:
        axes = principal_axes(y, dims)
        x = x @ axes
        y = y @ axes
    return x, owner, y


def fad(judged, reference, dims=0, seed=0):
    """Fréchet distance of clips [(n_i, F), ...] to reference clips -> Figure. dims: on so many
    principal axes of the reference, 0 = on all dimensions.
    """
    x, owner, y = check_fad("fad", judged, reference, dims)
    mean, covariance = gaussian(y)
    root = square_root(covariance)

    def distance(counts):
        return frechet_to(*gaussian(x, counts[owner]), mean, root)

    whole = distance(np.ones(len(judged)))
    return bootstrap_distance(whole, distance, len(judged), seed=seed, least=0.0)


def extrapolate(sizes, values):
    """The value at 1 / size = 0 of the least-squares line through values against 1 / sizes."""
    _, end = np.polyfit(1 / np.asarray(sizes), np.asarray(values), 1)
    return float(end)


def fad_inf(judged, reference, dims=0, seed=0):
    """Fréchet distance extrapolated to infinitely many windows -> Figure. BadInput where the
    clips have fewer than three times the windows that a Gaussian needs.
    """
    x, owner, y = check_fad("fad_inf", judged, reference, dims)
    mean, covariance = gaussian(y)
    root = square_root(covariance)
    need = x.shape[1] + 1
    refuse_too_few("fad_inf", {"judged": len(x)}, 3 * need, f"for subsets of at least {need}",
                   "give more clips, or fewer dimensions")
    if len(judged) < SIZES:
        raise BadInput(f"fad_inf: needs {SIZES} clips for subsets of several sizes, has "
                       f"{len(judged)}; give more clips")

    # sizes in clips, evenly spaced in 1/n, from a half of the clips, or a quarter if that is enough
    n = len(judged)
    share = 4 if len(x) >= 6 * need else 2
    sizes = sorted({max(2, round(1 / s)) for s in np.linspace(share / n, 1 / n, SIZES)})

    def end(counts):
        clips = np.repeat(np.arange(n), counts)
        rng = np.random.default_rng(seed)
        windows = []
        values = []
        for size in sizes:
            for _ in range(SUBSETS if size < n else 1):
                chosen = np.bincount(rng.permutation(clips)[:size], minlength=n)[owner]
                if chosen.sum() >= need:
                    windows.append(chosen.sum())
                    values.append(frechet_to(*gaussian(x, chosen), mean, root))

        # a draw of few different clips may have no second size
        if len(set(windows)) < 2:
            return np.nan
        return extrapolate(windows, values)

    whole = end(np.ones(n, int))
    return bootstrap_distance(whole, end, n, draws=50, seed=seed)


# ---------------------------------------------------------------------------- kernels


def squared_distances(x, y):
    """(n, F), (m, F) -> (n, m)."""
    return ((x ** 2).sum(1)[:, None] + (y ** 2).sum(1) - 2 * x @ y.T).clip(0)


def mean_of_pairs(kernel, counts):
    """Mean of a kernel (n, n) over pairs of different windows, window i taken counts[i] times."""
    pairs = counts.sum() ** 2 - (counts ** 2).sum()
    return (counts @ kernel @ counts - (counts ** 2) @ np.diag(kernel)) / pairs


def mmd(judged, reference, paired=False, seed=0):
    """Squared maximum mean discrepancy of clips [(n_i, F), ...] to reference clips -> Figure; of
    more than 4000 windows of a side every second, third, ... counts.

    paired: window i of one side was made from window i of the other; these pairs are left out
    (Gretton et al. 2012, eq. 4), else the distance were below 0.
    """
    x, owner = stack(judged)
    y, _ = stack(reference)
    refuse_too_few("mmd", {"judged": len(x), "reference": len(y)}, MMD_LEAST, "of each side",
                   "give more clips")
    chosen = drawn_evenly(range(len(x)), MMD_WINDOWS)
    x, owner = x[chosen], owner[chosen]
    y = y[drawn_evenly(range(len(y)), MMD_WINDOWS)]

    # a kernel as wide as the median distance within the reference
    within = squared_distances(y, y)
    width = np.median(within[np.triu_indices(len(y), 1)])
    if width == 0:
        raise BadInput("mmd: the reference windows are all the same; give other clips")
    kernel_xx = np.exp(-squared_distances(x, x) / (2 * width))
    kernel_xy = np.exp(-squared_distances(x, y) / (2 * width))
    if paired:
        across_each = (kernel_xy.sum(1) - np.diag(kernel_xy)) / (len(y) - 1)        # (n,)
    else:
        across_each = kernel_xy.mean(1)
    reference_pairs = mean_of_pairs(np.exp(-within / (2 * width)), np.ones(len(y)))

    def distance(counts):
        counts = counts[owner].astype(float)
        across = counts @ across_each / counts.sum()
        return mean_of_pairs(kernel_xx, counts) + reference_pairs - 2 * across

    whole = distance(np.ones(len(judged)))
    return bootstrap_distance(whole, distance, len(judged), seed=seed)


# ---------------------------------------------------------------------------- tags


def kl_divergence(p, q):
    """Σ p log(p / q) in nats of two distributions (tags,), both at least 1e-12."""
    p = np.maximum(p, 1e-12)
    q = np.maximum(q, 1e-12)
    return float((p * np.log(p / q)).sum())
