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
import json
import math
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import BadInput, Parser, cli
from data import (AUDIO, KINDS, Clip, audio_files, clips_in_folder, encode_text, load_audio,
                  load_manifest, open_audio, read_text, rng, seconds_of, write_manifest)


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


def ljspeech(folder, kind):
    """LJSpeech: metadata.csv (id|text|normalised text), wavs/id.wav."""
    table = folder / "metadata.csv"
    if not table.is_file():
        raise BadInput(f"{folder}: no metadata.csv in it; give LJSpeech's top folder")
    clips = []
    for line in read_text(table).splitlines():
        if line.strip():
            name, *texts = line.split("|")
            text = texts[-1] if texts else ""
            clips.append(make_clip(folder / "wavs" / f"{name}.wav", text, kind, "lj"))
    return clips


def libritts(folder, kind):
    """LibriTTS: speaker/chapter/*.normalized.txt beside the audio."""
    clips = []
    for path in sorted(folder.rglob("*.normalized.txt")):
        stem = path.name.removesuffix(".normalized.txt")
        audio = first_file(path.with_name(stem + suffix) for suffix in AUDIO)
        speaker = path.parent.parent.name
        clips.append(make_clip(audio, read_text(path), kind, speaker))
    return clips


def vctk(folder, kind):
    """VCTK: txt/speaker/*.txt, wav48*/speaker/; microphone 1 where there are two."""
    endings = ("_mic1.flac", ".flac", ".wav", "_mic2.flac")                 # the best first
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
    for row in csv.DictReader(read_text(table).splitlines()):
        if not {"audiocap_id", "youtube_id", "caption"} <= set(row):
            raise BadInput(f"{table}: needs columns audiocap_id, youtube_id, caption")
        youtube = row["youtube_id"]
        names = (youtube, f"Y{youtube}", f"{youtube}_{row.get('start_time')}", row["audiocap_id"])
        path = next((audio[name] for name in names if name in audio), None)
        clips.append(make_clip(path, row["caption"], "sound"))
    return clips


LAYOUTS = {"folder": clips_in_folder, "ljspeech": ljspeech, "libritts": libritts, "vctk": vctk,
           "audiocaps": audiocaps}


def find_clips(folder, layout="folder", kind="speech"):
    """Finds the clips of a corpus on disk -> list[Clip], always in the same order.

    Texts without audio are skipped and counted on stderr. Errors: BadInput when there is no such
    folder, when it does not have the layout, or when nothing is found."""
    root = Path(os.path.abspath(folder))
    if not root.exists():
        raise BadInput(f"{folder}: no such folder; correct the path")
    found = LAYOUTS[layout](root, kind)
    clips = [clip for clip in found if clip is not None]
    if not clips:
        raise BadInput(f"{folder}: no clips in the {layout} layout; "
                       "see `python -m corpora.scan scan -h`")
    if len(clips) < len(found):
        print(f"{len(found) - len(clips)} texts have no audio file: skipped", file=sys.stderr)
    return clips


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
    name = hashlib.sha256(clip.id.encode()).digest()[:8]
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

def scan(folder, out, layout, kind):
    """Writes a manifest of the clips of a corpus."""
    clips = find_clips(folder, layout, kind)
    write_manifest(out, clips)
    print(f"{len(clips)} clips -> {out}")


def check(manifest, out):
    """Reads every file of a manifest, prints the bad ones, and writes the good ones to `out`.

    Errors: BadInput when a file is bad and `out` is None, or when all files are bad."""
    clips = load_manifest(manifest, must_exist=False)
    good = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for clip, error in tqdm(pool.map(measured, clips), total=len(clips), unit="clip"):
            if error:
                tqdm.write(f"bad: {error}")
            else:
                good.append(clip)
    print(f"{len(good)} of {len(clips)} clips are good")

    if out and good:
        write_manifest(out, good)
        print(f"good clips -> {out}")
    elif len(good) < len(clips):
        advice = ("`--out clean.jsonl` writes a manifest without them" if good
                  else "no good clip is left")
        raise BadInput(f"{manifest}: {len(clips) - len(good)} bad clips; {advice}")


def measured(clip):
    """Reads the whole file of a clip -> (clip with its duration, None) or (clip, what is wrong)."""
    try:
        with open_audio(clip.audio) as f:
            sample_rate = f.samplerate
        wav = load_audio(clip.audio, sample_rate)
    except BadInput as e:
        return clip, str(e)
    return replace(clip, duration=wav.shape[1] / sample_rate), None


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


def describe(manifest, out, seed, rewritten):
    """Writes a manifest whose texts are descriptions; `transcript` keeps the words of speech.

    rewritten: None, or a .jsonl whose texts replace the templates."""
    clips = load_manifest(manifest)
    texts = read_rewritten(rewritten) if rewritten else {}
    if rewritten and not set(texts) & {clip.id for clip in clips}:
        raise BadInput(f"{rewritten}: none of its ids is in {manifest}; use the manifest's ids")
    if seed < 0:
        raise BadInput("--seed: cannot be negative; set 0 or more")

    described = []
    for clip in clips:
        text = texts.get(clip.id) or describe_clip(clip, seed)
        spoken = clip.text if clip.kind == "speech" else ""
        described.append(replace(clip, text=text, transcript=clip.transcript or spoken))
    write_manifest(out, described)
    print(f"{len(clips)} clips -> {out}")


# ---------------------------------------------------------------------------- command line

ABOUT = {
    "scan": """\
        Find the clips of a corpus on disk and write a manifest. The word scan may be left out.

        layouts:
          folder     any tree of audio files, the text of each in the same-stem .txt, if any
          ljspeech   metadata.csv (id|text|normalised text), wavs/
          libritts   speaker/chapter/*.normalized.txt beside the audio
          vctk       txt/speaker/*.txt, wav48*/speaker/ (microphone 1 where there are two)
          audiocaps  a .csv with audiocap_id, youtube_id, start_time, caption, and audio files below
                     its folder, named by either id; where a folder has several .csv, give the .csv;
                     the kind is always "sound"

        Texts without an audio file are skipped and counted.""",
    "check": """\
        Read every file of a manifest and print the bad ones. Bad is a file that is missing,
        unreadable, empty, silent or not finite. Exit status 2 if there are any and no --out is
        given, or if none is good.""",
    "info": """\
        Print clips, hours, speakers, durations and texts, by kind. "bytes max" is the longest text:
        a row holds data.text_len bytes.""",
    "describe": """\
        Write a manifest whose texts are descriptions, in one form for all kinds. They are templates
        with paraphrases, or sentences from another tool. Train on it, and give sample.py such
        sentences. The words of speech stay in the field "transcript".""",
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
    d.add_argument("--rewritten", metavar="FILE",
                   help='.jsonl with {"id", "text"} per line, used in place of the templates')
    return p, tuple(commands)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = arguments()
    if argv and argv[0] not in (*commands, "-h", "--help"):
        argv = ["scan", *argv]
    a = parser.parse_args(argv)

    if a.command == "scan":
        scan(a.dir, a.out, a.layout, a.kind)
    elif a.command == "check":
        check(a.manifest, a.out)
    elif a.command == "info":
        info(a.manifest)
    else:
        describe(a.manifest, a.out, a.seed, a.rewritten)


if __name__ == "__main__":
    cli(main)
