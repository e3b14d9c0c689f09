"""When each word is spoken: word times for a manifest of speech, from Whisper's attention.

    python -m corpora.align train.jsonl --out aligned.jsonl [--whisper base] [--threads 2]

    wav, silence cut off ─► log-mel (80, M) ─► Whisper's encoder ─┐
    "the old farmer" ─► tokens ─► Whisper's decoder, told to say them
                                        └─► attention of the alignment heads (tokens, M / 2)
                                                └─► dynamic time warping ─► a start a token
                                                        └─► [["the", .18, .27], ["old", ...], ...]

The inner monologue of calm.py (monologue = true) puts each word beside the latent where it begins
and so needs words [[word, start, end], ...] in seconds in every line of speech; flite.py knows
them, recordings do not. The text is taken as it is, words are what spaces part. Clips that have
words already, that are not speech, without text, over 30 s or unreadable are kept as they are.

Sources: Whisper (Radford et al. 2022), word timestamps of its code (attention heads that follow the
audio, median filter, DTW), here by CTranslate2 through faster-whisper: extra `eval`.
Where this differs: audio is padded to 6 s, not to 30 (clips of two seconds: seventeen times as
fast; 5 instead of 2 words of 100 are more than .2 s off); quiet ends, 35 dB below the loudest 20
ms, are cut off first, since the warping lets the first word begin at 0 whatever is heard there; the
last word lasts to the end of what is left.
Against the exact times of flite.py (575 words, base): half of the words begin within .07 s, nine of
ten within .18, nearly all of them early.
Exit status: 0 done, 2 your mistake.
"""
import argparse
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from cli import BadInput, Parser, cli, threads
from data import load_audio, load_manifest, write_manifest

RATE, LONGEST = 16000, 30.0             # Whisper's: Hz, seconds
FRAME = 0.02                            # seconds of one row of its encoder, two of its log-mel
PADDED = 600                            # log-mel rows, 6 s
TOKENS = 440                            # of text; its decoder has 448 positions
QUIET = 10 ** (-35 / 20)


def loud_part(wav):
    """wav (S,) at 16 kHz -> first and last sample of what is above -35 dB of its loudest 20 ms."""
    step = int(FRAME * RATE)
    rms = np.sqrt(np.mean(np.square(wav[:len(wav) // step * step].reshape(-1, step)), 1))
    if not len(rms) or not rms.max():
        return 0, len(wav)
    loud = np.flatnonzero(rms >= QUIET * rms.max())
    return int(loud[0]) * step, int(loud[-1] + 1) * step


def words_of_path(words, counts, path, offset, end):
    """A path of dynamic time warping -> [[word, start, end], ...] in seconds.

    words of `counts` tokens each; path: (token, encoder row) pairs, not going backwards in either,
    row 0 at `offset` seconds. A word starts at the first row of its first token and ends where the
    next one starts, the last at `end`.
    """
    first = {}
    for token, row in path:
        first.setdefault(token, row)
    at = [min(offset + first[token] * FRAME, end) for token in np.cumsum([0, *counts[:-1]])]
    return [[word, round(a, 3), round(b, 3)] for word, a, b in zip(words, at, [*at[1:], end])]


class Aligner:
    """whisper: a name of faster-whisper (downloaded) or a folder with a CTranslate2 model."""

    def __init__(self, whisper="base", language="en", threads=0):
        try:
            from ctranslate2 import StorageView
            from faster_whisper import WhisperModel
            from faster_whisper.tokenizer import Tokenizer
        except ImportError as e:
            raise BadInput(f"align.py: {e.name} is not installed: pip install -e .[eval]") from None
        try:
            self.model = WhisperModel(whisper, device="cpu", compute_type="int8",
                                      cpu_threads=threads)
            self.tokenizer = Tokenizer(self.model.hf_tokenizer, self.model.model.is_multilingual,
                                       task="transcribe", language=language)
        except (RuntimeError, OSError, ValueError) as e:
            raise BadInput(f"--whisper {whisper} --language {language}: cannot be loaded "
                           f"({str(e).splitlines()[0]})") from None
        self.view = StorageView.from_array

    def __call__(self, wav, text):
        """wav (S,) numpy at 16 kHz, text with words -> [[word, start, end], ...], or None for what
        Whisper cannot hold: more than 30 s or 440 tokens, less than one row of its encoder.
        """
        a, b = loud_part(wav)
        words = text.split()
        tokens = [self.tokenizer.encode(" " + word) for word in words]
        if not FRAME * RATE <= b - a <= LONGEST * RATE or sum(map(len, tokens)) > TOKENS:
            return None
        mel = self.model.feature_extractor(wav[a:b].astype(np.float32), padding=0)      # (80, M)
        rows = mel.shape[1] // 2 * 2
        mel = np.pad(mel[:, :rows], ((0, 0), (0, max(0, PADDED - rows))))
        heard = self.model.model.encode(self.view(np.ascontiguousarray(mel[None], np.float32)))
        path = self.model.model.align(heard, self.tokenizer.sot_sequence, [sum(tokens, [])],
                                      rows, median_filter_width=7)[0].alignments
        return words_of_path(words, list(map(len, tokens)), path, a / RATE, b / RATE)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("manifest", help=".jsonl or a folder of audio with texts")
    p.add_argument("--out", required=True, help="the manifest to write, .jsonl")
    p.add_argument("--whisper", default="base",
                   help="faster-whisper model, a name or a folder (default base)")
    p.add_argument("--language", default="en", help="of the texts (default en)")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = all")
    a = p.parse_args()
    clips, aligner, done = load_manifest(a.manifest), Aligner(a.whisper, a.language, a.threads), 0
    for i, clip in enumerate(tqdm(clips, unit="clip")):
        if clip.kind != "speech" or clip.words or not clip.text.split():
            continue
        try:
            wav = load_audio(clip.audio, RATE)[0]
        except BadInput as e:                           # one bad file must not cost hours of work
            tqdm.write(f"kept without words: {e}")
            continue
        words = aligner(wav, clip.text)
        clips[i], done = replace(clip, words=words), done + (words is not None)
    write_manifest(a.out, clips)
    print(f"{done} of {len(clips)} clips aligned -> {a.out}")


if __name__ == "__main__":
    cli(main)
