"""Speech, sounds and music made by rule: a text becomes audio that does what the text says.

    "seven three" ─► words ─► phonemes ─► tracks of F1..F3, voice, breath, hiss     speech
                                                            │
      pulses (f0) ──STFT── × glottis × cascade of formants ─┼─(+)─► overlap-add ─► wav (S,)
      noise       ──STFT── × breath × formants, + hiss band ┘

    "two low beeps"               ─► {type: beep, count: two, pitch: low}           sound
    "a fast rising scale, high, flute"   ─► {tempo, shape, register, timbre}        music
                                            └─► a few tones or bursts, each at its start ─► wav

Formants of the vowels follow Peterson and Barney (1952). No paper of this project has such a
synthesiser. Precision: float32, phases float64. Same seed, same samples, on the same build of
numpy.
"""
from typing import NamedTuple

import numpy as np

from cli import BadInput

DIGITS = "zero one two three four five six seven eight nine".split()
WORDS = "yes no go stop up down left right".split()
KINDS = ("speech", "sound", "music")
RATES = (16000, 24000)
COUNTS = ("one", "two", "three", "four")


# ---- attributes: what a text states --------------------------------------------------------------

def plural(count):
    return "" if count == "one" else "s"


# {caption: attributes} of each kind, in groups of one sort
CAPTIONS = {
    "sound": [
        {f"{count} {pitch} beep{plural(count)}": dict(type="beep", count=count, pitch=pitch)
         for count in COUNTS for pitch in ("low", "middle", "high")},

        {f"{count} click{plural(count)}": dict(type="click", count=count) for count in COUNTS},

        {**{f"{count} noise burst{plural(count)}": dict(type="noise", count=count, length="short")
            for count in COUNTS},
         "a long noise burst": dict(type="noise", count="one", length="long")},

        {f"a {speed} {direction} chirp": dict(type="chirp", speed=speed, direction=direction)
         for speed in ("slow", "fast") for direction in ("rising", "falling")},
    ],
    "music": [
        {f"a {tempo} {shape}, {register}, {timbre}":
         dict(tempo=tempo, shape=shape, register=register, timbre=timbre)
         for tempo in ("slow", "fast") for register in ("low", "high")
         for timbre in ("flute", "organ", "pluck")}
        for shape in ("rising scale", "falling scale", "arpeggio", "repeated note")
    ],
}


def attributes(text, kind):
    """The attributes that a text states, {name: value}; {} for an empty caption or no words.

    Speech: {position: word}. Errors: BadInput where no clip of this corpus has such a text.
    """
    if kind not in KINDS:
        raise BadInput(f"kind {kind!r} is not one of {', '.join(KINDS)}")

    if kind == "speech":
        for word in text.split():
            if word not in SPELLING:
                raise BadInput(f"the toy voice cannot say {word!r}, only {' '.join(SPELLING)}")
        return dict(enumerate(text.split()))

    for group in CAPTIONS[kind]:
        if text in group:
            return group[text]
    if text:
        examples = [list(group)[-1] for group in CAPTIONS[kind]]
        raise BadInput(f"no toy {kind} is called {text!r}; some are: {'; '.join(examples)}")
    return {}


# ---- speech: tables ------------------------------------------------------------------------------

class Voice(NamedTuple):
    f0: float                   # Hz
    formant_scale: float        # 1 / length of the vocal tract
    breath: float               # amplitude of noise under the voice
    tempo: float
    tilt: float                 # Hz, corner of the glottal spectrum; lower is duller


VOICES = (
    Voice(106, 0.93, 0.04, 1.04, 800),
    Voice(212, 1.18, 0.12, 0.98, 900),
    Voice(130, 1.02, 0.35, 0.94, 350),
    Voice(176, 1.10, 0.04, 1.06, 1800),
    Voice(86, 0.86, 0.08, 0.96, 1500),
    Voice(152, 1.05, 0.08, 1.0, 600),
)

# columns of SEGMENTS; a formant of 0 Hz means that of the neighbours
MS, VOICING, BREATH, F1, F2, F3, HISS, HISS_CENTRE, HISS_WIDTH = range(9)

# cl is a closure; t, d, k, g, p are bursts; h is the breath after one
SEGMENT_TABLE = """
    name   ms  voice breath   F1   F2   F3   hiss centre width
    sil    50    0     0       0    0    0      0   5000  2000
    cl     45    0     0       0    0    0      0   5000  2000
    IY    150   1.6    0     280 2280 3000      0   5000  2000
    IH     90   1.2    0     400 1980 2550      0   5000  2000
    EH     95    1     0     540 1830 2480      0   5000  2000
    AH     95    1     0     640 1190 2450      0   5000  2000
    AX     60   0.8    0     520 1400 2400      0   5000  2000
    AA    110    1     0     740 1120 2450      0   5000  2000
    AO    190    1     0     560  850 2420      0   5000  2000
    O1     85    1     0     540  980 2350      0   5000  2000
    UW    110   1.6    0     310  900 2250      0   5000  2000
    E1    110   1.1    0     480 1950 2550      0   5000  2000
    I2     80   1.3    0     330 2200 2800      0   5000  2000
    U2     80   1.3    0     340  800 2250      0   5000  2000
    W      65   1.2    0     290  620 2150      0   5000  2000
    Y      65   1.2    0     260 2300 3050      0   5000  2000
    R      75   0.8    0     380 1150 1550      0   5000  2000
    RX     80   0.8    0     450 1280 1650      0   5000  2000
    L      70   0.7    0     340 1050 2800      0   5000  2000
    N      70   0.6    0     240 1550 2600      0   5000  2000
    V      60   0.4    0     260 1050 2250    0.1   6000  3500
    Z      75  0.35    0     270 1750 2550    0.6   5800  1200
    S     100    0     0     300 1750 2550    1.4   5800  1200
    F      85    0   0.03    320 1100 2300    0.3   6000  4000
    TH     85    0   0.03    320 1350 2500    0.2   5200  4500
    h      32    0    0.5    350 1500 2500   0.05   5000  3000
    t      12    0    0.1    320 1800 2600      1   4500  1800
    d      12   0.5   0.1    300 1750 2600    0.8   4000  1800
    k      16    0    0.1    320 1900 2300      1   2200   700
    g      16   0.5   0.1    300 1500 2200    0.8   1700   700
    p      10    0    0.1    320 1000 2250    0.6   1000   900
"""

SPELLING_TABLE = """
    zero   Z IH R O1 U2
    one    W AH AH N
    two    t h UW UW
    three  TH R IY
    four   F AO RX
    five   F AA I2 V
    six    S IH cl k S
    seven  S EH V AX N
    eight  E1 I2 cl t h
    nine   N AA I2 N
    yes    Y EH S
    no     N O1 U2 U2
    go     g O1 U2 U2
    stop   S cl t AA cl p
    up     AH AH cl p h
    down   d AA U2 N
    left   L EH F cl t
    right  R AA I2 cl t
"""


def read_table(table):
    """Lines of words -> {first word: the others}."""
    rows = [line.split() for line in table.strip().splitlines()]
    return {name: values for name, *values in rows}


SEGMENTS = {name: [float(value) for value in values]
            for name, values in read_table(SEGMENT_TABLE).items() if name != "name"}
SPELLING = read_table(SPELLING_TABLE)


# ---- speech: signal processing -------------------------------------------------------------------

def smooth(x, n):
    """Hann-weighted moving average of n rows along axis 0; edges are repeated."""
    weights = np.hanning(n + 2)[1:-1]
    padding = [(n // 2, n - 1 - n // 2)] + [(0, 0)] * (x.ndim - 1)
    padded = np.pad(x, padding, mode="edge")
    return sum(weights[i] * padded[i:i + len(x)] for i in range(n)) / weights.sum()


def stft(x, n, hop, nfft=None):
    """Spectra of Hann windows of n samples centred on multiples of hop -> (len(x) // hop + 1, F).

    nfft: length of the transform, n unless given.
    """
    padded = np.pad(x, (n // 2, n))
    windows = np.lib.stride_tricks.sliding_window_view(padded, n)[::hop]
    windows = windows[:-(n // 2 // hop)] * np.hanning(n + 1)[:-1].astype(np.float32)
    return np.fft.rfft(windows, nfft).astype(np.complex64)


def overlap_add(frames, hop):
    """Add up frames (T, k hop), one every hop samples -> ((T + k - 1) hop,)."""
    T = len(frames)
    k = frames.shape[1] // hop
    out = np.zeros((T + k - 1, hop), np.float32)
    for i in range(k):                                  # one column of hop samples at a time
        out[i:i + T] += frames[:, i * hop:(i + 1) * hop]
    return out.reshape(-1)


# ---- speech: text to waveform --------------------------------------------------------------------

STEPS = 200                     # per second: tracks have a value every 5 ms


def speak(words, voice, rng, rate):
    """Words -> (wav (S,), [[word, start s, end s], ...]); a source-filter model in the STFT domain.

    Every 5 ms a frame of 20 ms, of pulses and of noise, is multiplied by the complex (hence causal)
    response of five resonators; the frames overlap-add into the waveform.
    """
    if not 0 <= voice < len(VOICES):
        raise BadInput(f"voice {voice} does not exist, use 0 to {len(VOICES) - 1}")
    v = VOICES[voice]
    f0 = v.f0 * (1 + rng.uniform(-0.08, 0.08))
    tempo = v.tempo * (1 + rng.uniform(-0.1, 0.1))

    # what is articulated when
    segments, ends, times = articulation(words, tempo, rng)
    T = int(ends[-1] * STEPS) + 1
    formants, amplitude, breath, hiss, centre, width = tracks(segments, ends, T, v.formant_scale)

    # sources: pulses at the pitch, and noise
    hop = rate // STEPS
    seconds = np.arange(T * hop) / rate                                  # (S,)
    pitch = pitch_contour(f0, seconds, times, rng)
    pulses = pulse_train(pitch, rate)
    noise = rng.standard_normal(len(seconds), dtype=np.float32)

    # filters of both sources
    f = np.fft.rfftfreq(8 * hop, 1 / rate).astype(np.float32)            # (F,) Hz
    tract = vocal_tract(formants, v.formant_scale, f, rate)              # (T, F)
    glottis = ((1j * f / 150) / ((1 + 1j * f / 150) * (1 + 1j * f / v.tilt))).astype(np.complex64)
    aspiration = 1.2 * f / (f + 1000)
    hiss_band = 0.5 * hiss * np.exp(-0.5 * ((f - centre) / width) ** 2)  # (T, F)

    spectrum = stft(pulses, 4 * hop, hop, 8 * hop)[:T] * (tract * (glottis * (2 * amplitude)))
    spectrum += stft(noise, 4 * hop, hop, 8 * hop)[:T] * (
        tract * (aspiration * (breath + v.breath * amplitude)) + hiss_band)
    wav = overlap_add(np.fft.irfft(spectrum, 8 * hop).astype(np.float32), hop)
    return wav[2 * hop:2 * hop + len(seconds)], times


def articulation(words, tempo, rng):
    """Segments in order (rows of SEGMENTS), their ends in s, and [[word, start s, end s], ...]."""
    segments = []
    ends = []
    times = []

    def add(name, seconds):
        segments.append(SEGMENTS[name])
        ends.append((ends[-1] if ends else 0.0) + seconds)

    add("sil", rng.uniform(0.03, 0.08))
    for i, word in enumerate(words):
        if i:
            add("sil", rng.uniform(0.04, 0.12))
        start = ends[-1]
        for name in SPELLING[word]:
            add(name, SEGMENTS[name][MS] / 1000 / tempo)
        times.append([word, round(start, 3), round(ends[-1], 3)])
    add("sil", rng.uniform(0.03, 0.06))
    return segments, ends, times


def tracks(segments, ends, T, formant_scale):
    """Formants (T, 3) in Hz, and (T, 1) each: voicing, breath, hiss, its centre and width in Hz."""
    index = np.searchsorted(ends, np.arange(T) / STEPS, side="right")
    track = np.array(segments)[index.clip(max=len(segments) - 1)]        # (T, 9)

    # coarticulation: formants move over about 40 ms
    given = np.flatnonzero(track[:, F1])
    formants = np.stack([np.interp(np.arange(T), given, track[given, column])
                         for column in (F1, F2, F3)], 1)
    formants = smooth(formants, 15) * formant_scale

    sources = smooth(track[:, [VOICING, BREATH, HISS, HISS_CENTRE, HISS_WIDTH]], 3)
    return formants, *sources.T[..., None].astype(np.float32)


def pitch_contour(f0, seconds, times, rng):
    """Pitch in Hz at each sample: f0 with declination, an accent on each word, 1 % of flutter."""
    contour = 1.1 - 0.25 * seconds / seconds[-1]
    for _, start, end in times:
        contour += 0.08 * np.exp(-0.5 * ((seconds - start - 0.35 * (end - start)) / 0.07) ** 2)

    knots = np.arange(0, seconds[-1] + 0.05, 0.03)
    flutter = np.interp(seconds, knots, 1 + 0.01 * rng.standard_normal(len(knots)))
    return contour * (f0 * flutter)


def pulse_train(pitch, rate):
    """Pulses of unit power where the phase of pitch (S,) in Hz passes an integer -> (S,).

    A pulse between two samples is shared by both.
    """
    phase = np.cumsum(pitch / rate)
    n = np.flatnonzero(np.diff(np.floor(phase))) + 1
    late = ((phase[n] % 1) * rate / pitch[n]).clip(0, 1)                 # samples since the pulse

    pulses = np.zeros(len(pitch), np.float32)
    pulses[n] += np.sqrt(rate / pitch[n]) * (1 - late)
    pulses[n - 1] += np.sqrt(rate / pitch[n]) * late
    return pulses


def vocal_tract(formants, scale, f, rate):
    """Response of a cascade of five resonators of gain 1 at 0 Hz, at frequencies f (F,) -> (T, F).

    formants (T, 3) in Hz; the two resonators above do not move.
    """
    z = np.exp(-2j * np.pi * f / rate).astype(np.complex64)
    centres = (*formants.T[..., None], 3500 * scale, 4500 * scale)
    bandwidths = (80 * scale, 100 * scale, 140 * scale, 250, 350)

    gain = 1
    poles = 1
    for hz, bandwidth in zip(centres, bandwidths):
        r = np.float32(np.exp(-np.pi * bandwidth / rate))
        c = (2 * r * np.cos(2 * np.pi * hz / rate)).astype(np.float32)
        gain = gain * (1 - c + r * r)
        poles = poles * (1 - c * z + r * r * z * z)
    return gain / poles


# ---- sound and music: text to waveform -----------------------------------------------------------

def tone(frequency, seconds, rate, harmonics=(1,), attack=0.008, decay=0.0):
    """A note with soft ends.

    frequency: Hz, a number or (S,); harmonics: their amplitudes; attack: s; decay: 1/s.
    """
    S = int(seconds * rate)
    t = np.arange(S) / rate
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, S)) / rate
    wav = sum(amplitude * np.sin((k + 1) * phase) for k, amplitude in enumerate(harmonics)
              if amplitude and (k + 1) * np.max(frequency) < 0.47 * rate)
    return wav * np.minimum(1, np.minimum(t, t[-1] - t) / attack) * np.exp(-decay * t)


def sound(stated, rng, rate):
    """Attributes of a sound -> ([(start s, wav), ...], length of the clip in s)."""
    lead = rng.uniform(0.04, 0.1)
    if stated["type"] == "chirp":
        seconds, wav = chirp(stated, rng, rate)
        parts = [(lead, wav)]
    else:
        seconds, step, wavs = repeated_sound(stated, rng, rate)
        parts = [(lead + i * step, wav) for i, wav in enumerate(wavs)]

    last_start = parts[-1][0]
    return parts, min(1.3, max(0.8, last_start + seconds + rng.uniform(0.05, 0.12)))


def chirp(stated, rng, rate):
    """A tone that glides over at least 1.8 octaves -> (seconds, wav)."""
    if stated["speed"] == "slow":
        seconds = rng.uniform(0.75, 0.9)
    else:
        seconds = rng.uniform(0.28, 0.36)

    first = rng.uniform(300, 500)
    last = rng.uniform(1800, 2600)
    if stated["direction"] == "falling":
        first, last = last, first
    frequency = first * (last / first) ** np.linspace(0, 1, int(seconds * rate))
    return seconds, tone(frequency, seconds, rate, attack=0.02)


def repeated_sound(stated, rng, rate):
    """One to four beeps, clicks or bursts of noise -> (s of one, s from start to start, wavs).

    Every kind of sound draws the same random numbers.
    """
    base = {"low": 280, "middle": 780, "high": 2100}.get(stated.get("pitch"), 0)
    base *= rng.uniform(0.88, 1.12)
    step = rng.uniform(0.21, 0.27)
    seconds = {"beep": rng.uniform(0.1, 0.13), "click": 0.03,
               "noise": rng.uniform(0.09, 0.12)}[stated["type"]]
    if stated.get("length") == "long":
        seconds = rng.uniform(0.55, 0.8)
    ring = rng.uniform(1500, 3500)
    colour = rng.uniform(0.3, 0.7)

    wavs = []
    for _ in range(COUNTS.index(stated["count"]) + 1):
        noise = rng.standard_normal(int(seconds * rate))
        t = np.arange(len(noise)) / rate
        if stated["type"] == "beep":
            wav = tone(base, seconds, rate)
        elif stated["type"] == "click":
            wav = np.exp(-t / 0.003) * (np.sin(2 * np.pi * ring * t) + 0.5 * noise)
        else:
            noise[1:] += colour * noise[:-1]            # slightly low-passed
            wav = noise * 0.3 * np.minimum(1, np.minimum(t, t[-1] - t) / 0.006)
        wavs.append(wav)
    return seconds, step, wavs


SCALE = (0, 2, 4, 5, 7, 9, 11, 12)      # semitones
LOWEST = {"low": 261.63, "high": 523.25}    # Hz: C4, C5; all music is in C major
TIMBRES = {
    "flute": dict(harmonics=(1, 0.06), attack=0.025),
    "organ": dict(harmonics=(1, 0, 0.6, 0, 0.4, 0, 0.25), attack=0.012),
    "pluck": dict(harmonics=(1, 0.5, 0.33, 0.2, 0.12, 0.08), attack=0.004),
}


def music(stated, rng, rate):
    """Attributes of a phrase -> ([(start s, wav), ...], length of the clip in s)."""
    slow = stated["tempo"] == "slow"
    notes = 5 if slow else 8
    step = rng.uniform(0.26, 0.3) if slow else rng.uniform(0.13, 0.15)

    scale = SCALE[:notes]
    semitones = {"rising scale": scale, "falling scale": scale[::-1],
                 "repeated note": [4] * notes,
                 "arpeggio": [0, 7, 12, 7, 0] if slow else [0, 4, 7, 12, 7, 4, 0, 4],
                 }[stated["shape"]]
    base = LOWEST[stated["register"]]

    timbre = TIMBRES[stated["timbre"]]
    decay = 7 / step * 0.75 if stated["timbre"] == "pluck" else 0.0
    lead = rng.uniform(0.03, 0.08)
    parts = [(lead + i * step,
              tone(base * 2 ** (semitone / 12), step * 0.84, rate, decay=decay, **timbre))
             for i, semitone in enumerate(semitones)]
    return parts, min(1.6, max(1.0, lead + notes * step + rng.uniform(0.02, 0.06)))


# ---- any text ------------------------------------------------------------------------------------

def synthesise(text, kind, *, voice=0, seed=0, rate=16000):
    """Text -> (wav float32 (S,) within ±0.9, words [[word, start s, end s], ...]).

    kind: speech, sound or music; voice matters for speech only; seed varies pitch (±8 %; music is
    in tune), tempo (±10 %), gaps and level. Errors: BadInput for a text, voice or rate that does
    not exist.
    """
    if rate not in RATES:
        raise BadInput(f"sample rate {rate} is not supported, use 16000 or 24000")
    stated = attributes(text, kind)
    if not stated:
        raise BadInput(f"nothing to make: the {kind} text is empty")

    rng = np.random.default_rng(seed)
    words = []
    if kind == "speech":
        wav, words = speak(list(stated.values()), voice, rng, rate)
    else:
        make = {"sound": sound, "music": music}[kind]
        wav = mix(*make(stated, rng, rate), rate)

    # level, and the noise of a room: no clip is digitally silent
    wav = wav * (rng.uniform(0.6, 0.9) / np.abs(wav).max())
    wav = wav + 3e-4 * rng.standard_normal(len(wav))
    return wav.astype(np.float32), words


def mix(parts, seconds, rate):
    """Add [(start s, wav), ...] into a clip of so many seconds -> (S,)."""
    mixed = np.zeros(int(seconds * rate))
    for start, wav in parts:
        first = int(start * rate)
        mixed[first:first + len(wav)] += wav[:len(mixed) - first]
    return mixed
