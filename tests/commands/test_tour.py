"""docs/tour.ipynb runs from its first cell to its last, without jupyter, and shows what it says."""
import ast
import json
import os
import sys
import time

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from conftest import ROOT

pytestmark = pytest.mark.long
NOTEBOOK = f"{ROOT}/docs/tour.ipynb"
MOST_SECONDS = 90


def cells(kind):
    with open(NOTEBOOK, encoding="utf8") as f:
        return ["".join(cell["source"]) for cell in json.load(f)["cells"]
                if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def tour():
    """What the notebook's names hold after all cells, the figures shown and the CPU's seconds."""
    before = os.getcwd(), list(sys.path), torch.random.get_rng_state()
    show = plt.show
    names = {"__name__": "__main__"}
    figures = []
    began = time.process_time()
    try:
        os.chdir(f"{ROOT}/docs")
        plt.show = lambda: (figures.append(plt.gcf()), plt.gcf().canvas.draw())
        for number, code in enumerate(cells("code"), 1):
            exec(compile(code, f"tour.ipynb, code cell {number}", "exec"), names)
    finally:
        plt.show = show
        os.chdir(before[0])
        sys.path[:] = before[1]
        torch.random.set_rng_state(before[2])
        if os.environ.get("TOUR_FIGURES"):              # to look at them
            for i, figure in enumerate(figures, 1):
                figure.savefig(f"{os.environ['TOUR_FIGURES']}/tour{i:02d}.png", dpi=70)
        plt.close("all")
    return names, figures, time.process_time() - began


def test_every_section_has_a_figure_and_all_of_them_take_less_than_90_seconds(tour):
    _, figures, seconds = tour
    sections = [text for text in cells("markdown") if text.startswith("## ")]
    assert len(figures) == len(sections) == 9
    assert all(ax.has_data() for figure in figures for ax in figure.axes)
    assert seconds < MOST_SECONDS


def test_consistency_jumps_nearer_to_the_end_with_a_smaller_tangent(tour):
    figures = tour[0]["figures"]
    for before, after in zip(figures["the flow's F"], figures["after consistency"]):
        assert after.mean() < 0.4 * before.mean()


def test_one_step_of_consistency_is_as_good_as_twenty_of_the_flow_and_one_of_the_flow_is_not(tour):
    names = tour[0]
    torch.manual_seed(1)
    x = names["data"](2000)
    scores = [names["energy_score"](head, names["no_past"](2000), x, steps=steps).mean().item()
              for head, steps in names["shown"]]
    assert scores[1] > 1.3 * scores[0] and scores[2] < 1.06 * scores[0]


def test_noise_on_the_past_makes_the_drift_smaller(tour):
    names = tour[0]
    clean, noised = (names["drift"](names["models"][noise], rows=256)[-1] for noise in (0.0, 0.5))
    assert noised < 0.8 * clean


def test_the_spread_of_the_loss_falls_with_the_root_of_the_multiplier(tour):
    spread = tour[0]["spread"]
    assert spread[-1] * 4 == pytest.approx(spread[0], rel=0.3)          # M = 16


def test_a_noisy_block_sees_the_text_the_clean_past_and_itself(tour):
    mask = tour[0]["mask"]
    assert mask[24].nonzero().flatten().tolist() == [*range(12), *range(24, 28)]


def test_the_expert_changes_rows_of_speech_alone(tour):
    change = tour[0]["difference"].abs().amax((1, 2))
    assert (change[:2] > 1e-3).all() and not change[2:].any()


def test_the_word_is_heard_and_comes_back_from_its_latents(tour):
    names = tour[0]
    wav, again = names["wav"], names["again"]
    assert 0.3 < len(wav) / names["model"].sample_rate < 3 and wav.abs().max() > 0.05
    assert 0.3 < again.std() / wav.std() < 3


def test_the_notebook_holds_no_outputs_and_imports_the_files_that_it_names():
    with open(NOTEBOOK, encoding="utf8") as f:
        found = json.load(f)
    assert found["nbformat"] == 4
    assert not any(cell.get("outputs") for cell in found["cells"])
    imported = {node.module for code in cells("code") for node in ast.walk(ast.parse(code))
                if isinstance(node, ast.ImportFrom)}
    assert {"heads", "calm", "audiocalm", "moe", "backbone", "generate"} <= imported
