"""Word times for a manifest of speech: when each word is spoken, from Whisper's attention, or of
English by comparison with a synthetic voice (--by flite, warping.py), which errs half as much.

    python -m corpora.align train.jsonl --out aligned.jsonl [--whisper base] [--threads 2]
    python -m corpora.align train.jsonl --out aligned.jsonl --by flite    # needs apt install flite

    wav, quiet ends cut off ─► log-mel (80, M) ─► Whisper's encoder ─┐
    "the old farmer" ─► tokens ─► Whisper's decoder, forced to this text
                                        └─► attention of the alignment heads (tokens, M / 2)
                                                └─► dynamic time warping ─► a start per token
                                                        └─► [["the", 0.18, 0.27], ["old", ...], ...]

The inner monologue of calm.py (monologue = true) puts each word beside the latent where it begins.
It needs words [[word, start, end], ...] in seconds in every line of speech. corpora/flite.py writes
them; recordings do not have them. The text is used as it is; words are separated by spaces.
A clip is kept as it is if it already has words, is not speech, has no text, is longer than 30 s or
cannot be read.

Sources: Whisper (Radford et al. 2022) and the word timestamps of its code (the attention heads that
follow the audio, median filter, dynamic time warping), here by CTranslate2 through faster-whisper:
extra `eval`.

Where this differs from Whisper's code:
- audio is padded to 6 s, not to 30: seventeen times as fast on clips of two seconds, but 5 instead
  of 2 words of 100 are more than 0.2 s off
- quiet ends, 35 dB below the loudest 20 ms, are cut off first, since dynamic time warping starts
  the first word at 0 whatever the audio has there
- the last word lasts to the end of what remains

Accuracy against the exact times of corpora/flite.py (575 words, Whisper base): half of the words
begin within 0.07 s, nine of ten within 0.18 s; nearly all errors are early. warping.py has the same
of a natural voice, beside that of --by flite.
Exit status: 0 done, 2 the user's mistake.
"""
import argparse
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from audio import load_audio
from cli import BadInput, Parser, check_writable, cli, threads
from corpora.warping import FRAME, RATE, Warper, loud_part
from data import load_manifest, write_manifest

# the longest audio that Whisper takes, seconds
LONGEST = 30.0
# log-mel rows to which shorter audio is padded: 6 s
PADDED = 600
# tokens of text at most; Whisper's decoder has 448 positions
TOKENS = 440


def words_of_path(words, counts, path, offset, end):
    """A path of dynamic time warping -> [[word, start, end], ...] in seconds.

    counts: number of tokens of each word. path: (token, encoder row) pairs, monotonic in both; row
    0 is at `offset` seconds. A word starts at the first row of its first token and ends where the
    next word starts, the last word at `end`.
    """
    first_row = {}
    for token, row in path:
        first_row.setdefault(token, row)

    first_tokens = np.cumsum([0, *counts[:-1]])
    starts = [min(offset + first_row[token] * FRAME, end) for token in first_tokens]
    ends = [*starts[1:], end]
    return [[word, round(a, 3), round(b, 3)] for word, a, b in zip(words, starts, ends)]


class Aligner:
    """Whisper as a function (wav, text) -> word times.

    whisper: the name of a faster-whisper model (downloaded) or a folder with a CTranslate2 model.
    threads: CPU threads, 0 = all. Errors: BadInput if the extra is not installed or the model or
    language is unknown.
    """

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
        """wav (S,) numpy at 16 kHz, text with words -> [[word, start, end], ...] in seconds.

        None for what Whisper cannot process: over 30 s or 440 tokens, or under one encoder row.
        """
        first, last = loud_part(wav)
        words = text.split()
        tokens = [self.tokenizer.encode(" " + word) for word in words]
        counts = [len(t) for t in tokens]
        if not FRAME * RATE <= last - first <= LONGEST * RATE or sum(counts) > TOKENS:
            return None

        mel, rows = self.log_mel(wav[first:last])
        encoded = self.model.model.encode(self.view(mel))
        aligned = self.model.model.align(encoded, self.tokenizer.sot_sequence, [sum(tokens, [])],
                                         rows, median_filter_width=7)
        return words_of_path(words, counts, aligned[0].alignments, first / RATE, last / RATE)

    def log_mel(self, wav):
        """wav (S,) -> (log-mel (1, 80, M), M at least 600; its number of rows before padding)."""
        mel = self.model.feature_extractor(wav.astype(np.float32), padding=0)           # (80, M)
        rows = mel.shape[1] // 2 * 2
        mel = np.pad(mel[:, :rows], ((0, 0), (0, max(0, PADDED - rows))))
        return np.ascontiguousarray(mel[None], np.float32), rows                        # (1, 80, M)


def parse():
    """The command line -> arguments."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("manifest", help=".jsonl or a folder of audio with texts")
    p.add_argument("--out", required=True, help="the manifest to write, .jsonl")
    p.add_argument("--by", choices=["whisper", "flite"], default="whisper",
                   help="whisper (default), for its languages, or flite, for English")
    p.add_argument("--whisper", default="base",
                   help="faster-whisper model, a name or a folder (default base)")
    p.add_argument("--language", default="en", help="language of the texts (default en)")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = all (default)")
    return p.parse_args()


def refuse_other_languages(arguments):
    """BadInput where --by flite is asked for what it has not."""
    if arguments.language != "en":
        raise BadInput(f"--language {arguments.language}: flite speaks English alone; use --by "
                       "whisper")


def main():
    arguments = parse()
    check_writable(arguments.out)
    clips = [*load_manifest(arguments.manifest)]
    if arguments.by == "flite":
        refuse_other_languages(arguments)
        aligner = Warper()
    else:
        aligner = Aligner(arguments.whisper, arguments.language, arguments.threads)

    aligned = 0
    refused = []
    for i, clip in enumerate(tqdm(clips, unit="clip")):
        if clip.kind != "speech" or clip.words or not clip.text.split():
            continue

        # one bad file must not cost hours of work
        try:
            wav = load_audio(clip.audio, RATE)[0]
        except BadInput as e:
            tqdm.write(f"kept without words: {e}")
            continue

        words = aligner(wav, clip.text)
        clips[i] = replace(clip, words=words)
        if words is None:
            refused.append(clip.audio)
        else:
            aligned += 1

    write_manifest(arguments.out, clips)
    print(f"{aligned} of {len(clips)} clips aligned -> {arguments.out}")
    if refused:
        limits = {"whisper": f"over {TOKENS} tokens of text or under {FRAME:g} s",
                  "flite": "with a text that does not fit their length or that flite cannot say"}
        print(f"left without words: {len(refused)} clips over {LONGEST:g} s, "
              f"{limits[arguments.by]}, e.g. {refused[0]}")


if __name__ == "__main__":
    cli(main)
