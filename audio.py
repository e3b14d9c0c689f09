"""Audio files in and out, with one sample rate and one range.

    file ── decoder.py ──> (S, its channels) ── mix_down, resample, clip ──> float32 (channels, S)

    load_audio      a whole file, or a part of it
    audio_pieces    a file of any length, in pieces: memory does not grow with the length
    from_array      a numpy array, as load_audio reads a file
    save_audio      a .wav, .flac, .ogg or .raw
    WavStream       a .wav that grows
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


def from_array(wav, rate, sample_rate, channels=1):
    """A numpy array (S,) or (its channels, S) at `rate` Hz -> as load_audio, silence allowed.

    Whole numbers are PCM of their width: int16 -32768 is -1.
    Errors: BadInput where it is no waveform.
    """
    wav = np.asarray(wav)
    if wav.dtype.kind == "i":
        wav = wav.astype(np.float32) / -float(np.iinfo(wav.dtype).min)
    wav = np.atleast_2d(wav)
    if wav.dtype.kind != "f" or wav.ndim != 2 or wav.size == 0 or len(wav) > wav.shape[1]:
        raise BadInput(f"array of shape {wav.shape}, {wav.dtype}: is no waveform; give numbers "
                       "(samples,) or (channels, samples)")
    wav = wav.T.astype(np.float32)                                          # (S, its channels)
    refuse_not_finite("array", wav)
    if wav.shape[1] != channels:
        wav = mix_down(wav)
    if rate != sample_rate:
        wav = soxr.resample(wav, rate, sample_rate)
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
SOFTWARE = "nanoCALM"               # in a file with a comment: what wrote it
FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"),
           "raw": ("RAW", "PCM_16")}
BLOCK = 65536                       # samples that libsndfile's Vorbis encoder gets at a time


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


def format_of(path):
    """The format that the name of a file asks for, of FORMATS; of a pipe or device wav.

    Errors: BadInput for other names.
    """
    path = Path(path)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in FORMATS:
        return suffix
    if not is_stream(path):
        raise BadInput(f"{path}: only .{', .'.join(FORMATS)} are written; "
                       f"name the file {path.stem or 'sample'}.wav")
    return "wav"


def save_audio(path, wav, sample_rate, sync=True, *, format=None, comment=""):
    """Write wav, a tensor or array (channels, S) or (S,), limited to +-1: 16 bits, or Vorbis in
    .ogg; format: one of FORMATS, None = that of the name; comment: what made it, for the file's
    header (ICMT in .wav, COMMENT in .flac and .ogg; a .raw has none).

    Whole or not at all (cli.atomic); makes parent folders. -> as limit(): samples limited, peak.
    Errors: BadInput when `path` has another ending or cannot be written, Failure when wav is not
    finite.
    """
    container, subtype = FORMATS[format or format_of(path)]
    wav = torch.atleast_2d(torch.as_tensor(wav).detach().float().cpu())
    refuse_poison(wav, sample_rate, path)

    wav, loud, peak = limit(wav)
    data = BytesIO()
    with sf.SoundFile(data, "w", sample_rate, len(wav), subtype, "LITTLE" if container == "RAW"
                      else None, container) as file:
        if comment and container != "RAW":
            file.comment = comment
            file.software = SOFTWARE
        for block in wav.split(BLOCK, 1):
            file.write(block.numpy().T)
    write_file(path, data.getvalue(), sync)
    return loud, peak


def pcm16(wav):
    """wav (channels, n) in +-1 -> the bytes of its samples as a .wav has them."""
    pcm = (wav * 32767).round().T.contiguous().numpy()                      # (n, channels)
    return pcm.astype("<i2").tobytes()


def wav_header(channels, sample_rate, size=UNKNOWN_SIZE, comment=""):
    """What stands before `size` bytes of 16-bit samples in a .wav: 44 bytes, and a comment."""
    info = b""
    if comment:
        info = b"INFO" + chunk(b"ICMT", comment) + chunk(b"ISFT", SOFTWARE)
        info = struct.pack("<4sI", b"LIST", len(info)) + info
    width = 2 * channels
    return (struct.pack("<4sI4s", b"RIFF", min(size + 36 + len(info), UNKNOWN_SIZE), b"WAVE")
            + struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, sample_rate,
                          width * sample_rate, width, 16)
            + info + struct.pack("<4sI", b"data", min(size, UNKNOWN_SIZE)))


def chunk(name, text):
    """A chunk of RIFF with a text, of an even number of bytes."""
    data = text.encode() + b"\0"
    return struct.pack("<4sI", name, len(data)) + data + b"\0" * (len(data) % 2)


class WavStream:
    """A 16-bit .wav that grows, whole after every piece, whenever the program ends.

        RIFF size WAVE | fmt: channels, rate | LIST: comment | data size | samples, samples, ...
              └───────────────── grow with every piece ────────────┘

    Samples are written before the sizes that name them. A pipe, a FIFO and a device cannot be
    written again: there both sizes are 0xFFFFFFFF, until the end, as ffmpeg has it. raw: the
    samples alone. comment: as in save_audio.
    """

    def __init__(self, path, channels, sample_rate, comment="", raw=False):
        self.path = path
        self.channels = channels
        self.sample_rate = sample_rate
        self.comment = comment
        self.raw = raw
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
        """The bytes before `size` bytes of samples."""
        if self.raw:
            return b""
        return wav_header(self.channels, self.sample_rate, size, self.comment)

    def write(self, wav):
        """wav (channels, n) in +-1."""
        with write_errors(self.path):
            write_all(self.file, pcm16(wav))
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
