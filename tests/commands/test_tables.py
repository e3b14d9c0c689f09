"""The papers' tables: every figure of ours has its closed form and stands beside the printed one.
"""
import dataclasses
import json
import types

import numpy as np
import pytest
import torch

from cli import BadInput
from clips import corpus
from config import load, open_run
from conftest import ROOT
from data import Clip, load_manifest, split_off, write_manifest
from intervals import Figure
from tools import ablation_tables, measure, paper_tables, systems, tables
from tools.measure import Speed
from untrained import untrained_run


# ---------------------------------------------------------------- figures


def test_mean_similarity_is_the_mean_cosine_over_pairs():
    """Eight vectors along one axis, one along the other: 28 of 36 pairs are alike."""
    figure = measure.mean_similarity(np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]]))
    assert figure.value == pytest.approx(28 / 36)
    assert figure.clips == 9 and figure.low < figure.value < figure.high


def test_equal_vectors_are_alike_and_orthogonal_ones_are_not():
    assert measure.mean_similarity(np.tile([0.6, 0.8], (9, 1))).value == pytest.approx(1)
    assert measure.mean_similarity(np.eye(9)).value == pytest.approx(0)
    with pytest.raises(BadInput, match="at least 8 clips, got 7"):
        measure.mean_similarity(np.eye(7))


def test_vectors_are_taken_relative_to_a_centre():
    found = measure.unit_vectors([[1.0, 3.0], [1.0, 1.0]], np.array([1.0, 1.0]))
    assert found.tolist() == [[0, 1], [0, 0]]


def test_clips_that_are_generated_are_not_compared_with():
    clips = [Clip(f"{i}.wav", "", "music") for i in range(10)]
    chosen, rest = measure.split_reference(clips, 3)
    assert len(chosen) == 3 and len(rest) == 7
    assert {clip.audio for clip in chosen} | {clip.audio for clip in rest} == {
        clip.audio for clip in clips}


def test_vert_is_zero_for_transcripts_that_never_repeat_a_word():
    figure = measure.vert([["a", "b", "c"], ["d", "e", "f"], ["a", "b", "g"]])
    assert figure.value == 0 and figure.clips == 3


# ---------------------------------------------------------------- seconds


def clockwork(monkeypatch):
    """A clock that a test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(measure, "clock", lambda device: now[0])

    def spend(seconds):
        now[0] += seconds
    return spend


def test_the_sampler_has_the_time_of_the_head_alone(monkeypatch):
    """3 s of backbone and 2 s of head per latent; the first repeat is slower and not counted."""
    spend = clockwork(monkeypatch)
    calls = []

    class Head:
        def sample(self, z):
            spend(2.0 * slow())

    def slow():
        return 10 if len(calls) == 1 else 1

    def generate(tokens, *, kind, max_frames, generator, steps):
        calls.append((max_frames, steps))
        for _ in range(max_frames):
            spend(3.0 * slow())
            lm.head.sample(None)
            yield None

    lm = types.SimpleNamespace(head=Head(), generate=generate, bos=torch.zeros(1))
    cfg = load(f"{ROOT}/configs/quickstart.toml")
    vae = types.SimpleNamespace(cfg=types.SimpleNamespace(frame_rate=25))
    contestant = systems.Contestant(systems.System("a"), cfg, vae, lm, {"steps": 4})
    speed = measure.time_generations({"a": contestant}, "music", 0.4, 3)["a"]
    assert (speed.total, speed.sampler, speed.frame_rate) == (5.0, 2.0, 25)
    assert speed.seconds_for(30) == 5 * 25 * 30
    assert calls == [(10, 4)] * 4 and "sample" not in vars(lm.head)


def test_speed_ups_are_of_seconds_of_audio():
    """MusicGen's 50 frames per second cost twice the 25 of its rivals."""
    found = tables.speed_columns({"rq": Speed(8.0, 4.0, 25), "calm": Speed(5.0, 1.0, 25),
                                  "delay": Speed(4.0, 0.0625, 50)}, "rq")
    assert found["rq"] == {"overall": 1, "sampler": 1, "share": 0.5}
    assert found["calm"] == {"overall": 1.6, "sampler": 4, "share": 0.2}
    assert found["delay"]["overall"] == 1 and found["delay"]["sampler"] == 32


# ---------------------------------------------------------------- rows


def arguments(**values):
    return types.SimpleNamespace(**{"calm": None, "flow": None, "rq": None, "rq16": None,
                                    "delay": None} | values)


def test_trigflow_is_the_stage_before_consistency_unless_a_run_is_named(monkeypatch):
    monkeypatch.setattr(systems, "find_stages", lambda run: ["lm", "consistency"])
    assert tables.run_of("flow", arguments(calm="a")) == ("a", "lm")
    assert tables.run_of("flow", arguments(calm="a", flow="b")) == ("b", "lm")
    monkeypatch.setattr(systems, "find_stages", lambda run: ["lm"])
    assert tables.run_of("flow", arguments(calm="a")) == ("", "")


def test_a_row_takes_its_settings_to_its_run():
    row = paper_tables.TABLES["table2"].rows[4]
    system = tables.system_of(row, arguments(calm="out/a"))
    assert system == systems.System(row.label, "out/a", "", {"temperature": 0.8, "steps": 1})
    assert tables.system_of(row, arguments(rq="out/a")) is None


def test_tables_without_a_run_say_which_option_is_missing():
    with pytest.raises(BadInput, match="--calm out/quickstart"):
        tables.open_rows(paper_tables.TABLES["table4"].rows, arguments())


def test_printed_figures_stand_in_columns_that_their_table_has():
    for name, table in paper_tables.TABLES.items():
        columns = table.columns or {"fad": ""}
        assert table.rows and all(set(row.paper) <= set(columns) for row in table.rows), name
        labels = [row.label for row in table.rows]
        assert len(labels) == len(set(labels)), name


def test_bit_rates_of_the_configs_are_those_of_table_3():
    printed = {row.label: row.paper["bitrate"] for row in paper_tables.TABLES["table3"].rows
               if "bitrate" in row.paper}
    for name, label in (("rq_music", "VQ-VAE (Mimi)"), ("delay_music", "EnCodec")):
        cfg = load(f"{ROOT}/configs/paper/{name}.toml")
        assert tables.codec_columns(cfg.vae)["bitrate"] == printed[label]
    assert tables.codec_columns(load(f"{ROOT}/configs/paper/calm_music.toml").vae) == {
        "size": "128 dims", "frame_rate": "25"}


def test_a_table_has_two_lines_per_row_and_rows_that_only_we_have(capsys):
    table = paper_tables.Table("A table", {"fad": "FAD", "n": "n"}, [
        paper_tables.Row("base", paper={"fad": "0.93"}), paper_tables.Row("other", paper={})])
    tables.print_rows(table, table.columns, {"base": {"fad": Figure(1.5, 1.0, 2.0, 9), "n": 3},
                                             "mine": {"fad": None, "n": 0.25}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert tables.text_of("overall", 1.26) == "x1.3" and tables.text_of("share", 0.066) == "6.6%"
    assert lines == [["A", "table"], ["FAD", "n"], ["base", "paper", "0.93", "-"],
                     ["ours", "1.500", "[1.000,", "2.000]", "3"], ["other", "paper", "-", "-"],
                     ["mine", "ours", "-", "0.25"]]


def test_votes_become_columns_of_the_rows_that_bear_the_systems_names(tmp_path):
    answer = {"format": tables.listen.FORMAT, "study": "s", "listener": "ann",
              "systems": ["one 1 step", "two"], "ratings": [{"system": "one 1 step", "score": 4}],
              "pairs": [{"left": "one 1 step", "right": "two", "choice": "left"}]}
    path = str(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(answer))
    found = tables.heard_columns([path], ["One, 1 step", "Two"])
    assert found["One, 1 step"]["elo"].value == round(2000 + 400 * np.log10(1.1 / 0.6))
    assert found["One, 1 step"]["quality"].value == 4 and found["Two"]["quality"] is None
    assert [found[name]["rank"] for name in found] == [1, 2]
    with pytest.raises(BadInput, match="no row of the table is named one 1 step; in the test, nam"):
        tables.heard_columns([path], ["Two", "Three"])


# ---------------------------------------------------------------- ablations


def test_an_ablation_prints_means_and_differences_beside_the_paper(monkeypatch, capsys):
    figures = {"full": [{"fad music": 1.0}, {"fad music": 3.0}],
               "none": [{"fad music": 5.0}, {"fad music": 7.0}],
               **{row: [{"fad music": 2.0}, {"fad music": 2.0}]
                  for row in ("no_multiplier", "no_noise", "no_short")}}
    monkeypatch.setattr(ablation_tables, "plan_rows", lambda rows, a: ([], ["distance"]))
    monkeypatch.setattr(ablation_tables.ablate, "measure", lambda *a: figures)
    a = types.SimpleNamespace(family="consistency", seeds="0,1", kind="music", vae=None)
    found = ablation_tables.table5(a)
    lines = capsys.readouterr().out.splitlines()
    assert "FAD music" in lines[2] and "less full" in lines[2]
    assert lines[-2].split()[:3] == ["none", "paper", "8.38"]
    assert lines[-1].split() == "ours 6.000 ± 12.706 4.000 ± 0.000".split()
    assert found["table5"]["less full"]["none"]["fad music"]["mean"] == 4


def test_threads_and_clips_reach_both_children_and_a_family_without_a_study_has_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    a = types.SimpleNamespace(family="consistency", seeds="0", out="out", vae=None, train="",
                              study="distance --limit 4", threads=1, manifest="valid.jsonl")
    [run], study = ablation_tables.plan_rows(["full"], a)
    assert run.resolved.threads == 1
    assert study == "distance --threads 1 --manifest valid.jsonl --limit 4".split()
    a.family, a.study = "toy", ""
    assert ablation_tables.plan_rows(["full"], a)[1] == []


def test_the_curve_of_figure_2_is_the_held_out_energy_score_of_the_language_model(tmp_path):
    rows = [{"stage": "vae", "step": 5, "valid_energy_music": 9.0},
            {"stage": "lm", "step": 10, "valid_energy_music": 0.5, "valid_energy_speech": 0.1},
            {"stage": "lm", "step": 15, "head": 0.3},
            {"stage": "lm", "step": 20, "valid_energy_music": 0.4}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ablation_tables.energy_curve(str(tmp_path), "music") == [(10, 0.5), (20, 0.4)]


def test_figure_2_has_intervals_over_seeds_and_differences_seed_by_seed():
    """Two seeds: the interval is the mean ± 12.706 standard errors, half of their difference."""
    curves = {1: [[(10, 0.5), (20, 0.4)], [(10, 0.7), (20, 0.2)]],
              8: [[(20, 0.3)], [(20, 0.1)]]}
    (step, figure), _ = ablation_tables.mean_curve(curves[1])
    assert (step, figure.value) == (10, pytest.approx(0.6))
    assert figure.high - figure.value == pytest.approx(12.706 * 0.1, rel=1e-3)
    less = ablation_tables.ends_less(curves, 8)[1]
    assert [less.value, less.low, less.high] == pytest.approx([0.1] * 3)


def test_the_pictures_are_drawn(tmp_path):
    figure = Figure(1.0, 0.5, 2.0, 9)
    tables.draw_steps(str(tmp_path / "steps.png"), {
        "1": {"calm_fad": figure, "flow_fad": figure, "calm_mmd": Figure(1.0)}})
    tables.draw_similarity(str(tmp_path / "fig3.png"), {
        "recordings": {"-": figure}, "CALM": {"0.2": figure, "1": figure}})
    curves = {1: [(10, figure), (20, figure)]}
    ablation_tables.draw_multipliers(str(tmp_path / "fig2.png"), curves, "music")
    for name in ("steps", "fig3", "fig2"):
        assert (tmp_path / f"{name}.png").stat().st_size > 3000


def test_reference_clips_are_those_of_training_or_a_whole_manifest(tmp_path):
    """Fault: where the training had split its manifest, "train" held the held-out clips too, and
    then those alone.
    """
    folder = untrained_run(tmp_path)
    path = f"{tmp_path}/clips.jsonl"
    write_manifest(path, corpus(tmp_path, 16))
    train, valid = split_off(load_manifest(path), 0)
    cfg, *_ = open_run(folder)

    def found(reference, **data):
        data = dataclasses.replace(cfg.data, manifest=path, **data)
        clips = tables.reference_clips(reference, folder, dataclasses.replace(cfg, data=data),
                                       "speech", 100)
        return {clip.id for clip in clips}

    everything = {clip.id for clip in [*train, *valid] if clip.kind == "speech"}
    assert found("train") == everything - {clip.id for clip in valid} != everything
    assert found("train", valid=path) == found(path) == everything
