"""Make, check and describe manifests of audio clips.

    python -m corpora.scan DIR --layout libritts --out train.jsonl         make a manifest
    python -m corpora.scan check train.jsonl --out clean.jsonl             read every file, drop bad
    python -m corpora.scan info train.jsonl                                hours, speakers, durations
    python -m corpora.scan describe train.jsonl --out described.jsonl      texts as descriptions
"""
import argparse
import csv
import hashlib
import json
import math
import os
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import BadInput, Parser, cli
from data import (AUDIO, KINDS, Clip, audio_files, clips_in_folder, encode_text, load_audio,
                  load_manifest, open_audio, read_text, rng, seconds_of, write_manifest)

LAYOUTS = ("folder", "ljspeech", "libritts", "vctk", "audiocaps")


def scan(folder, layout="folder", kind="speech"):
    """Finds the clips of a corpus on disk -> list[Clip], in the order of their paths.

    folder     any tree of audio files, the text in the same-stem .txt; `kind` for all of them
    ljspeech   metadata.csv (id|text|normalised text), wavs/
    libritts   speaker/chapter/*.normalized.txt beside the audio
    vctk       txt/speaker/*.txt, wav48*/speaker/ (microphone 1 where there are two)
    audiocaps  a .csv with audiocap_id, youtube_id, start_time, caption, and audio files below it
               named by either id; give the .csv itself where there are several; kind "sound"

    Texts without audio are skipped and counted. Errors: BadInput when nothing is found."""
    root, found, skipped = Path(os.path.abspath(folder)), [], 0
    if layout not in LAYOUTS:
        raise BadInput(f"unknown layout {layout!r}; use {', '.join(LAYOUTS)}")
    if not root.exists():
        raise BadInput(f"{folder}: no such folder; correct the path")

    if layout == "folder":
        return clips_in_folder(folder, kind)
    if layout == "ljspeech":
        if not (root / "metadata.csv").is_file():
            raise BadInput(f"{folder}: no metadata.csv in it; give LJSpeech's top folder")
        for line in read_text(root / "metadata.csv").splitlines():
            if line.strip():
                name, *texts = line.split("|")
                found.append((root / "wavs" / f"{name}.wav", texts[-1] if texts else "", "lj"))
    elif layout == "libritts":
        for p in sorted(root.rglob("*.normalized.txt")):
            stem = p.name.removesuffix(".normalized.txt")
            audio = [a for a in (p.with_name(stem + s) for s in AUDIO) if a.is_file()]
            found.append(((audio or [p.with_name(stem + ".wav")])[0], read_text(p),
                          p.parent.parent.name))
    elif layout == "vctk":
        for p in sorted(root.glob("txt/*/*.txt")):
            audio = [a for end in ("_mic1.flac", ".flac", ".wav", "_mic2.flac")
                     for a in sorted(root.glob(f"wav48*/{p.parent.name}/{p.stem}{end}"))]
            found.append(((audio or [p])[0], read_text(p), p.parent.name))
    else:
        tables = [root] if root.is_file() else sorted(root.glob("*.csv"))
        if len(tables) != 1:
            raise BadInput(f"{folder}: needs one .csv, it has {len(tables)}; give the one you want,"
                           f" e.g. {Path(folder) / 'train.csv'}, so that splits stay apart")
        by_name = {p.stem: p for p in audio_files(tables[0].parent)}
        for row in csv.DictReader(read_text(tables[0]).splitlines()):
            if not {"audiocap_id", "youtube_id", "caption"} <= set(row):
                raise BadInput(f"{tables[0]}: needs columns audiocap_id, youtube_id, caption")
            tube = row["youtube_id"]
            names = (tube, "Y" + tube, f"{tube}_{row.get('start_time')}", row["audiocap_id"])
            found.append((next((by_name[n] for n in names if n in by_name), tables[0]),
                          row["caption"], ""))
        kind = "sound"
    clips = [Clip(str(p), " ".join(text.split()), kind, who, id=p.stem)
             for p, text, who in found if p.suffix.lower() in AUDIO and p.is_file()]
    if not clips:
        raise BadInput(f"{folder}: no clips in the {layout} layout; see `python -m corpora.scan -h`")
    if len(clips) < len(found):
        print(f"{len(found) - len(clips)} texts have no audio file: skipped", file=sys.stderr)
    return clips


DESCRIPTIONS = {
    "speech": ('{who} says{how}: "{text}"', 'Speech by {who}{how}. The words are: "{text}"',
               'A recording of {who} speaking{how}: "{text}"', '{who}, speaking{how}: "{text}"',
               'One hears {who} say{how}: "{text}"'),
    "sound": ("{text}", "The sound of {text}", "{text} can be heard", "A recording of {text}",
              "One hears {text}"),
    "music": ("Music: {text}", "A piece of music, {text}", "The music is {text}",
              "A recording of music: {text}", "One hears music: {text}")}


PACES = ((11.0, ("slowly", "at a slow pace")), (18.0, ("",)),       # below so many characters a
         (math.inf, ("quickly", "at a fast pace")))                 # second; read English: 14 to 15


def describe(clip, seed=0):
    """The clip's text as a description, "" stays "". A function of (seed, clip.id) and the clip.

    Who: the speaker's name, or a paraphrase of "someone". How: the pace, measured as characters of
    transcript a second, named only where it is unusual."""
    if not clip.text:
        return ""
    name = hashlib.sha256(clip.id.encode()).digest()[:8]
    g = rng("describe", seed, int.from_bytes(name, "little"))

    def pick(options):
        return options[int(g.integers(len(options)))]

    who, how = pick(("someone", "a voice", "a person")), ""
    if clip.kind == "speech":
        who = f"speaker {clip.speaker}" if clip.speaker else who
        pace = len(clip.text) / max(seconds_of(clip), 0.1)
        how = pick(next(names for limit, names in PACES if pace < limit))
    text = pick(DESCRIPTIONS[clip.kind]).format(who=who, how=" " + how if how else "",
                                                text=clip.text.strip())
    return text[0].upper() + text[1:]


def read_rewritten(path):
    """{"id": ..., "text": ...} a line, from any external tool -> {id: text}."""
    rewritten = {}
    for n, line in enumerate(read_text(path).split("\n"), 1):
        try:
            row = json.loads(line or "{}")
        except json.JSONDecodeError as e:
            raise BadInput(f"{path}, line {n}: not JSON ({e.msg}); correct it") from e
        if line.strip() and not (isinstance(row, dict) and isinstance(row.get("id"), str)
                                 and isinstance(row.get("text"), str)):
            raise BadInput(f'{path}, line {n}: needs {{"id": "...", "text": "..."}}')
        rewritten |= {row["id"]: row["text"]} if line.strip() else {}
    return rewritten


def main(argv=None):
    p = Parser(description="Make, check and describe manifests of audio clips.")
    sub = p.add_subparsers(dest="command", required=True)

    def command(name, about):
        return sub.add_parser(name, help=about.split(".")[0], description=about,
                              formatter_class=argparse.RawDescriptionHelpFormatter)

    s = command("scan", "Find the clips of a corpus on disk and write a manifest.\n\n"
                + textwrap.dedent(scan.__doc__.split("\n\n", 1)[1]))
    s.add_argument("dir", help="the corpus's top folder (audiocaps: or its .csv)")
    s.add_argument("--layout", choices=LAYOUTS, default="folder", help="default: folder")
    s.add_argument("--kind", choices=KINDS, default="speech", help="for all, default: speech")
    s.add_argument("--out", required=True, help="the manifest to write, .jsonl")
    s = command("check", "Read every file of a manifest and list the bad ones. Exit 2 if there are "
                "any and no --out is given.")
    s.add_argument("manifest", help=".jsonl or a folder of audio")
    s.add_argument("--out", help="write the good clips here, with their durations")
    s = command("info", "Clips, hours, speakers and durations, by kind.")
    s.add_argument("manifest", help=".jsonl or a folder of audio")
    s = command("describe", "Write a manifest whose texts are descriptions, for all kinds alike: "
                "templates with paraphrases, or sentences from another tool. Train on it, and "
                "write such sentences to sample.py.")
    s.add_argument("manifest", help=".jsonl or a folder of audio")
    s.add_argument("--out", required=True, help="the manifest to write, .jsonl")
    s.add_argument("--seed", type=int, default=0, help="of the paraphrases, default: 0")
    s.add_argument("--rewritten", help='.jsonl of {"id", "text"}: used in place of the templates')
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*sub.choices, "-h", "--help"):
        argv = ["scan", *argv]
    a = p.parse_args(argv)

    if a.command == "describe":
        clips = load_manifest(a.manifest)
        given = read_rewritten(a.rewritten) if a.rewritten else {}
        if a.rewritten and not set(given) & {c.id for c in clips}:
            raise BadInput(f"{a.rewritten}: no id of it is in {a.manifest}")
        if a.seed < 0:
            raise BadInput("--seed: cannot be negative; set 0 or more")
        write_manifest(a.out, [replace(c, text=given.get(c.id) or describe(c, a.seed),
                                       transcript=c.transcript or (c.text if c.kind == "speech" else ""))
                               for c in clips])
        print(f"{len(clips)} clips -> {a.out}")
    elif a.command == "scan":
        clips = scan(a.dir, a.layout, a.kind)
        write_manifest(a.out, clips)
        print(f"{len(clips)} clips -> {a.out}")
    elif a.command == "check":
        def read(clip):
            try:
                with open_audio(clip.audio) as f:
                    rate = f.samplerate
                return replace(clip, duration=load_audio(clip.audio, rate).shape[1] / rate), None
            except BadInput as e:
                return clip, str(e)

        clips, good = load_manifest(a.manifest, must_exist=False), []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for clip, bad in tqdm(pool.map(read, clips), total=len(clips), unit="clip"):
                if bad:
                    tqdm.write(f"bad: {bad}")
                else:
                    good.append(clip)
        print(f"{len(good)} of {len(clips)} clips are good")
        if a.out and good:
            write_manifest(a.out, good)
            print(f"good clips -> {a.out}")
        elif len(good) < len(clips):
            raise BadInput(f"{a.manifest}: {len(clips) - len(good)} bad clips; " + (
                "`--out clean.jsonl` writes a manifest without them" if good else "no good one"))
    else:
        clips = load_manifest(a.manifest)
        seconds = np.array([seconds_of(c) for c in clips])
        counts = Counter(c.kind for c in clips)
        print("kind      clips   hours  speakers  seconds min/median/95%/max  with text  bytes max")
        for kind in [k for k in KINDS if counts[k]]:
            these = [c for c in clips if c.kind == kind]
            t = seconds[[c.kind == kind for c in clips]]
            span = "/".join(f"{v:.1f}" for v in np.quantile(t, (0, .5, .95, 1)))
            texts = [len(encode_text(c.text, kind)) - 1 for c in these]
            print(f"{kind:7s} {len(these):7d} {t.sum() / 3600:7.2f} "
                  f"{len({c.speaker for c in these} - {''}):9d}  {span:>26s} "
                  f"{np.mean(np.array(texts) > 0):9.0%} {max(texts):10d}")


if __name__ == "__main__":
    cli(main)
