"""Make, check and describe manifests of audio clips.

    python -m corpora.scan DIR --layout libritts --out train.jsonl         make a manifest
    python -m corpora.scan check train.jsonl --out clean.jsonl             read every file, drop bad
    python -m corpora.scan info train.jsonl                                hours, durations, ...
    python -m corpora.scan describe train.jsonl --out described.jsonl      texts as descriptions

    folder of a corpus ── layout ──> [Clip] ──> train.jsonl ──> check, info, describe, train.py

COMMAND -h explains a command, scan -h the layouts. A folder that has the name of a command is given
as ./check.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from audio import inspect
from cli import BadInput, Parser, check_writable, cli
from data import DataConfig, encode_text, rng, seconds_of
from manifest import (FFMPEG_AUDIO, KINDS, Clip, audio_endings, audio_files, clips_in_folder,
                      load_manifest, read_text, write_manifest)


# texts that scan does not read but names
OTHER_TEXTS = (".txt", ".lab", ".textgrid", ".srt", ".vtt")

# folders that say what is in them, not who speaks
NOT_SPEAKERS = ("audio", "clips", "data", "dev", "test", "train", "valid", "wav", "wavs")


# ---------------------------------------------------------------------------- layouts of corpora
# (folder, kind) -> [Clip, or None for a text without an audio file]

def make_clip(audio, text, kind, speaker=""):
    """A Clip, or None where there is no such audio file. audio: Path or None."""
    if audio is None or not audio.is_file():
        return None
    return Clip(str(audio), " ".join(text.split()), kind, speaker, id=audio.stem)


def first_file(paths):
    """The first path that is a file, or None."""
    return next((path for path in paths if path.is_file()), None)


def folder_of_audio(folder, kind):
    """Any tree of audio files, texts in the .txt of the same stem. Speech: folders are speakers."""
    clips = clips_in_folder(folder, kind) if audio_files(folder) else []
    if kind != "speech":
        return clips
    return [replace(clip, speaker=speaker_of(Path(clip.audio).relative_to(folder)))
            for clip in clips]


def speaker_of(path):
    """The first folder of a relative path that can be a speaker's name, or "". Bytes that are not
    UTF-8 become U+FFFD."""
    folder = next((name for name in path.parts[:-1] if name.lower() not in NOT_SPEAKERS), "")
    return os.fsencode(folder).decode("utf-8", "replace")


def ljspeech(folder, kind):
    """LJSpeech: metadata.csv, see read_metadata; the audio is wavs/id.wav or of another format."""
    table = folder / "metadata.csv"
    if not table.is_file():
        raise BadInput(f"{folder}: no metadata.csv in it; give LJSpeech's top folder")

    # every audio file under its path, with and without the ending
    audio = {}
    for path in audio_files(folder):
        relative = path.relative_to(folder)
        audio[relative.as_posix()] = path
        audio.setdefault(relative.with_suffix("").as_posix(), path)

    clips = []
    for name, text, speaker in read_metadata(table):
        path = audio.get(f"wavs/{name}") or audio.get(name)
        clips.append(make_clip(path, text, kind, speaker or "lj"))
    return clips


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


def libritts(folder, kind):
    """LibriTTS: speaker/chapter/*.normalized.txt beside the audio."""
    clips = []
    for path in sorted(folder.rglob("*.normalized.txt")):
        stem = path.name.removesuffix(".normalized.txt")
        audio = first_file(path.with_name(stem + ending) for suffix in audio_endings()
                           for ending in (suffix, suffix.upper()))
        speaker = path.parent.parent.name
        clips.append(make_clip(audio, read_text(path), kind, speaker))
    return clips


def vctk(folder, kind):
    """VCTK: txt/speaker/*.txt, wav48*/speaker/; microphone 1 where there are two."""
    endings = ("_mic1.flac", "_mic1.wav", ".flac", ".wav", "_mic2.flac", "_mic2.wav")  # best first
    clips = []
    for path in sorted(folder.glob("txt/*/*.txt")):
        speaker = path.parent.name
        candidates = [audio for ending in endings
                      for audio in sorted(folder.glob(f"wav48*/{speaker}/{path.stem}{ending}"))]
        clips.append(make_clip(first_file(candidates), read_text(path), kind, speaker))
    return clips


def audiocaps(folder, kind):
    """AudioCaps: a .csv, and audio files below its folder, named by either id. Always "sound".

    folder: with a single .csv, or the .csv itself."""
    tables = [folder] if folder.is_file() else sorted(folder.glob("*.csv"))
    if len(tables) != 1:
        raise BadInput(f"{folder}: needs one .csv, it has {len(tables)}; give the one you want,"
                       f" e.g. {folder / 'train.csv'}, so that splits stay apart")
    table = tables[0]
    audio = {path.stem: path for path in audio_files(table.parent)}

    clips = []
    for row in csv.DictReader(io.StringIO(read_text(table))):               # captions of two lines
        if not {"audiocap_id", "youtube_id", "caption"} <= set(row):
            raise BadInput(f"{table}: needs columns audiocap_id, youtube_id, caption")
        youtube = row["youtube_id"]
        names = (youtube, f"Y{youtube}", f"{youtube}_{row.get('start_time')}", row["audiocap_id"])
        path = next((audio[name] for name in names if name in audio), None)
        clips.append(make_clip(path, row["caption"], "sound"))
    return clips


LAYOUTS = {"folder": folder_of_audio, "ljspeech": ljspeech, "libritts": libritts, "vctk": vctk,
           "audiocaps": audiocaps}


def find_clips(folder, layout="folder", kind="speech", speaker=None):
    """Finds the clips of a corpus on disk -> list[Clip], always in the same order.

    speaker: the name of the only one, in place of the layout's; "" = none. What is left out is
    counted and named on stderr. Errors: BadInput when there is no such folder, when it does not
    have the layout, or when nothing is found."""
    root = Path(os.path.abspath(folder))
    if not root.exists():
        raise BadInput(f"{folder}: no such folder; correct the path")
    found = LAYOUTS[layout](root, kind)

    clips = [clip for clip in found if clip is not None and os.path.isfile(clip.audio)]
    for sentence in left_out(root, layout, found, clips):
        print(sentence, file=sys.stderr)
    if not clips:
        raise BadInput(f"{folder}: no clips in the {layout} layout; "
                       "see `python -m corpora.scan scan -h`")
    if speaker is not None:
        clips = [replace(clip, speaker=speaker) for clip in clips]
    return clips


def left_out(root, layout, found, clips):
    """One sentence for each sort of thing below `root` that is in no clip, with count and names."""
    top = root if root.is_dir() else root.parent
    used = {clip.audio for clip in clips}
    stems = {os.path.splitext(audio)[0] for audio in used}
    sorts = {}
    for folder, folders, files in os.walk(top):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for path in (os.path.join(folder, name) for name in (*links, *sorted(files))):
            reason = "" if path in used else reason_left_out(path, layout, stems)
            if reason:
                sorts.setdefault(reason, []).append(os.path.relpath(path, top))

    sentences = []
    texts = sum(clip is None for clip in found)
    if texts:
        sentences.append(f"{texts} texts have no audio file: skipped")
    for reason, paths in sorts.items():
        shown = ", ".join(ascii(path) for path in paths[:3])
        sentences.append(f"left out: {len(paths)} {reason}: {shown}"
                         + (" ..." if len(paths) > 3 else ""))
    return sentences


def reason_left_out(path, layout, stems):
    """What to say of a path that is no clip: "files ...; what to do", or "" for nothing.

    stems: paths of the clips without their endings."""
    stem, ending = os.path.splitext(path)
    lower = ending.lower()
    if os.path.basename(path).startswith("."):
        return ""
    if os.path.isdir(path):
        return "linked folders, which are not entered; copy them, or scan them by themselves"
    if not os.path.exists(path):
        return "links that lead nowhere"
    if lower in audio_endings():
        return "audio files that belong to no text of the layout"
    if lower in FFMPEG_AUDIO:
        return f"files {ending}, which only ffmpeg reads; install it or convert them to .flac"

    # texts: other layouts have them elsewhere
    if layout == "folder" and ending == ".txt" and stem not in stems:
        return "files .txt without an audio file of their name"
    if layout == "folder" and lower in OTHER_TEXTS and ending != ".txt":
        return f"files {ending}, which are not read; texts stand in .txt beside the audio"
    return ""


# ---------------------------------------------------------------------------- descriptions
# One form of text for the three kinds (AudioCALM, data reformulation): a sentence that describes
# the audio; for speech it names who speaks and how, and quotes the transcript word for word. The
# templates are ours.

TEMPLATES = {
    "speech": ('{who} says{how}: "{text}"', 'Speech by {who}{how}. The words are: "{text}"',
               'A recording of {who} speaking{how}: "{text}"', '{who}, speaking{how}: "{text}"',
               'One hears {who} say{how}: "{text}"'),
    "sound": ("{text}", "The sound of {text}", "{text} can be heard", "A recording of {text}",
              "One hears {text}"),
    "music": ("Music: {text}", "A piece of music, {text}", "The music is {text}",
              "A recording of music: {text}", "One hears music: {text}")}

# (limit, words): the words for a pace below the limit, in characters of transcript per second;
# English read aloud has 14 to 15
PACES = ((11.0, ("slowly", "at a slow pace")),
         (18.0, ("",)),
         (math.inf, ("quickly", "at a fast pace")))


def describe_clip(clip, seed=0):
    """The clip's text as a description; "" stays "". A pure function of (seed, clip.id) and clip.

    Who: the speaker's name, or a paraphrase of "someone". How: the pace, measured as characters of
    transcript per second, named only where it is unusual."""
    if not clip.text:
        return ""
    name = hashlib.sha256(clip.id.encode("utf-8", "surrogateescape")).digest()[:8]
    g = rng("describe", seed, int.from_bytes(name, "little"))

    def pick(options):
        return options[int(g.integers(len(options)))]

    # who speaks, and how
    who = pick(("someone", "a voice", "a person"))
    how = ""
    if clip.kind == "speech":
        if clip.speaker:
            who = f"speaker {clip.speaker}"
        pace = len(clip.text) / max(seconds_of(clip), 0.1)
        how = pick(next(words for limit, words in PACES if pace < limit))

    template = pick(TEMPLATES[clip.kind])
    text = template.format(who=who, how=" " + how if how else "", text=clip.text.strip())
    return text[0].upper() + text[1:]


def read_rewritten(path):
    """Reads {"id": ..., "text": ...} per line, from any external tool -> {id: text}."""
    rewritten = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise BadInput(f"{path}, line {number}: not JSON ({e.msg}); correct it") from e
        if not (isinstance(row, dict) and isinstance(row.get("id"), str)
                and isinstance(row.get("text"), str)):
            raise BadInput(f'{path}, line {number}: needs {{"id": "...", "text": "..."}}')
        rewritten[row["id"]] = row["text"]
    return rewritten


# ---------------------------------------------------------------------------- commands

def scan(folder, out, layout, kind, speaker=None):
    """Writes a manifest of the clips of a corpus."""
    clips = find_clips(folder, layout, kind, speaker)
    write_manifest(out, clips)
    print(f"{len(clips)} clips -> {out}")

    # voice prompts need speakers
    if kind == "speech" and layout != "audiocaps":
        names = sorted({clip.speaker for clip in clips if clip.speaker})
        without = sum(not clip.speaker for clip in clips)
        if names:
            print(f"speakers: {len(names)} ({', '.join(names[:5])}{' ...' if names[5:] else ''})"
                  + ("; --speaker \"\" leaves them out" if speaker is None else ""))
        if without:
            print(f"speakers: {without} clips name none, and get no voice prompt from another "
                  "clip; --speaker NAME names the only one, else one folder per speaker")


def check(manifest, out):
    """Reads every file of a manifest, prints the bad ones, and writes the good ones to `out`.

    Errors: BadInput when a file is bad and `out` is None, or when all files are bad."""
    clips = load_manifest(manifest, must_exist=False)
    good = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for clip, error, remarks in tqdm(pool.map(measured, clips), total=len(clips), unit="clip"):
            for remark in remarks:
                tqdm.write(f"note: {remark}")
            if error:
                tqdm.write(f"bad: {error}")
            else:
                good.append(clip)
    print(f"{len(good)} of {len(clips)} clips are good")
    repeated = sorted(path for path, n in Counter(c.audio for c in clips).items() if n > 1)
    if repeated:
        print(f"note: {len(repeated)} files stand in several lines, e.g. {repeated[0]}; each line "
              "is a clip of its own")

    if out and good:
        write_manifest(out, good)
        print(f"good clips -> {out}")
    elif len(good) < len(clips):
        advice = ("`--out clean.jsonl` writes a manifest without them" if good
                  else "no good clip is left")
        raise BadInput(f"{manifest}: {len(clips) - len(good)} bad clips; {advice}")


def measured(clip):
    """Reads the whole file of a clip -> (clip with its duration, what is wrong or None, notes)."""
    try:
        seconds, remarks = inspect(clip.audio, clip.duration)
    except BadInput as e:
        return clip, str(e), []
    return replace(clip, duration=seconds), None, remarks


def info(manifest):
    """Prints a table: per kind the clips, hours, speakers, durations and texts."""
    clips = load_manifest(manifest)
    print("kind      clips   hours  speakers  seconds min/median/95%/max  with text  bytes max")
    for kind in KINDS:
        members = [clip for clip in clips if clip.kind == kind]
        if not members:
            continue
        seconds = np.array([seconds_of(clip) for clip in members])
        speakers = {clip.speaker for clip in members if clip.speaker}
        quantiles = "/".join(f"{q:.1f}" for q in np.quantile(seconds, (0, 0.5, 0.95, 1)))
        text_bytes = np.array([len(encode_text(clip.text, kind)) - 1 for clip in members])
        print(f"{kind:7s} {len(members):7d} {seconds.sum() / 3600:7.2f} {len(speakers):9d}"
              f"  {quantiles:>26s} {np.mean(text_bytes > 0):9.0%} {text_bytes.max():10d}")


def describe(manifest, out, seed, rewritten, text_len):
    """Writes a manifest whose texts are descriptions; `transcript` keeps the words of speech.

    rewritten: None, or a .jsonl whose texts replace the templates. text_len: bytes of text in a row
    of training; how many texts exceed it, before and after, is printed."""
    clips = load_manifest(manifest)
    texts = read_rewritten(rewritten) if rewritten else {}
    ids = Counter(clip.id for clip in clips)
    if rewritten and not texts.keys() & ids.keys():
        raise BadInput(f"{rewritten}: none of its ids is in {manifest}; use the manifest's ids")
    ambiguous = [name for name in texts if ids[name] > 1]
    if ambiguous:
        raise BadInput(f"{rewritten}: id {ambiguous[0]} names {ids[ambiguous[0]]} clips of "
                       f"{manifest}; give each an \"id\" of its own there")
    if seed < 0:
        raise BadInput("--seed: cannot be negative; set 0 or more")

    described = []
    for clip in clips:
        text = texts.get(clip.id) or describe_clip(clip, seed)
        spoken = clip.text if clip.kind == "speech" else ""
        described.append(replace(clip, text=text, transcript=clip.transcript or spoken))
    write_manifest(out, described)
    print(f"{len(clips)} clips -> {out}")

    # a longer transcript is left out of training, a longer caption is cut
    before, after = (np.array([len(encode_text(clip.text, clip.kind)) - 1 for clip in group])
                     for group in (clips, described))
    if (after > text_len).any():
        print(f"text: {(after > text_len).sum()} of {len(clips)} exceed data.text_len = {text_len} "
              f"bytes ({(before > text_len).sum()} did before); "
              f"{math.ceil(np.quantile(after, 0.99))} holds 99 %, {after.max()} all")


# ---------------------------------------------------------------------------- command line

ABOUT = {
    "scan": """\
        Find the clips of a corpus on disk and write a manifest. The word scan may be left out.

        layouts:
          folder     any tree of audio files, the text of each in the same-stem .txt, if any;
                     folders of speech are named after the speaker
          ljspeech   metadata.csv (id|text|normalised text, id|text|speaker or id|text), wavs/
          libritts   speaker/chapter/*.normalized.txt beside the audio
          vctk       txt/speaker/*.txt, wav48*/speaker/ (microphone 1 where there are two)
          audiocaps  a .csv with audiocap_id, youtube_id, start_time, caption, and audio files below
                     its folder, named by either id; where a folder has several .csv, give the .csv;
                     the kind is always "sound"

        Texts without an audio file, and files that are not read, are counted and named.""",
    "check": """\
        Read every file of a manifest and print the bad ones. Bad is a file that is missing,
        unreadable, empty, silent, not finite, shorter than its header says, or of which more than
        1 % is above full scale. Notes name fewer samples above full scale, which are clipped, and
        durations of the manifest that are wrong; --out writes the right ones. Exit status 2 if
        there are bad files and no --out is given, or if none is good.""",
    "info": """\
        Print clips, hours, speakers, durations and texts, by kind. "bytes max" is the longest text:
        a row holds data.text_len bytes.""",
    "describe": """\
        Write a manifest whose texts are descriptions, in one form for all kinds. They are templates
        with paraphrases, or sentences from another tool. Train on it, and give sample.py such
        sentences. The words of speech stay in the field "transcript". Descriptions are longer than
        their texts: how many exceed --text-len is printed.""",
}


def arguments():
    """The argument parser, with one subparser per command -> (parser, names of the commands)."""
    p = Parser(prog="python -m corpora.scan", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {name: sub.add_parser(name, description=textwrap.dedent(about),
                                     help=textwrap.dedent(about).split(".")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
                for name, about in ABOUT.items()}

    s = commands["scan"]
    s.add_argument("dir", metavar="DIR", help="top folder of the corpus (audiocaps: or its .csv)")
    s.add_argument("--layout", choices=LAYOUTS, default="folder",
                   help="how the corpus is laid out, see above; default: folder")
    s.add_argument("--kind", choices=KINDS, default="speech",
                   help="kind of all clips; default: speech")
    s.add_argument("--speaker", metavar="NAME",
                   help="the speaker of all clips; \"\" = no names; default: as the layout says")

    for name in ("check", "info", "describe"):
        commands[name].add_argument("manifest", metavar="MANIFEST",
                                    help=".jsonl, or a folder of audio")
    for name in ("scan", "describe"):
        commands[name].add_argument("--out", required=True, metavar="FILE",
                                    help="the manifest to write, .jsonl")
    commands["check"].add_argument("--out", metavar="FILE",
                                   help="write the good clips here, with their durations")

    d = commands["describe"]
    d.add_argument("--seed", type=int, default=0, help="chooses the paraphrases; default: 0")
    d.add_argument("--text-len", type=int, default=DataConfig().text_len, metavar="N",
                   help="data.text_len of the training; how many texts exceed it is printed; "
                   "default: %(default)s")
    d.add_argument("--rewritten", metavar="FILE",
                   help='.jsonl with {"id", "text"} per line, used in place of the templates')
    return p, tuple(commands)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = arguments()
    if argv and argv[0] not in (*commands, "-h", "--help"):
        argv = ["scan", *argv]
    a = parser.parse_args(argv)
    if a.command != "info" and a.out:
        check_writable(a.out)

    if a.command == "scan":
        scan(a.dir, a.out, a.layout, a.kind, a.speaker)
    elif a.command == "check":
        check(a.manifest, a.out)
    elif a.command == "info":
        info(a.manifest)
    else:
        describe(a.manifest, a.out, a.seed, a.rewritten, a.text_len)


if __name__ == "__main__":
    cli(main)
