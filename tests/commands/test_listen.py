"""A listening test: the page holds what it needs, a listener gets through it in a browser, and
made-up answers score as their closed form.
"""
import base64
import io
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import browser
from cli import BadInput
from config import Config, build
from conftest import run, write
from data import Clip
from intervals import bootstrap
from tools import listen, systems

CHROMIUM = browser.find()


def tone(seconds, frequency):
    t = np.arange(int(8000 * seconds)) / 8000
    file = io.BytesIO()
    sf.write(file, 0.3 * np.sin(2 * np.pi * frequency * t), 8000, format="FLAC", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()


def make_study(**changes):
    """A study of two systems and the reference with three samples of 0.3 s."""
    names = ["flow", "one step", "reference"]
    samples = [{"id": f"clip{i}", "text": f"text {i} </script>",
                "audio": [tone(0.3, 200 + 100 * i + 30 * j) for j in range(3)]} for i in range(3)]
    return {"format": listen.FORMAT, "id": "abc", "seed": 0, "title": "A test", "about": "about",
            "pair_question": "Which?", "rating_question": "How good?", "listen_seconds": 10,
            "listen_text": "Listen first", "pairs": 6, "ratings": 3, "systems": names,
            "samples": samples} | changes


def make_answer(path, pairs=(), ratings=(), changes=None):
    """An answer file. pairs: (left, right, choice); ratings: (system, score); changes: of keys."""
    answer = {"format": listen.FORMAT, "study": "abc", "listener": Path(path).stem,
              "systems": ["A", "B", "reference"],
              "pairs": [{"sample": "x", "left": a, "right": b, "choice": c} for a, b, c in pairs],
              "ratings": [{"sample": "x", "system": s, "score": n} for s, n in ratings]}
    path.write_text(json.dumps(answer | (changes or {})))
    return str(path)


# ---------------------------------------------------------------- score


def test_made_up_answers_of_two_systems_score_as_the_closed_form(tmp_path):
    """A wins three times, on either side, loses once and ties once: w = 3.5 of n = 5."""
    first = make_answer(tmp_path / "ann.json", [("A", "B", "left"), ("B", "A", "right"),
                                                ("A", "B", "tie")])
    second = make_answer(tmp_path / "bob.json", [("B", "A", "left"), ("A", "B", "left")])
    found = listen.score_answers(listen.read_answers([first, second]))
    assert found["A"]["elo"][0] == pytest.approx(2000 + 400 * math.log10(3.6 / 2.6), abs=1e-9)
    assert found["B"]["elo"][0] == pytest.approx(2000 + 400 * math.log10(1.6 / 2.6), abs=1e-9)
    assert found["reference"]["elo"][0] == 2000
    assert [found[name]["comparisons"] for name in found] == [5, 5, 0]


def test_the_reference_has_an_elo_and_no_rank(tmp_path):
    votes = [("reference", "A", "left"), ("reference", "B", "left"), ("A", "B", "right")] * 3
    found = listen.score_answers([listen.read_answer(make_answer(tmp_path / "a.json", votes))])
    assert [found[name]["rank"] for name in ("A", "B", "reference")] == [2, 1, None]
    assert found["reference"]["elo"][0] > found["B"]["elo"][0]


def test_mean_opinion_scores_are_means_with_their_bootstrap(tmp_path):
    scores = [1, 2, 4, 5, 5, 3]
    path = make_answer(tmp_path / "a.json", ratings=[("A", n) for n in scores])
    found = listen.score_answers([listen.read_answer(path)])
    assert found["A"]["quality"] == bootstrap([(n, 1) for n in scores])
    assert found["A"]["quality"].value == 20 / 6 and found["A"]["ratings"] == 6
    assert found["B"]["quality"] is None


def test_the_score_is_printed_and_written(tmp_path, monkeypatch, capsys):
    path = make_answer(tmp_path / "a.json", [("A", "B", "left")], [("A", 4)])
    monkeypatch.setattr(sys, "argv", ["listen", "score", path, "--json", str(tmp_path / "s.json")])
    listen.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 listeners, 1 comparisons (0 ties), 1 ratings" and len(lines) == 5
    assert json.loads((tmp_path / "s.json").read_text())["A"]["quality"]["value"] == 4.0


@pytest.mark.parametrize("change, words", [
    ({"format": "other"}, "no answers of a listening test"),
    ({"pairs": [{"left": "A", "right": "A", "choice": "left"}]}, "a comparison that cannot be"),
    ({"pairs": [{"left": "A", "right": "B", "choice": "up"}]}, "a comparison that cannot be"),
    ({"ratings": [{"system": "A", "score": 6}]}, "a rating that cannot be"),
    ({"pairs": 3}, "damaged"),
])
def test_answers_that_cannot_be_are_refused_by_file(tmp_path, change, words):
    with pytest.raises(BadInput, match=words) as error:
        listen.read_answer(make_answer(tmp_path / "a.json", changes=change))
    assert str(tmp_path / "a.json") in str(error.value)


def test_answers_of_two_tests_or_twice_of_one_listener_are_refused(tmp_path):
    one = make_answer(tmp_path / "a.json")
    other = make_answer(tmp_path / "b.json", changes={"study": "xyz"})
    again = make_answer(tmp_path / "c.json", changes={"listener": "a"})
    with pytest.raises(BadInput, match="answers of another test"):
        listen.read_answers([one, other])
    with pytest.raises(BadInput, match="has answered already"):
        listen.read_answers([one, again])


# ---------------------------------------------------------------- systems


def test_a_system_is_a_run_and_what_is_set_differently():
    system = systems.parse("out/a,stage=lm,steps=4,cfg=1.5,name=flow")
    assert system == systems.System("flow", "out/a", "lm", {"steps": 4, "guidance": 1.5})
    assert systems.parse("out/a,steps=4").name == "a,steps=4"
    assert systems.parse("reference") == systems.REFERENCE


@pytest.mark.parametrize("words, complaint", [
    (["a,speed=3"], "is no setting"), (["a,steps=0"], "steps: must be"), (["a", "a"], "twice")])
def test_systems_that_cannot_be_are_refused(words, complaint):
    with pytest.raises(BadInput, match=complaint):
        systems.parse_all(words)


# ---------------------------------------------------------------- make


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("listen"))
    done = run("train.py", "--config", write(folder), "--stages", '["vae", "lm"]',
               "--train.vae.steps", "2", "--train.lm.steps", "2", "--sample.count", "0")
    assert done.returncode == 0, done.stderr
    return f"{folder}/run"


def make(trained, out, *arguments):
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        flow = f"{trained},stage=lm,steps=4,name=flow"
        patch.setattr(sys, "argv", ["listen", "make", trained, flow, "reference", "--out", str(out),
                                    "--threads", "1", *arguments])
        listen.main()
    page = out.read_text(encoding="utf8")
    return page, json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])


def test_a_page_holds_every_clip_and_needs_nothing_else(trained, tmp_path):
    page, study = make(trained, tmp_path / "page.html", "--samples", "2")
    assert not re.search(r"https?://|src=\"|@import|<link", page)
    assert study["systems"][1:] == ["flow", "reference"] and len(study["samples"]) == 2
    for sample in study["samples"]:
        assert sample["text"]
        for audio in sample["audio"]:
            wav, rate = sf.read(io.BytesIO(base64.b64decode(audio)))
            assert rate == 16000 and len(wav) > 1000
    assert (study["pairs"], study["ratings"]) == (6, 6)             # all there are


def test_the_same_seed_makes_the_same_page_and_another_seed_another_test(trained, tmp_path):
    first, study = make(trained, tmp_path / "a.html", "--samples", "2")
    again, _ = make(trained, tmp_path / "b.html", "--samples", "2")
    _, other = make(trained, tmp_path / "c.html", "--samples", "2", "--seed", "1")
    assert first == again and other["id"] != study["id"]


def test_clips_too_short_to_be_continued_are_refused(trained, tmp_path):
    with pytest.raises(BadInput, match="longer than 3 s"):
        make(trained, tmp_path / "page.html", "--task", "continue")


def test_a_single_system_is_nothing_to_compare(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["listen", "make", trained, "--out", str(tmp_path / "a.html")])
    with pytest.raises(BadInput, match="at least two"):
        listen.main()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt install chromium, or CHROMIUM=its path)")
    path = tmp_path_factory.mktemp("page") / "test.html"
    path.write_text(listen.fill_template(make_study()), encoding="utf8")
    with browser.Browser(CHROMIUM) as tab:
        tab.open(f"file://{path}")
        yield tab


def begin(page, name):
    page.evaluate(f"at('listener').value = '{name}'; begin()")


def orders(page, name):
    begin(page, name)
    return page.evaluate("trials.map(t => [t.type, t.sample, t.systems])")


def test_the_order_follows_from_the_listener_and_systems_take_turns(page):
    ann = orders(page, "ann")
    assert ann == orders(page, "ann") and ann != orders(page, "bob")
    assert [kind for kind, _, _ in ann] == ["pair"] * 6 + ["rating"] * 3
    pairs = Counter(tuple(sorted(pair)) for kind, _, pair in ann if kind == "pair")
    assert pairs == {(0, 1): 2, (0, 2): 2, (1, 2): 2}
    assert sorted(system for kind, _, [system, *_] in ann if kind == "rating") == [0, 1, 2]
    assert len({(kind, sample, tuple(sorted(pair))) for kind, sample, pair in ann}) == 9


def test_either_side_comes_about_as_often(page):
    first = [pair[0] < pair[1] for i in range(40) for kind, _, pair in orders(page, f"n{i}")
             if kind == "pair"]
    assert 0.4 < sum(first) / len(first) < 0.6


def test_a_vote_opens_when_both_clips_have_been_played(page):
    begin(page, "ann")
    page.press("ArrowLeft")                                         # too early: nothing happens
    assert page.evaluate("position") == 0 and page.evaluate("at('choices').children[0].disabled")
    page.press("1")
    page.wait("players[0].ended")
    assert page.evaluate("at('choices').children[0].disabled")
    page.press("2")
    page.wait("!at('choices').children[0].disabled")


def test_a_listener_plays_votes_and_saves_with_keyboard_and_touch(page):
    begin(page, "ann b")
    plan = page.evaluate("trials")
    keys = ["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowLeft", "touch", "touch"]
    for i, key in enumerate(keys):
        page.press("1")
        page.wait("players[0].ended")
        page.press("2")
        page.wait("!at('choices').children[0].disabled")
        if key == "touch":
            page.touch("#choices button:nth-child(3)")
        else:
            page.press(key)
        page.wait(f"position === {i + 1}")
    for i, score in enumerate("153"):
        page.press(" ")
        page.wait("!at('choices').children[0].disabled")
        page.press(score)
    page.wait("!at('end').hidden")
    page.touch("#save")

    # the file that the browser saved
    end = time.monotonic() + 10
    while not (files := list(Path(page.downloads).glob("*.json"))) and time.monotonic() < end:
        time.sleep(0.02)
    assert [f.name for f in files] == ["answers_abc_ann_b.json"]
    answer = listen.read_answer(files[0])
    names = answer["systems"]
    assert [pair["choice"] for pair in answer["pairs"]] == ["left", "right", "tie", "left",
                                                           "right", "right"]
    assert [pair["left"] for pair in answer["pairs"]] == [names[t["systems"][0]] for t in plan[:6]]
    assert [rating["score"] for rating in answer["ratings"]] == [1, 5, 3]


def test_a_vote_can_be_taken_back_and_what_is_given_be_saved_early(page):
    begin(page, "cleo")
    for audio in "12":
        page.press(audio)
        page.wait(f"players[{int(audio) - 1}].ended")
    page.press("ArrowLeft")
    page.wait("position === 1")
    page.press("Backspace")
    assert page.evaluate("position") == 0 and page.evaluate("trials[0].answer") == "left"
    page.press("ArrowDown")                                         # heard before: open at once
    page.touch("#stop")
    assert page.evaluate("answers().pairs.map(p => p.choice)") == ["tie"]
    assert not page.evaluate("at('end').hidden")


def test_the_recordings_of_a_continuation_are_prompt_and_continuation_long(tmp_path, monkeypatch):
    cfg = build(Config, {"vae": {"sample_rate": 16000, "ratios": [4, 10, 4, 4]},
                         "sample": {"seconds": 0.5, "prompt_seconds": 0.25}})
    sf.write(tmp_path / "a.wav", np.full(32000, 0.1), 16000)
    clips = [Clip(str(tmp_path / "a.wav"), "", "music", duration=2.0)]
    contestant = systems.Contestant(systems.REFERENCE, cfg, None, None, {})
    assert systems.generate(contestant, clips, "music", "continue")[0].shape == (1, 12000)
    assert systems.generate(contestant, clips, "music", "text")[0].shape == (1, 8000)
