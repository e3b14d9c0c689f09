"""Word times of a recording, from a synthetic voice that says the same words: what
`python -m corpora.align --by flite` does.

    "the old farmer" ─► flite, four voices ──► audio with exact word times ─┐
    recording, quiet ends cut off ─► cepstra, 100 per second ───────────────┴─► warping
                                       ─► median of the nearest ──► [["the", 0.18, 0.27], ...]

Cepstra: the first 13 cosine coefficients of 40 log-mel bands from 80 to 5500 Hz, and their slopes
in time, each with mean 0 and deviation 1 over its own audio, so that level, microphone and much of
the voice drop out. Dynamic time warping: the path through all pairs of frames with the least sum of
distances, where a step forward in both costs twice one in either (Sakoe and Chiba 1978, symmetric
form). A word begins in the middle of the frames that meet its first one. Of the three voices that
are nearest to the recording, the median: one of them may fail.

Source: alignment by synthesis (Malfrere and Dutoit 1997; the aeneas program does it with espeak).
English alone; needs the Debian package flite, no weights and no download.

Accuracy against the exact times of a natural voice (corpora/piper.py, 100 sentences, 727 words):
all words begin early, by 0.045 s; but for that, half of them are within 0.022 s and nine of ten
within 0.051 s. Whisper (align.py) on the same: 0.096 s early, within 0.046 and 0.102 s. A delay
that all words share is nothing to a model that learns from it.
"""
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from corpora.flite import VOICES, engine

# sample rate of flite and of Whisper, Hz
RATE = 16000
# seconds in which the level is measured; one row of Whisper's encoder is as long
FRAME = 0.02
# level relative to the loudest frame below which the ends are quiet: -35 dB
QUIET = 10 ** (-35 / 20)
# samples between two frames and of one
HOP = 160
WINDOW = 400
FFT = 512
BANDS = 40
CEPSTRA = 13
# weight of the slopes beside the cepstra
SLOPES = 0.7
# voices whose times are used, of those of flite: the nearest to the recording
NEAREST = 3
# a text whose synthesis is longer or shorter than so many times the recording is of other audio
STRETCH = 3.0
# seconds of audio at most: memory grows with the square
LONGEST = 30.0


def loud_part(wav):
    """wav (S,) at 16 kHz -> (first, last + 1) sample of the 20 ms frames above -35 dB.

    The level is relative to the loudest frame; (0, S) for silence and for less than one frame.
    """
    hop = int(FRAME * RATE)
    frames = wav[:len(wav) // hop * hop].reshape(-1, hop)
    rms = np.sqrt(np.mean(np.square(frames), 1))
    if not len(rms) or not rms.max():
        return 0, len(wav)

    loud = np.flatnonzero(rms >= QUIET * rms.max())
    return int(loud[0]) * hop, int(loud[-1] + 1) * hop


def mel_filters():
    """Triangles, evenly spaced on the mel scale from 80 to 5500 Hz -> (BANDS, FFT / 2 + 1)."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (80, 5500))
    edges = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(FFT, 1 / RATE)
    left, centre, right = (edges[i:i + BANDS, None] for i in range(3))
    return np.maximum(0, np.minimum((bins - left) / (centre - left),
                                    (right - bins) / (right - centre)))


def cepstra(wav):
    """wav (S,) at 16 kHz, at least one window -> (T, 26): cepstra and slopes of every 10 ms."""
    # a little noise, so that digital silence has a spectrum; high frequencies lifted
    wav = wav + 1e-4 * np.random.default_rng(0).standard_normal(len(wav))
    wav = np.append(wav[0], wav[1:] - 0.97 * wav[:-1])
    frames = sliding_window_view(wav, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2                           # (T, FFT / 2 + 1)
    log_mel = np.log(power @ mel_filters().T + 1e-6)

    # cosine transform, and what is left of it without mean and level
    k = np.arange(CEPSTRA)[:, None]
    found = log_mel @ np.cos(np.pi * k * (np.arange(BANDS) + 0.5) / BANDS).T
    found = (found - found.mean(0)) / (found.std(0) + 1e-6)                 # (T, 13)
    slopes = np.gradient(found, axis=0) if len(found) > 1 else 0 * found
    slopes = slopes / (slopes.std(0) + 1e-6)
    return np.concatenate([found, SLOPES * slopes], 1)


def warp(x, y):
    """x (n, d), y (m, d) -> (the path of least distance, [(i, j), ...] from (0, 0) to the end, its
    distance per frame).
    """
    distance = np.sqrt(np.maximum(0, (x ** 2).sum(1)[:, None] + (y ** 2).sum(1) - 2 * x @ y.T))
    n, m = distance.shape

    # the least sum up to each pair, one anti-diagonal after the other
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    came = np.zeros((n, m), np.int8)                     # 0: from both, 1: along x, 2: along y
    for s in range(n + m - 1):
        i = np.arange(max(0, s - m + 1), min(n, s + 1))
        j = s - i
        ways = np.stack([total[i, j] + 2 * distance[i, j], total[i, j + 1] + distance[i, j],
                         total[i + 1, j] + distance[i, j]])
        came[i, j] = ways.argmin(0)
        total[i + 1, j + 1] = ways.min(0)

    # back from the end
    i, j = n - 1, m - 1
    path = [(i, j)]
    while i > 0 or j > 0:
        i, j = i - (came[i, j] != 2), j - (came[i, j] != 1)
        path.append((i, j))
    return path[::-1], total[n, m] / (n + m)


def where_words_begin(path, frames):
    """A path of (recording, synthesis) frames, frames of the synthesis -> of the recording: the
    middle of those that they meet.
    """
    met = {}
    for i, j in path:
        first, _ = met.get(j, (i, i))
        met[j] = (first, i)
    last = path[-1][1]
    return [sum(met[min(max(frame, 0), last)]) / 2 for frame in frames]


class Warper:
    """flite as a function (wav, text) -> word times, in the place of align.Aligner.

    Errors: BadInput where flite is not installed.
    """

    def __init__(self):
        self.flite = engine()

    def __call__(self, wav, text):
        """wav (S,) numpy at 16 kHz, text -> [[word, start, end], ...] in seconds, or None for what
        cannot be aligned: over 30 s, under a window, nothing that flite says, or a text that does
        not fit the audio's length. A word that flite does not say has no length.
        """
        first, last = loud_part(wav)
        if not WINDOW <= last - first <= LONGEST * RATE:
            return None
        own = cepstra(wav[first:last].astype(np.float64))

        found = [self.times_by(voice, own, text) for voice in VOICES]
        if None in found:
            return None
        nearest = sorted(found, key=lambda pair: pair[0])[:NEAREST]
        times = np.median([times for _, times in nearest], 0)
        return words_from(text.split(), first / RATE + times, last / RATE)

    def times_by(self, voice, own, text):
        """-> (mean distance of the path, (words, 2) seconds from the first frame of the recording,
        NaN for words without sound), or None.
        """
        samples, words = self.flite.speak_text(text, voice)
        samples = samples / 32768
        first, last = loud_part(samples)
        if all(word is None for word in words) or last - first < WINDOW:
            return None
        other = cepstra(samples[first:last])
        if not 1 / STRETCH <= len(other) / len(own) <= STRETCH:
            return None

        path, distance = warp(own, other)
        spoken = [k for k, word in enumerate(words) if word is not None]
        times = np.full((len(words), 2), np.nan)
        for side in range(2):
            frames = [round((words[k][side] * RATE - first) / HOP) for k in spoken]
            times[spoken, side] = np.array(where_words_begin(path, frames)) * HOP / RATE
        return distance, times


def words_from(words, times, end):
    """Words and their (n, 2) times, NaN where there are none -> [[word, start, end], ...], none
    before the one before it and none behind `end`.
    """
    found = []
    done = 0.0
    for word, (start, stop) in zip(words, times.tolist()):
        start = done if start != start else min(max(start, done), end)
        stop = start if stop != stop else min(max(stop, start), end)
        found.append([word, round(start, 3), round(stop, 3)])
        done = stop
    return found
