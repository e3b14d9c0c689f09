"""Audio files in and out, with one sample rate and one range.

    file ── decoder.py ──> (S, its channels) ── mix_down, resample, clip ──> float32 (channels, S)

    load_audio      a whole file, or a part of it
    audio_pieces    a file of any length, in pieces: memory does not grow with the length
    save_audio      a 16-bit .wav
    WavStream       one that grows
    inspect         what is wrong with a file: it ends too early, is silent, too loud, ...

Samples above full scale (float files; MP3s overshoot a little) are clipped to +-1, alike in crops,
latents and prompts. A peak can be known only for a whole file, so a crop could not be scaled by it.

Precision: float32.
"""
import math
import os
import re
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
import torch

from cli import BadInput, Failure, is_stream, write_errors, write_file
from decoder import UNKNOWN, audio_info, decode, mapped, ogg_links
from remote import local


# ---------------------------------------------------------------------------- reading

def load_audio(path, sample_rate, channels=1, *, start=0.0, seconds=None, allow_silence=False):
    """Read `seconds` (None: all) from `start`, any format and rate -> float32 (channels, S) in +-1.

    A file with another number of channels is mixed to mono (mix_down) and repeated. Samples above
    full scale are clipped. At most round(seconds * sample_rate) samples come back, fewer at the end
    of the file.
    Errors: BadInput naming the file when it is missing, unreadable, empty, silent (peak < 1e-4;
    unless allow_silence) or holds NaN or infinity.
    """
    path = local(path)
    info = audio_info(path)
    count = UNKNOWN if seconds is None else math.ceil(seconds * info.sample_rate)
    blocks = [*decode(path, info, int(start * info.sample_rate), count)]
    wav = np.concatenate([np.zeros((0, info.channels), np.float32), *blocks])   # (S, channels)
    refuse_not_finite(path, wav)

    # channels, sample rate, length
    if wav.shape[1] != channels:
        wav = mix_down(wav)                                                 # (S, 1)
    if info.sample_rate != sample_rate and len(wav):
        wav = soxr.resample(wav, info.sample_rate, sample_rate)
    if seconds is not None:
        wav = wav[:round(seconds * sample_rate)]

    # empty or silent
    if len(wav) == 0:
        where = f" after {start:g} s" if start else ""
        raise BadInput(f"{path}: 0 samples{where}; remove it or start earlier")
    if not allow_silence and np.abs(wav).max() < 1e-4:
        raise BadInput(f"{path}: silent (peak below 0.0001); remove it")
    return in_range(wav, channels)


def audio_pieces(path, sample_rate, channels, samples):
    """Yield a whole file as load_audio reads it, in pieces (channels, samples), the last shorter.

    mix_down decides for each block of the file by itself.
    """
    path = local(path)
    info = audio_info(path)
    width = channels if info.channels == channels else 1
    resampler = None
    if info.sample_rate != sample_rate:
        resampler = soxr.ResampleStream(info.sample_rate, sample_rate, width, dtype="float32")

    waiting = np.zeros((0, width), np.float32)
    for block in decode(path, info):
        refuse_not_finite(path, block)
        if block.shape[1] != channels:
            block = mix_down(block)
        if resampler:
            block = resampler.resample_chunk(block)
        waiting = np.concatenate([waiting, block])
        while len(waiting) >= samples:
            yield in_range(waiting[:samples], channels)
            waiting = waiting[samples:]

    # what the resampler still holds
    if resampler:
        rest = resampler.resample_chunk(np.zeros((0, width), np.float32), last=True)
        waiting = np.concatenate([waiting, rest])
    for first in range(0, len(waiting), samples):
        yield in_range(waiting[first:first + samples], channels)


def refuse_not_finite(path, wav):
    """BadInput where a sample is NaN or infinite."""
    if not np.isfinite(wav).all():
        raise BadInput(f"{path}: holds NaN or infinite samples; export it again or remove it")


def mix_down(wav):
    """(S, channels) -> (S, 1): the average of the channels, or the loudest where they cancel
    (opposite phase), so that the average has less than 1 % of its power.
    """
    mean = wav.mean(1, keepdims=True)
    power = np.square(wav).sum(0)
    loudest = power.argmax()
    cancelled = np.square(mean).sum() < 0.01 * power[loudest]
    return wav[:, loudest:loudest + 1] if cancelled else mean


def in_range(wav, channels):
    """(S, 1 or channels) -> (channels, S), clipped to +-1."""
    wav = np.ascontiguousarray(wav.T, dtype=np.float32).clip(-1, 1)
    return np.repeat(wav, channels // len(wav), 0)


# ---------------------------------------------------------------------------- checking

def inspect(path, duration=None):
    """Read a whole file -> (its length in seconds, [remarks]). duration: what a manifest says.

    Errors: BadInput when the file is missing, unreadable, empty, silent, not finite, ends before
    its header says, or has more than 1 % of its samples above full scale.
    """
    path = local(path)
    info = audio_info(path)
    count = 0
    peak = 0.0
    loud = 0
    for block in decode(path, info):
        refuse_not_finite(path, block)
        level = np.abs(block).max(1)
        count += len(block)
        peak = max(peak, float(level.max()))
        loud += int((level > 1).sum())
    seconds = count / info.sample_rate

    # what makes a file useless
    missing = missing_part(path, info, count)
    if missing:
        raise BadInput(f"{path}: is not whole, {missing}; get it again or remove it")
    if peak < 1e-4:
        raise BadInput(f"{path}: silent (peak below 0.0001); remove it")
    if loud > 0.01 * count:
        raise BadInput(f"{path}: {loud / count:.0%} of its samples are above full scale (peak "
                       f"{peak:.4g}) and would be clipped; scale it to +-1")

    # what one should know
    remarks = []
    if loud:
        remarks.append(f"{path}: {loud} samples above full scale (peak {peak:.4g}) are clipped")
    if duration is not None and abs(duration - seconds) > max(0.1, 0.02 * seconds):
        remarks.append(f"{path}: lasts {seconds:.2f} s, the manifest says {duration:.2f}")
    return seconds, remarks


def missing_part(path, info, count):
    """What a truncated file lacks, in words; "" for a whole one."""
    there = f"{count / info.sample_rate:.2f}"
    promised = info.promised
    with mapped(path) as data:
        if data[:4] in (b"RIFF", b"RIFX") and len(info.parts) == 1:
            promised, named = wav_promise(data, info)
            if not named:
                return f"behind its {there} s is more sound, which its header does not name"
        elif data[:4] == b"OggS" and not ogg_links(data)[1]:
            return f"after {there} s the mark of the end is missing"

    if promised - count <= 0.1 * info.sample_rate:
        return ""
    return f"{there} of {promised / info.sample_rate:.2f} s are there"


def wav_promise(data, info):
    """A RIFF .wav -> samples that its data chunk promises (0 where its size is the dummy of a pipe
    or of a recorder that was stopped), and whether only chunks with names follow it.
    """
    order = "<" if data[:4] == b"RIFF" else ">"
    position = 12
    while position + 8 <= len(data):
        size, = struct.unpack(order + "I", data[position + 4:position + 8])
        if data[position:position + 4] == b"data":
            break
        position += 8 + size + size % 2
    there = len(data) - position - 8
    if size == 0 or size >= 0x7FFFF000 or there <= 0:
        return 0, True

    # behind the chunk: others, or padding
    end = position + 8 + size + size % 2
    named = re.fullmatch(rb"[\w ]{4}|", data[end:end + 4]) or not data[end:].strip(b"\0")
    return round(info.frames * max(1, size / min(size, there))), bool(named)


# ---------------------------------------------------------------------------- writing

UNKNOWN_SIZE = 0xFFFFFFFF           # in a .wav header: until the end


def refuse_poison(wav, sample_rate, where, first=0):
    """Failure where generated audio (..., S) is not finite, naming its first such moment: played,
    a NaN is a tone at full scale. first: samples before wav.
    """
    wrong = ~torch.isfinite(wav).flatten(0, -2).all(0)                      # (S,)
    if wrong.any():
        at = (first + int(wrong.nonzero()[0])) / sample_rate
        raise Failure(f"{where}: the audio is not finite from {at:.3f} s on, nothing of that is "
                      "written; use an earlier checkpoint of the model")


def limit(wav):
    """wav cut to +-1 -> (the same shape, how many samples were beyond, the peak)."""
    level = wav.abs()
    loud = int((level > 1).sum())
    return wav.clamp(-1, 1), loud, float(level.max()) if level.numel() else 0.0


def say_limited(path, loud, peak):
    """One line where limit() acted."""
    if loud:
        print(f"{path}: {loud} samples above full scale (peak {peak:.3g}) were limited", flush=True)


def save_audio(path, wav, sample_rate, sync=True):
    """Write wav, a tensor or array (channels, S) or (S,), as 16-bit .wav, limited to +-1.

    Whole or not at all (cli.atomic); makes parent folders. -> as limit(): samples limited, peak.
    Errors: BadInput when `path` is not a .wav or cannot be written, Failure when wav is not finite.
    """
    path = Path(path)
    if path.suffix.lower() != ".wav" and not is_stream(path):
        raise BadInput(f"{path}: only .wav is written; name the file {path.stem}.wav")
    wav = torch.atleast_2d(torch.as_tensor(wav).detach().float().cpu())
    refuse_poison(wav, sample_rate, path)

    wav, loud, peak = limit(wav)
    file = BytesIO()
    sf.write(file, wav.numpy().T, sample_rate, subtype="PCM_16", format="WAV")
    write_file(path, file.getvalue(), sync)
    return loud, peak


class WavStream:
    """A 16-bit .wav that grows, whole after every piece, whenever the program ends.

        RIFF size WAVE | fmt: channels, rate | data size | samples, samples, ...
              └───────── grow with every piece ────┘

    Samples are written before the sizes that name them. A pipe, a FIFO and a device cannot be
    written again: there both sizes are 0xFFFFFFFF, until the end, as ffmpeg has it.
    """

    def __init__(self, path, channels, sample_rate):
        self.path = path
        self.channels = channels
        self.sample_rate = sample_rate
        self.samples = 0
        self.grows = not is_stream(path)
        with write_errors(path):
            if self.grows:
                write_file(path, self.header(0))
                self.file = open(path, "r+b", buffering=0)
                self.file.seek(0, os.SEEK_END)
            else:
                self.file = open(path, "wb", buffering=0)
                write_all(self.file, self.header(UNKNOWN_SIZE))

    def header(self, size):
        """The 44 bytes before `size` bytes of samples."""
        size = min(size, UNKNOWN_SIZE)
        width = 2 * self.channels
        return struct.pack("<4sI4s4sIHHIIHH4sI",
                           b"RIFF", min(size + 36, UNKNOWN_SIZE), b"WAVE",
                           b"fmt ", 16, 1, self.channels, self.sample_rate,
                           width * self.sample_rate, width, 16,
                           b"data", size)

    def write(self, wav):
        """wav (channels, n) in +-1."""
        pcm = (wav * 32767).round().T.contiguous().numpy()                  # (n, channels)
        with write_errors(self.path):
            write_all(self.file, pcm.astype("<i2").tobytes())
            self.samples += wav.shape[-1]
            if self.grows:
                self.file.seek(0)
                write_all(self.file, self.header(2 * self.channels * self.samples))
                self.file.seek(0, os.SEEK_END)

    def close(self):
        self.file.close()


def write_all(file, data):
    """Write bytes to an unbuffered file, in as many calls as it takes."""
    data = memoryview(data)
    while len(data):
        data = data[file.write(data):]
