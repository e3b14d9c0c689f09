"""Configs are read strictly, overridden from the command line and written back unchanged."""
import dataclasses
import inspect
import re
import textwrap
import typing

import pytest

from cli import BadInput
from config import STAGES, Config, dump, load, resolve
from schema import build


def write(path, text):
    path.write_text(text)
    return path


def test_overrides_reach_nested_tables_with_their_types(tmp_path):
    path = write(tmp_path / "a.toml", "[lm.backbone]\nlayers = 2\n")
    cfg = load(path, ["--lm.backbone.layers", "6", "--train.vae.lr=0.5", "--out", "runs/x",
                      "--vae.ratios", "[2, 160]", "--data.weights.speech", "1"])
    assert ((cfg.lm.backbone.layers, cfg.train.vae.lr, cfg.out, cfg.vae.ratios)
            == (6, 0.5, "runs/x", [2, 160]))
    assert cfg.data.weights == {"speech": 1.0}


@pytest.mark.parametrize("text, value", [(".15", 0.15), ("-.5", -0.5), ("1e-3", 1e-3)])
def test_a_number_may_be_written_without_its_zero(tmp_path, text, value):
    path = write(tmp_path / "b.toml", "")
    assert load(path, ["--sample.cfg", text]).sample.cfg == value
    assert load(path, ["--out", "./runs", "--data.manifest=.runs/a"]).out == "./runs"


def test_a_list_of_names_can_be_given_with_commas(tmp_path):
    path = write(tmp_path / "c.toml", "")
    assert load(path, ["--stages", "vae"]).stages == ["vae"]
    assert load(path, ["--stages", "vae,lm"]).stages == ["vae", "lm"]


def test_a_dumped_config_loads_to_the_same_value(tmp_path):
    cfg = build(Config, {"sample": {"texts": {"speech": ["one \"two\"", "drei ü"]}},
                         "gan": {"loss_weights": {"mel": 2}}})
    assert load(write(tmp_path / "b.toml", dump(cfg))) == cfg


@pytest.mark.parametrize("name", ["magnitude", "phase"])
def test_losses_on_what_an_inverse_stft_is_asked_for_need_one(name):
    weights = {"gan": {"loss_weights": {name: 1.0}}}
    build(Config, weights)
    with pytest.raises(BadInput, match=f"gan.loss_weights: {name} is of an inverse STFT"):
        build(Config, {**weights, "vae": {"decoder": "conv"}})


def test_the_phase_loss_needs_a_decoder_that_predicts_phases():
    with pytest.raises(BadInput, match="phase is of phases that the decoder predicts"):
        build(Config, {"gan": {"loss_weights": {"phase": 1.0}}, "vae": {"phase": "locked"}})


def test_a_strided_front_replaces_whole_ratios_of_a_conv_encoder():
    build(Config, {"vae": {"encoder": "conv", "front_stride": 16}})
    with pytest.raises(BadInput, match=r"front_stride: must be the product of the last ratios, one "
                                       r"of \[160, 16, 4\], got 8"):
        build(Config, {"vae": {"encoder": "conv", "front_stride": 8}})
    with pytest.raises(BadInput, match="front_stride: needs encoder = \"conv\""):
        build(Config, {"vae": {"front_stride": 16}})


def test_whole_numbers_are_accepted_where_a_float_is_wanted_but_not_the_reverse():
    assert build(Config, {"train": {"lm": {"lr": 1}}}).train.lm.lr == 1.0
    with pytest.raises(BadInput, match="train.lm.steps: expected int, got 1.5"):
        build(Config, {"train": {"lm": {"steps": 1.5}}})
    with pytest.raises(BadInput, match="train.lm.steps: expected int, got True"):
        build(Config, {"train": {"lm": {"steps": True}}})


def test_a_wrong_element_of_a_list_or_table_is_named():
    with pytest.raises(BadInput, match="vae.ratios: expected int, got 'x'"):
        build(Config, {"vae": {"ratios": [4, "x"]}})
    with pytest.raises(BadInput, match="data.weights.speech: expected float"):
        build(Config, {"data": {"weights": {"speech": "half"}}})


def test_the_consistency_stage_is_refused_for_weights_that_mean_something_else():
    for objective in ("lsd", "rq"):
        with pytest.raises(BadInput, match="^stages: consistency goes on from the weights of trigflow"):
            build(Config, {"stages": ["lm", "consistency"],
                           "lm": {"head": {"objective": objective}}})


def test_values_that_a_dataclass_refuses_carry_their_table():
    with pytest.raises(BadInput, match="^lm.backbone.heads: dim / heads"):
        build(Config, {"lm": {"backbone": {"dim": 10, "heads": 3}}})


def old_layout(cfg):
    """A config as a (nested) dict of before 2026-11-27: [gan] inside [vae], `clip` of a stage."""
    table = dataclasses.asdict(cfg)
    table["vae"] |= table.pop("gan")
    for stage in STAGES:
        stage = table["train"][stage]
        stage["clip"] = stage.pop("grad_clip")
    return table


def test_a_config_of_before_gan_had_its_table_resolves_to_the_same_value():
    cfg = build(Config, {"vae": {"latent_dim": 7}, "gan": {"disc_width": 5, "balance": 0.5},
                         "train": {"vae": {"grad_clip": 0.25}}})
    assert resolve(old_layout(cfg)) == cfg
    assert resolve(dataclasses.asdict(cfg)) == cfg


def test_an_old_key_on_the_command_line_reaches_its_new_table_beside_the_others(tmp_path):
    path = write(tmp_path / "a.toml", "[gan.loss_weights]\nmel = 5.0\n")
    cfg = load(path, ["--vae.loss_weights.adv", "2", "--vae.disc_warmup", "9"])
    assert cfg.gan.loss_weights == {"mel": 5.0, "adv": 2.0} and cfg.gan.disc_warmup == 9


def test_a_new_key_on_the_command_line_reaches_a_file_of_the_old_layout(tmp_path):
    path = write(tmp_path / "a.toml", "[vae]\nloss_windows = [128]\n[train.lm]\nclip = 2.0\n")
    cfg = load(path, ["--gan.loss_windows", "[64]", "--train.lm.grad_clip", "0.5"])
    assert cfg.gan.loss_windows == [64] and cfg.train.lm.grad_clip == 0.5


def test_a_rule_names_a_key_of_its_own_table():
    """Fault: messages named doubled keys such as lm.head.head.objective, since the table's own name
    is put before what its rule says.
    """
    for table in (Config, *config_tables(Config)):
        source = textwrap.dedent(inspect.getsource(table))
        for key in re.findall(r'raise ValueError\(\s*f?["\'](\w[\w.]*):', source):
            fields = typing.get_type_hints(table)
            for name in key.split("."):
                assert name in fields, f"{table.__name__}: {key}"
                fields = typing.get_type_hints(fields[name]) if dataclasses.is_dataclass(
                    fields[name]) else {}


def config_tables(table):
    """Every dataclass that is a field of a table, or of a field's table."""
    for kind in typing.get_type_hints(table).values():
        if dataclasses.is_dataclass(kind):
            yield kind
            yield from config_tables(kind)
