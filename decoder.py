"""What an audio file holds, and its samples: all that a decoder gives, whatever its header says.

    file ── audio_info ──> AudioInfo, its parts ── decode ──> float32 (S, its channels), in blocks

libsndfile decodes. What it does not read (m4a, webm, wma, ... and MP3s within which it gives up)
goes through ffmpeg, where that is installed: from its start in every case, so convert long ones.

The length in a header is not believed where it may be wrong:

    MP3     all of it is decoded once, from a pipe that begins behind the header. Where that gives
            other samples than the header says (none there: libsndfile guesses from the first bit
            rate; files that were joined: it counts the first one), the pipe is what is read.
    joined  Ogg ("chains"), FLAC and WAV are decoded part by part: a decoder reads the first one.
    others  a length of 0 or 2^63 - 1 (what a pipe writes): the samples are counted.

A position in an MP3 is reached from 0.5 s before it: a frame needs the bits of frames before it
(the bit reservoir), without which a crop begins with up to 0.1 s of other sound.

Precision: float32.
"""
import mmap
import os
import re
import shutil
import subprocess
import threading
from collections import namedtuple
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from tempfile import TemporaryFile

import soundfile as sf

from cli import BadInput
from remote import local

BLOCK = 1 << 22                                     # samples that are decoded at a time, 95 s
LEAD = 0.5                                          # seconds decoded before a position in an MP3
UNKNOWN = 1 << 40                                   # samples: a header that says more knows nothing
MP3_DELAY = 4096                                    # samples that a header may take off both ends
FLAC_START = b"fLaC\0\0\0\x22"                     # of every FLAC file, and of no frame


class Undecodable(BadInput):
    """libsndfile does not read this file, or stops midway."""


# ---------------------------------------------------------------------------- what a file holds

# one file as the decoder sees it. promised: samples that its header names, 0 = none; parts: [Part]
AudioInfo = namedtuple("AudioInfo", "sample_rate channels frames promised parts")

# samples of a part, and how they are decoded: "file" as it is, "bytes" or "pipe" of the bytes in
# span, or "ffmpeg". forward: can only be decoded from its start
Part = namedtuple("Part", "how frames span forward", defaults=("file", 0, None, True))


def audio_info(path):
    """AudioInfo of a file. Errors: BadInput when it is missing, unreadable or empty."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file; correct the path")
    status = os.stat(path)
    if status.st_size == 0:
        raise BadInput(f"{path}: is empty (0 bytes); get it again or remove it")
    return measured_info(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(1 << 17)                                 # of 10 million files it would be 6 GB
def measured_info(path, size, mtime):
    """audio_info, once for each state of a file."""
    try:
        return info_of_libsndfile(path)
    except Undecodable as e:
        if not has_ffmpeg():
            raise BadInput(f"{e}, or install ffmpeg, which reads more files") from e
    return info_of_ffmpeg(path)


def info_of_libsndfile(path):
    """AudioInfo of a file that libsndfile opens. Errors: Undecodable for others and empty ones."""
    spans = joined_spans(path)
    if len(spans) > 1:
        info = info_of_joined(path, spans)
    else:
        with opened(path) as f:
            promised = f.frames if 0 < f.frames < UNKNOWN else 0
            if f.format == "MP3":
                promised, part = mp3_part(path, f)
            elif promised:
                part = Part("file", f.frames, forward=not f.can_seek())
            else:
                part = counted(path, Part("file"))
            info = AudioInfo(f.samplerate, f.channels, part.frames, promised, [part])

    if info.frames <= 0:
        raise Undecodable(f"{path}: holds 0 samples or is damaged; remove it")
    return info


def info_of_joined(path, spans):
    """AudioInfo of files that were joined to one: their bytes are [(first, last + 1), ...].

    Errors: BadInput where one cannot be read, or they differ in sample rate or channels.
    """
    parts = []
    forms = set()
    for span in spans:
        part = Part("bytes", 0, span)
        try:
            with opened(path, part) as f:
                forms.add((f.samplerate, f.channels))
                known = 0 < f.frames < UNKNOWN
                parts.append(part._replace(frames=f.frames, forward=not f.can_seek()) if known
                             else counted(path, part))
        except Undecodable as e:                    # ffmpeg would read the parts before it
            raise BadInput(f"{e} (part {len(parts) + 1} of a joined file)") from e
    if len(forms) > 1:
        raise BadInput(f"{path}: joined of parts with different sample rates or channels; "
                       "export it again")
    (sample_rate, channels), = forms
    return AudioInfo(sample_rate, channels, sum(part.frames for part in parts), 0, parts)


def info_of_ffmpeg(path):
    """AudioInfo of a file that ffmpeg decodes. Errors: BadInput for others and empty ones."""
    with opened(path, Part("ffmpeg")) as f:
        sample_rate = f.samplerate
        channels = f.channels
    part = counted(path, Part("ffmpeg"))
    if part.frames <= 0:
        raise BadInput(f"{path}: holds 0 samples or is damaged; remove it")
    promised = round(seconds_promised(path) * sample_rate)
    return AudioInfo(sample_rate, channels, part.frames, promised, [part])


def counted(path, part):
    """The part with the number of samples that decoding all of it gives.

    Errors: Undecodable where the decoder stops before the last bytes of a pipe, as it does where
    the sample rate changes.
    """
    with opened(path, part) as f:
        count = sum(len(block) for block in read_blocks(path, f, UNKNOWN))
        if part.how == "pipe" and len(os.read(f.name, 1 << 16)) > 1 << 12:
            raise Undecodable(f"{path}: of its sound only the first {count / f.samplerate:.1f} s "
                              "can be decoded; export it again")
    return part._replace(frames=count)


def seconds_in_file(path):
    """Length of an audio file in seconds."""
    info = audio_info(local(path))
    return info.frames / info.sample_rate


# ---------------------------------------------------------------------------- opening

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
def opened(path, part=Part("file")):
    """A Decoder of a part of a file. Errors: Undecodable."""
    with source(path, part) as file:
        try:
            f = Decoder(file, closefd=False)
        except (RuntimeError, TypeError, OSError) as e:
            reason = getattr(e, "error_string", str(e)).strip().rstrip(".")
            raise Undecodable(f"{path}: cannot be read as audio ({reason}); convert or remove it"
                              ) from e
        with f:
            yield f


@contextmanager
def source(path, part):
    """What the Decoder of a part opens: a name, bytes, or the descriptor of a pipe."""
    if part.how == "bytes":
        with mapped(path) as data:
            file = BytesIO(data[slice(*part.span)])
        yield file
    elif part.how == "pipe":
        with piped(path, part.span) as pipe:
            yield pipe
    elif part.how == "ffmpeg":
        with ffmpeg(path) as pipe:
            yield pipe
    else:
        # names that are not UTF-8
        yield os.fsencode(path) if os.name == "posix" else path


@contextmanager
def mapped(path):
    """The bytes of a file, not read before they are needed."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


@contextmanager
def piped(path, span):
    """Bytes of a file as a pipe. Errors: Undecodable where the decoder came to an end before them.
    """
    reading, writing = os.pipe()

    def write():
        try:
            with mapped(path) as data, open(writing, "wb") as out:
                for first in range(*span, 1 << 16):
                    out.write(data[first:min(first + (1 << 16), span[1])])
        except BrokenPipeError:                     # enough was read
            pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join()


def has_ffmpeg():
    """Whether ffmpeg is there, which decodes what libsndfile does not."""
    return shutil.which("ffmpeg") is not None


@contextmanager
def ffmpeg(path):
    """The first sound of a file, decoded by ffmpeg to float32, as a pipe in the format AU.

    Errors: BadInput, with what ffmpeg says, where nothing comes out.
    """
    command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe",
               "-i", b"file:" + os.fsencode(path), "-map", "0:a:0",
               "-c:a", "pcm_f32be", "-f", "au", "-"]
    with TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        try:
            yield process.stdout.fileno()
        except Undecodable as e:
            process.stdout.close()
            process.wait()
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or ["no sound"]
            reason = re.sub(r"\[.*?\] |:? ?file:.*: ", "", lines[0]).strip().rstrip(".")
            raise BadInput(f"{path}: neither libsndfile nor ffmpeg can read it ({reason}); "
                           "convert or remove it") from e
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def seconds_promised(path):
    """Seconds that the header of a file names, as ffmpeg's ffprobe reads it; 0 = none."""
    command = ["ffprobe", "-v", "quiet", "-protocol_whitelist", "file,pipe",
               "-show_entries", "format=duration", "-of", "csv=p=0",
               b"file:" + os.fsencode(path)]
    if not shutil.which("ffprobe"):
        return 0.0
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stdout
    try:
        return float(answer)
    except ValueError:                              # N/A
        return 0.0


# ---------------------------------------------------------------------------- MP3, joined files

def mp3_part(path, f):
    """An open MP3 -> (samples that its header promises, its Part): the file as it is where its
    header is right, else all that is behind the header.
    """
    with mapped(path) as data:
        first, has_header = mp3_sound(data)
        span = first, len(data)
    promised = f.frames if has_header else 0
    try:
        part = counted(path, Part("pipe", 0, span))
    except Undecodable:                             # libsndfile gives up within other bytes
        if not has_ffmpeg():
            raise
        part = counted(path, Part("ffmpeg"))

    if part.frames and abs(part.frames - f.frames) < MP3_DELAY:
        part = Part("file", min(part.frames, f.frames), forward=False)
    return promised, part


def mp3_sound(data):
    """Bytes of an MP3 -> (where its sound begins, whether there is a header before that).

    The header is a frame without sound that names the number of frames (by Xing; "Info" in files
    of one bit rate). libsndfile believes it; behind it the decoder reads what is there.
    """
    # tags: their size has 7 bits in each of four bytes
    first = 0
    while data[first:first + 3] == b"ID3":
        size = data[first + 6:first + 10]
        first += 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(size))
    first = max(first, data.find(b"\xff", first))

    # the header: 156 bytes, then zeros up to the next frame, which begins as this one
    frame = data[first:first + 64]
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return first, False
    return max(first, data.find(frame[:2], first + place + 156)), True


def joined_spans(path):
    """[(first byte, last + 1)] of the files that were joined to this one, in the formats that
    libsndfile reads to the end of the first only; [] for other formats.
    """
    starts_in = {b"OggS": ogg_starts, b"fLaC": flac_starts, b"RIFF": riff_starts}
    with mapped(path) as data:
        if data[:4] not in starts_in:
            return []
        starts = starts_in[data[:4]](data)
        return [*zip(starts, [*starts[1:], len(data)])]


def ogg_starts(data):
    """Bytes of an Ogg file -> first byte of each link of a chain."""
    return ogg_links(data)[0]


def flac_starts(data):
    """Bytes of a FLAC file -> first byte of each of the files that were joined."""
    starts = [0]
    position = data.find(FLAC_START) + 1
    while (position := data.find(FLAC_START, position) + 1) > 0:
        starts.append(position - 1)
    return starts


def riff_starts(data):
    """Bytes of a WAV file -> first byte of each of the files that were joined."""
    starts = []
    position = 0
    while data[position:position + 4] == b"RIFF":
        starts.append(position)
        size = int.from_bytes(data[position + 4:position + 8], "little")
        position += 8 + size + size % 2
    return starts


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
    with opened(path, part) as f:
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
            raise Undecodable(f"{path}: damaged audio ({e}); get it again or remove it") from e
        if len(block) == 0:
            return
        count -= len(block)
        yield block
