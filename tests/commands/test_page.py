"""The listening page: what it shows of a run, and that a browser plays it from a file."""
import base64
import glob
import io
import json
import os
import re
import sys

import numpy as np
import pytest
import soundfile as sf

import report
from audio import save_audio
from webdriver import Browser, needs_browser, wait_for
from cli import BadInput
from conftest import ROOT
from page import (SECONDS, comment, curve_svg, embedded, find_named, find_samples, keep_evaluation,
                  nice_step, png, read_curves, spectrogram, text_of, what_is_normal, write_page)

RATE = 16000
LOG = [{"stage": "vae", "step": 10, "mel": 0.5, "steps_per_second": 2.0},
       {"stage": "vae", "step": 20, "mel": 0.4, "steps_per_second": 4.0},
       {"stage": "vae", "step": 20, "valid_mel": 0.3},
       {"stage": "lm", "step": 10, "head": 0.9}, {"stage": "lm", "step": 20, "head": 0.8},
       {"stage": "lm", "step": 20, "valid_head": 0.7, "valid_energy_speech": 0.25}]


def tone(seconds, hertz=1000):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


@pytest.fixture
def folder(tmp_path):
    """A run with a log, and one clip that two stages have samples of, at two steps."""
    out = tmp_path / "a run & more"
    (out / "samples").mkdir(parents=True)
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    (out / "config.toml").write_text("seed = 0\n")
    for step in (10, 20):
        for name, seconds in (("vae_speech1_original", 1.0), ("vae_speech1_reconstruction", 1.0),
                              ("lm_speech1", 0.5)):
            save_audio(f"{out}/samples/step{step:08d}_{name}.wav", tone(seconds), RATE,
                       comment=comment("one <two>", "test"))
    return str(out)


def read(path):
    with open(path, encoding="utf8") as f:
        return f.read()


def test_a_text_comes_back_from_the_comment_of_a_wav(tmp_path):
    for text in ("three seven", "text: größer; 'x'", ""):
        save_audio(f"{tmp_path}/a.wav", tone(0.1), RATE, comment=comment(text, "made by lm"))
        assert text_of(f"{tmp_path}/a.wav") == text


def test_sounds_of_one_text_are_a_row_of_the_newest_step(folder):
    rows = find_samples(folder)
    assert list(rows) == [("speech", "one <two>")]
    sounds = rows["speech", "one <two>"]
    assert list(sounds) == ["original", "reconstruction", "lm, step 20"]
    assert all("step00000020" in path for path in sounds.values())


def test_samples_without_a_text_are_not_taken_for_one_clip(folder):
    """Clip 1 of the VAE and text 1 of a language model are others where nobody says so."""
    for name in ("vae_music1_original", "lm_music1", "lm_music_continued1"):
        save_audio(f"{folder}/samples/step00000020_{name}.wav", tone(0.1), RATE)
    rows = [title for kind, title in find_samples(folder) if kind == "music"]
    assert rows == ["clip 1", "text 1", "continued 1"]


def test_samples_of_a_run_that_was_started_over_are_not_shown(folder):
    save_audio(f"{folder}/samples/step00000700_lm_speech1.wav", tone(0.1), RATE)
    save_audio(f"{folder}/samples/step00000020_audiocalm_speech1.wav", tone(0.1), RATE)
    (sounds,) = find_samples(folder).values()
    assert list(sounds) == ["original", "reconstruction", "lm, step 20"]


def test_a_folder_of_wavs_has_its_texts_in_their_names(tmp_path):
    for name in ("lm_speech_three_six", "consistency_speech_three_six", "voices/a_few_words"):
        save_audio(f"{tmp_path}/{name}.wav", tone(0.1), RATE)
    rows = find_named(str(tmp_path))
    assert {key: list(row) for key, row in rows.items()} == {
        ("speech", "three six"): ["lm", "consistency"], ("voices", "a few words"): ["voices"]}


def test_a_tone_is_a_bright_line_at_its_frequency(tmp_path):
    """2 kHz of 8: the line is a quarter of the picture above its lower edge."""
    from matplotlib import image
    save_audio(f"{tmp_path}/a.wav", tone(1.0, 2000), RATE)
    seconds, khz, picture = spectrogram(f"{tmp_path}/a.wav", 0)
    with open(tmp_path / "a.png", "wb") as f:
        f.write(picture)
    pixels = image.imread(f"{tmp_path}/a.png")[..., :3].sum(-1)
    assert (seconds, khz) == (1.0, 8.0) and pixels.shape[1] == 101
    assert abs(pixels[:, 50].argmax() - (len(pixels) * 3 / 4 - 1)) <= 1


def test_of_a_long_sound_the_beginning_is_drawn_and_embedded(tmp_path):
    for seconds, kept in ((1, 1), (SECONDS + 5, SECONDS)):
        save_audio(f"{tmp_path}/a.wav", tone(seconds), RATE)
        data = base64.b64decode(embedded(f"{tmp_path}/a.wav").partition(",")[2])
        assert sf.info(io.BytesIO(data)).duration == kept
        assert spectrogram(f"{tmp_path}/a.wav", seconds)[0] == kept


def test_a_png_holds_the_pixels(tmp_path):
    from matplotlib import image

    from page import colours
    numbers = np.arange(12).reshape(3, 4)
    (tmp_path / "a.png").write_bytes(png(numbers))
    assert np.array_equal(np.round(255 * image.imread(tmp_path / "a.png")[..., :3]),
                          colours()[numbers])


@pytest.mark.parametrize("span, most, step", [(0.8, 6, 0.2), (1.2, 6, 0.2), (3, 6, 0.5),
                                              (60, 6, 10), (0.06, 6, 0.01)])
def test_axes_have_round_steps(span, most, step):
    assert nice_step(span, most) == pytest.approx(step)


def test_a_curve_keeps_the_places_of_its_points_and_one_point_alone_is_a_dot():
    """Step 10 of 20 is in the middle of the axis (38 .. 294), a constant slope is a line."""
    svg = curve_svg({"a": [(0, 1.0), (10, 2.0), (20, 3.0)]}, [(20, 2.0)])
    (points,) = re.findall('points="(.*?)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = [map(float, point.split(",")) for point in points.split()]
    assert (x0, x1, x2) == (38, 166, 294)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.15) and y0 > y1
    assert f'cx="294.0" cy="{y1}"' in svg and svg.count("<circle") == 1
    assert curve_svg({"a": [(5, 1.0)]}, []).count("<circle") == 1
    assert curve_svg({"a": []}, []) == ""


def test_every_figure_that_training_logs_has_a_sentence(folder):
    for panel in ("vae:mel", "vae:adv", "vae:grad_vae", "lm:head", "lm:valid_energy_",
                  "consistency:head", "consistency:tangent_max", "audiocalm:stop"):
        assert what_is_normal(panel), panel
    assert "quality" in what_is_normal("consistency:head") != what_is_normal("lm:head")
    assert what_is_normal("vae:unheard_of") == ""


def test_the_page_has_the_figures_and_shows_any_text_as_text(folder):
    write_page(folder)
    page = read(f"{folder}/report.html")
    assert "one &lt;two&gt;" in page and "<two>" not in page
    assert "<title>a run &amp; more" in page and "seed = 0" in page
    assert "energy_speech 0.250" in page and page.count("<polyline") == len(read_curves(folder)[1])
    assert page.count('preload="none"') == 3
    assert 'src="samples/step00000020_lm_speech1.wav"' in page


def test_what_evaluate_found_is_kept_beside_what_it_found_before(folder, tmp_path, capsys):
    wavs = f"{tmp_path}/wavs"
    save_audio(f"{tmp_path}/held_out.wav", tone(0.6), RATE)
    save_audio(f"{wavs}/lm/clip7.wav", tone(0.7), RATE)
    with open(f"{wavs}/lm/speech.jsonl", "w") as f:
        f.write(json.dumps({"id": "clip7", "text": "four", "audio": "clip7.wav"}) + "\n")
    keep_evaluation(folder, {"vae": {"speech": {"log_mel": 0.125, "clips": 1}}})
    keep_evaluation(folder, {"lm": {"steps": 20, "facts": {"speech": 0.75},
                                    "speech": {"wer": 0.1875}}}, wavs,
                    {"clip7": f"{tmp_path}/held_out.wav"})

    page = read(f"{folder}/report.html")
    assert "vae: log_mel</th><td>0.125" in page and "lm: facts</th><td>0.75" in page
    assert "lm: wer</th><td>0.1875" in page
    sounds = [os.path.normpath(f"{folder}/{path}") for path in re.findall('audio .*?src="(.*?)"',
                                                                          page)]
    assert f"{tmp_path}/held_out.wav" in sounds and f"{wavs}/lm/clip7.wav" in sounds
    assert capsys.readouterr().out.count("report.html") == 2


def test_a_page_that_cannot_be_written_costs_a_line_and_weights_alone_get_none(
        folder, tmp_path, capsys):
    os.mkdir(f"{folder}/report.html")
    keep_evaluation(folder, {})
    assert "report.html: not written" in capsys.readouterr().out
    keep_evaluation(str(tmp_path), {})
    assert os.listdir(tmp_path) == [os.path.basename(folder)]


def test_a_damaged_evaluation_is_named(folder):
    with open(f"{folder}/evaluation.json", "w") as f:
        f.write("{")
    with pytest.raises(BadInput, match="evaluation.json: damaged .*; delete it"):
        write_page(folder)


def test_a_damaged_sample_is_named(folder):
    with open(f"{folder}/samples/step00000020_lm_speech1.wav", "wb") as f:
        f.write(b"no sound")
    with pytest.raises(BadInput, match="lm_speech1.wav"):
        write_page(folder)


def test_the_page_of_the_project_has_every_wav_of_its_assets():
    addresses = re.findall('audio .*?src="(.*?)"', read(f"{ROOT}/docs/index.html"))
    wavs = glob.glob(f"{ROOT}/assets/wavs/**/*.wav", recursive=True)
    assert sorted(os.path.normpath(f"{ROOT}/docs/{address}") for address in addresses) == sorted(
        wavs)


@pytest.mark.parametrize("place, says", [("missing", "no such folder"), (".", "neither log.jsonl")])
def test_a_folder_without_anything_to_show_is_refused(tmp_path, place, says):
    with pytest.raises(BadInput, match=says):
        write_page(f"{tmp_path}/{place}")


def test_the_command_writes_one_file_with_everything_in_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "page", folder, "--embed", "--out",
                                      f"{tmp_path}/one.html"])
    report.main()
    assert capsys.readouterr().out == f"{tmp_path}/one.html\n"
    addresses = re.findall(r'(?:src|href)="(.*?)"', read(f"{tmp_path}/one.html"))
    assert len(addresses) == 7 and all(address.startswith("data:") for address in addresses)


# ---------------------------------------------------------------- in a browser

@needs_browser
def test_a_browser_plays_the_page_from_a_file_and_fits_it_on_a_phone(folder, tmp_path):
    write_page(folder)
    write_page(folder, f"{tmp_path}/alone/one.html", embed=True)
    browser = Browser(tmp_path / "browser")
    try:
        for path in (f"{folder}/report.html", f"{tmp_path}/alone/one.html"):
            browser.call(f"{browser.session}/url", url="file://" + path.replace(" ", "%20"))
            check_pictures(browser)
            check_sound(browser)
        browser.call(f"{browser.session}/window/rect", width=400, height=800)
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.run("return new Set([...document.querySelectorAll('.cells figure')]"
                           ".map(f => f.getBoundingClientRect().left)).size") == 1
    finally:
        browser.close()


def check_pictures(browser):
    """All are there; half as long a sound is half as wide; nothing comes from elsewhere."""
    widths = browser.run("return [...document.querySelectorAll('.spec img')]"
                         ".map(i => i.naturalWidth && i.getBoundingClientRect().width)")
    assert len(widths) == 3 and widths[0] > 200
    assert abs(widths[0] - widths[1]) < 0.1 and abs(widths[0] - 2 * widths[2]) < 0.1
    loaded = browser.run("return performance.getEntriesByType('resource').map(r => r.name)")
    assert all(name.startswith(("file:", "data:")) for name in loaded)


def check_sound(browser):
    """Nothing is loaded until a tap on the middle of the second picture plays from there."""
    state = "return [...document.querySelectorAll('audio')].map(a => a.readyState)"
    assert browser.run(state) == [0, 0, 0]
    browser.click("figure:nth-child(2) .spec")
    wait_for(lambda: browser.run("return document.querySelectorAll('audio')[1].currentTime") > 0.5,
             20)
    assert browser.run("return document.querySelectorAll('audio')[1].duration") == 1
    assert browser.run(state)[0] == 0
