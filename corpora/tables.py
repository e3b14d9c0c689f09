"""Corpora that a table describes: one row a clip, its fields under names that many projects share.

    table.csv ──┐
    table.tsv   │ rows ──> {"path": "a.mp3", "sentence": "Hi.", ...} ── item_of ──> Clip
    table.jsonl │           names in small letters; "1", "2", ...                   Piece, of a file
    *.parquet ──┘           where the table has no header                           Left

    table          any of them: HF audiofolder (file_name, text), Common Voice (path, sentence,
                   client_id), NeMo (audio_filepath, text, offset, duration), pocket-tts (path,
                   transcript, start, duration, words), VoxCPM (audio, text), audiocraft (path, with
                   the description in the .json beside the audio), lhotse cuts, HF parquet with
                   audio; without header path|speaker|text, path|text or path
    audiocaps, clotho, wavcaps (sound), musiccaps, songdescriber (music)
                   captions of audio files whose names the table gives in its own way

Where a row's file is longer than the row, or its audio stands in the table, it is a Piece
(pieces.py). Durations of a table are not believed: corpora/scan.py measures the files.
"""
import csv
import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from cli import BadInput
from corpora.layouts import AudioNames, Left, make_clip
from corpora.pieces import UNREADABLE, Piece
from decoder import seconds_in_file
from manifest import KINDS, Clip, read_text
from schema import shown

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".jsonl.gz", ".parquet")
# field of a clip -> names that columns have for it; the first that a row has is taken
COLUMNS = {
    "audio": ("audio", "path", "audio_filepath", "audio_path", "audio_file", "file_name",
              "filename", "file", "wav_path", "wav"),
    "text": ("text", "sentence", "transcript", "transcription", "caption", "normalized_text",
             "description"),
    "speaker": ("speaker", "speaker_id", "speaker_name", "client_id", "spk"),
    "id": ("id", "utt_id", "utterance_id"),
    "start": ("start", "offset", "start_time", "begin"),
    "end": ("end", "end_time"),
    "duration": ("duration",),
    "words": ("words",),
    "kind": ("kind",),
}
# columns of a table without header, by their number
BARE = {1: ["audio"], 2: ["audio", "text"], 3: ["audio", "speaker", "text"]}
# what separates columns, tried in this order
SEPARATORS = ("\t", "|", ",", ";")
# rows by which a table without header is recognised
FIRST_ROWS = 20
# seconds by which a row may differ from its whole file
TOLERANCE = 0.1


# ---------------------------------------------------------------------------- layout "table"

def table(path, kind, columns=None, audio=None):
    """Yield the clips of a table: Clip, Piece or Left.

    path: the table, or a folder with one; columns: {field of COLUMNS: name or number of its column}
    in place of the known names; audio: the folder that its paths are relative to, else the table's.
    Errors: BadInput where there is not one table, or no column with audio.
    """
    tables = tables_of(path)
    names = AudioNames(audio or tables[0].parent)
    columns = {field: str(name).lower() for field, name in (columns or {}).items()}
    wrong = sorted(columns.keys() - COLUMNS.keys())
    if wrong:
        raise BadInput(f"--columns: a clip has no {wrong[0]}; use {', '.join(COLUMNS)}")

    known = False
    for part in tables:
        for where, row in rows_of(part, columns, names):
            if isinstance(row, Left):
                yield row
                continue
            lacking = [name for name in columns.values() if name not in row]
            if lacking and not known:
                raise BadInput(f"{where}: has no column {lacking[0]}; it has {', '.join(row)}")
            known = True
            yield item_of(row, columns, names, kind, where)


def tables_of(path):
    """A table, or a folder with one -> [Path]; the parts of a parquet table are one.

    Errors: BadInput where a folder has none or several.
    """
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.name.endswith(ENDINGS)]
        metadata = [file for file in found if file.stem == "metadata"]
        one = metadata if len(metadata) == 1 else found
        if len({split_of(file) for file in one}) != 1:
            shown = ", ".join(file.name for file in found[:5]) or "none"
            raise BadInput(f"{path}: needs one table ({', '.join(ENDINGS)}), it has {shown}; give "
                           "the one you want, so that splits stay apart")
        return one
    if not path.name.endswith(".parquet"):
        return [path]
    return [file for file in sorted(path.parent.glob("*.parquet"))
            if split_of(file) == split_of(path)]


def split_of(path):
    """What the parts of a table share: train-00000-of-00002.parquet -> train.parquet."""
    name, of, rest = path.name.rpartition("-of-")
    return name.rpartition("-")[0] + ".parquet" if of and rest.endswith(".parquet") else path.name


def item_of(row, columns, names, kind, where):
    """A row -> Clip, Piece or Left."""
    row = row_of_cut(row) if "supervisions" in row or "tracks" in row else row
    values = {field: value_of(row, field, columns) for field in COLUMNS}
    kind = values["kind"] if values["kind"] in KINDS else kind
    audio = values["audio"]
    data = None
    if isinstance(audio, dict):                                     # HF's Audio
        data = audio.get("bytes")
        audio = audio.get("path")
    audio = str(audio or "").strip()
    path = None if data else names.find(audio)
    if path is None and not data:
        return Left("rows without an audio file", f"{where}: {audio}" if audio else where)

    # times in seconds
    times = {field: seconds_of(values[field]) for field in ("start", "end", "duration")}
    if "wrong" in times.values():
        return Left("rows whose start, end or duration is no time in seconds", where)
    start = times["start"] or 0.0
    end = times["end"]
    if end is None and values["start"] not in (None, "") and times["duration"]:
        end = start + times["duration"]

    text = text_of(values, path)
    clip = make_clip(path, text, kind) if path else Clip(audio, " ".join(text.split()), kind)
    clip.speaker = text_in(values["speaker"]).strip() if kind == "speech" else ""
    clip.words = words_of(values["words"])
    own_name = values["id"] not in (None, "")
    if own_name:
        clip.id = text_in(values["id"])
    return Piece(clip, data=data) if data else part_of(clip, start, end, own_name)


def part_of(clip, start, end, own_name=False):
    """The clip, or its Piece where start .. end (None: its end) is less than the whole file."""
    if start <= TOLERANCE and end is None:
        return clip
    try:
        whole = seconds_in_file(clip.audio)
    except BadInput as e:
        return Left(UNREADABLE, str(e))
    if start <= TOLERANCE and end is not None and end >= whole - TOLERANCE:
        return clip
    if end is not None and end <= start:
        return Left("rows that end before they begin", f"{clip.audio} at {start:g} s")
    if not own_name:
        clip.id = f"{clip.id}_{start:.3f}"
    return Piece(clip, start, end)


def value_of(row, field, columns):
    """A row's value of a field of COLUMNS, or None."""
    if field in columns:
        return row.get(columns[field])
    return next((row[name] for name in COLUMNS[field] if row.get(name) is not None), None)


def text_of(values, path):
    """The text of a row; without one that of the audio's .json, as audiocraft has it."""
    if values["text"] is not None:
        return text_in(values["text"])
    described = path.with_suffix(".json") if path else None
    if described is None or not described.is_file():
        return ""
    try:
        info = json.loads(read_text(described))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{described}: not JSON ({e}); correct it or remove it") from e
    return text_in(info.get("description")) if isinstance(info, dict) else ""


def text_in(value):
    """A cell as text, "" where it is empty; halves of characters (JSON's \\ud800) become "?"."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def words_of(words):
    """[{"word", "start", "end"}, ...] -> [[word, start, end], ...]; None where one is missing."""
    if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
        return None
    times = [[text_in(word.get("word")), word.get("start"), word.get("end")] for word in words]
    known = all(isinstance(time, (int, float)) for word in times for time in word[1:])
    return times if known else None


def seconds_of(value):
    """A cell as seconds: None where it is empty, "wrong" where it is no such number."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return "wrong"
    return seconds if 0 <= seconds < math.inf else "wrong"


def row_of_cut(cut):
    """A lhotse cut -> a row; without audio where it has no file of one recording."""
    recording = cut.get("recording")
    sources = dicts_of(recording.get("sources")) if isinstance(recording, dict) else []
    files = [source.get("source") for source in sources if source.get("type") == "file"]
    spoken = dicts_of(cut.get("supervisions"))
    speakers = {text_in(said.get("speaker")) for said in spoken} - {""}
    return {"audio": files[0] if len(files) == 1 else None, "id": cut.get("id"),
            "text": " ".join(text_in(said.get("text")) for said in spoken),
            "speaker": speakers.pop() if len(speakers) == 1 else "",
            "start": cut.get("start"), "duration": cut.get("duration")}


def dicts_of(value):
    """The dicts of a list; none of anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# ---------------------------------------------------------------------------- rows of a table

def rows_of(path, columns, names):
    """Yield (where, {name of a column in small letters: value}), or (where, Left), of a table."""
    if path.name.endswith(".parquet"):
        return rows_of_parquet(path)
    if path.name.endswith((".json", ".jsonl", ".jsonl.gz")):
        return rows_of_json(path)
    return rows_of_text(path, columns, names)


def rows_of_parquet(path):
    """The rows of a .parquet, a few at a time: their audio may stand in them."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise BadInput(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", small(row)
    except ArrowException as e:
        raise BadInput(f"{path}: not readable as parquet ({str(e)[:80]}); get it again") from e


def rows_of_json(path):
    """The rows of a .jsonl, or of a .json: lines too (NeMo), a list, or a list under "data"."""
    text = text_of_file(path)
    rows = None
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError):
            rows = None                                             # lines
    if isinstance(rows, dict):
        rows = rows.get("data", [rows])
    if not isinstance(rows, list):
        rows = [line for line in text.split("\n") if line.strip()]

    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if isinstance(row, str):
            row = parsed(row, where)
        if not isinstance(row, dict):
            raise BadInput(f"{where}: needs {{\"audio\": \"path\", ...}}; it is {shown(row)}")
        yield where, small(row)


def small(row):
    """A row with the names of its columns in small letters."""
    return {str(name).strip().lower(): value for name, value in row.items()}


def parsed(line, where):
    """The value of a line of JSON. Errors: BadInput naming it."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: not JSON ({e}); correct it") from e


def text_of_file(path):
    """read_text, also of a .gz."""
    if path.suffix != ".gz":
        return read_text(path)
    try:
        return gzip.decompress(path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read ({e}); get it again") from e


def rows_of_text(path, columns, names):
    """The rows of a .csv, .tsv or other text, with header or without."""
    text = text_of_file(path)
    separator, keys, header = form_of(path, text, columns, names)
    for number, (line, row) in enumerate(cells_of(path, text, separator)):
        where = f"{path}, line {line}"
        if not row or header and number == 0:
            continue
        if len(row) != len(keys):
            yield where, Left("rows with another number of columns than the first", where)
            continue
        values = dict(zip(keys, row))
        if keys == BARE[3] and len(values["speaker"].split()) > 3:
            raise BadInput(f"{where}: its second column reads like a text, not a speaker; say "
                           "which is which: --columns audio=1,text=2,speaker=3")
        yield where, values


def cells_of(path, text, separator):
    """Yield (line, [cell, ...]) of a table as text; tabs and | separate also between quotes."""
    quoting = csv.QUOTE_NONE if separator in "\t|" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as e:
        raise BadInput(f"{path}, line {reader.line_num}: not readable as a table ({e}); correct "
                       "it") from e


def form_of(path, text, columns, names):
    """A table as text -> (separator, names of its columns, whether its first row is a header).

    Errors: BadInput where no column is known to hold the audio.
    """
    if not text.strip():
        raise BadInput(f"{path}: is empty; give a table with a row a clip")
    wanted = columns.get("audio", "")
    known = {wanted} if wanted else {*COLUMNS["audio"]}
    column = int(wanted) - 1 if wanted.isdecimal() and int(wanted) else 0
    widest = []
    for separator in SEPARATORS:
        rows = [row for _, row in islice(cells_of(path, text, separator), FIRST_ROWS)]
        header = [cell.strip().lower() for cell in rows[0]]
        if known & {*header}:
            return separator, header, True

        # no header: a column of files
        if any(names.find(row[column].strip()) for row in rows if len(row) > column):
            numbers = [str(i) for i in range(1, len(header) + 1)]
            if not columns and len(header) not in BARE:
                raise BadInput(f"{path}: has {len(header)} columns and no header; say which is "
                               "which: --columns audio=1,text=2,speaker=3")
            return separator, numbers if columns else BARE[len(header)], False
        widest = max(widest, header, key=len)

    raise BadInput(f"{path}: no audio file is found in its column {wanted or 'audio'}; its first "
                   f"row is {shown(widest)}; name the columns, --columns audio=NAME,text=NAME "
                   "(numbers without header), and where the files are, --audio DIR")


# ---------------------------------------------------------------------------- captions

@dataclass(frozen=True)
class Captions:
    """How a corpus of captions names its audio files."""
    kind: str
    # columns that its table has
    needs: tuple
    # row -> names of its audio file, best first
    names: Callable
    # columns of captions, each a clip of its own
    texts: tuple = ("caption",)
    # row -> (start, end) in a file that was downloaded whole; None: it never is
    span: Callable | None = None


CAPTIONS = {
    "audiocaps": Captions(
        "sound", ("audiocap_id", "youtube_id", "caption"),
        lambda row: (row["youtube_id"], f"Y{row['youtube_id']}",
                     f"{row['youtube_id']}_{row.get('start_time')}", row["audiocap_id"])),
    "clotho": Captions(
        "sound", ("file_name", *(f"caption_{i}" for i in range(1, 6))),
        lambda row: (row["file_name"],), tuple(f"caption_{i}" for i in range(1, 6))),
    "wavcaps": Captions(
        "sound", ("id", "caption"),
        lambda row: (str(row["id"]), str(row["id"]).removesuffix(".wav"))),
    "musiccaps": Captions(
        "music", ("ytid", "start_s", "end_s", "caption"),
        lambda row: ("[{ytid}]-[{start_s}-{end_s}]".format(**row),
                     "{ytid}_{start_s}_{end_s}".format(**row),
                     "{ytid}_{start_s}".format(**row), row["ytid"]),
        span=lambda row: (seconds_of(row["start_s"]), seconds_of(row["end_s"]))),
    "songdescriber": Captions(
        "music", ("path", "caption"),
        lambda row: (row["path"].removesuffix(".mp3") + ".2min", row["path"])),
}


def captions(path, corpus, audio=None):
    """Yield the clips of a corpus of CAPTIONS: Clip, Piece or Left.

    path: its table, or a folder with one; audio: the folder of its files, else the table's.
    """
    source, = tables_of(path)
    names = AudioNames(audio or source.parent)
    how = CAPTIONS[corpus]
    clips_of = Counter()
    is_json = source.name.endswith((".json", ".jsonl", ".jsonl.gz"))
    rows = rows_of_json(source) if is_json else rows_of_csv(source)
    for where, row in rows:
        if not {*how.needs} <= row.keys():
            raise BadInput(f"{where}: {corpus} has the columns {', '.join(how.needs)}; this row "
                           f"has {shown(list(row))}; correct it")
        found = names.find(*how.names(row))
        if found is None:
            yield Left("captions without an audio file", how.names(row)[0])
            continue

        for column in how.texts:
            clip = make_clip(found, row[column], how.kind)
            # several captions of a file
            clips_of[found] += 1
            if clips_of[found] > 1:
                clip.id += f"_{clips_of[found]}"
            yield of_span(clip, *how.span(row)) if how.span else clip


def rows_of_csv(path):
    """The rows of a .csv with commas and a header: captions may have two lines."""
    rows = cells_of(path, text_of_file(path), ",")
    _, header = next(rows, (0, []))
    for line, row in rows:
        if row:
            yield f"{path}, line {line}", dict(zip(header, row))


def of_span(clip, start, end):
    """The clip where its file was cut when it was downloaded, else the Piece start .. end of it."""
    if "wrong" in (start, end) or None in (start, end):
        return Left("captions whose times are no seconds", clip.id)
    try:
        whole = seconds_in_file(clip.audio)
    except BadInput as e:
        return Left(UNREADABLE, str(e))
    return clip if whole <= end - start + 1 else part_of(clip, start, end)
