"""Ablations: every row is a valid config, means with honest errors, one VAE for all rows."""
import json
import os
import sys
from dataclasses import asdict, replace

import pytest
import torch

from cli import BadInput
from config import load, make_model, save_checkpoint
from conftest import ROOT, run, write
from gan import Discriminators
from tools import ablate
from vae import VAE

ABLATION = f"{ROOT}/configs/ablation.toml"
FAMILIES = ablate.read_families(ABLATION)


def resolve(name, overrides=()):
    """{row: Config} of a family, as the rows are trained."""
    family = FAMILIES[name]
    runs = ablate.plan(name, family, list(family.rows), [0], "out", overrides)
    return {run.row: run.resolved for run in runs}


def command(monkeypatch, *arguments):
    """tools.ablate in this process, from the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tools.ablate", *map(str, arguments)])
    ablate.main()


# ---------------------------------------------------------------- the shipped file

@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_of_every_family_is_a_config_whose_models_build(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for row, cfg in resolve(name).items():
        assert cfg.stages[0] == "vae" and len(cfg.stages) == 2, row
        with torch.device("meta"):
            VAE(cfg.vae), Discriminators(cfg.gan, cfg.vae.channels)
            make_model(cfg, cfg.stages[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_a_family_differ_and_share_a_vae(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = list(resolve(name).values())
    assert len({ablate.vae_settings(cfg) for cfg in configs}) == 1
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


@pytest.mark.parametrize("name", ["toy", "consistency", "audiocalm"])
def test_rows_on_the_toy_corpus_have_the_vae_of_their_config(name, monkeypatch):
    """Fault: two families set losses of the waveform on phases that nobody asks for."""
    monkeypatch.chdir(ROOT)
    cfg = load(FAMILIES[name].config)
    for row in resolve(name).values():
        assert (row.vae, row.gan, row.train.vae) == (cfg.vae, cfg.gan, cfg.train.vae)


@pytest.mark.parametrize("name, base, row, key, value", [
    ("audiocalm", "amome", "block_1", "block", 1), ("audiocalm", "amome", "block_2", "block", 2),
    ("audiocalm", "amome", "block_8", "block", 8),
    ("audiocalm", "amome", "history_0", "history_noise", 0.0),
    ("audiocalm", "amome", "history_0.6", "history_noise", 0.6),
    ("prompt", "noise_0.1", "noise_0", "prompt_noise", 0.0),
    ("prompt", "noise_0.1", "noise_0.5", "prompt_noise", 0.5)])
def test_a_sweep_of_audiocalm_differs_from_its_base_in_one_value(
        name, base, row, key, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = resolve(name)
    base, cfg = rows[base], rows[row]
    assert getattr(base.audiocalm, key) != value
    assert cfg == replace(base, audiocalm=replace(base.audiocalm, **{key: value}))


def test_list_prints_every_family_and_row(monkeypatch, capsys):
    command(monkeypatch, ABLATION, "--list")
    printed = capsys.readouterr().out
    for name, family in FAMILIES.items():
        assert f"{name}: {family.about}" in printed
        for row in family.rows:
            assert f"\n    {row}" in printed


# ---------------------------------------------------------------- the order of options

def test_a_rows_options_follow_the_common_ones_and_the_command_line_comes_last(tmp_path):
    family = ablate.Family(config=write(str(tmp_path)), common="--lm.noise 0.1 --seed 5",
                           rows={"a": "", "b": "--lm.noise 0.2"})
    a, b = ablate.plan("x", family, ["a", "b"], [3], "/out", [])
    assert (a.resolved.lm.noise, b.resolved.lm.noise) == (0.1, 0.2)
    assert (a.folder, b.folder) == ("/out/x_a_3", "/out/x_b_3")
    a, b = ablate.plan("x", family, ["a", "b"], [3], "/out", ["--lm.noise", "0.3"])
    assert (a.resolved.lm.noise, b.resolved.lm.noise) == (0.3, 0.3)


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize("arguments, says", [
    (["{file}"], "which family? valid: tiny"),
    (["{file}", "large"], "family large: unknown; valid: tiny"),
    (["{file}", "tiny", "--rows", "a,c"], "--rows c: unknown; valid: a, b"),
    (["{file}", "tiny", "--seeds", "one"], "--seeds one: must be whole numbers"),
    (["{file}", "tiny", "--lm.noise", "2"], "tiny, row a: lm.noise: must lie in"),
    (["{file}", "tiny", "--lm.noise"], "--lm.noise: needs a value"),
    (["{file}", "tiny", "--study", "sweep --limit 2"],
     "--study sweep: unknown; valid: continue, distance"),
    (["{file}", "tiny", "--evaluate", "--metrics 'wer"], "--evaluate: No closing quotation"),
    (["{none}", "tiny"], "no such file")])
def test_a_mistake_is_found_before_anything_trains(arguments, says, tmp_path, monkeypatch):
    path = tmp_path / "ablation.toml"
    path.write_text(f'[tiny]\nconfig = "{write(str(tmp_path))}"\n[tiny.rows]\na = ""\nb = ""\n')
    arguments = [a.format(file=path, none=tmp_path / "none.toml") for a in arguments]
    with pytest.raises(BadInput) as e:
        command(monkeypatch, *arguments, "--out", tmp_path / "runs")
    assert says in str(e.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text, says", [
    ('[x]\nconfig = "a.toml"\n', "x.rows: missing"),
    ('[x]\nrows = {a = ""}\n', "x.config: missing"),
    ('[x]\nconfig = "a.toml"\nrow = {a = ""}\n', "x.row: unknown key"),
    ('[x]\nconfig = "a.toml"\nrows = {a = 1}\n', "x.rows.a: expected str"),
    ('[x\n', "not readable as TOML")])
def test_a_mistake_in_the_file_names_its_key(text, says, tmp_path):
    (tmp_path / "ablation.toml").write_text(text)
    with pytest.raises(BadInput, match=says):
        ablate.read_families(tmp_path / "ablation.toml")


def test_an_unknown_row_is_one_line(tmp_path):
    done = run("-m", "tools.ablate", ABLATION, "toy", "--rows", "no_nose", "--out", f"{tmp_path}")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "--rows no_nose: unknown; valid: full, no_noise" in done.stderr


def test_a_mistake_in_an_option_is_one_line(tmp_path):
    done = run("-m", "tools.ablate", ABLATION, "toy", "--out", f"{tmp_path}",
               "--lm.backbone.layers", "two")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "lm.backbone.layers" in done.stderr


# ---------------------------------------------------------------- runs and their figures

@pytest.mark.long
def test_two_rows_give_a_table_and_share_a_vae(tmp_path):
    with open(f"{tmp_path}/ablation.toml", "w") as f:
        f.write(f'[tiny]\nconfig = "{write(str(tmp_path))}"\n'
                'common = "--stages vae,lm --train.vae.steps 2"\n'
                'evaluate = "--limit 1 --repeats 1"\n[tiny.rows]\na = ""\nb = "--lm.noise 1"\n')
    done = run("-m", "tools.ablate", f"{tmp_path}/ablation.toml", "tiny",
               "--out", f"{tmp_path}/runs", "--seeds", "3", "--json", f"{tmp_path}/t.json",
               "--picture", f"{tmp_path}/t.png",
               "--train.lm.steps", "2", "--lm.noise", "0.5")
    assert done.returncode == 0, done.stderr
    with open(f"{tmp_path}/t.json") as f:
        table = json.load(f)
    assert set(table) == {"a", "b"} and len(table["a"]["held-out loss"]["seeds"]) == 1
    assert "energy score speech" in table["a"]
    assert table["a"] == table["b"]                  # the same experiment
    with open(f"{tmp_path}/t.png", "rb") as f:
        assert f.read(8) == b"\x89PNG\r\n\x1a\n"
    runs = f"{tmp_path}/runs"
    assert os.path.samefile(f"{runs}/tiny_a_3/vae.pt", f"{runs}/tiny_b_3/vae.pt")
    assert load(f"{runs}/tiny_b_3/config.toml").seed == 3


def vae_run(folder, *overrides):
    """A run folder with the vae.pt that a config's VAE would leave, untrained."""
    cfg = load(f"{ROOT}/configs/quickstart.toml", overrides)
    os.makedirs(f"{folder}/toy", exist_ok=True)
    save_checkpoint(f"{folder}/vae.pt", {"stage": "vae", "config": asdict(cfg), "model": {},
                                         "done": True, "step": 0, "ema": None, "optimizers": {}})
    return str(folder), cfg


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_every_family_take_the_vae_of_a_given_run(name, tmp_path, monkeypatch, capsys):
    """Fault: `ablate --vae` of the newcomer's only VAE, the quickstart's, was refused by every row
    that ships, since their [vae] and [gan] are older.
    """
    monkeypatch.chdir(ROOT)
    folder, saved = vae_run(tmp_path / "q", "--gan.loss_weights.mel", "3.5")
    family = FAMILIES[name]
    plain = ablate.plan(name, family, list(family.rows), [0], "out", [])
    runs = ablate.plan(name, family, list(family.rows), [0], "out", [], folder)
    for before, run in zip(plain, runs):
        assert (run.resolved.vae, run.resolved.gan) == (saved.vae, saved.gan)
        assert replace(run.resolved, vae=before.resolved.vae, gan=before.resolved.gan
                       ) == before.resolved
        # what train.py gets says the same
        assert load(family.config, run.options) == run.resolved
    says = capsys.readouterr().err
    assert says.startswith(f"rows take the VAE of {folder}: ") and "mel = 3.5" in says
    if name == "speech":
        assert "vae.stft_size = 320 instead of 0" in says
    [row, *_] = family.rows
    [own] = ablate.plan(name, family, [row], [0], "out", ["--vae.width", "48"], folder)
    assert own.resolved.vae == replace(saved.vae, width=48)


def test_a_toy_corpus_of_other_settings_is_not_made_anew_through_a_link(tmp_path):
    """Fault: `ablate ... prompt --vae out/quickstart` (four voices) linked the quickstart's corpus
    into its run folder, where train.py replaced it.
    """
    folder, saved = vae_run(tmp_path / "q")
    ablate.link_vae(folder, str(tmp_path / "same"), saved)
    assert os.path.samefile(tmp_path / "same" / "toy", f"{folder}/toy")
    ablate.link_vae(folder, str(tmp_path / "other"),
                    replace(saved, toy=replace(saved.toy, voices=4)))
    assert sorted(os.listdir(tmp_path / "other")) == ["vae.pt"]
    with pytest.raises(BadInput, match="has no vae.pt"):
        ablate.link_vae(str(tmp_path), str(tmp_path / "x"), saved)


@pytest.mark.parametrize("evaluation, study, scripts", [
    ([], [], ["evaluate.py"]), (["--limit", "2"], [], ["evaluate.py"]),
    ([], ["continue", "--limit", "2"], ["tools.studies"]),
    (["--limit", "2"], ["continue"], ["evaluate.py", "tools.studies"])])
def test_a_study_takes_the_place_of_evaluate_unless_both_are_asked_for(
        evaluation, study, scripts, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(ablate, "run_command", lambda *words: commands.append(words))
    family = ablate.Family(config=write(str(tmp_path)), rows={"a": ""})
    planned, = ablate.plan("x", family, ["a"], [0], str(tmp_path), [])
    ablate.evaluate(planned, evaluation, study)
    found = [words[1] if words[0] == "-m" else os.path.basename(words[0]) for words in commands]
    assert found == scripts
    if study:
        assert commands[-1] == ("-m", "tools.studies", "continue", "--run", planned.folder,
                                "--json", f"{planned.folder}/study.json", *study[1:])

    # figures that are there are kept, but not those of other words
    for name in ("figures.json", "study.json"):
        with open(f"{planned.folder}/{name}", "w") as f:
            f.write("{}")
    commands.clear()
    ablate.evaluate(planned, evaluation, study)
    assert commands == []
    ablate.evaluate(planned, [*evaluation, "--seed", "1"], study)
    assert len(commands) == 1 and commands[0][-2:] == ("--seed", "1")


def test_a_continuation_gives_its_first_and_last_three_seconds(tmp_path):
    study = {"continue lm": {"music": {"alive": [1.0] * 6,
                                       "level": [0.0, -1.0, -2.0, -3.0, -4.0, None],
                                       "mmd": [0.0, 0.1, 0.1, 0.1, 0.1, None],
                                       "beat": [0.9, None, None, 0.2, 0.4, None]}}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"stage": "vae", "step": 1, "valid_head": 9.0},
        {"stage": "lm", "step": 1, "valid_head": 2.0, "valid_head_music": 2.0},
        {"stage": "lm", "step": 2, "valid_head": 1.0, "valid_head_music": 1.5,
         "valid_energy_music": 0.5})))
    assert ablate.read(tmp_path) == pytest.approx({
        "level music first": -2.0, "level music last": -3.0,
        "mmd music first": 0.1, "mmd music last": 0.1,
        "beat music first": 0.3, "beat music last": 0.3,
        "held-out loss": 1.0, "held-out loss music": 1.5, "energy score music": 0.5})

    # with evaluate.py's figures beside it
    figures = {"lm": {"facts": {"music": 0.7}, "length": {"music": 0.9}, "speech": {"wer": 0.2}}}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    found = ablate.read(tmp_path)
    assert list(found)[:4] == ["facts music", "length music", "wer", "level music first"]


def test_a_run_without_figures_of_a_language_model_is_named(tmp_path):
    (tmp_path / "figures.json").write_text('{"vae": {}}')
    with pytest.raises(BadInput, match="no figures of a language model"):
        ablate.read(tmp_path)


# ---------------------------------------------------------------- means and errors

def test_the_error_is_half_of_students_95_percent_interval():
    mean, error = ablate.mean_and_error([1.0, 3.0])
    assert mean == 2.0 and error == pytest.approx(12.706)        # std sqrt(2), / sqrt(2)
    assert ablate.mean_and_error([1.0, 2.0, 3.0])[1] == pytest.approx(4.303 / 3 ** 0.5)
    assert ablate.mean_and_error([5.0]) == (5.0, None)


def test_a_figure_that_only_some_rows_have_is_a_dash_in_the_others(capsys):
    result = ablate.summarize({"a": [{"x": 1.0}, {"x": 3.0}], "b": [{"y": 2.0}]})
    assert result["a"]["x"] == {"mean": 2.0, "error": pytest.approx(12.706), "seeds": [1.0, 3.0]}
    ablate.print_table(result)
    header, a, b = capsys.readouterr().out.splitlines()
    assert header.split() == ["x", "y"]
    assert a.split() == ["a", "2.000", "±", "12.706", "-"] and b.split() == ["b", "-", "2.000"]


# ---------------------------------------------------------------- differences

def test_differences_are_taken_seed_by_seed():
    """Seeds that differ by 10 hide an effect of 1 in the means, and not in the differences."""
    figures = {"full": [{"fad": 1.0}, {"fad": 11.0}, {"fad": 21.0}],
               "none": [{"fad": 2.0}, {"fad": 12.0}, {"fad": 22.0}]}
    less = ablate.differences(figures, "full")
    assert list(less) == ["none"]
    assert less["none"]["fad"] == {"mean": 1.0, "error": 0.0, "seeds": [1.0, 1.0, 1.0]}
    assert ablate.summarize(figures)["none"]["fad"]["error"] > 20


def test_a_difference_has_the_interval_of_students_t():
    figures = {"full": [{"a": 0.0}, {"a": 0.0}], "row": [{"a": 1.0}, {"a": 3.0, "b": 5.0}]}
    cell = ablate.differences(figures, "full")["row"]
    assert cell["a"]["mean"] == 2 and cell["a"]["error"] == pytest.approx(12.706 * 1.0)
    assert "b" not in cell                                   # the base row has no such figure


def test_figures_of_a_distance_become_columns(tmp_path):
    study = {"distance lm": {"music": {"fad": [2.0, 1.0, 3.0], "facts": [0.5, 0.4, 0.6]}}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    (tmp_path / "log.jsonl").write_text("")
    assert ablate.read(str(tmp_path)) == {"fad music": 2.0, "facts music": 0.5}
