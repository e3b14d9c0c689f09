"""manifest.py: clips as columns. What a line may hold is in test_data.py and test_faults.py."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

import data
import manifest
from checks import digest_of, earlier_digest_of
from cli import BadInput
from clips import RATE, corpus, same, tone
from data import AudioBatches, Clip, DataConfig, load_clips, load_manifest, write_manifest
from latents import ListOf, digest
from manifest import KINDS, columns, plain, with_other_file

TEXTS = ["", "plain", " led", "two  spaces", "ﬁne", "日本\u2028語", "a\tb", "  ", "e\u0301", "x "]


@pytest.fixture
def mixed(tmp_path):
    """Clips of all kinds, texts and fields, and the manifest that holds them."""
    clips = []
    for i, text in enumerate(TEXTS):
        path = tone(tmp_path / "wavs" / f"{i}.wav", 0.1 + 0.02 * i)
        clips.append(Clip(path, text, KINDS[i % 3], speaker="anna" if i % 4 == 0 else "",
                          words=[["a", 0, 0.1]] if i == 3 else None,
                          duration=0.5 + i if i % 2 else None, id=f"{i}"))
    write_manifest(tmp_path / "m.jsonl", clips)
    return clips, tmp_path / "m.jsonl"


def test_columns_hold_what_the_clips_hold(mixed):
    clips, path = mixed
    for columns_ in (load_manifest(path), columns(clips)):
        assert columns_ == clips and [*columns_] == clips
        assert [KINDS[k] for k in columns_.column("kind")] == [c.kind for c in clips]
        assert columns_.column("text_bytes").tolist() == [len(plain(t).encode()) for t in TEXTS]
        assert columns_.column("has_text").tolist() == [bool(t) for t in TEXTS]
        assert columns_.column("has_words").tolist() == [bool(c.words) for c in clips]
        assert columns_.column("bytes").tolist() == [os.path.getsize(c.audio) for c in clips]
        assert [*columns_.paths()] == [c.audio for c in clips]
        seconds = [c.duration or 0.1 + 0.02 * i for i, c in enumerate(clips)]
        assert np.allclose(columns_.seconds(), seconds)
        assert columns_.kinds() == [*KINDS]


def test_a_choice_of_clips_is_columns_again_in_its_order(mixed):
    clips, path = mixed
    loaded = load_manifest(path)
    for choice in (slice(None, None, -2), [3, 0, 7], np.array([5, 5, 1])):
        expected = clips[choice] if isinstance(choice, slice) else [clips[i] for i in choice]
        assert loaded[choice] == expected
        assert loaded[choice][1:] == expected[1:]
    assert loaded[-1] == clips[-1]
    assert loaded.of_kind("music") == [c for c in clips if c.kind == "music"]


def test_a_manifest_and_a_list_have_one_digest_also_in_older_checkpoints(mixed):
    clips, path = mixed
    loaded = load_manifest(path)
    assert digest_of(loaded) == digest_of(clips) != digest_of(clips[::-1])
    assert earlier_digest_of(loaded) == earlier_digest_of(clips)
    names = [clip.audio for clip in clips]
    assert digest("key", ListOf(len(loaded), loaded.paths())) == digest("key", names)


def test_any_change_of_what_is_trained_on_changes_the_digest(mixed):
    clips, _ = mixed
    before = digest_of(clips)
    for field, value in (("text", "other"), ("kind", "sound"), ("speaker", "bob"), ("id", "n"),
                         ("words", [["a", 0, 0.2]])):
        old = getattr(clips[3], field)
        setattr(clips[3], field, value)
        assert digest_of(clips) != before, field
        setattr(clips[3], field, old)
    assert digest_of(clips) == before


def test_a_manifest_that_is_replaced_is_read_on_and_one_that_is_overwritten_is_named(mixed):
    """Lines are read again when a clip is wanted, hours after they were checked."""
    clips, path = mixed
    loaded = load_manifest(path)
    write_manifest(path, clips[:2])                     # another file under this name
    assert loaded == clips

    loaded = load_manifest(path)
    assert len(loaded) == 2
    text = path.read_text()
    path.write_text(text.replace("0.wav", "0.wax").replace('"id": "0"', '"id": "9"'))
    with pytest.raises(BadInput, match="m.jsonl: the line at byte 0 was overwritten"):
        loaded[0]


def test_a_clip_costs_so_many_bytes_whatever_its_text_is(tmp_path):
    """Fault: a clip was a Python object of 0.8 to 1.2 KB; ten million did not fit into 8 GB."""
    tone(tmp_path / "a.wav")
    with open(tmp_path / "m.jsonl", "w") as out:
        for i in range(3000):
            out.write(json.dumps({"audio": "a.wav", "text": "x" * 500, "speaker": "anna"}) + "\n")
    clips = load_manifest(tmp_path / "m.jsonl")
    size = clips.table.rows.nbytes + len(clips.table.paths) + clips.numbers.nbytes
    assert size < 80 * len(clips) and len(clips) == 3000


def test_who_can_prompt_whom_is_what_a_search_finds():
    g = np.random.default_rng(0)
    for _ in range(50):
        clips = [Clip(f"/{g.integers(4)}.wav", speaker=" abc"[g.integers(4)].strip())
                 for _ in range(8)]
        able = g.random(8) < 0.5
        expected = [any(able[j] and c.speaker and other.speaker == c.speaker
                        and other.audio != c.audio for j, other in enumerate(clips))
                    for c in clips]
        assert with_other_file(columns(clips), able).tolist() == expected


def test_the_stem_and_the_path_of_an_audio_file_are_pathlibs(tmp_path):
    for name in ("a.wav", "b/a.b.flac", ".hidden", "no", "trailing.", "a/.x.wav", "..wav"):
        assert manifest.stem(f"/{name}") == Path(f"/{name}").stem
    for name in ("a.wav", "./a.wav", "b/../a.wav", "b//a.wav", "/far/a.wav", "a.wav/", "b/./a.wav"):
        assert manifest.audio_path("/home", name) == os.path.normpath(os.path.join("/home", name))


def test_loads_is_json_loads():
    for line in ('{"a": 1}\n', ' {"a": 1}', '{"a": 1} \r\n', '{"a": 1}x', '{"a": 1} {', "[", "",
                 '{"a": NaN}', '{"a": "\\ud83d"}'):
        try:
            expected = json.loads(line)
        except json.JSONDecodeError as e:
            with pytest.raises(json.JSONDecodeError, match=e.msg):
                manifest.loads(line)
        else:
            assert repr(manifest.loads(line)) == repr(expected)


def test_a_byte_that_is_not_utf8_is_named_by_its_place(tmp_path):
    tone(tmp_path / "a.wav")
    line = b'{"audio": "a.wav"}\n'
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b'{"audio": "\xff.wav"}\n')
    with pytest.raises(BadInput, match=f"not UTF-8 text .byte {3 + len(line) + 11}."):
        load_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + line)
    assert [c.id for c in load_manifest(tmp_path / "m.jsonl")] == ["a"]


def test_the_split_is_the_one_of_a_list(mixed):
    clips, path = mixed
    train, valid = load_clips(DataConfig(manifest=str(path), seed=3))
    assert sorted([*train, *valid], key=lambda c: c.id) == clips
    assert len(valid) == 2


def test_of_a_corpus_beyond_ram_gb_only_the_crop_is_decoded(tmp_path, monkeypatch):
    """Fault: every clip up to a minute was decoded whole for one second of it."""
    clips = [Clip(tone(tmp_path / f"{i}.wav", 4.0, hz=100 + i), kind="music", duration=4.0)
             for i in range(4)]
    read = []
    real = data.load_audio
    monkeypatch.setattr("data.load_audio", lambda *a, **k: read.append(real(*a, **k)) or read[-1])

    def batch(gb):
        read.clear()
        batches = AudioBatches(clips, DataConfig(crop_seconds=0.5, ram_gb=gb), RATE, 1, 8)
        return batches(0, range(8)), max(wav.shape[1] for wav in read)

    whole, longest = batch(1.0)
    crops, shortest = batch(1e-5)
    assert longest == 4 * RATE and shortest == RATE // 2
    assert not same(whole, crops)
    # the same places, to a sample of 4 s
    rows = zip(whole["audio"], crops["audio"])
    assert all((a - b).abs().max() < 0.5 * 2 * np.pi * 103 / RATE * 1.5 for a, b in rows)
    assert same(crops, batch(1e-5)[0])
