"""Generated audio on its way out: into a file, a pipe, a player.

    pieces of audio ─► finite? ─► limited to +-1 ─┬─► collected ─► .wav .flac .ogg .raw, at the end
                                                  └─► --stream: .wav or raw, piece by piece
"""
import itertools
import os
import shutil
import subprocess

import torch

from audio import WavStream, limit, refuse_poison, save_audio, say_limited
from cli import Failure

# players of a file, as they are called, without a window
PLAYERS = {"aplay": ["-q"], "afplay": [], "ffplay": ["-nodisp", "-autoexit", "-loglevel", "error"],
           "play": ["-q"]}
# of these, the ones that know .wav alone
PLAIN_PLAYERS = ("aplay",)


class Output:
    """The generated audio on its way to a file: collected, or with stream written at once. Not a
    sample that is not finite is written; peaks are limited to full scale, which is said.

    format: one of audio.FORMATS, for a stream wav or raw; comment: as in audio.save_audio.
    """

    def __init__(self, path, channels, sample_rate, *, stream=False, format="wav", comment=""):
        self.path = path
        self.sample_rate = sample_rate
        self.format = format
        self.comment = comment
        self.pieces = []
        self.samples = 0
        self.loud = 0                                   # samples that were limited
        self.peak = 0.0
        self.file = None
        if stream:
            self.file = WavStream(path, channels, sample_rate, comment, raw=format == "raw")

    @property
    def seconds(self):
        """How much has been written or collected."""
        return self.samples / self.sample_rate

    def write(self, wav):
        """wav (ch, n)."""
        wav = wav.float().cpu()
        refuse_poison(wav, self.sample_rate, "the VAE's decoder", self.samples)

        # to full scale
        wav, loud, peak = limit(wav)
        self.loud += loud
        self.peak = max(self.peak, peak)
        self.samples += wav.shape[-1]
        if self.file is None:
            self.pieces.append(wav)
            return
        try:
            self.file.write(wav)
        except BrokenPipeError:
            raise Failure(f"{self.path}: its reader has gone after {self.seconds:.2f} s; "
                          "stopped") from None

    def close(self):
        if self.file is not None:
            self.file.close()
        else:
            save_audio(self.path, torch.cat(self.pieces, -1), self.sample_rate,
                       format=self.format, comment=self.comment)
        say_limited(self.path, self.loud, self.peak)


def numbered_names(path, count):
    """x.wav -> x_1.wav, ..., with leading zeros where there are ten or more; one stays x.wav."""
    if count == 1:
        return [path]
    stem, suffix = os.path.splitext(path)
    digits = len(str(count))
    return [f"{stem}_{i:0{digits}d}{suffix}" for i in range(1, count + 1)]


def free_names(path, count):
    """The same of x.wav, or where something is there of x1.wav, x2.wav, ..."""
    stem, suffix = os.path.splitext(path)
    for tail in itertools.chain([""], itertools.count(1)):
        names = numbered_names(f"{stem}{tail}{suffix}", count)
        if not any(map(os.path.lexists, names)):
            return names


def find_player(format):
    """The command of a player that is installed and plays a format, or None."""
    for name, options in PLAYERS.items():
        if shutil.which(name) and (format == "wav" or name not in PLAIN_PLAYERS):
            return [name, *options]
    return None


def play(path, format):
    """Play a file to its end; one line where that does not work: the file is there all the same."""
    player = find_player(format)
    if player is None:
        print(f"--play: none of {', '.join(PLAYERS)} is installed; play {path} yourself")
        return
    done = subprocess.run([*player, os.path.abspath(path)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          errors="replace")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        print(f"--play: {player[0]} could not play {path} ({why[:200]})")
