"""Audio files in and out: all that the decoder gives, with one sample rate and one range.

    file ── decode ──> (S, its channels) ── mix_down, resample, clip ──> float32 (channels, S)

    load_audio      a whole file, or a part of it
    audio_pieces    a file of any length, in pieces: memory does not grow with the length
    save_audio      a 16-bit .wav
    inspect         what is wrong with a file: it ends too early, is silent, too loud, ...

The length in a header is not believed where it may be wrong:

    MP3     its frames are counted. Where the count is not the Xing header's (none there: libsndfile
            guesses from the first bit rate; files that were joined: it counts the first one;
            truncated files), the frames alone are piped to the decoder, without any header.
    Ogg     joined files ("chains") are decoded link by link.
    others  a length of 0 or 2^63 - 1 (what a pipe writes): the samples are counted.

A position in an MP3 is reached from 0.5 s before it: a frame needs the bits of frames before it
(the bit reservoir), without which a crop begins with up to 0.1 s of other sound.

Samples above full scale (float files; MP3s overshoot a little) are clipped to +-1, alike in crops,
latents and prompts. A peak can be known only for a whole file, so a crop could not be scaled by it.

Precision: float32.
"""
import math
import mmap
import os
import struct
import threading
from collections import namedtuple
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
import torch

from cli import BadInput, atomic

BLOCK = 1 << 22                                     # samples that are decoded at a time, 95 s
LEAD = 0.5                                          # seconds decoded before a position in an MP3
UNKNOWN = 1 << 40                                   # samples: a header that says more knows nothing

JOINED_OF_DIFFERENT = "joined of parts with different sample rates or channels; export it again"


# ---------------------------------------------------------------------------- what a file holds

# one file as the decoder sees it; parts: [Part]
AudioInfo = namedtuple("AudioInfo", "sample_rate channels frames parts")

# samples of a part, and where they are: span, bytes of the file (None: the file as it is), or
# offsets, those of the MP3 frames to pipe (n, 2). forward: can only be decoded from its start
Part = namedtuple("Part", "frames span offsets forward", defaults=(None, None, False))


def audio_info(path):
    """AudioInfo of a file. Errors: BadInput when it is missing, unreadable or empty."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file; correct the path")
    status = os.stat(path)
    return measured_info(str(path), status.st_size, status.st_mtime_ns)


@cache
def measured_info(path, size, mtime):
    """audio_info, once for each state of a file."""
    with opened(path) as f:
        if f.format == "MP3":
            parts = mp3_parts(path, f)
        elif f.format == "OGG":
            parts = ogg_parts(path, f)
        elif 0 < f.frames < UNKNOWN:
            parts = [Part(f.frames, forward=not f.can_seek())]
        else:
            parts = [Part(count_samples(path, f), forward=True)]

        frames = sum(part.frames for part in parts)
        if frames <= 0:
            raise BadInput(f"{path}: holds 0 samples or is damaged; remove it")
        return AudioInfo(f.samplerate, f.channels, frames, parts)


def seconds_in_file(path):
    """Length of an audio file in seconds."""
    info = audio_info(path)
    return info.frames / info.sample_rate


class Decoder(sf.SoundFile):
    """An sf.SoundFile that reads on. soundfile seeks to where it is after every read: in a VBR MP3
    the next read then begins with wrong sound, and what a pipe wrote cannot seek at all.
    """

    def seekable(self):
        """What soundfile asks before it seeks."""
        return False

    def can_seek(self):
        return super().seekable()


@contextmanager
def opened(path, file=None):
    """A Decoder of path, or of `file` (binary file or descriptor) that holds a part of it."""
    if file is None:
        file = os.fsencode(path) if os.name == "posix" else path   # names that are not UTF-8
    try:
        f = Decoder(file, closefd=False)
    except (RuntimeError, TypeError, OSError) as e:
        reason = getattr(e, "error_string", str(e)).strip().rstrip(".")
        raise BadInput(f"{path}: cannot be read as audio ({reason}); convert or remove it") from e
    with f:
        yield f


@contextmanager
def mapped(path):
    """The bytes of a file, not read before they are needed."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def count_samples(path, f):
    """Samples of an open file, by decoding all of them."""
    return sum(len(block) for block in read_blocks(path, f, UNKNOWN))


# ---------------------------------------------------------------------------- MP3

def mp3_parts(path, f):
    """The parts of an MP3: the file as it is where its header counts the frames that are there."""
    with mapped(path) as data:
        offsets, samples, claimed, formats = mp3_frames(data)
    if len(formats) > 1:
        raise BadInput(f"{path}: {JOINED_OF_DIFFERENT}")
    if len(claimed) == 1 and claimed[0] in (len(offsets), len(offsets) + 1):
        return [Part(f.frames)]                     # some encoders count the header's own frame
    if len(offsets) == 0:
        return [Part(count_samples(path, f), forward=True)]
    return [Part(len(offsets) * samples, offsets=offsets)]


def mp3_frames(data):
    """Bytes of an MP3 -> (n, 2) first and last byte + 1 of each frame, samples per frame, the
    number of frames that each Xing header claims, and {(sample rate, channels)} of the frames.

    Frames of layer III that are complete and hold sound. ID3 tags and other bytes are skipped.
    """
    offsets = []
    claimed = []
    formats = set()
    samples = 0
    position = 0
    expected = None                                 # format of the frame that ends here
    while position + 4 <= len(data):
        if data[position:position + 3] == b"ID3":
            position += 10 + id3_size(data[position + 6:position + 10])
            continue
        size, frame_samples, form = mp3_header(data[position:position + 4])
        end = position + size

        # a frame, or bytes that look so: then no second one follows
        follows = end == len(data) or mp3_header(data[end:end + 4])[2] == form
        if size == 0 or end > len(data) or not (form == expected or follows):
            expected = None
            position = data.find(b"\xff", position + 1)
            if position < 0:
                break
            continue

        count = xing_count(data[position:position + 64])
        if count is None:
            offsets.append((position, end))
            samples = frame_samples
            formats.add(form)
        else:
            claimed.append(count)
        expected = form
        position = end
    return np.array(offsets, np.int64).reshape(-1, 2), samples, claimed, formats


def id3_size(four):
    """The size in an ID3 tag, 7 bits in each of four bytes."""
    return sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(four))


def mp3_header(four):
    """The first four bytes of an MP3 frame -> (bytes, samples, (sample rate, channels)) of it,
    (0, 0, None) if it is none.

    11 bits of ones, 2 version, 2 layer, 1, 4 bit rate, 2 sample rate, 1 padding, 1, 2 mode, ...
    """
    if len(four) < 4 or four[0] != 0xFF or four[1] & 0xE6 != 0xE2:         # layer III
        return 0, 0, None
    version = four[1] >> 3 & 3                      # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bit_rate = four[2] >> 4
    rate = four[2] >> 2 & 3
    if version == 1 or bit_rate in (0, 15) or rate == 3:
        return 0, 0, None

    sample_rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    if version == 3:
        samples = 1152
        kbit = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[bit_rate - 1]
    else:
        samples = 576
        kbit = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[bit_rate - 1]
    size = samples // 8 * kbit * 1000 // sample_rate + (four[2] >> 1 & 1)
    return size, samples, (sample_rate, 1 if four[3] >> 6 == 3 else 2)


def xing_count(head):
    """Number of frames that a Xing header claims (0: it does not say); None for other frames."""
    place = max(head.find(b"Xing", 4, 44), head.find(b"Info", 4, 44))
    if place < 0:
        return None
    flags, frames = struct.unpack(">II", head[place + 4:place + 12])
    return frames if flags & 1 else 0


@contextmanager
def piped(path, offsets):
    """The frames of an MP3 as a pipe, in which the decoder finds no length to believe."""
    reading, writing = os.pipe()

    def write():
        try:
            with mapped(path) as data, open(writing, "wb") as out:
                for first, end in offsets:
                    out.write(data[first:end])
        except BrokenPipeError:                     # enough was read
            pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()


# ---------------------------------------------------------------------------- Ogg

def ogg_parts(path, f):
    """The parts of an Ogg file: the file as it is, or the links of a chain."""
    with mapped(path) as data:
        links, _ = ogg_links(data)
        if len(links) < 2:
            known = 0 < f.frames < UNKNOWN
            return [Part(f.frames if known else count_samples(path, f), forward=not known)]

        parts = []
        for span in zip(links, [*links[1:], len(data)]):
            with opened(path, BytesIO(data[slice(*span)])) as link:
                if (link.samplerate, link.channels) != (f.samplerate, f.channels):
                    raise BadInput(f"{path}: {JOINED_OF_DIFFERENT}")
                parts.append(Part(link.frames, span=span))
    return parts


def ogg_links(data):
    """Bytes of an Ogg file -> first byte of each link, and whether the end of the last is there."""
    links = []
    position = 0
    flags = 0                                       # 2: first page of a stream, 4: last
    while data[position:position + 4] == b"OggS" and position + 27 <= len(data):
        before = flags
        flags = data[position + 5]
        if flags & 2 and not before & 2:
            links.append(position)
        segments = data[position + 26]
        position += 27 + segments + sum(data[position + 27:position + 27 + segments])
    return links, bool(flags & 4) and position <= len(data)


# ---------------------------------------------------------------------------- reading

def decode(path, info, first=0, count=UNKNOWN):
    """Yield samples first .. first + count of a file, as float32 (S, channels) blocks."""
    for part in info.parts:
        n = min(count, part.frames - first)
        if n > 0:
            yield from decode_part(path, part, first, n)
            count -= n
        first = max(0, first - part.frames)


def decode_part(path, part, first, count):
    """Yield samples first .. first + count of one part."""
    if part.offsets is not None:
        # from some frames before on
        samples = part.frames // len(part.offsets)
        frame = max(0, first // samples - 20)
        with piped(path, part.offsets[frame:]) as pipe, opened(path, pipe) as f:
            skip(path, f, first - frame * samples)
            yield from read_blocks(path, f, count)
        return

    file = None
    if part.span is not None:
        with mapped(path) as data:
            file = BytesIO(data[slice(*part.span)])
    with opened(path, file) as f:
        if first and not part.forward:
            lead = min(first, int(LEAD * f.samplerate)) if f.format == "MP3" else 0
            f.seek(first - lead)
            first = lead
        skip(path, f, first)
        yield from read_blocks(path, f, count)


def skip(path, f, count):
    """Decode `count` samples and forget them."""
    for _ in read_blocks(path, f, count):
        pass


def read_blocks(path, f, count):
    """Yield the next `count` samples of an open file, or those that are there."""
    while count > 0:
        try:
            block = f.read(min(count, BLOCK), dtype="float32", always_2d=True)
        except RuntimeError as e:
            raise BadInput(f"{path}: damaged audio ({e}); remove it") from e
        if len(block) == 0:
            return
        count -= len(block)
        yield block


def load_audio(path, sample_rate, channels=1, *, start=0.0, seconds=None, allow_silence=False):
    """Read `seconds` (None: all) from `start`, any format and rate -> float32 (channels, S) in +-1.

    A file with another number of channels is mixed to mono (mix_down) and repeated. Samples above
    full scale are clipped. At most round(seconds * sample_rate) samples come back, fewer at the end
    of the file.
    Errors: BadInput naming the file when it is missing, unreadable, empty, silent (peak < 1e-4;
    unless allow_silence) or holds NaN or infinity.
    """
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
    with mapped(path) as data:
        # samples that the header promises
        promised = 0
        if data[:4] in (b"RIFF", b"RIFX"):
            promised = wav_promise(data, info)
        elif info.parts[0].offsets is not None:
            _, samples, claimed, _ = mp3_frames(data)
            promised = sum(claimed) * samples
        elif data[:4] == b"fLaC" and data.find(b"fLaC\0\0\0\x22", 4) > 0:
            return "behind it is a second FLAC file that no decoder reads"
        elif data[:4] == b"OggS" and not ogg_links(data)[1]:
            return f"after {count / info.sample_rate:.2f} s the mark of the end is missing"
        else:
            promised = sum(part.frames for part in info.parts)

    lacking = (promised - count) / info.sample_rate
    if lacking <= 0.1:
        return ""
    return f"{count / info.sample_rate:.2f} of {promised / info.sample_rate:.2f} s are there"


def wav_promise(data, info):
    """Samples that the data chunk of a RIFF .wav promises; 0 where its size is a pipe's dummy."""
    order = "<" if data[:4] == b"RIFF" else ">"
    position = 12
    while position + 8 <= len(data):
        size, = struct.unpack(order + "I", data[position + 4:position + 8])
        if data[position:position + 4] == b"data":
            there = len(data) - position - 8
            if size >= 0x7FFFF000 or there <= 0:
                return 0
            return round(info.frames * max(1, size / min(size or 1, there)))
        position += 8 + size + size % 2
    return 0


# ---------------------------------------------------------------------------- writing

def save_audio(path, wav, sample_rate):
    """Write wav, a tensor or array (channels, S) or (S,), as 16-bit .wav, limited to +-1.

    Atomic (temporary file, then rename); makes parent folders. Errors: BadInput when `path` is
    not a .wav or cannot be written, ValueError when wav is not finite.
    """
    path = Path(path)
    if path.suffix.lower() != ".wav":
        raise BadInput(f"{path}: only .wav is written; name the file {path.stem}.wav")
    if torch.is_tensor(wav):
        wav = wav.detach().float().cpu().numpy()
    wav = np.atleast_2d(np.asarray(wav, dtype=np.float32))
    if not np.isfinite(wav).all():
        raise ValueError(f"save_audio({path}): the audio is not finite")
    with atomic(path) as temp:
        sf.write(temp, np.clip(wav.T, -1, 1), sample_rate, subtype="PCM_16", format="WAV")
