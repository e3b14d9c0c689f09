"""Manifests: the clips of a corpus as columns, checked line by line before anything is trained.

    manifest.jsonl   {"audio": "a/b.flac", "text": "...", "kind": "speech", ...}     one clip a line
          │ load_manifest: every line is parsed, checked, and its audio file looked for
          v
    Table    rows   | line | path | bytes | changed | duration | fields | ... |      60 bytes a clip
             paths  a/b.flac|a/c.flac|...                                         one bytes object
          │
          v
    Clips    numbers [4, 0, 7, ...]    clips[i] reads line numbers[i] again ──> Clip

Ten million clips as Python objects are 12 GB; as columns they are 1 GB, and the texts stay in the
file, which all processes share. A question about all clips (how many are speech?) is asked of a
column; one about a clip makes that Clip, in 15 microseconds. An open file is read even when another
one takes its name; a line that was overwritten since is noticed by its CRC-32.

Lists of Clips are columns too (columns), so that a folder or a test needs no manifest.
"""
import json
import math
import os
import stat
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import numpy as np

from cli import BadInput, atomic
from decoder import has_ffmpeg, seconds_in_file
from remote import is_remote, local
from schema import Kind, shown

KINDS = get_args(Kind)                              # speech, sound, music
# endings of audio files, and of those that only ffmpeg reads (decoder.py)
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".oga", ".aif", ".aiff", ".aifc", ".au", ".caf",
         ".w64", ".sph")
FFMPEG_AUDIO = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".mka", ".ape", ".wv")
DECODER = json.JSONDecoder()
# lines that are parsed before they become rows of the table
CHUNK = 1000


@dataclass
class Clip:
    """One line of a manifest."""
    # absolute path of the audio file, or its address (remote.py)
    audio: str
    # transcript (speech) or caption (sound, music), or a description of either
    text: str = ""
    # speech, sound or music
    kind: Kind = "speech"
    # the speaker's name; "" = not known
    speaker: str = ""
    # [[word, start, end], ...] in seconds; None = not aligned
    words: list | None = None
    # length in seconds; None = measure the file
    duration: float | None = None
    # name of the clip; by default the stem of the audio file
    id: str = ""
    # speech whose `text` is a description: the words spoken (older manifests call this "said")
    transcript: str = ""


FIELDS = {f.name for f in fields(Clip)}
KNOWN_KEYS = FIELDS | {"said"}
STRINGS = {"transcript", "text", "kind", "speaker", "id"}


# ---------------------------------------------------------------------------- columns

ROW = np.dtype([
    # first byte of the clip's line in the manifest
    ("line", "i8"),
    # first byte of its audio file's path in Table.paths
    ("path", "i8"),
    # size of the audio file in bytes, -1 where there is none, and its last change in ns
    ("bytes", "i8"),
    ("changed", "i8"),
    # seconds, NaN where the manifest has none
    ("duration", "f8"),
    # CRC-32 of id, text, kind, speaker and words, and of the path
    ("fields", "u4"),
    ("path_crc", "u4"),
    # number in Table.speakers, 0 for none
    ("speaker", "u4"),
    # bytes of the text as UTF-8, in normal form
    ("text_bytes", "i4"),
    # number in KINDS
    ("kind", "u1"),
    # whether there is a text, and whether its words have times
    ("has_text", "?"),
    ("has_words", "?")])


class Table:
    """The columns of all clips of one source, in its order.

    rows       (n + 1,) ROW: the last one only holds the ends of the last line and path
    paths      bytearray: the paths of the audio files, end to end; below folder: relative to it
    speakers   {name: number}
    letters    {kind: set of the characters of its texts}
    read       (k) -> Clip k
    """

    def __init__(self, longest, folder=""):
        self.rows = np.zeros(longest + 1, ROW)
        self.paths = bytearray()
        self.folder = folder
        # what the paths below the folder lack
        self.prefix = f"{folder}/".encode("utf-8", "surrogatepass") if folder else b""
        self.speakers = {"": 0}
        self.letters = {kind: set() for kind in KINDS}
        self.n = 0
        self.waiting = []

    def add(self, row, audio, line, status):
        """One more clip. row: {field: value}; status: os.stat of its audio file, or None."""
        name = row["id"] if "id" in row else stem(audio)
        text = row.get("text", "")
        words = row.get("words")
        kind = row.get("kind", "speech")
        speaker = row.get("speaker", "")
        self.letters[kind].update(text if text.isascii() else plain(text))
        path = audio.encode("utf-8", "surrogatepass")
        size, changed = (status.st_size, status.st_mtime_ns) if status else (-1, 0)
        self.waiting.append((
            line, len(self.paths), size, changed, row.get("duration", math.nan),
            crc_of_fields(name, text, kind, speaker, words), zlib.crc32(path),
            self.speakers.setdefault(speaker, len(self.speakers)),
            bytes_of_text(text), KINDS.index(kind), bool(text), bool(words)))
        self.paths += path.removeprefix(self.prefix)
        if len(self.waiting) == CHUNK:
            self.flush()

    def flush(self):
        """Waiting clips become rows."""
        end = self.n + len(self.waiting)
        self.rows[self.n:end] = self.waiting
        self.n = end
        self.waiting = []

    def close(self, end):
        """After the last clip -> Clips. end: bytes of the manifest."""
        self.flush()
        self.rows = self.rows[:self.n + 1]
        self.rows[self.n] = np.zeros((), ROW)
        self.rows[self.n]["line"] = end
        self.rows[self.n]["path"] = len(self.paths)
        return Clips(self, np.arange(self.n, dtype=np.int32))

    def path(self, k):
        """The path of the audio file of clip k."""
        first, end = self.rows["path"][k:k + 2].tolist()
        name = self.paths[first:end].decode("utf-8", "surrogatepass")
        return name if is_remote(name) else os.path.join(self.folder, name)


class Lines:
    """The lines of a manifest that Table knows, read again one by one."""

    def __init__(self, path, table):
        self.path = path
        self.table = table
        self.file = open(path, "rb")

    def __call__(self, k):
        """Clip k. Errors: BadInput where its line is not the one that was checked."""
        first, end = self.table.rows["line"][k:k + 2].tolist()
        changed = BadInput(f"{self.path}: the line at byte {first} was overwritten since this "
                           "command began; start it again")
        try:
            row = row_of(json.loads(os.pread(self.file.fileno(), end - first, first)))
            clip = clip_of(row, self.table.path(k))
        except (ValueError, TypeError):
            raise changed from None
        crc = crc_of_fields(clip.id, clip.text, clip.kind, clip.speaker, clip.words)
        if crc != self.table.rows["fields"][k]:
            raise changed
        return clip


class Clips(Sequence):
    """Clips of a Table, in any order: a sequence whose items are made on access.

        clips[3]                     Clip
        clips[::2], clips[[4, 0]]    Clips, as columns
        clips.column("kind")         numpy array, one entry per clip; the names are ROW's
    """

    def __init__(self, table, numbers):
        self.table = table
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        if isinstance(i, (slice, list, np.ndarray)):
            return Clips(self.table, self.numbers[i])
        return self.table.read(int(self.numbers[i]))

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __repr__(self):
        return repr([*self])

    def column(self, name):
        """One entry per clip."""
        return self.table.rows[name][self.numbers]

    def paths(self):
        """Yield the paths of the audio files."""
        return (self.table.path(k) for k in self.numbers.tolist())

    def path(self, i):
        """The path of the audio file of clip i."""
        return self.table.path(int(self.numbers[i]))

    def of_kind(self, kind):
        """The clips of one kind, as Clips."""
        return self[np.flatnonzero(self.column("kind") == KINDS.index(kind))]

    def kinds(self):
        """The kinds that are there, in the order of KINDS."""
        present = np.unique(self.column("kind"))
        return [KINDS[number] for number in present]

    def seconds(self):
        """The length of every clip (n,): the manifest's, else its file's."""
        seconds = self.column("duration")
        for i in np.flatnonzero(np.isnan(seconds)):
            seconds[i] = seconds_in_file(self.path(i))
        return seconds


def columns(clips):
    """Clips, or a list of Clips, as Clips."""
    if isinstance(clips, Clips):
        return clips
    table = Table(len(clips))
    for k, clip in enumerate(clips):
        row = {name: value for name, value in vars(clip).items() if value is not None}
        table.add(row, clip.audio, k, status_of(clip.audio))
    table.read = clips.__getitem__
    return table.close(len(clips))


def with_other_file(clips, able):
    """Of which clips the speaker has another audio file among the clips `able` (n,) bool -> (n,)
    bool.
    """
    # speaker and file in one number
    file = clips.column("speaker").astype(np.uint64)
    able = able & (file > 0)
    file <<= np.uint64(32)
    file |= clips.column("path_crc")
    files = np.unique(file[able])
    of_speaker = np.bincount((files >> np.uint64(32)).astype(np.int64),
                             minlength=len(clips.table.speakers))

    # without the clip's own file
    own = able.copy()
    own[~able] = np.isin(file[~able], files)
    return of_speaker[clips.column("speaker")] - own > 0


def stem(path):
    """pathlib's stem of a path: the file's name without its ending."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name


def crc_of_fields(name, text, kind, speaker, words):
    """CRC-32 of what a training sees of a clip beside its audio."""
    joined = "\0".join((name, text, kind, speaker, repr(words) if words else ""))
    return zlib.crc32(joined.encode("utf-8", "surrogatepass"))


def plain(text):
    """NFKC, white space and line ends made single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def bytes_of_text(text):
    """len(plain(text).encode())."""
    # most texts are plain already
    if text.isascii() and text.isprintable() and "  " not in text and text == text.strip(" "):
        return len(text)
    return len(plain(text).encode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------------------- reading

def load_manifest(path, must_exist=True):
    """Read a .jsonl manifest, or a folder of audio (same-stem .txt is the text) -> Clips.

    Each line is a JSON object. `audio` is required, relative to the manifest; the other fields are
    Clip's; further keys are ignored, and counted on stderr. Errors: BadInput naming file and line;
    with must_exist also when audio files are missing, naming the first and how many.
    """
    if os.path.isdir(path):
        return columns(clips_in_folder(path))
    file_path = local(path)
    if not os.path.isfile(file_path):
        raise BadInput(f"{path}: no such manifest; `python -m corpora.scan DIR --out {path}` makes "
                       "one from a folder of recordings; the header of a shipped config names the "
                       "command that makes its corpus")

    # audio files lie beside the manifest
    path = str(path)
    folder = os.path.dirname(path if is_remote(path) else os.path.abspath(path))
    table = Table(count_lines(file_path), folder)
    table.read = Lines(file_path, table)
    missing = ""
    missing_count = 0
    ignored = Counter()
    size = 0
    for number, (first, line) in enumerate(lines_of(file_path), 1):
        size = first + len(line)
        if line.isspace() or not line:
            continue
        where = f"{path}, line {number}"
        values = parse_line(decoded(line, path, first), where)
        if not values.keys() <= KNOWN_KEYS:
            ignored.update(values.keys() - KNOWN_KEYS)
        row = row_of(values)
        check_row(row, where)

        # the audio file
        audio = audio_path(folder, row["audio"])
        status = status_of(audio)
        if must_exist and status is None and not is_remote(audio):
            missing = missing or f"{where}: audio file {audio} is missing"
            missing_count += 1
        if "words" in row:
            row["words"] = plain_words(row["words"])
        table.add(row, audio, first, status)

    clips = table.close(size)
    if missing:
        raise BadInput(f"{missing} ({missing_count} of {len(clips)} are); correct the paths, or "
                       f"`python -m corpora.scan check {path} --out clean.jsonl` drops those lines")
    if not clips:
        raise BadInput(f"{path}: holds no clips; each line is {{\"audio\": \"a/b.flac\", ...}}")
    if ignored:
        note_ignored_keys(path, ignored)
    return clips


def count_lines(path):
    """The lines of a file, at least."""
    count = 1
    with open_for_reading(path) as file:
        while piece := file.read(1 << 24):
            count += piece.count(b"\n")
    return count


def lines_of(path):
    """Yield (first byte, bytes of the line with its end), without a byte order mark."""
    first = 0
    with open_for_reading(path) as file:
        if file.read(3) == b"\xef\xbb\xbf":
            first = 3
        file.seek(first)
        for line in file:
            yield first, line
            first += len(line)


def open_for_reading(path):
    """An open file of bytes. Errors: BadInput naming the file."""
    try:
        return open(path, "rb")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); correct the path") from e


def decoded(line, path, first):
    """Bytes of a line -> its text. Errors: BadInput where it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text (byte {first + e.start}); convert it") from e


def audio_path(folder, audio):
    """The absolute path of the audio that a manifest in a folder names."""
    if is_remote(audio):
        return audio
    if is_remote(folder):
        return f"{folder}/{audio}"
    path = audio if os.path.isabs(audio) else f"{folder}/{audio}"
    # "a//b", "./a", "a/../b", "a/"
    odd = "//" in path or "/." in path or path[-1] == "/" or os.sep != "/"
    return os.path.normpath(path) if odd else path


def status_of(path):
    """os.stat of a file, None where there is no file of that name (or it is an address)."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def clip_of(row, audio):
    """The fields of a line -> Clip."""
    clip = Clip(**row | {"audio": audio})
    clip.id = row["id"] if "id" in row else stem(audio)
    if clip.words is not None:
        clip.words = plain_words(clip.words)
    return clip


def plain_words(words):
    """[[word, start, end], ...] with words as the texts are."""
    return [[plain(word), *times] for word, *times in words]


def note_ignored_keys(path, ignored):
    """Print the keys that no Clip has, on stderr of the first process. ignored: {key: lines}."""
    keys = ", ".join(f"{key!r} ({n:,} lines)" for key, n in ignored.most_common())
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: ignored keys: {keys}; a clip has {', '.join(sorted(FIELDS))}",
              file=sys.stderr)


def parse_line(line, where):
    """One line of a manifest -> its JSON object, which has "audio"."""
    try:
        values = loads(line)
    except json.JSONDecodeError as e:
        raise BadInput(f"{where}: not JSON ({e.msg} at column {e.colno}); correct it") from e
    except (RecursionError, ValueError) as e:           # brackets in brackets, 5,000 digits
        raise BadInput(f"{where}: not a line of a manifest ({e}); correct it") from e
    if not isinstance(values, dict) or not isinstance(values.get("audio"), str) \
            or not values["audio"]:
        raise BadInput(f'{where}: needs {{"audio": "path", ...}}; it is {line.strip()[:60]}')
    return values


def loads(line):
    """json.loads of a line, in half the time where it is as json.dumps writes it."""
    try:
        values, end = DECODER.raw_decode(line)
    except json.JSONDecodeError:
        return json.loads(line)
    return values if end >= len(line) - 1 and not line[end:].strip() else json.loads(line)


def row_of(values):
    """The JSON object of a line -> {field of Clip: value}, without fields that are null."""
    # manifests written before 2026-11-27 call it said
    if "transcript" not in values:
        values["transcript"] = values.get("said")
    # without a description the transcript is the text
    if not values.get("text"):
        values["text"] = values["transcript"]
    return {name: value for name, value in values.items() if value is not None and name in FIELDS}


def check_row(row, where):
    """Raise BadInput where a field's type or value is impossible."""
    for name, value in row.items():
        if name in STRINGS:
            if not isinstance(value, str):
                raise BadInput(f"{where}: {name} must be a string; it is {shown(value)}")
            if not value.isascii() and name in ("text", "transcript", "speaker"):
                check_characters(value, f"{where}: {name}")
    if row.get("kind", "speech") not in KINDS:
        raise BadInput(f"{where}: unknown kind {shown(row['kind'])}; use {', '.join(KINDS)}")
    seconds = row.get("duration", 1)
    if not is_seconds(seconds) or not seconds > 0:
        raise BadInput(f"{where}: duration must be positive seconds; it is {shown(seconds)}")
    if "words" in row:
        check_words(row["words"], where)
        refuse_words_behind(row["words"], row.get("duration", math.inf), where)


def check_characters(text, where):
    """Raise BadInput where a text has half a character, which no UTF-8 file can hold."""
    halves = [character for character in text if "\ud800" <= character <= "\udfff"]
    if halves:
        raise BadInput(f"{where} holds half a character (the surrogate {ascii(halves[0])}) in "
                       f"{ascii(text[:40])}; correct it")


def is_seconds(value):
    """Whether a value of a manifest is a finite number, below 30 years."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def check_words(words, where):
    """Raise BadInput unless words is [[word, start, end], ...] in order of time."""
    form = f"{where}: words must be [[word, start, end], ...]"
    if not isinstance(words, list):
        raise BadInput(f"{form}; it is {shown(words)}")
    for word in words:
        if not (isinstance(word, list) and len(word) == 3 and isinstance(word[0], str)
                and all(is_seconds(seconds) for seconds in word[1:])):
            raise BadInput(f"{form}; one is {shown(word)}")
        check_characters(word[0], f"{where}: words")

    # words may overlap: aligners produce that
    starts = [start for _, start, _ in words]
    if starts != sorted(starts) or any(end < start for _, start, end in words):
        raise BadInput(f"{where}: the times of words must not go backwards")


def refuse_words_behind(words, seconds, where):
    """Raise BadInput where a word begins more than 0.1 s behind the end of its clip."""
    if words and words[-1][1] > seconds + 0.1:
        word, start, _ = words[-1]
        raise BadInput(f"{where}: words are of other audio; {word!r} begins at {start:g} s, and "
                       f"the clip has {seconds:g} s")


# ---------------------------------------------------------------------------- folders, writing

def audio_endings():
    """The endings of audio files that can be read here."""
    return AUDIO + FFMPEG_AUDIO if has_ffmpeg() else AUDIO


def walk(top):
    """os.walk in the order of names, also into linked folders: (folder, its folders, its files).

    Every folder is entered once: a link to a folder of this tree is left out, which is entered in
    its own place, and so is one to a folder that holds the link.
    """
    whole = os.path.realpath(top)
    entered = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            status = os.stat(path)
            number = (status.st_dev, status.st_ino)
            if number not in entered and not (os.path.islink(path) and leads_back(path, whole)):
                entered.add(number)
                kept.append(name)
        folders[:] = kept
        yield folder, kept, sorted(files)


def leads_back(link, whole):
    """Whether a link names a folder in `whole`, a real path, or one that holds the link."""
    target = os.path.join(os.path.realpath(link), "")
    place = os.path.join(os.path.realpath(os.path.dirname(link)), "")
    return target.startswith(os.path.join(whole, "")) or place.startswith(target)


def files_below(folder):
    """All files below a folder as Paths, sorted, without hidden ones (walk)."""
    return sorted(Path(place, name) for place, _, files in walk(folder) for name in files
                  if not name.startswith("."))


def audio_files(folder):
    """All audio files below a folder, sorted by path, without hidden ones."""
    endings = audio_endings()
    return [path for path in files_below(folder) if path.suffix.lower() in endings]


def clips_in_folder(folder, kind="speech"):
    """Every audio file below `folder` as a Clip, with the text of its same-stem .txt -> list[Clip].

    Errors: BadInput when there is no audio file.
    """
    clips = []
    for path in audio_files(os.path.abspath(folder)):
        text_file = path.with_suffix(".txt")
        text = " ".join(read_text(text_file).split()) if text_file.is_file() else ""
        clips.append(Clip(str(path), text, kind, id=path.stem))
    if not clips:
        raise BadInput(f"{folder}: no audio in it ({', '.join(audio_endings())}); "
                       "see `python -m corpora.scan -h`")
    return clips


def read_text(path):
    """The text of a UTF-8 file, without a byte order mark. Errors: BadInput naming the file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); correct the path") from e
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text (byte {e.start}); convert it") from e


def write_manifest(path, clips):
    """Write Clips as .jsonl, atomically. Audio below the manifest's folder becomes relative."""
    folder = os.path.dirname(os.path.abspath(path)) + os.sep
    with atomic(path) as temp, open(temp, "w", encoding="utf-8") as out:
        for clip in clips:
            row = {name: value for name, value in vars(clip).items() if value not in ("", None)}
            if clip.audio.startswith(folder):
                row["audio"] = os.path.relpath(clip.audio, folder)
            # names that are not UTF-8 hold surrogates, which JSON writes as \udce9
            readable = all(character < "\ud800" or character > "\udfff"
                           for character in row["audio"] + row.get("id", ""))
            out.write(json.dumps(row, ensure_ascii=not readable) + "\n")


if __name__ == "__main__":
    print("manifest.py is a library; python -m corpora.scan makes and checks manifests")
