"""train.py --from RUN: every stage of a run begins with another run's weights."""
import dataclasses
import os

import pytest
import torch

import checks
import train
from checkpoint import load_checkpoint
from cli import BadInput
from config import initial_weights, load, make_model
from conftest import run, write
from untrained import untrained_run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run folder with a VAE and a language model of random weights."""
    return untrained_run(tmp_path_factory.mktemp("source"))


def config(folder, *overrides):
    """The tiny config, with its run in folder/mine."""
    return load(write(str(folder), out="mine"), list(overrides))


def inits(cfg):
    """{stage: the file that it begins with} of a config's stages that have one."""
    return {name: os.path.basename(getattr(cfg.train, name).init) for name in cfg.stages
            if getattr(cfg.train, name).init}


def test_stages_with_a_checkpoint_begin_there_and_consistency_with_this_runs_lm(source, tmp_path):
    """Of another run's consistency.pt would be left nothing of what lm has learned here."""
    cfg = train.start_from(config(tmp_path), source)
    assert cfg.stages == ["vae", "lm", "consistency"]
    assert cfg.train.vae.init == f"{source}/vae.pt"
    assert inits(cfg) == {"vae": "vae.pt", "lm": "lm.pt"}


def test_an_init_that_the_command_line_names_comes_first(source, tmp_path):
    cfg = train.start_from(config(tmp_path, "--train.lm.init", "other.pt"), source)
    assert inits(cfg) == {"vae": "vae.pt", "lm": "other.pt"}


def test_a_run_that_kept_its_last_stage_alone_gives_that_to_lm(tmp_path):
    """pretrained/voice has no lm: its consistency model has the same weights, and a counter of its
    objective.
    """
    source = f"{tmp_path}/source"
    os.mkdir(source)
    cfg = config(tmp_path)
    weights = make_model(cfg, "consistency").state_dict()
    torch.save({"stage": "consistency", "step": 1, "done": True, "model": {}, "ema": weights,
                "config": dataclasses.asdict(cfg), "optimizers": {}}, f"{source}/consistency.pt")
    state = load_checkpoint(f"{source}/consistency.pt")
    own = make_model(cfg, "lm").state_dict()
    begin = initial_weights(state, "lm")
    assert begin.keys() == own.keys() and "head.it" in weights.keys() - begin.keys()
    assert inits(train.start_from(cfg, source)) == {"lm": "consistency.pt"}


def test_other_sizes_are_one_line_before_anything_is_trained(source, tmp_path):
    cfg = config(tmp_path, "--lm.backbone.dim", "32")
    with pytest.raises(BadInput) as error:
        train.start_from(cfg, source)
    line = str(error.value)
    assert line.startswith(f"{source}/lm.pt: ")
    assert "settings that differ: [lm] dim = 16, here dim = 32; give" in line
    assert line.endswith(f"give --config {source}/config.toml, or another run")


def bring(cfg, folder):
    """What bring_stages_before says of a run folder `mine` that is there."""
    os.makedirs(f"{folder}/mine", exist_ok=True)
    said = []
    checks.bring_stages_before(cfg, said.append)
    return said


def test_a_language_model_alone_takes_the_vae_of_the_other_run_as_it_is(source, tmp_path):
    """Fault: it was refused, and a VAE had to be trained again; our own line of how to train a
    finished stage on led there.
    """
    cfg = train.start_from(config(tmp_path, "--stages", "lm,consistency"), source)
    assert inits(cfg) == {"lm": "lm.pt"}
    assert bring(cfg, tmp_path) == [f"vae: copied from {source}/vae.pt"]
    old, new = (load_checkpoint(f"{run}/vae.pt") for run in (source, f"{tmp_path}/mine"))
    assert new["done"] and all(old["ema"][key].equal(new["ema"][key]) for key in old["ema"])
    assert bring(cfg, tmp_path) == []                              # from now on it is this run's


def test_consistency_alone_takes_vae_and_lm(source, tmp_path):
    cfg = config(tmp_path, "--stages", "consistency", "--train.vae.init", f"{source}/vae.pt",
                 "--train.lm.init", f"{source}/lm.pt")
    assert bring(cfg, tmp_path) == [f"{name}: copied from {source}/{name}.pt"
                                    for name in ("vae", "lm")]


def test_consistency_alone_begins_with_a_run_that_has_none_yet(source, tmp_path):
    """Fault: "has no checkpoint of consistency", although it goes on from the run's lm."""
    cfg = train.start_from(config(tmp_path, "--stages", "consistency"), source)
    assert not inits(cfg)
    assert bring(cfg, tmp_path) == [f"{name}: copied from {source}/{name}.pt"
                                    for name in ("vae", "lm")]


def test_a_vae_alone_begins_no_language_model(source, tmp_path):
    os.makedirs(tmp_path / "vae_only")
    os.link(f"{source}/vae.pt", tmp_path / "vae_only" / "vae.pt")
    with pytest.raises(BadInput, match="vae_only: has no checkpoint of lm, consistency"):
        train.start_from(config(tmp_path, "--stages", "lm,consistency"), f"{tmp_path}/vae_only")


def test_what_a_language_model_goes_on_from_must_be_there_finished_and_fit(source, tmp_path):
    """Fault: "no such checkpoint; train it first", whatever --train.vae.init said."""
    alone = ["--stages", "lm", "--train.vae.init"]
    with pytest.raises(BadInput, match="mine has no vae yet; put vae before them, or name the one"):
        bring(config(tmp_path, *alone[:2]), tmp_path)
    with pytest.raises(BadInput, match=r"vae.pt: trained with \[vae\] latent_dim = 4, the config"):
        bring(config(tmp_path, *alone, f"{source}/vae.pt", "--vae.latent_dim", "5"), tmp_path)
    state = load_checkpoint(f"{source}/vae.pt")
    torch.save(state | {"done": False}, tmp_path / "vae.pt")
    with pytest.raises(BadInput, match="vae.pt: its training is not finished"):
        bring(config(tmp_path, *alone, f"{tmp_path}/vae.pt"), tmp_path)
    assert os.listdir(tmp_path / "mine") == []


def test_a_finished_stage_is_trained_on_in_another_folder_with_what_follows_it(tmp_path):
    cfg = config(tmp_path)
    assert checks.to_train_on(cfg, "lm") == \
        f"use --out DIR --from {cfg.out} --stages lm,consistency"
    assert checks.to_train_on(cfg, "vae").endswith("--stages vae,lm,consistency")
    both = config(tmp_path, "--stages", "vae,lm,audiocalm,audiocalm_lsd")
    assert checks.to_train_on(both, "lm").endswith("--stages lm")
    assert checks.to_train_on(both, "audiocalm").endswith("--stages audiocalm,audiocalm_lsd")


def test_other_weights_to_begin_with_are_named_and_none_are_not(tmp_path):
    """Fault: the same command without --from said that a finished stage had begun with them."""
    begun = config(tmp_path, "--train.lm.init", "a.pt")
    other = config(tmp_path, "--train.lm.init", "b.pt")
    assert checks.training_changes(begun, other, "lm") == [("init = a.pt", "b.pt")]
    assert checks.training_changes(begun, config(tmp_path), "lm") == []


@pytest.mark.parametrize("wrong, message", [
    ("gone", "gone: no such folder"), ("mine", "is the run itself"),
    ("empty", "empty: has no checkpoint of vae, lm, consistency")])
def test_a_run_to_begin_with_is_refused_where_it_is_none(wrong, message, tmp_path):
    for name in ("mine", "empty"):
        (tmp_path / name).mkdir()
    with pytest.raises(BadInput, match=message):
        train.start_from(config(tmp_path), f"{tmp_path}/{wrong}")


@pytest.mark.long
def test_the_first_step_goes_on_from_the_other_runs_weights(source, tmp_path):
    """One step of a tiny learning rate leaves the weights where they were; the same command again
    finds its own.
    """
    options = ("--config", write(str(tmp_path), out="mine"), "--from", source,
               "--stages", "vae", "--train.vae.steps", "1", "--train.vae.lr", "1e-9",
               "--vae.loss_weights.adv", "0", "--vae.loss_weights.feat", "0")
    done = run("train.py", *options)
    assert done.returncode == 0, done.stderr
    assert f"vae: starts from {source}/vae.pt (1 steps)" in done.stdout
    old = load_checkpoint(f"{source}/vae.pt")["ema"]
    new = load_checkpoint(f"{tmp_path}/mine/vae.pt")["ema"]
    for key in new.keys() - {"latent_mean", "latent_std"}:
        torch.testing.assert_close(new[key], old[key], atol=1e-6, rtol=0)

    again = run("train.py", *options, "--train.vae.steps", "2")
    assert again.returncode == 0 and "starts from" not in again.stdout, again.stderr
