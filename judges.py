"""Published metrics of speech, none of them ours; each needs a package of the eval extra.

    original ───────┬────────────────► dnsmos, wer
                    ├─► pesq, stoi, visqol
    reconstruction ─┴────────────────► dnsmos, wer
    generation ──────────────────────► dnsmos, wer
                 clip of the voice ──► sim

    judges = Judges(["pesq", "wer"])
    for ...: judges.compare(original, reconstruction, rate, text)
    judges.pop_figures()               {"pesq": 3.1, "wer original": 0.02, ...}

pesq: wide band. stoi. visqol: speech mode, lattice; only for originals from 0.75 s that are not
silent. dnsmos: overall. wer: word errors of Whisper's transcript / words of the text.
sim: cosine of the d-vectors (Resemblyzer, with its preprocessing) of a generation and of the clip
that gave its voice.
All of them at 16 kHz, on the first channel. A package is imported when its metric is asked for.
"""
import math

import numpy as np
import soxr

from cli import BadInput

METRICS = ("pesq", "stoi", "visqol", "dnsmos", "wer", "sim")
RATE = 16000                        # Hz, of every metric


def resample(wav, rate):
    """The first channel of a tensor (ch, S) at `rate` Hz -> numpy (S',) at 16 kHz."""
    return soxr.resample(wav[0].numpy(), rate, RATE)


def split_words(text):
    """Lower-case words without punctuation; "don't" -> "dont"."""
    return "".join(c if c.isalnum() else " " for c in text.lower().replace("'", "")).split()


def word_errors(reference, hypothesis):
    """Insertions + deletions + substitutions between two lists of words (Levenshtein)."""
    row = list(range(len(hypothesis) + 1))           # row[j]: errors against hypothesis[:j]
    for i, expected in enumerate(reference, 1):
        diagonal = row[0]
        row[0] = i
        for j, word in enumerate(hypothesis, 1):
            errors = min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != word))
            diagonal = row[j]
            row[j] = errors
    return row[-1]


class Judges:
    """Published metrics of speech: compare() and judge() add one clip, pop_figures() averages."""

    def __init__(self, metrics, whisper="base"):
        """metrics: some of METRICS. whisper: name or folder of a faster-whisper model."""
        self.metrics = metrics
        self.sums = {}                               # figure -> (sum, weight)
        for metric in metrics:
            try:
                self.load(metric, whisper)
            except ImportError as e:
                raise BadInput(f"--metrics {metric}: {e.name} is not installed: "
                               "pip install -e .[eval]") from None
            except (RuntimeError, OSError, ValueError) as e:
                model = f"--whisper {whisper}" if metric == "wer" else f"--metrics {metric}"
                reason = (str(e).splitlines() or [type(e).__name__])[0]
                raise BadInput(f"{model}: cannot be loaded ({reason})") from None

    def load(self, metric, whisper):
        """Import the package of one metric, and load its model."""
        # reconstruction against original
        if metric == "pesq":
            import pesq
            self.pesq = pesq.pesq
            self.no_speech = (pesq.NoUtterancesError, pesq.BufferTooShortError)
        if metric == "stoi":
            from pystoi import stoi
            self.stoi = stoi
        if metric == "visqol":
            import ai_edge_litert.interpreter        # without it visqol uses a laxer mapping
            from visqol import VisqolApi
            self.visqol = VisqolApi()
            self.visqol.create(mode="speech")

        # one clip by itself
        if metric == "dnsmos":
            from speechmos import dnsmos
            self.dnsmos = dnsmos
        if metric == "wer":
            from faster_whisper import WhisperModel
            self.whisper = WhisperModel(whisper, device="cpu", compute_type="int8")

        # one clip and its voice prompt
        if metric == "sim":
            from resemblyzer import VoiceEncoder, preprocess_wav
            self.voice_encoder = VoiceEncoder("cpu", verbose=False)
            self.preprocess_voice = preprocess_wav

    def embed_voice(self, wav):
        """The unit d-vector of the speech in wav (S,) at 16 kHz; zeros where there is none.

        Resemblyzer's preprocessing comes first, as its encoder was trained: quiet wavs are raised
        to -30 dB of full scale, long silences cut out.
        """
        if abs(wav).max() > 1e-3:
            wav = self.preprocess_voice(wav)
            if len(wav):
                return self.voice_encoder.embed_utterance(wav)
        return np.zeros(256)

    def add(self, figure, value, weight=1):
        """Add `weight` observations to a figure, `value` their sum."""
        total, weights = self.sums.get(figure, (0.0, 0))
        self.sums[figure] = (total + value, weights + weight)

    def compare(self, original, reconstruction, rate, text):
        """Add an original and its reconstruction, tensors (ch, S) at `rate` Hz."""
        x = resample(original, rate).clip(-1, 1)
        y = resample(reconstruction, rate).clip(-1, 1)

        # clips in which PESQ finds no speech are not counted
        if "pesq" in self.metrics:
            try:
                self.add("pesq", self.pesq(RATE, x, y, "wb"))
            except self.no_speech:
                pass
        if "stoi" in self.metrics:
            self.add("stoi", self.stoi(x, y, RATE))

        # ViSQOL needs 0.75 s that are not silent, and gives NaN for a silent reconstruction
        if "visqol" in self.metrics and len(x) >= 12000 and abs(x).max() > 1e-3:
            score = self.visqol.measure_from_arrays(x, y, sample_rate=RATE).moslqo
            self.add("visqol", score if math.isfinite(score) else 1.0)

        self.judge("original", original, rate, text)
        self.judge("reconstruction", reconstruction, rate, text)

    def judge(self, name, wav, rate, text, voice=None):
        """Add dnsmos and wer of one wav (ch, S), and its sim to the clip `voice` (ch, S')."""
        wav = resample(wav, rate).clip(-1, 1)        # DNSMOS refuses samples above 1
        if "dnsmos" in self.metrics:
            self.add(f"dnsmos {name}", self.dnsmos.run(wav, RATE)["ovrl_mos"])

        if "wer" in self.metrics and text:
            segments, _ = self.whisper.transcribe(wav, language="en", beam_size=1,
                                                  condition_on_previous_text=False)
            transcript = split_words(" ".join(segment.text for segment in segments))
            reference = split_words(text)
            self.add(f"wer {name}", word_errors(reference, transcript), len(reference))

        # the embeddings are unit vectors, of a silent wav 0
        if "sim" in self.metrics and voice is not None:
            similarity = self.embed_voice(wav) @ self.embed_voice(resample(voice, rate))
            self.add(f"sim {name}", float(similarity))

    def pop_figures(self):
        """{figure: mean over the clips added since the last call}."""
        means = {figure: round(float(total / weight), 4)
                 for figure, (total, weight) in self.sums.items() if weight}
        self.sums = {}
        return means
