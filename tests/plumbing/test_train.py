"""The loop: resume is exact, accumulation is a large batch, nothing is lost, every config builds.
"""
import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import checks
import optim
import runs
import stages
import train
from backbone import RMSNorm
from cli import BadInput
from config import (STAGES, Config, StageConfig, dump, load, load_checkpoint, make_model, open_run,
                    resolve, save_checkpoint, stage_seed)
from conftest import ROOT, logged, run, write
from data import Clip
from discrete import ResidualVQ
from gan import Discriminators
from latents import LatentBatches
from layers import ConvNeXt
from locks import owned
from parallel import Losses
from schema import build
from vae import VAE


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run, all three stages, never interrupted."""
    folder = str(tmp_path_factory.mktemp("finished"))
    done = run("train.py", "--config", write(folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_leaves_checkpoints_log_picture_and_sounds(finished):
    out = f"{finished[0]}/run"
    for name in ("config.toml", "log.jsonl", "loss.png", "report.html", "vae.pt", "lm.pt",
                 "consistency.pt"):
        assert os.path.getsize(f"{out}/{name}") > 0, name
    for kind in ("speech", "sound", "music"):
        for pattern in (f"*_vae_{kind}1_original.wav", f"*_vae_{kind}1_reconstruction.wav",
                        f"*_vae_{kind}1.png", f"*_lm_{kind}1.wav", f"*_consistency_{kind}1.wav"):
            assert glob.glob(f"{out}/samples/{pattern}"), pattern
    assert "eta" in finished[1].stdout and "steps/s" in finished[1].stdout


def test_finished_stages_are_skipped(finished):
    again = run("train.py", "--config", f"{finished[0]}/tiny.toml")
    assert again.returncode == 0 and again.stdout.count("skipped") == 3


def test_a_run_folder_of_before_gan_had_its_table_is_read_and_skipped(finished, tmp_path):
    """One migration in one place (config.migrate): checkpoints of before 2026-11-27 stay of use."""
    out = f"{tmp_path}/run"
    shutil.copytree(f"{finished[0]}/run", out)
    for stage in ("vae", "lm", "consistency"):
        state = load_checkpoint(f"{out}/{stage}.pt")
        config = state["config"]
        config["vae"] |= config.pop("gan")
        for table in (config["train"][name] for name in STAGES):
            table["clip"] = table.pop("grad_clip")
        save_checkpoint(f"{out}/{stage}.pt", state)
    again = run("train.py", "--config", f"{finished[0]}/tiny.toml", "--out", out)
    assert again.returncode == 0 and again.stdout.count("skipped") == 3, again.stderr
    wavs = []
    for folder in (f"{finished[0]}/run", out):
        made = run("sample.py", "--run", folder, "--text", "one", "--out", f"{tmp_path}/a.wav")
        assert made.returncode == 0, made.stderr
        with open(f"{tmp_path}/a.wav", "rb") as f:
            wavs.append(f.read())
    assert wavs[0] == wavs[1]


def test_other_training_settings_for_a_finished_stage_are_answered_aloud(finished):
    """They were dropped in silence, and config.toml then told what never happened."""
    again = run("train.py", "--config", f"{finished[0]}/tiny.toml", "--train.lm.lr", "0.123")
    assert "lm: was trained with lr = " in again.stdout and "not 0.123" in again.stdout


@pytest.mark.long
def test_fresh_deletes_the_named_stages_alone_and_nothing_where_the_corpus_is_missing(
        finished, tmp_path):
    """Bug: `--stages lm --fresh` deleted vae.pt, before a typo in the manifest was noticed."""
    out = shutil.copytree(f"{finished[0]}/run", tmp_path / "again")
    again = ("train.py", "--config", f"{finished[0]}/tiny.toml", "--out", str(out),
             "--stages", "lm", "--fresh")
    before = {f: os.path.getmtime(out / f) for f in ("vae.pt", "lm.pt", "consistency.pt")}
    for typo in (("--data.manifest", "typo.jsonl"), ("--train.lm.init", "typo.pt")):
        done = run(*again, *typo)
        assert done.returncode == 2 and {f: os.path.getmtime(out / f) for f in before} == before
    done = run(*again)
    assert done.returncode == 0, done.stderr
    after = {f: os.path.getmtime(out / f) for f in before}
    assert [f for f in before if after[f] != before[f]] == ["lm.pt"]
    stages = {json.loads(line)["stage"] for line in open(out / "log.jsonl")}
    assert stages == {"vae", "lm", "consistency"}


def test_half_a_line_of_the_log_left_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "lm", "step": 20}\n{"stage": "lm", "st')
    assert train.read_log(str(tmp_path)) == ['{"stage": "lm", "step": 20}\n']
    assert train.read_log(str(tmp_path / "none")) == []


def test_a_run_killed_at_any_moment_resumes_to_bitwise_the_same_losses_and_weights(
        finished, tmp_path):
    config, out = write(str(tmp_path)), f"{tmp_path}/run"
    for stage, step in (("vae", 6), ("lm", 7)):      # between checkpoints at 4 and 8
        process = subprocess.Popen([sys.executable, "train.py", "--config", config],
                                   cwd=ROOT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.PIPE)
        for line in process.stdout:
            if line.startswith(f"{stage} {step}/"):
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert load_checkpoint(f"{out}/{stage}.pt")["step"] == 4
    done = run("train.py", "--config", config)
    assert done.returncode == 0 and "resuming at step 4" in done.stdout
    assert logged(out) == logged(f"{finished[0]}/run")
    for name in ("vae", "lm", "consistency"):
        one, other = (load_checkpoint(f"{folder}/run/{name}.pt")["model"]
                      for folder in (finished[0], tmp_path))
        assert all(torch.equal(one[k], other[k]) for k in one), name


def test_ctrl_c_saves_the_last_step_first(tmp_path):
    config = write(str(tmp_path))
    process = subprocess.Popen([sys.executable, "train.py", "--config", config,
                                "--train.vae.save_every", "1000"],
                               cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("vae 2/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate()[0]
    assert process.returncode == 130 and "the same command goes on" in rest
    assert load_checkpoint(f"{tmp_path}/run/vae.pt")["step"] >= 2


def test_a_full_disk_leaves_the_old_checkpoint_whole(finished, tmp_path):
    config, out = write(str(tmp_path)), f"{tmp_path}/run"
    assert run("train.py", "--config", config, "--stages", '["vae"]',
               "--train.vae.steps", "4").returncode == 0
    before = open(f"{out}/vae.pt", "rb").read()
    limit = len(before) // 2                # files may not grow beyond this: what a full disk does
    again = run("train.py", "--config", config, "--stages", '["vae"]',
                "--train.vae.steps", "8", "--fresh",
                preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    assert (again.returncode == 2 and "cannot be written" in again.stderr
            and again.stderr.count("\n") == 1)
    from config import save_checkpoint
    path = f"{tmp_path}/old.pt"
    save_checkpoint(path, {"a": torch.zeros(10)})
    child = subprocess.run([sys.executable, "-c", f"""
import resource, signal, torch, config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    config.save_checkpoint({path!r}, {{"a": torch.ones(100_000)}})
except config.BadInput as e:
    print(e)
"""], cwd=ROOT, capture_output=True, text=True)
    assert "untouched" in child.stdout, child.stderr
    assert torch.equal(torch.load(path)["a"], torch.zeros(10)) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("stage", ["vae", "lm"])
def test_accumulated_gradients_equal_the_large_batch(finished, stage):
    """Fault: noise belonged to a micro-batch, so it changed with the size of one."""
    folder = finished[0]
    cfg = load(f"{folder}/tiny.toml", ["--vae.disc_start", "0"])
    runtime = train.Runtime(cfg)
    clips, valid = train.corpus(cfg, runtime)
    torch.manual_seed(0)
    made = (stages.VAEStage(cfg, runtime, clips, valid, "vae") if stage == "vae"
            else stages.LMStage(cfg, runtime, clips, valid, "lm"))
    for p in made.model.parameters():
        p.data += 0.05 * torch.linspace(-1, 1, p.numel()).view_as(p)
    if stage == "lm":                     # equal lengths: a mean over valid positions is not linear
        for part in (made.batch, made.held_out):
            part.cfg = cfg.data

    def grads(micro):
        made.model.zero_grad(set_to_none=True)
        batches = [(range(s, s + micro), made.batch(0, range(s, s + micro)))
                   for s in range(0, 4, micro)]
        for _, b in batches:
            if stage == "lm":
                b["frames"] = torch.full_like(b["frames"], 10)
                b["ended"] = torch.ones_like(b["ended"])
        train.gradients(Losses(made), batches, 0, runtime, 0, 4)
        return [p.grad.clone() for p in made.model.parameters() if p.grad is not None]

    for whole, pieces in zip(grads(4), grads(2)):
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-3)


def test_every_part_that_learns_has_an_optimizer(finished, monkeypatch):
    """Guards the projection to WavLM, which nobody stepped and nobody cleared of gradients."""
    monkeypatch.setattr("gan.Teacher", lambda *_: types.SimpleNamespace(dim=5))
    cfg = load(f"{finished[0]}/tiny.toml", ["--gan.loss_weights.distill", "1", "--gan.teacher", "x",
                                            "--gan.balance", "0.9"])
    runtime = train.Runtime(cfg)
    stage = stages.VAEStage(cfg, runtime, *train.corpus(cfg, runtime), "vae")
    stepped = [id(p) for part in stage.optimized.values() for p in part.parameters()]
    assert sorted(stepped) == sorted(id(p) for p in stage.model.parameters())
    assert id(stage.model.to_teacher.weight) in stepped


@pytest.mark.long
def test_two_processes_train_like_one_with_two_micro_batches(finished, tmp_path):
    """Each process takes its rows of the same global batch; the noise belongs to the rows."""
    losses = []
    for number, launch in enumerate((["train.py"], ["-m", "torch.distributed.run", "--standalone",
                                                    "--nproc_per_node=2", "train.py"])):
        config = write(str(tmp_path), out=f"run{number}")
        done = run(*launch, "--config", config, "--stages", '["vae"]',
                   "--train.vae.micro_batch", "2", "--train.vae.steps", "5", timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([row["vae"] for row in logged(f"{tmp_path}/run{number}") if "vae" in row])
    assert len(losses[0]) == 5
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]),
                               atol=1e-4, rtol=1e-4)


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_stop_the_run(
        finished, tmp_path, monkeypatch, capsys):
    cfg = load(write(str(tmp_path)), ["--stages", '["vae"]', "--train.vae.steps", "30"])
    runtime = train.Runtime(cfg)
    os.makedirs(f"{cfg.out}/samples")
    clips, valid = train.corpus(cfg, runtime)
    stage = stages.VAEStage(cfg, runtime, clips, valid, "vae")
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    stage.losses = lambda batch, step, source: iter(
        [("vae", sum(p.sum() for p in stage.model.vae.parameters()) * float("nan"), {})])
    with pytest.raises(FloatingPointError, match="ten steps in a row.*vae nan"):
        train.train(stage, "vae", cfg, runtime)
    assert all(torch.equal(before[k], v) for k, v in stage.model.state_dict().items())
    assert capsys.readouterr().out.count("step skipped") == 9


def test_a_file_that_is_gone_does_not_cost_the_steps_before_it(tmp_path):
    """Fault: the run stopped with one line, and up to save_every steps of it were lost."""
    cfg = load(write(str(tmp_path)), ["--stages", '["vae"]', "--train.vae.save_every", "100"])
    runtime = train.Runtime(cfg)
    os.makedirs(f"{cfg.out}/samples")
    clips, valid = train.corpus(cfg, runtime)
    stage = stages.VAEStage(cfg, runtime, clips, valid, "vae")
    batch = stage.batch

    class Batches:
        clips = batch.clips
        seen = batch.seen

        def __call__(self, step, rows):
            if step == 5:
                raise BadInput("gone.wav: no such audio file")
            return batch(step, rows)

    stage.batch = Batches()
    with pytest.raises(BadInput, match="gone.wav"):
        train.train(stage, "vae", cfg, runtime)
    state = load_checkpoint(f"{cfg.out}/vae.pt")
    assert (state["step"], state["done"]) == (5, False)


def test_training_keeps_its_compiled_graphs_through_a_validation(finished, tmp_path, monkeypatch):
    """Bugs: lengths of validation made is_causal symbolic, and from then on the backbone ran
    uncompiled; each length of a cache compiled a graph of its own.
    """
    from torch._dynamo.utils import counters
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    shutil.copytree(f"{finished[0]}/run", tmp_path / "run", ignore=shutil.ignore_patterns("*lm.pt"))
    cfg = load(f"{finished[0]}/tiny.toml", ["--out", f"{tmp_path}/run", "--compile", "yes"])
    clips, valid = train.corpus(cfg, runtime := train.Runtime(cfg))
    stage = stages.LMStage(cfg, runtime, clips, valid, "lm")
    run = runs.Run(stage, "lm", cfg, runtime)                # compiles
    rows = range(cfg.train.lm.batch)

    def graphs():
        counters.clear()
        train.gradients(run.losses, [(rows, stage.batch(0, rows))], 0, runtime, 0, len(rows))
        return counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    assert graphs()[1] == {} and graphs() == (0, {})
    counters.clear()
    run.show(1)
    assert counters["stats"]["unique_graphs"] == 0 and not counters["graph_break"]
    assert graphs() == (0, {})
    torch._dynamo.reset()


def test_averaged_weights_follow_with_their_decay():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ema = runs.EMA(layer, 0.9)
    torch.nn.init.ones_(layer.weight)
    ema.update(0)                                    # warm-up: decay (1 + 0) / (10 + 0) = .1
    assert ema.state["weight"].item() == pytest.approx(0.9)
    ema.update(10_000)
    assert ema.state["weight"].item() == pytest.approx(0.91)


def test_buffers_are_copied_and_not_averaged():
    """Fault: an RVQ's codebooks and counts, running means already, were averaged once more."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 2), ResidualVQ(2, 1, 3))
    ema = runs.EMA(model, 0.9)
    model[1].codebooks.fill_(5.0)
    ema.update(10_000)
    assert (ema.state["1.codebooks"] == 5.0).all()


def test_each_stage_has_rows_and_noise_of_its_own():
    """Fault: consistency went through the language model's first rows and noise again."""
    seeds = {train.seed_for(stage_seed(seed, name), step, row)
             for seed in range(3) for name in STAGES for step in range(20) for row in range(8)}
    assert len(seeds) == 3 * len(STAGES) * 20 * 8


def test_a_language_model_is_not_trained_through_another_encoder_than_its_vae_had(
        finished, tmp_path):
    """Fault: `--stages lm --vae.context 0.5` trained in silence on latents of another encoder."""
    out = f"{tmp_path}/run"
    os.makedirs(out)
    shutil.copy(f"{finished[0]}/run/vae.pt", out)
    wrong = run("train.py", "--config", f"{finished[0]}/tiny.toml", "--out", out, "--stages", "lm",
                "--vae.context", "0.5")
    assert wrong.returncode == 2
    assert "trained with [vae] context = 10.0, the config now says context = 0.5" in wrong.stderr


def ill_conditioned(optimizer):
    """Steps of a linear layer: each input direction is a tenth as loud as the one before."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4, bias=False)
    stage = types.SimpleNamespace(optimized={"lm": layer})
    opt = optim.make_optimizers(stage, StageConfig(optimizer=optimizer, lr=0.1), "cpu")["lm"]
    scale = torch.tensor([1.0, 0.1, 0.01, 0.001])
    mix = torch.linalg.qr(torch.randn(4, 4))[0]
    x = torch.randn(256, 4) * scale @ mix
    target = torch.randn(4, 4)
    for step in range(400):
        for group in opt.param_groups:
            group["lr"] = 0.1 * (1 - step / 400)
        opt.zero_grad()
        (x @ (layer.weight - target).T).pow(2).sum().backward()
        opt.step()
    return ((layer.weight - target) @ mix.T).norm(dim=0)       # error along each direction


def test_muon_learns_directions_of_small_gradients_that_adamw_leaves():
    adamw, muon = ill_conditioned("adamw"), ill_conditioned("muon")
    assert adamw[0] < 0.01 and muon[0] < 0.01
    assert muon[2] < 0.3 * adamw[2] and muon[3] < 0.5 * adamw[3]


def test_muon_moves_a_convolution_by_an_orthogonal_matrix_of_adamws_size():
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(8, 6, 3)
    stage = types.SimpleNamespace(optimized={"vae": conv})
    opt = optim.make_optimizers(stage, StageConfig(optimizer="muon", lr=0.1), "cpu")["vae"]
    before, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    conv(torch.randn(2, 8, 20)).pow(2).sum().backward()
    opt.step()
    step = (before - conv.weight.detach()).flatten(1) / (0.1 * 0.2 * math.sqrt(24))
    values = torch.linalg.svdvals(step)
    assert 0.6 < values.min() and values.max() < 1.3           # Newton-Schulz: about 1
    assert ((conv.bias - bias).abs() - 0.1).abs().max() < 1e-3  # AdamW's first step: lr


def test_discriminators_are_not_given_to_muon():
    stage = types.SimpleNamespace(optimized={"disc": torch.nn.Conv2d(1, 2, 3)})
    found = optim.make_optimizers(stage, StageConfig(optimizer="muon"), "cpu")["disc"]
    assert isinstance(found, torch.optim.AdamW)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_acts_on_weights_and_not_on_gains_scales_and_biases(optimizer):
    """Fault: scales (C, 1) of ConvNeXt and the g of weight norm decayed, having two axes."""
    net = torch.nn.ModuleDict({
        "linear": torch.nn.Linear(3, 2), "text": torch.nn.Embedding(5, 2), "unit": ConvNeXt(4),
        "norm": RMSNorm(4), "conv": torch.nn.utils.parametrizations.weight_norm(
            torch.nn.Conv2d(1, 2, 3))}).double()
    weights = {"linear.weight", "text.weight", "conv.parametrizations.weight.original1",
               *(f"unit.body.{i}.conv.weight" for i in (0, 2, 4))}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert weights < set(before)
    stage = types.SimpleNamespace(optimized={"lm": net})
    cfg = StageConfig(optimizer=optimizer, lr=0.1, weight_decay=0.5)
    opt = optim.make_optimizers(stage, cfg, "cpu")["lm"]

    # a step of gradients of 0 is a step of the decay alone
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for name, p in net.named_parameters():
        decays = name in weights
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 * decays))
    assert before["unit.scale"].shape == (4, 1)
    assert before["conv.parametrizations.weight.original0"].dim() == 4      # g


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    cfg = build(Config, {"train": {"lm": {"steps": 110, "warmup": 10, "lr_end": 0.1}}}).train.lm
    assert optim.schedule(cfg, 0) == 0.1 and optim.schedule(cfg, 9) == 1.0
    assert (optim.schedule(cfg, 60) == pytest.approx(0.55)
            and optim.schedule(cfg, 110) == pytest.approx(0.1))


def test_the_latents_that_the_model_sees_have_zero_mean_and_unit_variance(finished):
    cfg, vae, _, _ = open_run(f"{finished[0]}/run")
    clips, _ = train.corpus(cfg, train.Runtime(cfg))
    stage = stages.LMStage(cfg, train.Runtime(cfg), clips, clips, "lm")
    xs = []
    for step in range(20):
        b = stage.prepare(stage.batch(step, range(4)))
        xs += [x[:n] for x, n in zip(b["x"], b["frames"])]
    x = torch.cat(xs)
    assert x.mean(0).abs().max() < 0.35 and (x.std(0) - 1).abs().max() < 0.35


# configs/ablation.toml is no config but a table of them: tests/commands/test_ablate.py
CONFIGS = sorted(set(glob.glob(f"{ROOT}/configs/**/*.toml", recursive=True))
                 - {f"{ROOT}/configs/ablation.toml"})


@pytest.mark.parametrize("path", CONFIGS, ids=os.path.basename)
def test_every_config_builds_and_comes_back_from_its_dump(path, tmp_path):
    cfg = load(path)
    with open(tmp_path / "again.toml", "w") as f:
        f.write(dump(cfg))
    assert load(tmp_path / "again.toml") == cfg
    with torch.device("meta"):
        VAE(cfg.vae), Discriminators(cfg.gan, cfg.vae.channels)
        for stage in set(cfg.stages) - {"vae"}:
            make_model(cfg, stage)


@pytest.mark.long
def test_a_student_is_distilled_with_the_teachers_head_untouched(finished, tmp_path):
    teacher = f"{finished[0]}/run/lm.pt"
    config = write(str(tmp_path))
    with open(config, "a") as f:
        f.write(f"[train.distill]\nteacher = \"{teacher}\"\nsteps = 4\nbatch = 4\nlog_every = 1\n")
    command = ["train.py", "--config", config, "--sample.count", "0", "--stages", '["distill"]',
               "--lm.backbone.layers", "2"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    rows = [row for row in logged(f"{tmp_path}/run") if row["stage"] == "distill"]
    assert len(rows) >= 4 and all("explained" in row for row in rows[:4])
    theirs, ours = load_checkpoint(teacher), load_checkpoint(f"{tmp_path}/run/distill.pt")["model"]
    theirs = theirs["ema"] or theirs["model"]
    for k in ours:
        if k.startswith("head."):
            assert torch.equal(ours[k], theirs[k]), k
    assert not torch.equal(ours["latent.weight"], theirs["latent.weight"])
    assert not torch.equal(ours["eos.weight"], theirs["eos.weight"])
    assert "backbone.blocks.1.mlp.down.weight" in ours and len(theirs) < len(ours)
    assert open_run(f"{tmp_path}/run")[3] == "distill"
    wrong = run(*command, "--fresh", "--lm.head.width", "8")
    assert wrong.returncode == 2 and "does not fit" in wrong.stderr, wrong.stderr
    wrong = run("train.py", "--config", write(str(tmp_path)), "--stages", '["distill"]')
    assert wrong.returncode == 2 and "train.distill.teacher" in wrong.stderr


def test_a_run_may_start_from_the_weights_of_another_with_other_losses(finished, tmp_path):
    start = f"{finished[0]}/run/vae.pt"
    done = run("train.py", "--config", write(str(tmp_path)), "--stages", '["vae"]',
               "--train.vae.init", start, "--vae.loss_weights.adv", "0",
               "--vae.loss_weights.feat", "0", "--train.vae.steps", "1", "--train.vae.lr", "1e-9")
    assert done.returncode == 0 and f"starts from {start}" in done.stdout, done.stderr
    old, new = load_checkpoint(start), load_checkpoint(f"{tmp_path}/run/vae.pt")
    for k in new["ema"].keys() - {"latent_mean", "latent_std"}:
        torch.testing.assert_close(new["ema"][k], old["ema"][k], atol=1e-6, rtol=0)
    wrong = run("train.py", "--config", f"{tmp_path}/tiny.toml", "--fresh",
                "--train.vae.init", start, "--vae.latent_dim", "6")
    assert wrong.returncode == 2 and start in wrong.stderr


def test_frozen_parts_keep_their_weights_while_the_others_learn(finished, tmp_path):
    start = f"{finished[0]}/run/vae.pt"
    options = ("--config", write(str(tmp_path)), "--stages", '["vae"]', "--train.vae.init", start,
               "--train.vae.steps", "2")
    done = run("train.py", *options, "--train.vae.freeze", '["encoder"]')
    assert done.returncode == 0, done.stderr
    old, new = load_checkpoint(start)["ema"], load_checkpoint(f"{tmp_path}/run/vae.pt")["ema"]
    moved = {k for k in new if not torch.equal(old[k], new[k])}
    assert any(k.startswith("decoder.") for k in moved)
    assert not any(k.startswith("encoder.") for k in moved)
    # fault: the latents' mean and std were measured anew, and a language model on them was off
    assert not moved & {"latent_mean", "latent_std"}
    wrong = run("train.py", *options, "--fresh", "--train.vae.freeze", '["ears"]')
    assert wrong.returncode == 2 and "ears" in wrong.stderr and "decoder" in wrong.stderr


def test_the_consistency_stage_of_a_rectified_flow_is_lsd_from_its_weights(finished, tmp_path):
    shutil.copytree(f"{finished[0]}/run", f"{tmp_path}/run", ignore=shutil.ignore_patterns("lm.pt"))
    cfg = load(f"{finished[0]}/tiny.toml", ["--lm.head.objective", "rectified_flow",
                                            "--out", f"{tmp_path}/run"])
    runtime = train.Runtime(cfg)
    clips, valid = train.corpus(cfg, runtime)
    flow = stages.LMStage(cfg, runtime, clips, valid, "lm").model
    for p in flow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    save_checkpoint(f"{tmp_path}/run/lm.pt", {"stage": "lm", "step": 0, "done": True,
                                              "config": {}, "optimizers": {},
                                              "model": flow.state_dict(), "ema": None})
    few = stages.ConsistencyStage(cfg, runtime, clips, valid, "consistency").model
    assert few.cfg.head.objective == "lsd" and few.cfg.head.sample_steps == 1
    x, t, z = torch.randn(5, 4), torch.rand(5), torch.randn(5, 16)
    torch.testing.assert_close(few.head.net(x, t, z, t), flow.head.net(x, t, z))
    assert torch.equal(few.backbone.norm.weight, flow.backbone.norm.weight)


@pytest.mark.long
def test_distilled_consistency_trains_the_head_alone_and_resumes_with_its_teacher(
        finished, tmp_path):
    for name in ("whole", "stopped"):
        shutil.copytree(f"{finished[0]}/run", f"{tmp_path}/{name}",
                        ignore=shutil.ignore_patterns("consistency.pt"))
    options = ("train.py", "--config", f"{finished[0]}/tiny.toml", "--stages", "consistency",
               "--train.consistency.teacher", "true", "--train.consistency.steps", "12",
               "--train.consistency.save_every", "4")
    process = subprocess.Popen([sys.executable, *options, "--out", f"{tmp_path}/stopped"], cwd=ROOT,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("consistency 6/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    for out in ("whole", "stopped"):
        done = run(*options, "--out", f"{tmp_path}/{out}")
        assert done.returncode == 0, done.stderr
    assert "resuming at step 4" in done.stdout
    flow, head, resumed = (load_checkpoint(f"{tmp_path}/{path}.pt") for path in (
        "whole/lm", "whole/consistency", "stopped/consistency"))
    assert all(torch.equal(v, resumed["model"][k]) for k, v in head["model"].items())
    moved = {k for k, v in flow["ema"].items() if not torch.equal(v, head["model"][k])}
    assert moved and all(k.startswith("head.net.") for k in moved)
    head["model"]["eos.bias"] += 1                   # as after steps without a teacher
    save_checkpoint(f"{tmp_path}/whole/consistency.pt", head | {"done": False})
    wrong = run(*options, "--out", f"{tmp_path}/whole")
    assert wrong.returncode == 2 and "another backbone" in wrong.stderr


def test_a_checkpoint_of_another_model_is_refused_with_both_values(finished):
    done = run("train.py", "--config", f"{finished[0]}/tiny.toml", "--vae.latent_dim", "5")
    assert (done.returncode == 2
            and "latent_dim = 4" in done.stderr and "latent_dim = 5" in done.stderr)


def test_a_figure_named_max_is_the_largest_of_the_micro_batches_and_the_others_are_means():
    """Fault: tangent_max was a mean of the micro-batches' maxima."""
    weight = torch.nn.Parameter(torch.ones(()))

    def losses(batch, step, source):
        yield "lm", weight * batch, {"tangent_max": batch, "tangent_mean": batch}
    stage = types.SimpleNamespace(losses=losses, model=torch.nn.Identity(), some_unused=False)
    runtime = types.SimpleNamespace(autocast=contextlib.nullcontext, to=lambda batch: batch,
                                    device="cpu", world=1)
    batches = [(range(0, 3), torch.tensor(1.0)), (range(3, 4), torch.tensor(5.0))]
    figures = train.gradients(Losses(stage), batches, 0, runtime, seed=0, total=4)
    assert figures == {"lm": 2.0, "tangent_mean": 2.0, "tangent_max": 5.0}


# ---------------------------------------------------------------- what the corpus has and lacks

def speech(name, speaker="", seconds=1.0, words=None):
    return Clip(f"/none/{name}.wav", "a word", "speech", speaker, words, seconds, name)


def announced(cfg, clips):
    lines = []
    checks.announce_data(cfg, clips, [], lines.append)
    return lines[1:]


def small(**data):
    """frames: 2 s of 25 latents per second; a prompt of 13 to 25 latents."""
    return resolve({"data": {"frames": 50, "prompt_frames": 25, **data}})


def test_the_share_of_speech_that_can_have_a_voice_prompt_is_told_at_the_start():
    """Fault: a folder of one speaker had no voice prompt in any of its rows, and nothing said so.

    Of another file of the speaker with 13 latents or more, or of 13 that the row leaves.
    """
    clips = [speech("a", "anna"), speech("b", "anna", 0.5), speech("c", "bert"), speech("d"),
             speech("e", seconds=2.6), speech("f", seconds=2.4)]
    [line] = announced(small(), clips)
    # b has a's 25 latents; a has only b's 13; e leaves 15 of its 65, f 10 of its 60
    assert line == ("data: 3 of 6 clips of speech can have a voice prompt; "
                    "50% of their rows get one")
    [line] = announced(small(), [speech("a"), speech("b")])
    assert line.startswith("data: 0 of 2 clips") and "corpora.scan DIR --speaker NAME" in line
    assert announced(small(prompt_frames=0), clips) == []


class Latents(list):
    """A cache of zeros: the frames of every clip."""
    dim = 2
    levels = 0

    def __init__(self, frames):
        super().__init__(frames)
        self.frames = np.array(frames)

    def get(self, i):
        return np.zeros((self[i], 2 * self.dim), np.float16)


def test_the_told_number_of_clips_is_that_of_the_batches(tmp_path):
    """The claim above, against the rows of LatentBatches themselves, with a prompt in each."""
    clips = [speech("a", "anna"), speech("b", "anna", 0.4), speech("c", "bert"),
             speech("e", "eve", 2.6), speech("f", "fay", 2.4)]
    cfg = small(prompt_prob=1.0)
    batches = LatentBatches(clips, Latents([math.ceil(25 * c.duration) for c in clips]),
                            cfg.data, batch=5, dim=2)
    prompted = {batches.order.index(row) for row in range(200)
                if batches.row(row)["prompt_len"] > 0}
    [line] = announced(cfg, clips)
    assert line.startswith(f"data: {len(prompted)} of 5 clips of speech can have")
    assert prompted == {1, 3}


def test_a_monologue_without_word_times_is_refused_before_anything_trains(tmp_path):
    """Fault: it trained to the end with a text loss of 0, on another layout than it then spoke."""
    cfg = resolve({"lm": {"monologue": True}, "data": {"manifest": "m.jsonl"}})
    aligned = speech("a", words=[["a", 0.0, 0.1]])
    with pytest.raises(BadInput, match="no speech in m.jsonl has word times; `python -m corp"):
        announced(cfg, [speech("a")])

    # advice that can be followed. Fault: other weights' monologue cannot be switched off, and
    # nothing aligns clips without text
    with pytest.raises(BadInput, match="lm.monologue = false"):
        announced(cfg, [speech("a")])
    begun = resolve({"lm": {"monologue": True}, "data": {"manifest": "m.jsonl"},
                     "train": {"lm": {"init": "other.pt"}}})
    with pytest.raises(BadInput, match="aligned.jsonl` measures them$"):
        announced(begun, [speech("a")])
    with pytest.raises(BadInput, match="no speech in m.jsonl has a text"):
        announced(cfg, [dataclasses.replace(speech("a"), text="")])

    assert announced(cfg, [aligned]) == []
    [line] = announced(cfg, [aligned, speech("b"), speech("c")])
    assert line.startswith("data: 1 of 3 clips of speech have word times")
    assert announced(dataclasses.replace(cfg, stages=["vae"]), [speech("a")]) == []
    lines = []
    checks.announce_data(cfg, [aligned], [speech("b")], lines.append)
    assert lines[1:] == ["data: no held-out speech has word times; its losses are those without a "
                         "monologue"]


def test_a_second_training_of_a_run_folder_is_refused(tmp_path):
    """Fault: two at once wrote every row of the log twice and each other's checkpoints."""
    what = "another training writes to it"
    with owned(tmp_path, what):
        owner = f"process {os.getpid()} on {socket.gethostname()} since 20"
        with pytest.raises(BadInput, match=f"{what} .{owner}"), owned(tmp_path, what):
            pass
    with owned(tmp_path, what):
        pass


def test_a_folder_given_for_a_checkpoint_is_named_with_what_it_holds(finished, tmp_path):
    """Fault: `--train.vae.init RUN` told the user to delete a finished run."""
    out = f"{finished[0]}/run"
    says = "run is a folder; give one of its checkpoints: consistency.pt, lm.pt, vae.pt"
    with pytest.raises(BadInput, match=says) as error:
        load_checkpoint(out)
    assert "delete" not in str(error.value)
    with pytest.raises(BadInput, match="it has no checkpoint"):
        load_checkpoint(str(tmp_path))
    for key in ("train.lm.init", "train.distill.teacher"):
        done = run("train.py", "--config", f"{finished[0]}/tiny.toml", "--out", str(tmp_path / "x"),
                   "--stages", "vae,lm,distill", f"--{key}", out, "--sample.cfg", "1",
                   *(("--train.distill.teacher", "t.pt") if key == "train.lm.init" else ()))
        assert done.returncode == 2 and f"error: {key}: {out} is a folder" in done.stderr
    with pytest.raises(BadInput, match="is a file; give the folder"):
        open_run(f"{out}/lm.pt")


def test_a_stage_that_resumes_with_other_settings_or_other_clips_says_so(finished):
    """Fault: other data or another learning rate went on in silence."""
    saved = load(f"{finished[0]}/tiny.toml")
    cfg = load(f"{finished[0]}/tiny.toml", ["--train.lm.lr", "0.123", "--data.text_len", "30",
                                            "--train.lm.save_every", "7", "--data.workers", "2"])
    clips = [speech("a"), speech("b")]
    moved = [dataclasses.replace(c, audio=f"/moved/{c.id}.wav") for c in clips]

    def noted(clips, **state):
        lines = []
        state = {"done": False, "step": 8, "clips": checks.digest_of(moved), **state}
        checks.note_changed_training(cfg, "lm.pt", "lm", state, saved, clips, lines.append)
        return lines

    settings = ["lm: trained with lr = 0.001 to step 8, and resumes with 0.123",
                "lm: trained with data.text_len = 32 to step 8, and resumes with 30"]
    assert noted(clips) == settings
    assert noted(clips[:1]) == [*settings,
                                "lm: resumes on other clips than those of its first 8 steps"]
    assert [line.split(";")[0] for line in noted(clips[:1], done=True)] == [
        "lm: was trained with lr = 0.001, not 0.123, and is finished",
        "lm: was trained with data.text_len = 32, not 30, and is finished",
        "lm: was trained on other clips, and is finished"]


def test_weights_of_another_sample_rate_are_started_from_aloud(finished, tmp_path):
    """Fault: the shapes are the same, and nothing said that the latents mean something else."""
    done = run("train.py", "--config", f"{finished[0]}/tiny.toml", "--out", str(tmp_path / "new"),
               "--stages", "vae", "--train.vae.init", f"{finished[0]}/run/vae.pt",
               "--vae.sample_rate", "24000", "--train.vae.steps", "1")
    assert done.returncode == 0, done.stderr
    says = "vae.pt was trained with [vae] sample_rate = 16000, here sample_rate = 24000"
    assert says in done.stdout


def test_a_held_out_figure_is_the_mean_over_rows_and_one_named_max_the_largest():
    """Fault: in several passes valid_tangent_max was a mean of their maxima."""
    rows_of = []

    def loss(batch):
        rows_of.append(len(batch["x"]))
        value = torch.tensor([1.0, 4.0][len(rows_of) - 1])
        return None, {"head": value, "tangent_max": value}
    runtime = types.SimpleNamespace(autocast=contextlib.nullcontext, to=lambda batch: batch)
    stage_cfg = types.SimpleNamespace(micro_batch=0, batch=3)
    stage = types.SimpleNamespace(
        name="lm", valid=[None] * 4, runtime=runtime, prepare=lambda batch: batch,
        cfg=types.SimpleNamespace(train=types.SimpleNamespace(lm=stage_cfg)),
        held_out=lambda step, rows: {"x": torch.zeros(len(rows))})
    found = stages.LMStage.validate(stage, types.SimpleNamespace(loss=loss))
    assert rows_of == [3, 1]
    assert found == {"valid_head": 1.75, "valid_tangent_max": 4.0}


def test_a_corpus_of_silence_is_refused_before_it_is_trained_on(tmp_path):
    """Fault: a broken export trained for hours, on nothing and without a word."""
    clips = []
    for i in range(3):
        path = f"{tmp_path}/{i}.wav"
        sf.write(path, np.zeros(16000, np.float32), 16000)
        clips.append(Clip(path, "", "music", "", None, 1.0, str(i)))
    with pytest.raises(BadInput, match="0.wav: silent .* all of the first 3 held-out clips"):
        stages.open_held_out(clips, resolve({}))
    sf.write(f"{tmp_path}/1.wav", 0.1 * np.ones(16000, np.float32), 16000)
    stages.open_held_out(clips, resolve({}))
