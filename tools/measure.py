"""What the papers' tables are made of: figures of generations with 95 % intervals, and seconds.

    wavs of a system ─► distances  ─► fad, mmd       to real clips (distances.py), any embedding
                     ─► facts      ─► share right    toy corpus (corpora/oracle.py)
                     ─► words      ─► wer, ppx, vert  speech, with Whisper (transcripts.py)
                     ─► similarity                   mean over pairs (CALM Fig. 3)
    a system ─────────► seconds    ─► per latent: all of it, and in the sampler
    lm               backbone ─► head.sample ─► latent      the sampler is the head alone

Figures are intervals.Figure: a value and the ends of its interval over clips. Times are medians
over the repeats of generations of one row, without the decoder; a first repeat is not counted.
"""
import statistics
from dataclasses import dataclass

import numpy as np
import torch

from cli import BadInput
from data import KINDS, encode_text
from distances import fad, mmd
from embeddings import embed_clip, open_embedding, resample
from intervals import (bootstrap, bootstrap_distance, drawn_evenly, exp_ratio,
                       geometric_mean)
from judges import opening
from reconstruction import count_right_facts, load_clip
from speech_metrics import SPEECH_RATE
from tools.bench.timing import clock
from transcripts import Recogniser, TextModel, Words, auto_bleu, self_bleu

SECONDS = 20.0                          # of a real clip that are compared
LEAST_SIMILAR = 8                       # clips that a mean similarity needs


# ---------------------------------------------------------------------------- distances


class Yardstick:
    """Real clips as vectors of an embedding, and the distance of other clips to them."""

    def __init__(self, embedding, clips, vae_config, dims):
        """embedding: mel, birdnet or a model of transformers. dims: principal axes that FAD is
        taken on, 0 = all.
        """
        with opening(f"--embedding {embedding}", "eval,hf"):
            self.model = open_embedding(embedding)
        self.dims = dims
        rate = vae_config.sample_rate
        self.vectors = [embed_clip(self.model, load_clip(clip, vae_config, SECONDS), rate)
                        for clip in clips]

    def distances(self, wavs, rate):
        """Waveforms (ch, S) -> {"fad": Figure, "mmd": Figure}."""
        vectors = [embed_clip(self.model, wav, rate) for wav in wavs]
        return {"fad": fad(vectors, self.vectors, self.dims), "mmd": mmd(vectors, self.vectors)}


def split_reference(clips, limit):
    """Clips of one kind -> at most `limit` of them to generate, and all others to compare with."""
    chosen = drawn_evenly(clips, limit)
    names = {clip.audio for clip in chosen}
    return chosen, [clip for clip in clips if clip.audio not in names]


# ---------------------------------------------------------------------------- facts and words


def facts(wavs, clips, rate):
    """Share of the toy corpus's facts that are right -> Figure; None on other corpora."""
    counts = [count_right_facts(wav, clip, rate) for wav, clip in zip(wavs, clips)]
    counts = [count for count in counts if count]
    return bootstrap(counts) if counts else None


class Listener:
    """Whisper and, where one is named, a text model: what is said, and how likely it is."""

    def __init__(self, whisper, text_model=""):
        with opening(f"--whisper {whisper}", "eval"):
            self.words = Words()
            self.recogniser = Recogniser(whisper)
        with opening(f"--text-model {text_model}", "hf"):
            self.text_model = TextModel(text_model) if text_model else None

    def judge(self, wavs, clips, rate, with_text):
        """Waveforms of speech -> {"wer", "ppx", "vert": Figure}; wer where the clips' texts were
        spoken, ppx where there is a text model.
        """
        transcripts = [self.recogniser.transcribe(resample(wav, rate, SPEECH_RATE)) for wav in wavs]
        found = {"vert": vert([self.words.normalize(t).split() for t in transcripts])}
        if with_text:
            found["wer"] = bootstrap([self.words.errors(clip.transcript or clip.text, transcript)
                                      for clip, transcript in zip(clips, transcripts)])
        if self.text_model:
            nats = [self.text_model.surprise(transcript) for transcript in transcripts]
            found["ppx"] = bootstrap(nats, exp_ratio)
        return found


def vert(transcripts):
    """Lists of words -> VERT in percent (transcripts.py), a Figure."""
    columns = [(100 * alone, 100 * among, 1) for alone, among
               in zip(map(auto_bleu, transcripts), self_bleu(transcripts))]
    return bootstrap(columns, geometric_mean)


# ---------------------------------------------------------------------------- diversity


def mean_similarity(vectors):
    """Mean cosine over all pairs of unit vectors (n, F) -> Figure, over clips (CALM Fig. 3).

    A draw of the bootstrap has clips twice: pairs of a clip with itself are left out, and from 8
    clips on there is always another pair.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    n = len(vectors)
    if n < LEAST_SIMILAR:
        raise BadInput(f"similarity: needs at least {LEAST_SIMILAR} clips, got {n}; raise "
                       "--samples, or give --manifest with more")
    cosines = vectors @ vectors.T                                               # (n, n)
    itself = np.diag(cosines)

    def mean(counts):
        pairs = counts.sum() ** 2 - (counts ** 2).sum()
        return (counts @ cosines @ counts - (counts ** 2) @ itself) / pairs

    return bootstrap_distance(mean(np.ones(n)), mean, n)


def unit_vectors(vectors, centre):
    """Vectors (n, F), less a centre (F,), of length 1; what is at the centre stays 0."""
    vectors = np.asarray(vectors, dtype=np.float64) - centre
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


# ---------------------------------------------------------------------------- seconds


@dataclass
class Speed:
    """Seconds per latent, and how many latents make a second of audio."""
    total: float
    sampler: float
    frame_rate: float

    def seconds_for(self, seconds):
        """Seconds that so many seconds of audio take."""
        return self.total * self.frame_rate * seconds


def time_generations(contestants, kind, seconds, repeats):
    """{label: Contestant} -> {label: Speed} of generations of one row from nothing, of at most
    `seconds`; contestants take turns, so that a noisy machine slows all of them.
    """
    spent = {label: [] for label in contestants}
    for repeat in range(repeats + 1):
        for label, contestant in contestants.items():
            times = time_once(contestant, kind, seconds, repeat)
            if repeat:
                spent[label].append(times)
    return {label: Speed(*(statistics.median(column) for column in zip(*times)),
                         contestants[label].vae.cfg.frame_rate)
            for label, times in spent.items()}


@torch.no_grad()
def time_once(contestant, kind, seconds, seed):
    """One generation -> seconds per latent: all of it, and in the sampler."""
    lm = contestant.lm
    device = lm.bos.device
    tokens = torch.tensor([encode_text("", kind, contestant.cfg.data)], device=device)
    frames = max(2, round(seconds * contestant.vae.cfg.frame_rate))
    generator = torch.Generator(device).manual_seed(seed)

    with timed_head(lm.head, device.type) as spent:
        start = clock(device.type)
        latents = sum(1 for _ in lm.generate(tokens, kind=KINDS.index(kind), max_frames=frames,
                                             generator=generator, **contestant.options))
        total = clock(device.type) - start
    return total / latents, sum(spent) / latents


class timed_head:
    """`with timed_head(head, device) as spent:` spent grows by the seconds of each head.sample."""

    def __init__(self, head, device):
        self.head = head
        self.device = device
        self.spent = []

    def __enter__(self):
        sample = self.head.sample

        def timed(*arguments, **options):
            start = clock(self.device)
            found = sample(*arguments, **options)
            self.spent.append(clock(self.device) - start)
            return found

        self.head.sample = timed
        return self.spent

    def __exit__(self, *error):
        del self.head.sample
