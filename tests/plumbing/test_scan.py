"""corpora/scan.py: layouts, the command line, descriptions."""
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import cli
import data
from cli import BadInput
from clips import RATE, corpus, tone
from corpora import scan
from data import Clip, load_manifest


# --------------------------------------------------------------------------- layouts and commands

def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def found(folder, layout):
    return [(Path(c.audio).name, c.text, c.kind, c.speaker)
            for c in scan.find_clips(folder, layout)]


def test_every_layout_is_scanned(tmp_path, capsys):
    folder = tmp_path / "folder"
    tone(folder / "x" / "one.flac")
    write_text(folder / "x" / "one.txt", " hello\nyou ")
    tone(folder / "two.WAV")
    assert found(folder, "folder") == [("two.WAV", "", "speech", ""),
                                       ("one.flac", "hello you", "speech", "x")]

    folder = tmp_path / "lj"
    tone(folder / "wavs" / "LJ1.wav")
    write_text(folder / "metadata.csv", 'LJ1|In 5 "days|In five "days\nLJ2|gone|gone\n')
    assert found(folder, "ljspeech") == [("LJ1.wav", 'In five "days', "speech", "lj")]
    assert "1 texts without an audio file: 'LJ2'" in capsys.readouterr().err

    folder = tmp_path / "libri"
    tone(folder / "84" / "121" / "84_121_0_0.wav")
    write_text(folder / "84" / "121" / "84_121_0_0.normalized.txt", "A word.")
    assert found(folder, "libritts") == [("84_121_0_0.wav", "A word.", "speech", "84")]

    folder = tmp_path / "vctk"
    for microphone in "12":
        tone(folder / "wav48_silence_trimmed" / "p225" / f"p225_001_mic{microphone}.flac")
    write_text(folder / "txt" / "p225" / "p225_001.txt", "Please.\n")
    assert found(folder, "vctk") == [("p225_001_mic1.flac", "Please.", "speech", "p225")]

    folder = tmp_path / "caps"
    tone(folder / "audio" / "Yabc.wav")
    tone(folder / "audio" / "77.wav")
    write_text(folder / "train.csv", "audiocap_id,youtube_id,start_time,caption\n"
               '1,abc,30,"Rain, then wind"\n77,zzz,0,A dog\n78,gone,0,A cat\n')
    assert found(folder, "audiocaps") == [("Yabc.wav", "Rain, then wind", "sound", ""),
                                          ("77.wav", "A dog", "sound", "")]
    write_text(folder / "test.csv", "audiocap_id,youtube_id,start_time,caption\n77,zzz,0,A dog\n")
    with pytest.raises(BadInput, match="splits stay apart"):
        scan.find_clips(folder, "audiocaps")
    assert len(scan.find_clips(folder / "test.csv", "audiocaps")) == 1

    (tmp_path / "nothing").mkdir()
    for layout in scan.LAYOUTS:
        with pytest.raises(BadInput, match="nothing"):
            scan.find_clips(tmp_path / "nothing", layout)


TABLES = [    # the table, what it says: [(text, speaker), ...] of a and b
    ("a|Hello world|\nb|Mr. Smith came|Mister Smith came", [("Hello world", "lj"),
                                                          ("Mister Smith came", "lj")]),
    ("a|In 1860|In eighteen sixty\nb|1861|eighteen sixty-one\n", [("In eighteen sixty", "lj"),
                                                               ("eighteen sixty-one", "lj")]),
    ("a|Hello world|anna\nb|Two words|bert\n", [("Hello world", "anna"), ("Two words", "bert")]),
    ("a|Hello | big world\nb|two columns only\n", [("Hello | big world", "lj"),
                                                  ("two columns only", "lj")]),
    ("a|A | B in 5|A | B in five\nb|no more|no more\n", [("A | B in five", "lj"),
                                                       ("no more", "lj")]),
    ("a|Hello|world wide|anna\nb|Two words|bert\n", [("Hello|world wide", "anna"),
                                                    ("Two words", "bert")]),
    ("a.wav|Hello\nwavs/b.wav|Two\n", [("Hello", "lj"), ("Two", "lj")]),
    ("\ufeffid|text\r\na|one\u2028line\r\nwavs/b|Two\r\n", [("one line", "lj"), ("Two", "lj")]),
]


@pytest.mark.parametrize("table, says", TABLES, ids=[table.strip() for table, _ in TABLES])
def test_a_table_of_ljspeechs_form_loses_no_text_and_trains_no_speaker_as_text(
        table, says, tmp_path):
    """Fault: the last column was the text: an empty one, a speaker or what follows a | was trained
    in its place; ids with an ending or a folder found no audio, and U+2028 ended a row.
    """
    tone(tmp_path / "wavs" / "a.wav")
    tone(tmp_path / "wavs" / "b.wav")
    (tmp_path / "metadata.csv").write_bytes(table.encode())
    assert [(c.text, c.speaker) for c in scan.find_clips(tmp_path, "ljspeech")] == says


def test_a_third_column_that_is_neither_text_nor_speaker_is_refused(tmp_path):
    """Fault: "a remark" was trained as what is spoken."""
    tone(tmp_path / "wavs" / "a.wav")
    write_text(tmp_path / "metadata.csv", "a|Hello world|recorded at home\n")
    with pytest.raises(BadInput, match="neither the text normalised nor a speaker"):
        scan.find_clips(tmp_path, "ljspeech")


@pytest.mark.parametrize("name", ["a.WAV", "a.flac", "a.ogg"])
def test_audio_of_ljspeech_may_have_any_format_that_is_read(name, tmp_path):
    """Fault: only wavs/ID.wav was found."""
    tone(tmp_path / "wavs" / name)
    write_text(tmp_path / "metadata.csv", "a|Hello|Hello\n")
    assert found(tmp_path, "ljspeech") == [(name, "Hello", "speech", "lj")]


def test_a_caption_of_two_lines_and_capital_endings_are_read(tmp_path):
    """Fault: brothers of the above. A quoted line feed cut AudioCaps' caption, and LibriTTS with
    .WAV or VCTK with _mic1.wav had no clips.
    """
    tone(tmp_path / "caps" / "1.wav")
    write_text(tmp_path / "caps" / "t.csv", 'audiocap_id,youtube_id,start_time,caption\n'
               '1,abc,30,"Rain,\nthen wind"\n')
    assert found(tmp_path / "caps", "audiocaps") == [("1.wav", "Rain, then wind", "sound", "")]
    tone(tmp_path / "libri" / "84" / "121" / "x.WAV")
    write_text(tmp_path / "libri" / "84" / "121" / "x.normalized.txt", "A word.")
    assert found(tmp_path / "libri", "libritts") == [("x.WAV", "A word.", "speech", "84")]
    tone(tmp_path / "vctk" / "wav48" / "p1" / "p1_001_mic1.wav")
    write_text(tmp_path / "vctk" / "txt" / "p1" / "p1_001.txt", "Please.")
    assert found(tmp_path / "vctk", "vctk") == [("p1_001_mic1.wav", "Please.", "speech", "p1")]


def test_what_scan_leaves_out_is_counted_and_named(tmp_path, capsys, monkeypatch):
    """Fault: other formats, other texts and links that lead back were dropped without a word; a
    dead link became a clip."""
    monkeypatch.setenv("PATH", "")                      # no ffmpeg
    folder = tmp_path / "c"
    tone(folder / "one.wav")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "dead.wav").symlink_to(tmp_path / "gone.wav")
    for name in ("x.m4a", "y.m4a", "one.lab", "three.txt", ".hidden.wav"):
        write_text(folder / name, "")
    code, out, err = run(capsys, folder, "--out", tmp_path / "m.jsonl")
    assert code == 0 and out.startswith("1 clips ->")
    assert [Path(c.audio).name for c in load_manifest(tmp_path / "m.jsonl")] == ["one.wav"]
    for sentence in ("1 linked folders, which are entered elsewhere or hold the link: 'linked'", "1 links that lead nowhere: 'dead.wav'",
                     "2 files .m4a, which only ffmpeg reads; install it or convert them to .flac: "
                     "'x.m4a', 'y.m4a'",
                     "1 files .lab, which are not read; texts stand in .txt beside the audio",
                     "1 files .txt without an audio file of their name: 'three.txt'"):
        assert f"left out: {sentence}" in err, err
    assert len(err.splitlines()) == 5

    # none of it hides a corpus of one format alone
    write_text(tmp_path / "b" / "x.m4a", "")
    code, _, err = run(capsys, tmp_path / "b", "--out", tmp_path / "m.jsonl")
    assert code == 2 and "files .m4a, which only ffmpeg reads" in err


def test_linked_folders_are_entered_once_and_loops_end(tmp_path):
    """Fault: linked folders were left out; entering them all would never end, or repeat clips."""
    folder = tmp_path / "c"
    tone(folder / "a" / "one.wav")
    tone(tmp_path / "disk" / "bert" / "two.wav")
    (folder / "linked").symlink_to(tmp_path / "disk")
    (folder / "again").symlink_to(tmp_path / "disk")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "a" / "up").symlink_to(tmp_path)
    (folder / "b").symlink_to(folder / "a")
    (tmp_path / "disk" / "back").symlink_to(folder)
    (tmp_path / "disk" / "itself").symlink_to(tmp_path / "disk")
    assert [Path(c.audio).relative_to(folder).as_posix() for c in scan.find_clips(folder)] == [
        "a/one.wav", "again/bert/two.wav"]
    assert len(load_manifest(folder)) == 2


def test_librispeech_and_an_empty_third_column_are_read(tmp_path, capsys):
    tone(tmp_path / "train" / "84" / "121" / "84-121-0000.flac")
    write_text(tmp_path / "train" / "84" / "121" / "84-121.trans.txt",
               "84-121-0000 GO  DO YOU HEAR\n84-121-0001 GONE\n")
    assert found(tmp_path, "librispeech") == [
        ("84-121-0000.flac", "GO DO YOU HEAR", "speech", "84")]
    assert "1 texts without an audio file: '84-121-0001'" in capsys.readouterr().err
    tone(tmp_path / "lj" / "wavs" / "a.flac")
    write_text(tmp_path / "lj" / "metadata.csv", "a.flac|In 5 days|\n")
    assert found(tmp_path / "lj", "ljspeech") == [("a.flac", "In 5 days", "speech", "lj")]


@pytest.mark.parametrize("ending", ["aif", "aiff", "oga", "opus", "m4a"])
def test_a_format_that_libsndfile_or_ffmpeg_reads_is_found_and_lasts_as_long(ending, tmp_path):
    path = tmp_path / "c" / f"a.{ending}"
    wav = tone(tmp_path / "a.wav", seconds=0.5)
    path.parent.mkdir()
    if ending == "m4a":
        if not shutil.which("ffmpeg"):
            pytest.skip("no ffmpeg")
        subprocess.run(["ffmpeg", "-v", "error", "-i", wav, path], check=True)
    else:
        kind = {"oga": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}.get(ending, ("AIFF", "PCM_16"))
        sf.write(path, sf.read(wav)[0], RATE, format=kind[0], subtype=kind[1])
    clips = scan.find_clips(path.parent)
    assert [clip.audio for clip in clips] == [str(path)]
    assert data.seconds_of(clips[0]) == pytest.approx(0.5, abs=0.15 if ending == "m4a" else 1e-3)


def test_the_nth_folder_names_the_speakers(tmp_path):
    """Fault: the first folder was every speaker's name, also where it names a language."""
    tone(tmp_path / "en" / "female" / "judy" / "a.wav")
    tone(tmp_path / "en" / "b.wav")

    def speakers(n):
        return [c.speaker for c in scan.find_clips(tmp_path, speaker_folder=n)]

    assert speakers(None) == ["en", "en"]
    assert speakers(1) == ["en", "en"]
    assert speakers(2) == ["", "female"]
    assert speakers(-1) == ["en", "judy"]


def test_the_report_says_hours_and_what_a_config_would_use(tmp_path, capsys):
    """36 s in hours; a text of 9 bytes where 8 fit; rows of 3.2 s."""
    folder = tmp_path / "c"
    for name, seconds, text in (("a", 28.0, ""), ("b", 4.4, "short"), ("c", 3.6, "9 letters")):
        tone(folder / "anna" / f"{name}.wav", seconds=seconds)
        write_text(folder / "anna" / f"{name}.txt", text)
    write_text(folder / "broken.wav", "RIFF")
    config = tmp_path / "x.toml"
    write_text(config, "[data]\ntext_len = 8\nframes = 80\n")
    manifest = tmp_path / "m.jsonl"
    code, out, _ = run(capsys, folder, "--out", manifest, "--config", config)
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [f"4 clips -> {manifest}",
                         "speech: 0.01 hours, 2 of 4 clips with text"]
    assert lines[2].startswith("unreadable: 1 of them cannot be opened, e.g. ")
    assert f"{config}: text: 1 of 2 transcripts exceed data.text_len = 8; 9 holds 99 %" in lines
    assert (f"{config}: cuts 1 of 1 clips of speech with text, longer than data.frames = 80 "
            "(3.2 s): their ends are never seen with their text") in lines
    assert (f"{config}: takes 3.2 s at a time of 2 longer clips, which have captions or no text"
            in lines)
    durations = {Path(c.audio).stem: c.duration for c in load_manifest(manifest)}
    assert durations == {"a": 28.0, "b": 4.4, "c": 3.6, "broken": None}

    # nothing is opened
    code, out, _ = run(capsys, folder, "--out", manifest, "--unmeasured")
    assert code == 0 and " hours, " not in out
    assert {c.duration for c in load_manifest(manifest)} == {None}
    assert run(capsys, folder, "--out", manifest, "--unmeasured", "--config", config)[0] == 2


def test_the_report_names_the_kinds_that_a_config_drops(tmp_path, capsys):
    tone(tmp_path / "c" / "a.wav")
    write_text(tmp_path / "x.toml", "[data]\nweights = {speech = 1.0}\n")
    _, out, _ = run(capsys, tmp_path / "c", "--kind", "music", "--out", tmp_path / "m.jsonl",
                    "--config", tmp_path / "x.toml")
    assert "drops 1 clips of music: data.weights gives it no share" in out


def test_names_that_are_not_utf8_go_through_every_command(tmp_path, capsys):
    """Fault: UnicodeEncodeError in describe; scan left them out, all of them in such a folder."""
    folder = os.fsdecode(bytes(tmp_path) + b"/f\xe9")
    for name in ("caf\udce9.wav", "\udcffanna/b.wav"):
        (Path(folder) / name).parent.mkdir(parents=True)
        os.rename(tone(tmp_path / "a.wav"), Path(folder) / name)
    write_text(Path(folder) / "caf\udce9.txt", "hello there")
    manifest, clean, described = (tmp_path / name for name in ("m.jsonl", "c.jsonl", "d.jsonl"))

    assert run(capsys, folder, "--out", manifest)[0] == 0
    for clips in (manifest, folder):
        assert run(capsys, "check", clips, "--out", clean)[0] == 0
        assert run(capsys, "describe", clips, "--out", described)[0] == 0
        found = {Path(c.audio).name: c for c in load_manifest(described)}
        assert sorted(found) == ["b.wav", "caf\udce9.wav"]
        assert '"hello there"' in found["caf\udce9.wav"].text
        assert all(os.path.isfile(c.audio) for c in load_manifest(clean))
    assert {c.speaker for c in load_manifest(manifest)} == {"", "\ufffdanna"}


def test_an_id_of_several_clips_takes_no_rewritten_text(tmp_path, capsys):
    """Fault: every clip of that name got the text."""
    tone(tmp_path / "c" / "x" / "1.wav")
    tone(tmp_path / "c" / "y" / "1.wav")
    write_text(tmp_path / "r.jsonl", json.dumps({"id": "1", "text": "new"}))
    code, _, err = run(capsys, "describe", tmp_path / "c", "--rewritten", tmp_path / "r.jsonl",
                       "--out", tmp_path / "d.jsonl")
    assert code == 2 and "r.jsonl: id 1 names 2 clips of " in err


def test_a_file_in_two_lines_is_noted_and_a_transcript_alone_is_the_text(tmp_path, capsys):
    """Fault: neither was said, and speech was trained without its text."""
    tone(tmp_path / "a.wav")
    write_text(tmp_path / "m.jsonl", '{"audio": "a.wav", "transcript": "hi you"}\n'
                                     '{"audio": "./a.wav", "text": "b", "transcript": "c"}\n')
    assert [(c.text, c.transcript) for c in load_manifest(tmp_path / "m.jsonl")] == [
        ("hi you", "hi you"), ("b", "c")]
    code, out, _ = run(capsys, "check", tmp_path / "m.jsonl")
    assert code == 0 and f"1 files stand in several lines, e.g. {tmp_path / 'a.wav'}" in out


def test_folders_name_the_speakers_and_an_option_the_only_one(tmp_path, capsys):
    """Fault: scan wrote no speaker, so that no row of a corpus had a voice prompt."""
    for name in ("anna/a.wav", "train/wavs/bert/b.wav", "c.wav"):
        tone(tmp_path / "d" / name)
    manifest = tmp_path / "m.jsonl"

    def speakers(*options):
        _, out, _ = run(capsys, tmp_path / "d", "--out", manifest, *options)
        return [c.speaker for c in load_manifest(manifest)], out

    names, out = speakers()
    assert sorted(names) == ["", "anna", "bert"]
    assert "speakers: 2 (anna, bert)" in out and "speakers: 1 clips name none" in out
    assert speakers("--speaker", "eve")[0] == ["eve"] * 3
    assert speakers("--speaker", "")[0] == [""] * 3
    assert speakers("--kind", "music")[0] == [""] * 3


def run(capsys, *arguments):
    """The command line -> (exit status, stdout, stderr)."""
    code = 0
    try:
        cli.cli(lambda: scan.main([str(a) for a in arguments]))
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_the_command_line_scans_checks_and_describes_a_corpus(tmp_path, capsys):
    corpus(tmp_path / "c", 3)
    sf.write(tmp_path / "c" / "silent.wav", np.zeros(800), RATE)
    manifest = tmp_path / "m.jsonl"
    clean = tmp_path / "clean.jsonl"
    code, out, _ = run(capsys, "scan", tmp_path / "c", "--out", manifest)
    assert code == 0 and out.splitlines()[0] == f"4 clips -> {manifest}"

    code, out, err = run(capsys, "check", manifest)
    assert code == 2 and "silent.wav: silent" in out + err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    assert run(capsys, "check", manifest, "--out", clean)[0] == 0
    assert [c.duration for c in load_manifest(clean)][0] == 0.3

    code, out, _ = run(capsys, "info", clean)
    assert code == 0 and "speech        3" in out


def test_words_behind_the_end_of_a_file_make_a_clip_bad(tmp_path, capsys):
    tone(tmp_path / "a.wav")
    write_text(tmp_path / "m.jsonl", '{"audio": "a.wav", "text": "b", "words": [["b", 9, 10]]}\n')
    code, out, err = run(capsys, "check", tmp_path / "m.jsonl")
    assert code == 2 and "words are of other audio; 'b' begins at 9 s" in out + err


def test_two_manifests_become_one_whose_paths_hold_from_where_it_lies(tmp_path, capsys):
    """Also words and transcripts stay, and of a long manifest clips are drawn evenly."""
    for name, count in (("a", 2), ("b", 6)):
        for i in range(count):
            tone(tmp_path / name / f"{i}.wav")
    write_text(tmp_path / "a" / "m.jsonl", "".join(json.dumps(
        {"audio": f"{i}.wav", "text": "hi", "speaker": "me", "words": [["hi", 0.0, 0.1]]}) + "\n"
        for i in range(2)))
    write_text(tmp_path / "b" / "m.jsonl", "".join(json.dumps(
        {"audio": f"{i}.wav", "text": "x", "transcript": "y"}) + "\n" for i in range(6)))
    code, out, _ = run(capsys, "join", tmp_path / "a" / "m.jsonl", tmp_path / "b" / "m.jsonl",
                       "--out", tmp_path / "b" / "both.jsonl", "--most", 3)
    assert code == 0 and "m.jsonl: 3 of 6 clips" in out and "note" not in out

    joined = load_manifest(tmp_path / "b" / "both.jsonl")
    assert [clip.audio for clip in joined] == [str(tmp_path / name) for name in (
        "a/0.wav", "a/1.wav", "b/0.wav", "b/2.wav", "b/4.wav")]
    assert joined[0].words == [["hi", 0.0, 0.1]] and joined[0].speaker == "me"
    assert joined[4].text == "x" and joined[4].transcript == "y"


def test_a_speaker_of_several_joined_manifests_is_named(tmp_path, capsys):
    for name in ("a", "b"):
        tone(tmp_path / name / "1.wav")
        write_text(tmp_path / f"{name}.jsonl",
                   json.dumps({"audio": f"{name}/1.wav", "text": "hi", "speaker": "19"}) + "\n")
    code, out, _ = run(capsys, "join", tmp_path / "a.jsonl", tmp_path / "b.jsonl",
                       "--out", tmp_path / "both.jsonl")
    assert code == 0 and "note: 1 names of speakers stand in several manifests, e.g. 19" in out


@pytest.mark.parametrize("command", ["scan", "check", "describe", "join"])
def test_an_out_that_is_a_folder_is_refused_before_the_work(command, tmp_path, capsys):
    """Fault: a traceback after every file had been read."""
    corpus(tmp_path / "c", 2)
    code, out, err = run(capsys, command, tmp_path / "c", "--out", tmp_path)
    assert code == 2 and out == "" and err.startswith(f"error: {tmp_path}: is a folder")


def test_a_first_word_that_is_no_command_is_a_folder_and_check_is_one_as_a_path(
        tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "check", 2)
    for folder in ("./check", str(tmp_path / "check")):
        assert run(capsys, folder, "--kind", "music", "--out", "m.jsonl")[0] == 0
        assert [c.kind for c in load_manifest("m.jsonl")] == ["music", "music"]
    code, _, err = run(capsys, "check", "--out", "m.jsonl")             # the command, no manifest
    assert code == 2 and "MANIFEST" in err


@pytest.mark.parametrize("command", ["scan", "check", "info", "describe", "join"])
def test_every_command_explains_itself(command, capsys):
    code, out, _ = run(capsys, command, "-h")
    assert code == 0 and len(out.splitlines()) > 8


# ---------------------------------------------------------------------------- descriptions

def clip(kind="speech", text="hello there", duration=0.8, id="a", speaker=""):
    return Clip("x.wav", text, kind, speaker, duration=duration, id=id)


def test_a_description_keeps_every_word_of_its_text_and_depends_on_seed_and_id_only():
    for kind in data.KINDS:
        found = {scan.describe_clip(clip(kind, id=str(i))) for i in range(40)}
        assert len(found) >= 5 and all("hello there" in t.lower() for t in found)
        assert [scan.describe_clip(clip(kind), s) for s in range(9)] == [
            scan.describe_clip(clip(kind), s) for s in range(9)]
        assert len({scan.describe_clip(clip(kind), s) for s in range(40)}) >= 5
    assert scan.describe_clip(clip(text="")) == ""


def test_speech_says_who_and_how_fast_and_quotes_word_for_word():
    def texts(**fields):
        return [scan.describe_clip(clip(id=str(i), **fields)).lower() for i in range(30)]

    def slow(text):
        return "slow" in text

    def fast(text):
        return "quickly" in text or "fast" in text

    assert all("speaker anna" in t and '"hello there"' in t for t in texts(speaker="anna"))
    assert all(slow(t) for t in texts(duration=2.0))
    assert all(fast(t) for t in texts(duration=0.4))
    assert not any(slow(t) or fast(t) for t in texts(duration=0.8))


def test_a_manifest_is_described_and_another_tools_sentences_come_first(tmp_path, capsys):
    """Fault: descriptions grew past data.text_len, and speech lost its text in silence."""
    corpus(tmp_path / "c", 3)
    manifest, out, other = (tmp_path / n for n in ("m.jsonl", "d.jsonl", "r.jsonl"))
    scan.main(["scan", str(tmp_path / "c"), "--out", str(manifest)])
    clips = load_manifest(manifest)
    data.write_manifest(manifest, [replace(c, text=f"word {i}") for i, c in enumerate(clips)])
    other.write_text(json.dumps({"id": clips[1].id, "text": "a new sentence"}) + "\n")
    scan.main(["describe", str(manifest), "--out", str(out), "--rewritten", str(other)])
    texts = [c.text for c in load_manifest(out)]
    assert '"word 0"' in texts[0] and texts[1] == "a new sentence" and '"word 2"' in texts[2]
    # judges compare with the words, not with their description
    assert [c.transcript for c in load_manifest(out)] == ["word 0", "word 1", "word 2"]
    texts = [len(t) for t in texts]
    capsys.readouterr()
    scan.main(["describe", str(manifest), "--out", str(out), "--rewritten", str(other),
               "--text-len", "14"])
    assert capsys.readouterr().out == (
        f"3 clips -> {out}\n"
        f"text: {sum(n > 14 for n in texts)} of 3 exceed data.text_len = 14 bytes (0 did before); {max(texts)} holds 99 %, {max(texts)} all\n")
    other.write_text("{}\n")
    with pytest.raises(BadInput, match="line 1: needs"):
        scan.main(["describe", str(manifest), "--out", str(out), "--rewritten", str(other)])
