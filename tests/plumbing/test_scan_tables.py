"""corpora/tables.py and pieces.py: a table of every kind, and the same clips each time."""
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from cli import BadInput
from clips import RATE, tone
from corpora import scan
from manifest import load_manifest


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def found(path, layout="table", **options):
    return [(Path(c.audio).name, c.text, c.speaker)
            for c in scan.find_clips(path, layout, **options)]


TABLES = {     # name of the table: its text; each names a.wav "Hi, you." of anna and b.wav of bert
    "metadata.csv": 'file_name,text,speaker_id\naudio/a.wav,"Hi, you.",anna\naudio/b.wav,No,bert\n',
    "train.tsv": "client_id\tpath\tsentence_id\tsentence\tage\nanna\ta.wav\t7\tHi, you.\t\n"
                 "bert\tb.wav\t8\tNo\tfifties\n",
    "list.txt": "audio/a.wav|anna|Hi, you.\naudio/b.wav|bert|No\n",
    "bom.csv": "\ufeffAudio;Text;Speaker\r\na;Hi, you.;anna\r\n\r\nb;No;bert\r\n",
    "nemo.json": lines_of(
        {"audio_filepath": "/other/disk/audio/a.wav", "text": "Hi, you.", "duration": 0.5,
         "offset": 0, "speaker": "anna"},
        {"audio_filepath": "audio/b.wav", "text": "No", "duration": 0.5, "speaker": "bert"}),
    "pocket.jsonl": lines_of(
        {"path": "audio/a.wav", "start": 0.0, "duration": 0.5, "transcript": "Hi, you.",
         "speaker": "anna", "audio_filepath": "1/2.flac"},
        {"path": "audio/b.wav", "duration": 0.5, "transcript": "No", "speaker": "bert"}),
    "voxcpm.jsonl": lines_of(
        {"audio": "audio/a.wav", "text": "Hi, you.", "dataset_id": 0, "speaker": "anna"},
        {"audio": "audio/b.wav", "text": "No", "duration": 0.5, "speaker": "bert"}),
    "list.json": json.dumps([{"audio": "audio/a.wav", "text": "Hi, you.", "speaker": "anna"},
                             {"audio": "audio/b.wav", "text": "No", "speaker": "bert"}], indent=1),
    "cuts.jsonl": lines_of(*({
        "id": f"cut-{name}", "start": 0.0, "duration": 0.5, "channel": 0, "type": "MonoCut",
        "supervisions": [{"id": "s", "recording_id": name, "start": 0.0, "duration": 0.5,
                          "text": text, "speaker": speaker}],
        "recording": {"id": name, "sampling_rate": RATE, "num_samples": RATE // 2, "duration": 0.5,
                      "sources": [{"type": "file", "channels": [0],
                                   "source": f"audio/{name}.wav"}]}}
        for name, text, speaker in (("a", "Hi, you.", "anna"), ("b", "No", "bert")))),
}


@pytest.fixture
def corpus(tmp_path):
    """a.wav and b.wav of half a second in audio/."""
    tone(tmp_path / "audio" / "a.wav")
    tone(tmp_path / "audio" / "b.wav")
    return tmp_path


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_every_project_gives_its_audio_text_and_speaker(name, corpus):
    table = write(corpus / name, TABLES[name])
    expected = [("a.wav", "Hi, you.", "anna"), ("b.wav", "No", "bert")]
    assert found(table) == expected
    if name != "list.txt":                          # a folder with one table is that table
        assert found(corpus) == expected


def test_a_packed_table_and_captions_beside_the_audio_are_read(corpus):
    """audiocraft: path in the table, the description in a.json."""
    table = corpus / "data.jsonl.gz"
    table.write_bytes(gzip.compress(lines_of(
        {"path": "audio/a.wav", "duration": 0.5, "sample_rate": RATE, "amplitude": None,
         "weight": None, "info_path": None}, {"path": "audio/b.wav"}).encode()))
    write(corpus / "audio" / "a.json", json.dumps({"description": "a  slow waltz", "bpm": 90}))
    assert found(table, kind="music") == [("a.wav", "a slow waltz", ""), ("b.wav", "", "")]


def test_words_of_pocket_tts_become_word_times_unless_one_is_missing(corpus):
    table = write(corpus / "t.jsonl", lines_of(
        {"path": "audio/a.wav", "transcript": "hi", "words": [
            {"word": "hi", "start": 0.1, "end": 0.3}]},
        {"path": "audio/b.wav", "transcript": "no", "words": [
            {"word": "no", "start": None, "end": 0.3}]}))
    assert [c.words for c in scan.find_clips(table, "table")] == [[["hi", 0.1, 0.3]], None]


def test_a_row_may_name_its_kind_and_only_speech_has_speakers(corpus):
    table = write(corpus / "t.jsonl", lines_of(
        {"audio": "audio/a.wav", "kind": "music", "speaker": "anna"},
        {"audio": "audio/b.wav", "kind": "podcast", "speaker": "bert"}))
    assert [(c.kind, c.speaker) for c in scan.find_clips(table, "table")] == [
        ("music", ""), ("speech", "bert")]


def test_columns_are_named_or_numbered(corpus):
    table = write(corpus / "t.csv", "clip,words said,who\na.wav,Hi,anna\n")
    names = {"audio": "clip", "text": "words said", "speaker": "WHO"}
    assert found(table, columns=names) == [("a.wav", "Hi", "anna")]
    table = write(corpus / "u.txt", "Hi there you all|a.wav|x\n")
    assert found(table, columns={"audio": "2", "text": "1"}) == [("a.wav", "Hi there you all", "")]
    for wrong, message in (({"audio": "clip", "text": "gone"}, "has no column gone"),
                           ({"adio": "clip"}, "a clip has no adio")):
        with pytest.raises(BadInput, match=message):
            scan.find_clips(corpus / "t.csv", "table", columns=wrong)


def test_a_quote_in_a_tab_separated_text_stays_a_quote(corpus):
    """Common Voice quotes nothing: a text that begins with one would swallow the next rows."""
    table = write(corpus / "t.tsv", 'path\tsentence\na.wav\t"Hi\nb.wav\tyou"\n')
    assert found(table) == [("a.wav", '"Hi', ""), ("b.wav", 'you"', "")]


@pytest.mark.parametrize("text, message", [
    ("clip,words\na.wav,Hi\n", None),
    ("sound file,words\ngone.wav,Hi\n", "its first row is \\['sound file', 'words'\\]"),
    ("a.wav|Hi|x|y\n", "4 columns and no header"),
    ("a.wav|what she said that day|anna\n", "reads like a text"),
    ("", "is empty"),
])
def test_a_table_that_is_not_understood_says_what_to_give(text, message, corpus):
    table = write(corpus / "t.txt", text)
    if message is None:                              # a header of unknown names is a row without
        assert found(table) == [("a.wav", "Hi", "")]
        return
    with pytest.raises(BadInput, match=message):
        scan.find_clips(table, "table")


@pytest.mark.parametrize("name, text", [
    ("a.csv", "path,text\na.wav,\"" + "x" * 200_000 + "\"\n"), ("a.json", "[" * 100_000),
    ("a.jsonl", '{"audio":"../rec/'), ("a.json", "[1, 2]"), ("a.jsonl.gz", "no gzip"),
    ("a.jsonl", '{"supervisions": 3, "recording": 4}\n{"audio": ["x"], "start": {}}\n')])
def test_a_damaged_table_is_one_line(name, text, corpus):
    """Fault: a cell of 131,073 characters, brackets in brackets and numbers in place of lists ended
    in a traceback.
    """
    with pytest.raises(BadInput):
        scan.find_clips(write(corpus / name, text), "table")


def test_a_folder_with_several_tables_asks_for_one_and_takes_metadata(corpus):
    write(corpus / "train.csv", TABLES["metadata.csv"])
    write(corpus / "test.csv", TABLES["metadata.csv"])
    with pytest.raises(BadInput, match="test.csv, train.csv; give the one you want"):
        scan.find_clips(corpus, "table")
    write(corpus / "metadata.csv", TABLES["metadata.csv"])
    assert len(scan.find_clips(corpus, "table")) == 2


def test_rows_without_a_clip_are_counted_and_named(corpus, capsys):
    tone(corpus / "more" / "c.wav")
    table = write(corpus / "t.csv", "path,text,start,end\na.wav,A,,\ngone.wav,B,,\na.wav,C\n"
                  "b.wav,D,late,\nb.wav,E,0.4,0.2\nb.wav,F,-1,\n")
    assert [c.text for c in scan.find_clips(table, "table")] == ["A"]
    err = capsys.readouterr().err
    for sentence in (f"1 rows without an audio file: '{table}, line 3: gone.wav'",
                     f"1 rows with another number of columns than the first: '{table}, line 4'",
                     f"2 rows whose start, end or duration is no time in seconds: '{table}, line 5'"
                     f", '{table}, line 7'",
                     "1 rows that end before they begin: ",
                     "2 audio files that belong to no text of the layout: "):
        assert f"left out: {sentence}" in err, err


def test_a_name_of_two_folders_needs_its_path(tmp_path):
    """A bare 1.wav could be either speaker's; anna/1.wav, also of another machine, is hers."""
    for speaker in ("anna", "bert"):
        tone(tmp_path / speaker / "1.wav")
    table = write(tmp_path / "t.csv", "path,text\n1.wav,either\n/old/place/anna/1.wav,hers\n")
    clips = scan.find_clips(table, "table")
    assert [(c.audio, c.text) for c in clips] == [(str(tmp_path / "anna" / "1.wav"), "hers")]


# ---------------------------------------------------------------------------- pieces

def ramp(path, seconds=3.0):
    """Sample i is i / 65536: where a piece was cut can be read from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.arange(int(seconds * RATE)) / 65536, RATE)
    return path


def test_a_segment_of_a_long_file_is_cut_to_the_sample(tmp_path):
    ramp(tmp_path / "long.wav")
    table = write(tmp_path / "t.jsonl", lines_of(
        {"audio_filepath": "long.wav", "offset": 0.5, "duration": 0.25, "text": "one"},
        {"audio_filepath": "long.wav", "offset": 1.0, "duration": 2.0, "text": "two", "id": "x/y"},
        {"audio_filepath": "long.wav", "start": 2.5, "text": "to the end"},
        {"audio_filepath": "long.wav", "offset": 2.5, "duration": 9.0, "text": "too long"}))
    manifest = tmp_path / "m.jsonl"
    scan.main([str(table), "--layout", "table", "--cut", str(tmp_path / "cut"), "--out",
               str(manifest)])
    clips = load_manifest(manifest)
    assert [(Path(c.audio).name, c.text, c.id, c.duration) for c in clips] == [
        ("long_0.500.flac", "one", "long_0.500", 0.25), ("x_y.flac", "two", "x/y", 2.0),
        ("long_2.500.flac", "to the end", "long_2.500", 0.5)]
    for clip, first in zip(clips, (0.5, 1.0, 2.5)):
        wav, rate = sf.read(clip.audio)
        expected = (np.arange(len(wav)) + first * RATE) / 65536
        assert rate == RATE and abs(wav - expected).max() <= 2 / 65536


def test_what_ends_behind_its_file_is_left_out_and_named(tmp_path, capsys):
    ramp(tmp_path / "long.wav", 1.0)
    table = write(tmp_path / "t.csv", "path,start,end,text\nlong.wav,0.5,0.9,in\nlong.wav,0.5,3,out\n"
                  "long.wav,5,6,after\n")
    assert [c.text for c in scan.find_clips(table, "table", cut=tmp_path / "cut")] == ["in"]
    assert "2 rows whose audio cannot be read: " in capsys.readouterr().err


def test_a_place_that_takes_no_files_is_said_once_and_not_per_row(tmp_path):
    ramp(tmp_path / "long.wav")
    table = write(tmp_path / "t.csv", "path,start,end\nlong.wav,0.5,0.9\nlong.wav,1,2\n")
    with pytest.raises(BadInput, match="t.csv.*(cannot be written|Not a directory)"):
        scan.find_clips(table, "table", cut=table / "cut")


def test_half_a_character_of_json_does_not_reach_the_manifest(corpus):
    """UTF-8 cannot hold it: the manifest could not be written."""
    table = corpus / "t.jsonl"
    table.write_text('{"audio": "audio/a.wav", "text": "a\\ud800b", "id": "\\udc00", '
                     '"speaker": "x\\ud800"}\n')
    scan.main([str(table), "--layout", "table", "--out", str(corpus / "m.jsonl")])
    (clip,) = load_manifest(corpus / "m.jsonl")
    assert (clip.text, clip.id, clip.speaker) == ("a?b", "?", "x?")


def test_segments_are_refused_where_there_is_no_place_for_them(tmp_path):
    ramp(tmp_path / "long.wav")
    table = write(tmp_path / "t.csv", "path,start,end\nlong.wav,0.5,0.9\n")
    with pytest.raises(BadInput, match="long_0.500 is a part of a longer file.*--cut DIR"):
        scan.find_clips(table, "table")


def test_a_parquet_with_audio_gives_the_files_that_are_in_it(tmp_path):
    """Hugging Face's Audio: {"bytes", "path"}; the shards of one split are one table."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def packed(hz):
        out = io.BytesIO()
        sf.write(out, 0.5 * np.sin(np.arange(800) * hz), RATE, format="FLAC")
        return out.getvalue()

    for shard in range(2):
        rows = [{"audio": {"bytes": packed(0.1 + shard), "path": "u.flac" if shard else None},
                 "sentence": f"text {shard}", "speaker_id": 7}]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{shard:05}-of-00002.parquet")
    clips = scan.find_clips(tmp_path, "table", cut=tmp_path / "cut")
    assert [(c.text, c.speaker) for c in clips] == [("text 0", "7"), ("text 1", "7")]
    assert [Path(c.audio).read_bytes() for c in clips] == [packed(0.1), packed(1.1)]
    assert {Path(c.audio).suffix for c in clips} == {".flac"}


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    write(tmp_path / "t.parquet", "PAR1")
    with pytest.raises(BadInput, match="parquet needs pyarrow: pip install pyarrow"):
        scan.find_clips(tmp_path, "table")


# ---------------------------------------------------------------------------- captions

def captions(path, layout, **options):
    return [(Path(c.audio).name, c.text, c.kind, c.id)
            for c in scan.find_clips(path, layout, **options)]


def test_clotho_has_a_clip_for_each_of_its_five_captions(tmp_path):
    tone(tmp_path / "development" / "Rain on.wav")
    names = ",".join(f"caption_{i}" for i in range(1, 6))
    write(tmp_path / "clotho_captions_development.csv",
          f'file_name,{names}\nRain on.wav,"a, b",c,d,e,f\n')
    assert captions(tmp_path, "clotho") == [
        ("Rain on.wav", text, "sound", "Rain on" + number)
        for text, number in zip(("a, b", "c", "d", "e", "f"), ("", "_2", "_3", "_4", "_5"))]


def test_wavcaps_names_its_files_by_id_elsewhere(tmp_path):
    tone(tmp_path / "flac" / "180913.flac")
    tone(tmp_path / "flac" / "Yabc.flac")
    write(tmp_path / "json" / "fsd.json", json.dumps({"num_captions_per_audio": 1, "data": [
        {"id": "180913", "caption": "A dog", "duration": 3.0, "audio": "wav"},
        {"id": "Yabc.wav", "caption": "A cat"}, {"id": "gone", "caption": "None"}]}))
    assert captions(tmp_path / "json", "wavcaps", audio=tmp_path / "flac") == [
        ("180913.flac", "A dog", "sound", "180913"), ("Yabc.flac", "A cat", "sound", "Yabc")]


def test_musiccaps_cuts_what_was_downloaded_whole(tmp_path):
    tone(tmp_path / "wav" / "[-ab]-[30-40].wav", seconds=1.0)
    tone(tmp_path / "wav" / "cd.wav", seconds=1.0)
    ramp(tmp_path / "wav" / "ef.wav", 4.0)
    write(tmp_path / "musiccaps-public.csv",
          "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id\n"
          + "".join(f"{ytid},{start},{end},/m/1,\"['x']\",\"Slow, {ytid}\",4\n" for ytid, start, end
                    in (("-ab", 30, 40), ("cd", 30, 40), ("ef", 1, 2))))
    cut = tmp_path / "cut"
    assert captions(tmp_path, "musiccaps", cut=cut) == [
        ("[-ab]-[30-40].wav", "Slow, -ab", "music", "[-ab]-[30-40]"),
        ("cd.wav", "Slow, cd", "music", "cd"), ("ef_1.000.flac", "Slow, ef", "music", "ef_1.000")]
    assert sf.read(cut / "ef_1.000.flac")[0][0] == pytest.approx(RATE / 65536, abs=1e-4)


def test_song_describer_has_two_minutes_of_each_track(tmp_path):
    tone(tmp_path / "audio" / "00" / "18500.2min.mp3".replace("mp3", "ogg"))
    write(tmp_path / "song_describer.csv", "caption_id,track_id,caption,path,duration\n"
          "1,18500,A waltz,00/18500.mp3,214\n2,18500,Slow,00/18500.mp3,214\n")
    assert captions(tmp_path, "songdescriber") == [
        ("18500.2min.ogg", "A waltz", "music", "18500.2min"),
        ("18500.2min.ogg", "Slow", "music", "18500.2min_2")]


def test_options_that_a_layout_does_not_have_are_refused(corpus):
    for options in ({"columns": {"audio": "1"}}, {"audio": corpus}):
        with pytest.raises(BadInput, match="^--(columns|audio): "):
            scan.find_clips(corpus, "folder", **options)
    table = write(corpus / "t.csv", "path\na.wav\n")
    with pytest.raises(BadInput, match="is a file; layout folder"):
        scan.find_clips(table, "folder")
