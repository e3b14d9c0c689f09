"""Curves of a run's log: every figure has a panel."""
import json

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
