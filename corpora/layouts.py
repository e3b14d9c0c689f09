"""Layouts of speech corpora on disk: a folder -> the clips in it.

    folder       any tree of audio files, the text of each in the .txt of its name
    ljspeech     metadata.csv, wavs/
    libritts     speaker/chapter/NAME.normalized.txt beside NAME.wav
    librispeech  speaker/chapter/speaker-chapter.trans.txt beside speaker-chapter-0000.flac
    vctk         txt/speaker/NAME.txt, wav48*/speaker/NAME*

A layout is a function (folder: Path, kind) -> [Clip, or Left where there is none]. Corpora that are
described by a table with named columns are in tables.py; corpora/scan.py calls both.
"""
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property

from cli import BadInput
from manifest import Clip, audio_endings, audio_files, clips_in_folder, files_below, read_text, stem

# folders that say what is in them, not who speaks
NOT_SPEAKERS = ("audio", "clips", "data", "dev", "test", "train", "valid", "wav", "wavs")


@dataclass
class Left:
    """What a corpus names and a layout has no clip of."""
    # many such things, e.g. "texts without an audio file"
    reason: str
    # this one's name
    name: str


class AudioNames:
    """The audio files of a folder, found by what a table calls them:

        a/b.flac, a/b           their path, with its ending or without
        b.flac, b               their name, where one folder alone has it
        /elsewhere/a/b.flac     a path from another machine: as much of its end as is a path here
    """

    def __init__(self, folder):
        self.folder = folder

    def find(self, *names):
        """The Path of the first of the names that is an audio file, or None."""
        for name in filter(None, names):
            path = self.folder / name
            if path.suffix.lower() in audio_endings() and path.is_file():
                return path
            found = self.by_end(name)
            if found:
                return found
        return None

    def by_end(self, name):
        """The file whose path or name is `name`, or its longest end that is one; None without."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        for first in range(len(parts)):
            found = self.paths.get("/".join(parts[first:]))
            if found:
                return found
        return self.names.get(parts[-1]) if parts else None

    @cached_property
    def paths(self):
        """{path below the folder, with and without ending: Path}."""
        paths = {}
        whole = {}
        for path in audio_files(self.folder):
            relative = path.relative_to(self.folder)
            paths.setdefault(relative.with_suffix("").as_posix(), path)
            whole[relative.as_posix()] = path
        # a whole path comes before one without its ending
        return paths | whole

    @cached_property
    def names(self):
        """{name of the file, with and without ending: Path}, None where two folders have it."""
        names = {}
        for path in self.paths.values():
            for name in (path.name, path.stem):
                known = names.setdefault(name, path)
                if known is None or known.parent != path.parent:
                    names[name] = None
        return names


def make_clip(audio, text, kind, speaker="", name=""):
    """A Clip, or Left where there is no such audio file. audio: Path or None; name: of the text."""
    if audio is None or not audio.is_file():
        return Left("texts without an audio file", name)
    return Clip(str(audio), " ".join(text.split()), kind, speaker, id=stem(str(audio)))


def first_file(paths):
    """The first path that is a file, or None."""
    return next((path for path in paths if path.is_file()), None)


# ---------------------------------------------------------------------------- folders

def folder_of_audio(folder, kind):
    """Any tree of audio files, texts in the .txt of the same stem. Speech: folders are speakers."""
    clips = clips_in_folder(folder, kind) if audio_files(folder) else []
    if kind != "speech":
        return clips
    return [replace(clip, speaker=speaker_of(clip.audio, folder)) for clip in clips]


def speaker_of(audio, top, number=0):
    """The name of a folder on the way from `top` to an audio file, or "".

    number: 1 for the first, -1 for the last; 0 for the first that can be a speaker's name. Bytes
    that are not UTF-8 become U+FFFD.
    """
    folders = os.path.relpath(audio, top).split(os.sep)[:-1]
    if os.pardir in folders:
        return ""
    if number == 0:
        folders = [name for name in folders if name.lower() not in NOT_SPEAKERS]
    place = number - 1 if number > 0 else number
    if not -len(folders) <= place < len(folders):
        return ""
    return os.fsencode(folders[place]).decode("utf-8", "replace")


# ---------------------------------------------------------------------------- LJSpeech

def ljspeech(folder, kind):
    """LJSpeech: metadata.csv, see read_metadata; the audio is wavs/id.wav or of another format."""
    table = folder / "metadata.csv"
    if not table.is_file():
        raise BadInput(f"{folder}: no metadata.csv in it; give LJSpeech's top folder")

    audio = AudioNames(folder)
    return [make_clip(audio.find(f"wavs/{name}", name), text, kind, speaker or "lj", name)
            for name, text, speaker in read_metadata(table)]


def read_metadata(table):
    """A table of LJSpeech's form -> [(id, text, speaker or ""), ...].

        id|text|normalised text     the normalised text, where it is not empty
        id|text|speaker             where the third column holds single words, and not the text's
        id|text                     further | belong to the text

    Which of them a table is, all its rows decide together. Errors: BadInput where they do not, or
    where a row has other columns.
    """
    lines = [line for line in read_text(table).split("\n") if line.strip()]
    rows = [[name.strip(), *texts] for name, *texts in (line.split("|") for line in lines)]
    thirds = [row for row in rows if "".join(row[2:]).strip()]
    alike = sum(same_text(*text_halves(row)) for row in thirds)

    if 2 * alike >= len(thirds):
        return [normalised(row, f"{table}: '{line[:60]}'") for row, line in zip(rows, lines)]
    if all(len(row) > 2 and len(row[-1].split()) == 1 for row in rows):
        return [(row[0], "|".join(row[1:-1]), row[-1].strip()) for row in rows]
    if any(len(row) == 2 for row in rows):
        return [(row[0], "|".join(row[1:]), "") for row in rows]
    raise BadInput(f"{table}: '{'|'.join(thirds[0])[:60]}': the third column is neither the text "
                   "normalised nor a speaker; write id|text, id|text|normalised text or "
                   "id|text|speaker")


def text_halves(row):
    """The columns after the id, in two halves: a | in a text stands in both its forms."""
    texts = row[1:]
    middle = len(texts) // 2
    return "|".join(texts[:middle]), "|".join(texts[middle:])


def normalised(row, where):
    """A row id|text|normalised text, or without the last -> (id, text, "")."""
    texts = row[1:]
    if len(texts) < 2:
        return row[0], "".join(texts), ""
    if len(texts) % 2:
        raise BadInput(f"{where}: has {len(row)} columns; write id|text|normalised text")
    plain, spoken = text_halves(row)
    return row[0], spoken if spoken.strip("| ") else plain, ""


def same_text(plain, spoken):
    """Whether two texts are one, normalised or not: they share half of the shorter one's words."""
    plain, spoken = (set(re.findall(r"\w+", text.lower())) for text in (plain, spoken))
    shorter = min(len(plain), len(spoken))
    return shorter > 0 and 2 * len(plain & spoken) >= shorter


# ---------------------------------------------------------------------------- LibriSpeech, VCTK

def libritts(folder, kind):
    """LibriTTS: speaker/chapter/*.normalized.txt beside the audio."""
    clips = []
    for path in files_below(folder):
        if not path.name.endswith(".normalized.txt"):
            continue
        name = path.name.removesuffix(".normalized.txt")
        audio = first_file(beside(path, name))
        clips.append(make_clip(audio, read_text(path), kind, path.parent.parent.name, name))
    return clips


def librispeech(folder, kind):
    """LibriSpeech: *.trans.txt with a line "id TEXT" for each audio file of its folder."""
    clips = []
    for path in files_below(folder):
        if not path.name.endswith(".trans.txt"):
            continue
        speaker = path.name.split("-")[0]
        for line in read_text(path).split("\n"):
            name, _, text = line.strip().partition(" ")
            if name:
                clips.append(make_clip(first_file(beside(path, name)), text, kind, speaker, name))
    return clips


def beside(path, name):
    """Paths that the audio file `name` in the folder of `path` may have."""
    return (path.with_name(name + ending) for suffix in audio_endings()
            for ending in (suffix, suffix.upper()))


def vctk(folder, kind):
    """VCTK: txt/speaker/*.txt, wav48*/speaker/; microphone 1 where there are two."""
    endings = ("_mic1.flac", "_mic1.wav", ".flac", ".wav", "_mic2.flac", "_mic2.wav")  # best first
    clips = []
    for path in sorted(folder.glob("txt/*/*.txt")):
        speaker = path.parent.name
        candidates = [audio for ending in endings
                      for audio in sorted(folder.glob(f"wav48*/{speaker}/{path.stem}{ending}"))]
        clips.append(make_clip(first_file(candidates), read_text(path), kind, speaker, path.stem))
    return clips


LAYOUTS = {"folder": folder_of_audio, "ljspeech": ljspeech, "libritts": libritts,
           "librispeech": librispeech, "vctk": vctk}
