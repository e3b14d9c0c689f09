"""Pictures: every figure of a log has a panel; spectrograms side by side can be compared."""
import json

import torch

import report
from report import read_curves


def test_every_figure_has_a_panel_and_those_of_validation_alone_have_their_own(tmp_path):
    """Fault: figures logged only at validation (valid_energy_KIND) were drawn nowhere, and the dot
    of valid_mel stood on the panel of another measure.
    """
    rows = [{"stage": "vae", "step": 1, "mel": 2.0, "kl": 1.0, "rate": 9.0},
            {"stage": "vae", "step": 1, "valid_mel": 0.4},
            {"stage": "lm", "step": 1, "head": 1.0, "steps_per_second": 9.0},
            {"stage": "lm", "step": 1, "valid_head": 1.1, "valid_head_speech": 1.0,
             "valid_energy_speech": 0.3, "valid_energy_music": 0.2}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves, panels = read_curves(tmp_path)
    assert panels == ["vae:kl", "vae:mel", "vae:valid_mel",
                      "lm:head", "lm:valid_energy_", "lm:valid_head_"]
    assert curves["lm", "valid_energy_music"] == [(1, 0.2)]


def test_spectrograms_in_one_picture_have_the_same_time_axis(monkeypatch):
    """Fault: a clip of 4.3 s beside one of 1.2 s looked as long as that."""
    drawn = []
    monkeypatch.setattr(report, "save_picture", lambda fig, path: drawn.append(fig))
    pictures = [("short", torch.randn(1, 8000)), ("long", torch.randn(1, 24000))]
    report.draw_spectrograms("x.png", pictures, 16000, columns=2)
    assert [ax.get_xlim() for ax in drawn[0].axes] == [(0, 1.5), (0, 1.5)]
    assert [ax.images[0].get_extent()[:2] for ax in drawn[0].axes] == [[0, 0.5], [0, 1.5]]
