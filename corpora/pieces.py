"""Clips that are no audio file of their own yet: cut from a long one, or taken out of a table.

    chapter.mp3, 3.2 .. 7.9 s ──┐
                                ├── file_of ──> DIR/NAME.flac, or the bytes as they are
    row of a .parquet, bytes ───┘               and its Clip

Why files, and not a start and an end in the manifest: a clip's path then names all of its samples.
Crops, the latents' cache, voice prompts (another file of the speaker), the check of a corpus and
the digest of a run ask for nothing else. It costs the disk once, in FLAC about half of 16-bit WAV.

Precision: 16 bits at the file's own rate and channels; above full scale clipped, as in training.
"""
import re
from dataclasses import dataclass, replace
from pathlib import Path

from audio import load_audio, save_audio
from cli import BadInput, write_file
from corpora.layouts import Left
from decoder import audio_info
from manifest import Clip, audio_endings, stem

# first bytes of a file -> its ending
MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3",
         b"\xff\xf3": ".mp3", b"\xff\xf2": ".mp3", b"FORM": ".aiff"}
# why there is no clip of a row
UNREADABLE = "rows whose audio cannot be read"
# seconds by which a row may end after its file
BEHIND = 0.25


@dataclass
class Piece:
    """A clip that is a part of a file, or bytes of a table."""
    # its audio is the long file's path, or the name of the bytes
    clip: Clip
    # seconds; None: to the end
    start: float = 0.0
    end: float | None = None
    # a whole audio file
    data: bytes | None = None


def file_of(piece, folder, taken):
    """Write a Piece as a file in a folder -> its Clip, or Left where its audio cannot be read.

    taken: {names in the folder}, which grows.
    """
    path = Path(folder, free_name(piece, taken))
    if piece.data:
        ending = ending_of(piece)
        if not ending:
            return Left(UNREADABLE, f"{path.name}: begins with {piece.data[:8]!r}, as no known "
                        "format does")
        path = f"{path}{ending}"
        write_file(path, piece.data, sync=False)
        return replace(piece.clip, audio=path, id=piece.clip.id or stem(path))

    try:
        wav, rate = samples_of(piece)
    except BadInput as e:
        return Left(UNREADABLE, str(e))
    path = f"{path}.flac"
    save_audio(path, wav, rate, sync=False)
    return replace(piece.clip, audio=path, duration=wav.shape[1] / rate)


def free_name(piece, taken):
    """A name for the file, without its ending, that is not in `taken` yet, and then is."""
    name = re.sub(r"[^\w.-]+", "_", piece.clip.id or stem(piece.clip.audio))[:60].strip(".")
    name = name or "clip"
    free = name
    number = 1
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def ending_of(piece):
    """The ending of a file that stands in a table: its name's, else what its first bytes say, or
    "".
    """
    ending = Path(piece.clip.audio).suffix.lower()
    if ending in audio_endings():
        return ending
    return next((ending for start, ending in MAGIC.items() if piece.data.startswith(start)), "")


def samples_of(piece):
    """A part of a long file -> float32 (its channels, S), its rate.

    Errors: BadInput where it cannot be read, or ends before the part does.
    """
    source = piece.clip.audio
    info = audio_info(source)
    seconds = None if piece.end is None else piece.end - piece.start
    wav = load_audio(source, info.sample_rate, info.channels, start=piece.start, seconds=seconds,
                     allow_silence=True)
    there = wav.shape[1] / info.sample_rate
    if seconds is not None and there < seconds - BEHIND:
        raise BadInput(f"{source}: ends {seconds - there:.2f} s before its row at "
                       f"{piece.start:g} s does")
    return wav, info.sample_rate
