"""Make, check and describe manifests of audio clips.

    python -m corpora.scan DIR --layout libritts --out train.jsonl         make a manifest
    python -m corpora.scan check train.jsonl --out clean.jsonl             read every file, drop bad
    python -m corpora.scan info train.jsonl                                hours, durations, ...
    python -m corpora.scan describe train.jsonl --out described.jsonl      texts as descriptions
    python -m corpora.scan join a.jsonl b.jsonl --out both.jsonl           two corpora as one

    folder of a corpus ── layout ──> [Clip] ──> train.jsonl ──> the other commands, train.py

COMMAND -h explains a command, scan -h the layouts. A folder that has the name of a command is given
as ./check.
"""
import argparse
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

from audio import inspect
from cli import BadInput, Parser, check_writable, cli, number
from config import load
from corpora.layouts import LAYOUTS, Left, speaker_of
from corpora.pieces import Piece, file_of
from corpora.tables import CAPTIONS, captions, table
from data import DataConfig, encode_text, rng, seconds_of, texts_left_out, texts_tokens
from decoder import seconds_in_file
from manifest import (FFMPEG_AUDIO, KINDS, Clip, audio_endings, columns, load_manifest, read_text,
                      refuse_words_behind, walk, write_manifest)


# texts that scan does not read but names
OTHER_TEXTS = (".txt", ".lab", ".textgrid", ".srt", ".vtt")


# ---------------------------------------------------------------------------- finding clips

def find_clips(folder, layout="folder", kind="speech", speaker=None, *, columns=None, audio=None,
               cut=None, speaker_folder=None):
    """Finds the clips of a corpus on disk -> list[Clip], always in the same order.

    speaker: the name of the only one, in place of the layout's; "" = none. speaker_folder: which
    folder has its name (layouts.speaker_of). columns, audio: of a table (tables.py). cut: a folder
    for parts of long files and for audio that stands in a table (pieces.py). What is left out is
    counted and named on stderr.
    Errors: BadInput when there is no such folder, when it does not have the layout, or when nothing
    is found.
    """
    root = Path(os.path.abspath(folder))
    if not root.exists():
        raise BadInput(f"{folder}: no such folder; correct the path")
    if cut:
        check_writable(os.path.join(cut, "clip.flac"))
    top = Path(os.path.abspath(audio)) if audio else root if root.is_dir() else root.parent

    # files of pieces, as they come: their bytes need not lie in memory together
    clips = []
    used = set()
    left = {}
    taken = set()
    for item in found_in(root, layout, kind, columns, top if audio else None):
        clip = item.clip if isinstance(item, Piece) else item
        if isinstance(clip, Clip):
            used.add(clip.audio)
            if speaker_folder and clip.kind == "speech":
                clip.speaker = speaker_of(clip.audio, top, speaker_folder)
        if isinstance(item, Piece):
            if not cut:
                raise BadInput(f"{folder}: {item.clip.id or item.clip.audio} is a part of a longer "
                               "file, or stands in a table; --cut DIR writes such clips to files")
            item = file_of(item, os.path.abspath(cut), taken)
        if isinstance(item, Left):
            left.setdefault(item.reason, []).append(item.name)
        elif os.path.isfile(item.audio):
            clips.append(item)
        else:
            used.discard(item.audio)

    for sentence in left_out(top, layout, left, used):
        print(sentence, file=sys.stderr)
    if not clips:
        raise BadInput(f"{folder}: no clips in the {layout} layout; "
                       "see `python -m corpora.scan scan -h`")
    if speaker is not None:
        clips = [replace(clip, speaker=speaker) for clip in clips]
    return clips


def found_in(root, layout, kind, columns, audio):
    """What a layout finds: an iterable of Clip, Piece and Left."""
    if layout == "table":
        return table(root, kind, columns, audio)
    if columns:
        raise BadInput(f"--columns: {layout} has its own; use it with --layout table")
    if layout in CAPTIONS:
        return captions(root, layout, audio)
    if audio:
        raise BadInput(f"--audio: {layout} has its files below DIR; leave it out")
    if not root.is_dir():
        raise BadInput(f"{root}: is a file; layout {layout} is of a folder, --layout table of a "
                       "file")
    return LAYOUTS[layout](root, kind)


def left_out(top, layout, left, used):
    """Sentences that count and name what a scan found and has no clip of.

    left: {reason: names}; used: the audio files of clips. Where all of them lie elsewhere, as a
    table's may, the folder `top` is not looked through.
    """
    below = not used or any(audio.startswith(os.path.join(top, "")) for audio in used)
    stems = {os.path.splitext(audio)[0] for audio in used}
    sorts = {**left}
    for folder, folders, files in walk(top) if below else ():
        links = [entry.name for entry in os.scandir(folder) if entry.is_symlink()
                 and entry.is_dir() and entry.name not in folders]
        for path in (os.path.join(folder, name) for name in (*sorted(links), *files)):
            reason = "" if path in used else reason_left_out(path, layout, stems)
            if reason:
                sorts.setdefault(reason, []).append(os.path.relpath(path, top))

    sentences = []
    for reason, paths in sorts.items():
        shown = ", ".join(ascii(path) for path in paths[:3])
        sentences.append(f"left out: {len(paths)} {reason}: {shown}"
                         + (" ..." if len(paths) > 3 else ""))
    return sentences


def reason_left_out(path, layout, stems):
    """What to say of a path that is no clip: "files ...; what to do", or "" for nothing.

    stems: paths of the clips without their endings.
    """
    stem, ending = os.path.splitext(path)
    lower = ending.lower()
    if os.path.basename(path).startswith("."):
        return ""
    if os.path.isdir(path):
        return "linked folders, which are entered elsewhere or hold the link"
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

def scan(folder, out, layout, kind, speaker=None, config=None, measure=True, **options):
    """Writes a manifest of the clips of a corpus, and says what it holds. options: find_clips'."""
    clips = find_clips(folder, layout, kind, speaker, **options)
    if measure:
        clips, unreadable = with_durations(clips)
    write_manifest(out, clips)
    print(f"{len(clips)} clips -> {out}")

    for name in KINDS:
        members = [clip for clip in clips if clip.kind == name]
        if members and measure:
            hours = sum(clip.duration or 0.0 for clip in members) / 3600
            print(f"{name}: {hours:.2f} hours, {sum(bool(clip.text) for clip in members)} of "
                  f"{len(members)} clips with text")
    if measure and unreadable:
        print(f"unreadable: {len(unreadable)} of them cannot be opened, e.g. {unreadable[0]}; "
              "`python -m corpora.scan check` drops them")
    tell_speakers([clip for clip in clips if clip.kind == "speech"], speaker)
    if config:
        for sentence in use_of([clip for clip in clips if clip.duration], load(config)):
            print(f"{config}: {sentence}")


def with_durations(clips):
    """The clips with the lengths of their files -> (clips, [what is wrong with the others])."""
    unreadable = []
    measured = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lengths = pool.map(length_of, clips)
        for clip, length in tqdm(zip(clips, lengths), "measuring", len(clips), unit="clip",
                                 disable=None):
            if isinstance(length, str):
                unreadable.append(length)
                length = None
            measured.append(replace(clip, duration=length))
    return measured, unreadable


def length_of(clip):
    """Seconds of a clip's file, or what is wrong with it."""
    try:
        return seconds_in_file(clip.audio)
    except BadInput as e:
        return str(e)


def tell_speakers(clips, speaker):
    """Prints who speaks: voice prompts need speakers. speaker: what --speaker said, or None."""
    names = sorted({clip.speaker for clip in clips if clip.speaker})
    without = sum(not clip.speaker for clip in clips)
    if names:
        print(f"speakers: {len(names)} ({', '.join(names[:5])}{' ...' if names[5:] else ''})"
              + ("; --speaker \"\" leaves them out" if speaker is None else ""))
    if without:
        print(f"speakers: {without} clips name none, and get no voice prompt from another "
              "clip; --speaker NAME names the only one, else one folder per speaker")


def speech_with_text(clips, cfg):
    """Which clips are speech that is trained with its text (n,), as LatentBatches has it."""
    fitting = texts_tokens(clips, cfg.data) <= cfg.data.text_len
    if cfg.lm.monologue:
        fitting |= clips.column("has_words")
    return (clips.column("kind") == KINDS.index("speech")) & clips.column("has_text") & fitting


def use_of(clips, cfg):
    """Sentences on what a training with this config uses of clips whose durations are known."""
    clips = columns(clips)
    sentences = []
    dropped = Counter(KINDS[k] for k in clips.column("kind").tolist()
                      if cfg.data.weights and not cfg.data.weights.get(KINDS[k]))
    for kind, count in dropped.items():
        sentences.append(f"drops {count} clips of {kind}: data.weights gives it no share")

    # their text, then their end
    try:
        sentences += texts_left_out(clips, cfg.data, cfg.lm.monologue)
    except BadInput as e:
        sentences.append(str(e))
    read = speech_with_text(clips, cfg)
    long = np.ceil(clips.seconds() * cfg.vae.frame_rate) > cfg.data.frames
    seconds = f"{cfg.data.frames / cfg.vae.frame_rate:.1f} s"
    if (long & read).any():
        sentences.append(f"cuts {(long & read).sum()} of {read.sum()} clips of speech with text, "
                         f"longer than data.frames = {cfg.data.frames} ({seconds}): their ends "
                         "are never seen with their text")
    if (long & ~read).any():
        sentences.append(f"takes {seconds} at a time of {(long & ~read).sum()} longer clips, "
                         "which have captions or no text")
    return sentences or [f"uses all {len(clips)} clips whole, with their texts"]


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
        refuse_words_behind(clip.words or [], seconds, clip.audio)
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


def join(manifests, out, most):
    """Writes the clips of several manifests as one, of each at most `most` (None: all), drawn
    evenly over its lines.

    Names of speakers that stand in several manifests are printed: training takes each for one
    voice.
    """
    joined = []
    speakers = Counter()
    for manifest in manifests:
        clips = load_manifest(manifest)
        n = min(len(clips), most or len(clips))
        taken = [clips[i * len(clips) // n] for i in range(n)]
        speakers.update({clip.speaker for clip in taken} - {""})
        print(f"{manifest}: {n} of {len(clips)} clips")
        joined += taken
    write_manifest(out, joined)
    print(f"{len(joined)} clips -> {out}")

    shared = sorted(name for name, count in speakers.items() if count > 1)
    if shared:
        print(f"note: {len(shared)} names of speakers stand in several manifests, e.g. "
              f"{shared[0]}; each is one voice in training, so rename those of different people")


# ---------------------------------------------------------------------------- command line

ABOUT = {
    "scan": """\
        Find the clips of a corpus on disk and write a manifest. The word scan may be left out.

        layouts:
          folder       any tree of audio files, the text of each in the same-stem .txt, if any;
                       folders of speech are named after the speaker
          table        a table, or a folder with one: .csv, .tsv, .jsonl, .json, .parquet (needs
                       pyarrow). Its columns may have the names of Hugging Face's audiofolder and
                       datasets, Common Voice, NeMo, pocket-tts, VoxCPM, audiocraft and lhotse;
                       without header: path|speaker|text, path|text or path; --columns says others
          ljspeech     metadata.csv (id|text|normalised text, id|text|speaker or id|text), wavs/
          libritts     speaker/chapter/*.normalized.txt beside the audio
          librispeech  speaker/chapter/*.trans.txt (id TEXT) beside the audio
          vctk         txt/speaker/*.txt, wav48*/speaker/ (microphone 1 where there are two)
          audiocaps, clotho, wavcaps, musiccaps, songdescriber
                       the table of captions as it is published, and audio files below its folder
                       or --audio DIR; where a folder has several tables, give the one. The kind
                       is "sound", of the last two "music". A caption is a clip

        Linked folders are entered once. Texts without an audio file, and files that are not read,
        are counted and named. The report at the end needs the files' lengths, which the manifest
        then has; --unmeasured does not open them.""",
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
    "join": """\
        Write the clips of several manifests as one, to train on more than one corpus. Their audio
        stays where it is.""",
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

    # scan: what there is
    s = commands["scan"]
    s.add_argument("dir", metavar="DIR", help="top folder of the corpus, or its table")
    s.add_argument("--layout", choices=(*LAYOUTS, "table", *CAPTIONS), default="folder",
                   help="how the corpus is laid out, see above; default: folder")

    # scan: what a clip is
    s.add_argument("--kind", choices=KINDS, default="speech",
                   help="kind of all clips; default: speech")
    s.add_argument("--speaker", metavar="NAME",
                   help="the speaker of all clips; \"\" = no names; default: as the layout says")
    s.add_argument("--speaker-folder", type=int, metavar="N",
                   help="speakers are the N-th folders of the paths below DIR; -1 = the last")

    # scan: of tables
    s.add_argument("--columns", type=column_map, metavar="FIELD=COLUMN,...",
                   help="of a table: audio=wav,text=words,speaker=who, numbers (from 1) without "
                   "header; fields: audio, text, speaker, id, start, end, duration")
    s.add_argument("--audio", metavar="DIR",
                   help="where the paths of a table begin; default: the table's folder")
    s.add_argument("--cut", metavar="DIR",
                   help="write parts of long files (start, end, offset of a table) here as .flac, "
                   "and audio that stands in a parquet as it is")

    # scan: what is said of them
    s.add_argument("--config", metavar="FILE",
                   help="also say what this config would use without text, cut or drop")
    s.add_argument("--unmeasured", action="store_true",
                   help="do not open the files: no hours, no durations")

    # what several commands take
    for name in ("check", "info", "describe"):
        commands[name].add_argument("manifest", metavar="MANIFEST",
                                    help=".jsonl, or a folder of audio")
    for name in ("scan", "describe", "join"):
        commands[name].add_argument("--out", required=True, metavar="FILE",
                                    help="the manifest to write, .jsonl")
    commands["check"].add_argument("--out", metavar="FILE",
                                   help="write the good clips here, with their durations")

    # join
    j = commands["join"]
    j.add_argument("manifests", metavar="MANIFEST", nargs="+",
                   help=".jsonl, or folders of audio")
    j.add_argument("--most", type=number(int, 1), metavar="N",
                   help="at most N clips of each, drawn evenly over its lines; default: all")

    # describe
    d = commands["describe"]
    d.add_argument("--seed", type=int, default=0, help="chooses the paraphrases; default: 0")
    d.add_argument("--text-len", type=int, default=DataConfig().text_len, metavar="N",
                   help="data.text_len of the training; how many texts exceed it is printed; "
                   "default: %(default)s")
    d.add_argument("--rewritten", metavar="FILE",
                   help='.jsonl with {"id", "text"} per line, used in place of the templates')
    return p, tuple(commands)


def column_map(text):
    """The argparse type of --columns: "audio=1,text=3" -> {"audio": "1", "text": "3"}."""
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text} is not FIELD=COLUMN,FIELD=COLUMN")
    return dict(pairs)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = arguments()
    if argv and argv[0] not in (*commands, "-h", "--help"):
        argv = ["scan", *argv]
    a = parser.parse_args(argv)
    if a.command != "info" and a.out:
        check_writable(a.out)

    if a.command == "scan":
        if a.config and a.unmeasured:
            raise BadInput("--config: needs the lengths of the files; leave out --unmeasured")
        scan(a.dir, a.out, a.layout, a.kind, a.speaker, a.config, not a.unmeasured,
             columns=a.columns, audio=a.audio, cut=a.cut, speaker_folder=a.speaker_folder)
    elif a.command == "check":
        check(a.manifest, a.out)
    elif a.command == "info":
        info(a.manifest)
    elif a.command == "join":
        join(a.manifests, a.out, a.most)
    else:
        describe(a.manifest, a.out, a.seed, a.rewritten, a.text_len)


if __name__ == "__main__":
    cli(main)
