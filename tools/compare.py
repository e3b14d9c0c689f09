"""Do two checkouts of this project train the same numbers? Bitwise: every figure of log.jsonl and
every byte of a wav.

    python -m tools.compare OLD NEW [--configs quickstart rq_quick] [--steps 20] [--work DIR]
                            [--manifest train.jsonl]

    OLD ─► train.py, 20 steps per stage ─► log.jsonl ─┐            ┌─► sample.py ─► wav ─┐
                                                      ├─ equal? ───┤                     ├─ equal?
    NEW ─► train.py, 20 steps per stage ─► log.jsonl ─┘            └─► sample.py ─► wav ─┘

Each checkout reads its own configs/NAME.toml, with seed 0 and one thread; steps per second are not
compared. Configs of recordings (real_*) need --manifest and start from nothing; discriminators act
after a quarter of the steps. What a checkout has already trained under --work is not trained again
while its files stay as they are: one old checkout serves many comparisons.

Exit status: 0 equal, 1 different, 2 your mistake (one line says which).
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from cli import BadInput, Parser, cli
from config import WALL_CLOCK

CONFIGS = ("quickstart", "audiocalm_quick", "rq_quick")


def run_folder_of(work, checkout, name, steps):
    """Where a checkout trains a config: its name has a digest of the checkout's path and files."""
    path = Path(checkout).resolve()
    digest = hashlib.sha256(os.fsencode(path) + str(steps).encode())
    files = [f for part in ("*.py", "corpora/*.py", "configs/*.toml") for f in path.glob(part)]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return f"{work}/{path.name}_{digest.hexdigest()[:8]}_{name}"


def train_and_sample(checkout, name, a):
    """Train one config for a few steps and generate from it -> (rows of log.jsonl, wav or None)."""
    run_folder = run_folder_of(a.work, checkout, name, a.steps)
    config = f"{checkout}/configs/{name}.toml"
    with open(config, "rb") as f:
        table = tomllib.load(f)

    options = ["--out", run_folder, "--seed", "0", "--threads", "1", "--device", "cpu"]
    for stage in table["stages"]:
        options += [f"--train.{stage}.steps", str(a.steps), f"--train.{stage}.log_every", "1",
                    f"--train.{stage}.init", '""', f"--train.{stage}.freeze", "[]"]
    if "vae" in table["stages"]:
        # the generator's adversarial loss begins soon; the old name, which every layout reads
        # (config.migrate)
        options += ["--vae.disc_warmup", str(a.steps // 4)]
    if name.startswith("real"):
        options += ["--data.manifest", a.manifest]
    run(checkout, "train.py", "--config", config, *options)

    with open(f"{run_folder}/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        for key in WALL_CLOCK:
            row.pop(key, None)

    if table["stages"] == ["vae"]:
        return rows, None
    wav = f"{run_folder}/compared.wav"
    run(checkout, "sample.py", "--run", run_folder, "--text", "three seven", "--threads", "1",
        "--seconds", "1", "--out", wav)
    return rows, Path(wav).read_bytes()


def run(checkout, *command):
    """One command of a checkout, in its folder; its last line of stderr where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=checkout, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{checkout}: {command[0]}: {last}")


def first_difference(old, new):
    """A sentence about the first figure that differs, or None."""
    if len(old) != len(new):
        return f"{len(old)} rows of log.jsonl against {len(new)}"
    for before, after in zip(old, new):
        for key in before.keys() | after.keys():
            if before.get(key) != after.get(key):
                return (f"{before['stage']} step {before['step']}: {key} "
                        f"{before.get(key)} against {after.get(key)}")
    return None


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", help="folder of one checkout")
    p.add_argument("new", help="folder of the other")
    p.add_argument("--configs", nargs="+", default=CONFIGS, help=f"default: {' '.join(CONFIGS)}")
    p.add_argument("--steps", type=int, default=20, help="per stage (default 20)")
    p.add_argument("--manifest", help="recordings, for the configs that need some")
    p.add_argument("--work", default="out/compare", help="folder of the runs (default out/compare)")
    a = p.parse_args()
    a.work = os.path.abspath(a.work)
    if a.manifest:
        a.manifest = os.path.abspath(a.manifest)
    elif any(name.startswith("real") for name in a.configs):
        raise BadInput("--manifest: real_* need recordings; give some, or --configs without them")

    equal = True
    for name in a.configs:
        (old, old_wav), (new, new_wav) = (train_and_sample(c, name, a) for c in (a.old, a.new))
        difference = first_difference(old, new)
        if difference is None and old_wav != new_wav:
            difference = "the wavs of sample.py"
        figures = sum(len(row) - 2 for row in old)
        print(f"{name:20s} {len(old):4d} rows, {figures:5d} figures: "
              + ("equal" + (", wav equal" if old_wav else "") if difference is None
                 else f"DIFFERENT: {difference}"), flush=True)
        equal = equal and difference is None
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    cli(main)
