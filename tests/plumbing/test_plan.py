"""The plan against exact counts and against memory that was really used."""
import gc
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import plan
import train
from cli import BadInput
from config import load
from conftest import ROOT

ONE_STAGE = ["--stages", '["lm"]']
SMALL = ["--data.frames", "24", "--data.text_len", "12"]


def config(name, *changes):
    return load(f"{ROOT}/configs/{name}.toml", [*SMALL, *changes])


def test_parameters_of_paper_sizes_are_counted_without_memory():
    cost = plan.measure(config("paper/pocket_tts"), "lm", 1)
    assert cost.parameters == 85_619_745 and cost.flops > 0 and cost.peak > cost.kept > 0


def test_flops_of_a_row_are_six_per_weight_and_position():
    """Forward 2, backward 4 per weight of a matrix and position; attention comes on top, and the
    gradients of inputs that need none go off.
    """
    changes = ["--lm.head.multiplier", "1", "--lm.backbone.dim", "256", "--lm.short_layers", "0",
               "--data.prompt_frames", "0"]
    cfg = config("quickstart", *changes)
    flops = plan.measure(cfg, "lm", 1).flops
    weights = plan.RandomRows(cfg, "lm", 1, "cpu").model
    backbone = sum(m.weight.numel() for m in weights.backbone.modules()
                   if isinstance(m, torch.nn.Linear))
    head = sum(m.weight.numel() for m in weights.head.modules() if isinstance(m, torch.nn.Linear))
    exact = 6 * (backbone * (13 + 25) + head * 24)
    assert 0.98 * exact < flops < 1.1 * exact


@pytest.mark.parametrize("name, stage", [("quickstart", "lm"), ("rq_quick", "lm"),
                                         ("quickstart", "vae"), ("audiocalm_quick", "audiocalm")])
def test_the_planned_peak_is_what_a_real_pass_holds(name, stage):
    """Real tensors, counted as they live and die, within 15 percent."""
    cfg = config(name, "--gan.loss_scales", "0")
    planned = plan.measure(cfg, stage, 4, bf16=False).peak
    trainer = plan.RandomRows(cfg, stage, 4, "cpu")
    plan.forward(trainer, trainer.batch, bf16=False).backward()
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    with plan.Live() as live:
        plan.forward(trainer, trainer.batch, bf16=False).backward()
    assert planned == pytest.approx(live.peak, rel=0.15)


def test_recomputing_activations_lowers_the_planned_peak():
    changes = ["--data.frames", "400", "--lm.head.multiplier", "1", "--lm.short_layers", "0"]
    path = f"{ROOT}/configs/quickstart.toml"
    kept = plan.measure(load(path, changes), "lm", 8)
    changes += ["--train.lm.checkpoint", "true"]
    recomputed = plan.measure(load(path, changes), "lm", 8)
    assert recomputed.peak < 0.6 * kept.peak and kept.flops == recomputed.flops


def test_a_plan_says_whether_a_stage_fits():
    cfg = config("quickstart", "--stages", '["lm"]')
    assert "fits" in plan.plan(cfg, 1) and "does not fit" in plan.plan(cfg, 1, gigabytes=0.001)


def test_bytes_of_other_micro_batches_lie_on_a_line_through_two():
    cfg = load(f"{ROOT}/configs/quickstart.toml", ["--data.frames", "400", "--lm.short_layers", "0"])
    five = plan.measure(cfg, "lm", 5)
    on_the_line = plan.measure_rows(cfg, "lm", [5])[5]
    assert on_the_line.peak == pytest.approx(five.peak, rel=0.05)
    assert on_the_line.kept == pytest.approx(five.kept, rel=0.05)


@pytest.mark.parametrize("gigabytes, options", [
    (1000, []),
    (45, ["--train.lm.micro_batch 2"]),
    (28, ["--train.lm.micro_batch 2", "--train.shard true"]),
    (12, ["--train.lm.micro_batch 2", "--train.lm.checkpoint true", "--train.shard true"]),
    (5, None)])
def test_what_does_not_fit_is_made_in_pieces_then_sharded_then_recomputed(
        monkeypatch, gigabytes, options):
    """10^9 parameters; a row keeps 10 GB, 2 recomputed; 4 rows per GPU, each enough for a pass."""
    cfg = config("quickstart", "--data.frames", "2048", "--train.lm.batch", "16")

    def costs(cfg, stage, choices):
        row = 2 * 10 ** 9 if cfg.train.lm.checkpoint else 10 ** 10
        return {n: plan.Cost(10 ** 9, 0, 0, 0, n * row, n * row + 4 * 10 ** 9) for n in choices}
    monkeypatch.setattr(plan, "measure_rows", costs)
    if options is None:
        with pytest.raises(BadInput, match="one row does not fit"):
            plan.fit(cfg, "lm", 4, gigabytes)
        return
    assert plan.changed_options(cfg, plan.fit(cfg, "lm", 4, gigabytes), "lm") == options


def test_sharding_divides_state_and_gradients():
    cost = plan.Cost(parameters=1000, layer=100, root=200, flops=0, kept=5000, peak=9500)
    assert plan.memory(cost, 4, False, True) == (16_000, 9500)
    state, of_pass = plan.memory(cost, 4, True, True)
    assert state == 4000
    assert of_pass == 5500 + 4 * (2 * 200 + 3 * 100) + 1000


class Waits(TorchDispatchMode):
    """Counts the operations whose result a host needs: on CUDA each waits for the device."""
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
        by_mask = name.startswith("index") and any(
            torch.is_tensor(i) and i.dtype == torch.bool for i in indices)
        if name in self.waits or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage, changes", [
    ("vae", ["--vae.bottleneck", "rvq", "--gan.balance", "0.9", "--gan.loss_weights.adv", "1",
             "--gan.loss_weights.feat", "1", "--gan.disc_start", "0"]),
    ("lm", []),
    ("lm", [*ONE_STAGE, "--lm.head.objective", "consistency"]),
    ("lm", [*ONE_STAGE, "--lm.head.objective", "lsd"]),
    ("audiocalm", []),
    ("audiocalm_lsd", [])])
def test_a_pass_never_waits_for_the_device(stage, changes):
    """Faults: an RVQ waited twice per level, the balancer once per term, AudioCALM once."""
    cfg = config("audiocalm_quick" if stage.startswith("audiocalm") else "quickstart", *changes)
    trainer = plan.RandomRows(cfg, stage, 3, "cpu")
    with Waits() as waits:
        plan.forward(trainer, trainer.batch, bf16=False).backward()
    assert not waits.found


def test_a_plan_times_steps_of_every_stage_on_this_machine(capsys, monkeypatch):
    """Seconds per step times the steps of the config; the steps are real, their time is 0.25 s."""
    argv = ["train.py", "--config", f"{ROOT}/configs/quickstart.toml", *SMALL,
            "--plan", "--measure", "--toy.clips", "8", "--train.vae.batch", "2", "--train.vae.steps", "1000"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(train.statistics, "median", lambda times: 0.25 if min(times) > 0 else 0)
    train.main()
    lines = capsys.readouterr().out.splitlines()
    assert "vae: 0.25 s per step, 1000 steps in 4.2 min" in lines
    assert lines[-1].startswith("on this machine, rows of full length: ")
    assert sum(" steps in " in line for line in lines) == 3


@pytest.mark.parametrize("seconds, text", [
    (50, "50 s"), (89, "89 s"), (90, "1.5 min"), (2700, "45 min"), (36_000, "10 h"),
    (86_400 * 12, "12 days"), (86_400 * 4000, "4,000 days")])
def test_times_are_spoken_in_the_largest_unit_that_tells_them(seconds, text):
    assert train.spoken_time(seconds) == text


def test_a_timed_step_has_all_micro_batches_of_the_config(monkeypatch):
    cfg = config("quickstart", "--device", "cpu", *ONE_STAGE, "--train.lm.batch", "6",
                 "--train.lm.micro_batch", "2")
    seen = []
    real = train.gradients

    def watched(losses, batches, step, runtime, seed, total):
        seen.append([len(rows) for rows, _ in batches])
        assert total == 6 and all(len(batch["x"]) == 2 for _, batch in batches)
        return real(losses, batches, step, runtime, seed, total)

    monkeypatch.setattr(train, "gradients", watched)
    train.time_on_this_machine(cfg, train.Runtime(cfg))
    assert seen == 4 * [[2, 2, 2]]
