"""The plan against exact counts and against memory that was really used."""
import gc

import pytest
import torch

import plan
from config import load
from conftest import ROOT

SMALL = ["--data.frames", "24", "--data.text_len", "12"]


def config(name, *changes):
    return load(f"{ROOT}/configs/{name}.toml", [*SMALL, *changes])


def test_parameters_of_paper_sizes_are_counted_without_memory():
    parameters, flops, peak = plan.measure(config("paper/pocket_tts"), "lm", 1)
    assert parameters == 85_619_745 and flops > 0 and peak > 0


def test_flops_of_a_row_are_six_per_weight_and_position():
    """Forward 2, backward 4 per weight of a matrix and position; attention comes on top, and the
    gradients of inputs that need none go off.
    """
    changes = ["--lm.head.multiplier", "1", "--lm.backbone.dim", "256", "--lm.short_layers", "0",
               "--data.prompt_frames", "0"]
    cfg = config("quickstart", *changes)
    _, flops, _ = plan.measure(cfg, "lm", 1)
    weights = plan.RandomRows(cfg, "lm", 1, "cpu").model
    backbone = sum(m.weight.numel() for m in weights.backbone.modules()
                   if isinstance(m, torch.nn.Linear))
    head = sum(m.weight.numel() for m in weights.head.modules() if isinstance(m, torch.nn.Linear))
    exact = 6 * (backbone * (13 + 25) + head * 24)
    assert 0.98 * exact < flops < 1.1 * exact


@pytest.mark.parametrize("name, stage", [("quickstart", "lm"), ("rq_quick", "lm"),
                                         ("quickstart", "vae")])
def test_the_planned_peak_is_what_a_real_pass_holds(name, stage):
    """Real tensors, counted as they live and die, within 15 percent."""
    cfg = config(name, "--gan.loss_scales", "0")
    _, _, planned = plan.measure(cfg, stage, 4, bf16=False)
    trainer = plan.RandomRows(cfg, stage, 4, "cpu")
    plan.forward_backward(trainer, trainer.batch, bf16=False)
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    with plan.Live() as live:
        plan.forward_backward(trainer, trainer.batch, bf16=False)
    assert planned == pytest.approx(live.peak, rel=0.15)


def test_recomputing_activations_lowers_the_planned_peak():
    changes = ["--data.frames", "400", "--lm.head.multiplier", "1", "--lm.short_layers", "0"]
    path = f"{ROOT}/configs/quickstart.toml"
    _, flops, kept = plan.measure(load(path, changes), "lm", 8)
    changes += ["--train.lm.checkpoint", "true"]
    _, same_flops, recomputed = plan.measure(load(path, changes), "lm", 8)
    assert recomputed < 0.6 * kept and flops == same_flops


def test_a_plan_says_whether_a_stage_fits():
    cfg = config("quickstart", "--stages", '["lm"]')
    assert "fits" in plan.plan(cfg, 1) and "does not fit" in plan.plan(cfg, 1, gigabytes=0.001)
