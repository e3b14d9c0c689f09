"""An oracle without learning: it reads back from any waveform what the texts of synth.py state.

    wav (S,), "seven three" ─► speech: log-mel ─► DTW against every word in every voice ─┐
                               sound:  events of the envelope, pitch track ──────────────┼─► a text
                               music:  pitch track, beat, harmonics ─────────────────────┘     │
                                       {right: 2, total: 2, text: "seven three"} ◄─ attributes ┘

It tells a model that obeys its text from one that only sounds plausible. Level does not matter, nor
does phase. `python -m corpora.toy --check 100` measures its accuracy.

Sources: one-pass dynamic time warping after Bridle and Brown (1979) and Ney (1984). Neither paper
of this project has such an oracle. Precision: float32.
"""
import functools
from typing import NamedTuple

import numpy as np

from corpora.synth import (CAPTIONS, COUNTS, DIGITS, VOICES, WORDS, attributes, overlap_add,
                           plural, smooth, stft, synthesise)

FRAME = 0.0125                  # s between two log-mel frames
BELOW_PEAK = 3.8                # the floor of log-mel, in units of 10 dB below the peak


# ---- the oracle ----------------------------------------------------------------------------------

def judge(wav, text, kind, rate=16000):
    """Compare mono audio (S,) with its text -> {"right": , "total": , "text": what it says}.

    right, total count the attributes of the text. A spoken answer consists of digits when the text
    does, else of digits and words. "text" is empty for silence, broken or very short audio, and
    where there is nothing to compare with.
    """
    expected = attributes(text, kind)
    wav = np.asarray(wav, np.float32).reshape(-1)
    broken = not np.isfinite(wav).all() or len(wav) < 0.1 * rate or np.abs(wav).max() < 1e-4
    if broken or not expected:
        return dict(right=0, total=len(expected), text="")

    if kind == "speech":
        words = recognise_words(wav, rate, len(expected), vocabulary(expected))
        recognised = " ".join(words)
    elif kind == "sound":
        recognised = describe_sound(wav, rate)
    else:
        recognised = describe_music(wav, rate)

    right = len(expected.items() & attributes(recognised, kind).items())
    return dict(right=right, total=len(expected), text=recognised)


def chance(text, kind):
    """The expected share of right attributes when the answer is a random text of the corpus."""
    expected = attributes(text, kind)
    if kind == "speech":
        return 1 / len(vocabulary(expected))

    # a group at random, then one of its captions
    right = [np.mean([len(expected.items() & other.items()) for other in group.values()])
             for group in CAPTIONS[kind]]
    return float(np.mean(right)) / len(expected)


def vocabulary(expected):
    """The words that a spoken answer picks from."""
    only_digits = set(expected.values()) <= set(DIGITS)
    return tuple(DIGITS if only_digits else DIGITS + WORDS)


def degrade(wav, damage, rate=16000):
    """Do to a clip what a vocoder may do to it; the oracle must survive that.

    damage: "noise" at 20 dB SNR; "phase" lost and rebuilt by eight rounds of Griffin and Lim
    (1984); "smear" of the magnitudes over 3 x 3 cells (8 ms, 31 Hz).
    """
    rng = np.random.default_rng(0)
    if damage == "noise":
        return (wav + 0.1 * wav.std() * rng.standard_normal(len(wav))).astype(np.float32)

    n = rate * 4 // 125                                 # 32 ms
    hop = rate // 125                                   # 8 ms
    spectrum = stft(wav, n, hop)
    magnitude = np.abs(spectrum)

    def resynthesise(magnitude, angle):                 # 1.5: squared windows at 4 x overlap
        frames = np.fft.irfft(magnitude * np.exp(1j * angle), n) * np.hanning(n + 1)[:-1] / 1.5
        return overlap_add(frames, hop)[n // 2:n // 2 + len(wav)]

    if damage == "smear":
        smeared = smooth(smooth(magnitude, 3).T, 3).T
        return resynthesise(smeared, np.angle(spectrum))

    rebuilt = resynthesise(magnitude, 2 * np.pi * rng.random(spectrum.shape))
    for _ in range(8):
        rebuilt = resynthesise(magnitude, np.angle(stft(rebuilt, n, hop)))
    return rebuilt


# ---- spectra -------------------------------------------------------------------------------------

def power_spectra(wav, rate, window, hop, nfft=None):
    """Power spectra (T, F); window and hop in seconds."""
    spectrum = stft(wav, int(window * rate), int(hop * rate), nfft)
    return (spectrum.real ** 2 + spectrum.imag ** 2).astype(np.float32)


@functools.cache
def mel_filters(rate, bins, n=18, low=100.0, high=7600.0):
    """Triangular filters (bins, n), equal steps in mel = 2595 log10(1 + f/700)."""
    edges = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), n + 2)
    hz = 700 * (10 ** (edges / 2595) - 1)
    f = np.linspace(0, rate / 2, bins)[:, None]
    rising = (f - hz[:-2]) / (hz[1:-1] - hz[:-2])
    falling = (hz[2:] - f) / (hz[2:] - hz[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(wav, rate):
    """Log-mel spectra (T, 18) at 12.5 ms, in units of 10 dB above a floor 38 dB below the peak."""
    power = power_spectra(wav, rate, 0.032, FRAME)
    power = power @ mel_filters(rate, power.shape[1])

    # the peak of what is not silence, however long that is
    loudest = power.max(1)
    peak = np.percentile(loudest[loudest >= 1e-3 * loudest.max()], 95)
    return np.maximum(0, np.log10(power / (peak + 1e-12) + 1e-12) + BELOW_PEAK)


# ---- speech --------------------------------------------------------------------------------------

@functools.cache
def templates(rate, words):
    """Every word in every voice, end to end, as a chain of states.

    -> features (states, 18), index of each state's word (states,), first and last state of each
    template. Two states that match nothing separate the templates.
    """
    features = []
    word_of = []
    first = []
    last = []
    for i, word in enumerate(words):
        for voice in range(len(VOICES)):
            wav, [(_, start, end)] = synthesise(word, "speech", voice=voice, seed=voice, rate=rate)
            spoken = log_mel(wav, rate)[round(start / FRAME):round(end / FRAME) + 1]

            separators = np.full_like(spoken[:2], 1e4)
            features.append(np.concatenate([separators, spoken]))
            first.append(len(word_of) + 2)
            word_of.extend([i] * (len(spoken) + 2))
            last.append(len(word_of) - 1)
    return np.concatenate(features), np.array(word_of), np.array(first), np.array(last)


def recognise_words(wav, rate, n, words):
    """The best n of `words`: one-pass dynamic time warping against all templates at once.

    Level l of the n levels is the l-th word. From frame to frame a path moves on by one state, or
    at a price stays or skips one; between words it may rest in silence. A path stores its words so
    far as the digits of one number, in base len(words).
    """
    features, word_of, first, last = templates(rate, words)
    base = len(words)

    # distances of every frame to every state, and to silence, which is 0 in log-mel
    x = log_mel(wav, rate)
    energy = (x ** 2).sum(1)
    distances = np.sqrt(np.maximum(
        0, energy[:, None] + (features ** 2).sum(1) - 2 * x @ features.T))   # (T, states)
    to_silence = np.sqrt(energy)                                             # (T,)

    # the best path to each level and state, and to silence after l words
    cost = np.full((n, len(word_of)), 1e9, np.float32)
    path = np.zeros((n, len(word_of)), np.int64)
    rest_cost = np.full(n + 1, 1e9, np.float32)
    rest_path = np.zeros(n + 1, np.int64)
    rest_cost[0] = 0

    for distance, silence in zip(distances, to_silence):
        # word l may end here
        best = last[cost[:, last].argmin(1)]
        end_cost = cost[np.arange(n), best]
        end_path = path[np.arange(n), best]

        # word l + 1 may begin: after silence, or after word l
        begin_cost = rest_cost[:-1].copy()
        begin_path = rest_path[:-1].copy()
        np.copyto(begin_path[1:], end_path[:-1], where=end_cost[:-1] < begin_cost[1:])
        np.minimum(begin_cost[1:], end_cost[:-1], out=begin_cost[1:])

        # silence may begin or continue
        np.copyto(rest_path[1:], end_path, where=end_cost < rest_cost[1:])
        rest_cost[1:] = np.minimum(rest_cost[1:], end_cost)
        rest_cost += silence

        # the separator before each template's first state stands for its beginning
        cost[:, first - 1] = begin_cost[:, None]
        path[:, first - 1] = begin_path[:, None] * base + word_of[first]
        cost, path = advance(cost, path)
        cost = cost + distance

    # the best of ending in the last word and in silence after it
    end = last[cost[-1, last].argmin()]
    code = int(path[-1, end] if cost[-1, end] < rest_cost[n] else rest_path[n])
    return [words[code // base ** i % base] for i in reversed(range(n))]


def advance(cost, path):
    """The best paths (levels, states) into each state, one frame later.

    From the state itself at a price of 2.5, from the one before for nothing, from two before for 3.
    """
    new_cost = cost + np.float32(2.5)
    new_path = path.copy()
    for step, price in ((1, 0), (2, 3)):
        moved = cost[:, :-step] + np.float32(price)
        better = moved < new_cost[:, step:]
        np.copyto(new_cost[:, step:], moved, where=better)
        np.copyto(new_path[:, step:], path[:, :-step], where=better)
    return new_cost, new_path


# ---- sound and music -----------------------------------------------------------------------------

class PitchTrack(NamedTuple):
    """The strongest partial in steps of 10 ms, (T,) each."""
    hz: np.ndarray
    power: np.ndarray           # of the whole frame
    tonal: np.ndarray           # share of that power within 60 Hz of the partial
    second: np.ndarray          # amplitude of its 2nd harmonic, relative to it
    third: np.ndarray           # of its 3rd


def pitch_track(wav, rate):
    """Find the strongest partial between 150 and 3200 Hz in each frame."""
    power = power_spectra(wav, rate, 0.04, 0.01, 4096)
    bin_hz = rate / 4096
    low = int(150 / bin_hz)
    high = int(3200 / bin_hz)
    width = round(60 / bin_hz)

    peak = low + power[:, low:high].argmax(1)
    sums = power.cumsum(1, dtype=np.float64)
    sums = np.concatenate([np.zeros((len(power), 1)), sums], 1)              # (T, F + 1)

    def power_around(centre):
        centre = np.clip(centre, width, power.shape[1] - width - 1)[:, None]
        above = np.take_along_axis(sums, centre + width, 1)
        below = np.take_along_axis(sums, centre - width, 1)
        return above[:, 0] - below[:, 0]

    total = sums[:, -1]
    main = power_around(peak) + 1e-12
    return PitchTrack(hz=peak * bin_hz, power=total, tonal=main / (total + 1e-12),
                      second=np.sqrt(power_around(2 * peak) / main),
                      third=np.sqrt(power_around(3 * peak) / main))


def events(wav, rate):
    """[(start s, end s), ...] of what is louder than 0.3 of the top, until it is below 0.15."""
    envelope = power_spectra(wav, rate, 0.016, 0.004).sum(1)
    envelope = np.sqrt(smooth(envelope, 4))
    top = np.percentile(envelope, 99.5)

    found = []
    start = None
    for i, level in enumerate(np.append(envelope, 0)):
        if start is None and level > 0.3 * top:
            start = i
        elif start is not None and level < 0.15 * top:
            found.append((start * 0.004, i * 0.004))
            start = None

    # a gap below 40 ms separates nothing
    joined = []
    for start, end in found:
        if joined and start - joined[-1][1] < 0.04:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def describe_sound(wav, rate):
    """A caption: events of the envelope, then noise, chirp or beep from the strongest partial."""
    found = events(wav, rate)
    length = np.median([end - start for start, end in found])
    count = COUNTS[min(len(found), 4) - 1]
    s = plural(count)
    if length < 0.065:
        return f"{count} click{s}"

    track = pitch_track(wav, rate)
    if np.average(track.tonal, weights=track.power) < 0.5:
        return "a long noise burst" if length > 0.3 else f"{count} noise burst{s}"

    # octaves that the partial rises in all
    loud = track.power > 0.05 * track.power.max()
    slope = np.polyfit(np.flatnonzero(loud), np.log2(track.hz[loud]), 1,
                       w=np.sqrt(track.power[loud]))[0]
    octaves = slope * loud.sum()
    if len(found) == 1 and abs(octaves) > 0.8:
        speed = "slow" if length > 0.55 else "fast"
        return f"a {speed} {'rising' if octaves > 0 else 'falling'} chirp"

    hz = np.median(track.hz[loud])
    if hz < 470:
        return f"{count} low beep{s}"
    return f"{count} {'middle' if hz < 1280 else 'high'} beep{s}"


def describe_music(wav, rate):
    """A caption: shape and register from the pitch track, tempo, timbre from the harmonics."""
    track = pitch_track(wav, rate)
    loud = track.power > 0.03 * track.power.max()
    register = "low" if np.median(track.hz[loud]) < 500 else "high"
    return f"a {tempo(wav, rate)} {shape(track, loud)}, {register}, {timbre(track, loud)}"


def shape(track, loud):
    """Rising, falling or repeated notes, or an arpeggio, from the pitch over time."""
    padded = np.pad(np.log2(track.hz), 3, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 7)
    octave = np.median(windows, 1)[loud]                    # median of 70 ms: no outliers
    frame = np.flatnonzero(loud)

    correlation = np.corrcoef(frame, octave)[0, 1] if octave.std() > 0 else 0
    if np.ptp(np.percentile(octave, [15, 85])) < 0.08:
        return "repeated note"
    if correlation > 0.7:
        return "rising scale"
    if correlation < -0.7:
        return "falling scale"
    return "arpeggio"


def tempo(wav, rate):
    """Fast where the envelope repeats after 120 to 165 ms: seven notes per second, not four."""
    envelope = np.sqrt(power_spectra(wav, rate, 0.024, 0.005).sum(1))
    loud = np.flatnonzero(envelope > 0.1 * envelope.max())
    envelope = envelope[loud[0]:loud[-1] + 1]               # without the silence around it
    envelope = np.pad(envelope - envelope.mean(), 40)

    autocorrelation = [np.dot(envelope[:-lag], envelope[lag:]) for lag in range(24, 34)]
    return "fast" if max(autocorrelation) > 0.3 * np.dot(envelope, envelope) else "slow"


def timbre(track, loud):
    """Which of three instruments has these 2nd and 3rd harmonics."""
    second = np.median(track.second[loud])
    third = np.median(track.third[loud])
    if third > 0.25 and second < 0.6 * third:
        return "organ"
    return "pluck" if second > 0.25 else "flute"
