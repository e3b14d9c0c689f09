"""speedrun.sh from a folder of recordings to exported weights, every command of it at toy size."""
import os
import subprocess
import sys

import numpy as np
import pytest

from audio import save_audio
from conftest import ROOT, TINY, write

SMALL = TINY.replace('"lm", "consistency"', '"lm"').replace("steps = 12", "steps = 2")


@pytest.mark.long
def test_a_folder_of_recordings_becomes_a_model_that_speaks(tmp_path):
    folder = tmp_path / "recordings" / "joe"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(6):
        save_audio(f"{folder}/{i}.wav", 0.1 * noise.standard_normal((1, 16000)), 16000)
        (folder / f"{i}.txt").write_text("three seven")

    env = {**os.environ, "PYTHON": sys.executable, "CONFIG": write(tmp_path, SMALL),
           "ALIGN": "no", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "speedrun.sh", str(folder.parent), f"{tmp_path}/mine",
                           "--train.lm.warmup", "1"],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("hello.wav", "lm.pt", "export/lm.safetensors", "export/README.md"):
        assert os.path.getsize(f"{tmp_path}/mine/{name}") > 0
    assert "1 (joe)" in done.stdout and "fits" in done.stdout
