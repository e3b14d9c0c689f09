"""Half an hour of one GPU, in three parts of at most ten minutes: python -m tools.gpu_day PART

    correct   the tests that need a GPU, the papers' tests, the quickstart's stages compiled in bf16
    bench     speed of the heads, the VAE, generation and AudioCALM; training steps at paper sizes
    train     configs/h100.toml: speech VAE, text to speech, its one-step head; going on where the
              last time ended, if its checkpoints are still there

    PART ─► commands, one after the other, each with a time limit ─► OUT/PART.log, OUT/*.json
                                                                └─► one line per command

    python -m tools.gpu_day bench --out gpu              on the GPU
    python -m tools.gpu_day bench --out gpu --toy        the same commands, tiny, on the CPU
    python -m tools.gpu_day bench --only "train music"   some of them

A command that fails or exceeds its limit does not stop the others. `make gpu-day` runs all parts at
toy size, to be sure of every command before a GPU is paid for.
Exit status: 0 all commands succeeded, 1 some did not, 2 the user's mistake.
"""
import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from cli import Parser, cli, number

PYTHON = sys.executable


@dataclass
class Command:
    """One command of a part."""
    name: str
    arguments: list                         # of Python
    seconds: float                          # most it may take
    environment: dict = None


# ---------------------------------------------------------------- the parts

def correct(out, toy):
    """Tests, then every stage of a few steps; graph breaks and recompilations go to the log."""
    tests = ["-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider"]
    many = [] if toy else ["-n", "6"]
    steps = 3 if toy else 30
    config = ["train.py", "--config", "configs/quickstart.toml", "--out", f"{out}/correct",
              "--stages", '["vae","lm","consistency","audiocalm","audiocalm_lsd"]',
              "--toy.clips", "48", "--toy.valid_clips", "12", "--sample.count", "1",
              "--sample.seconds", "1", "--fresh"]
    for stage in ("vae", "lm", "consistency", "audiocalm", "audiocalm_lsd"):
        config += [f"--train.{stage}.steps", str(steps), f"--train.{stage}.log_every", "5"]
    if toy:
        config += ["--device", "cpu", "--threads", "1"]
    return [
        Command("gpu tests", [*tests, *many, "-m", "gpu", "tests/gpu"], 400),
        Command("stages", config, 200, {"TORCH_LOGS": "graph_breaks,recompiles"}),
        Command("paper tests", [*tests, *many,
                                "tests/papers/test_moe.py" if toy else "tests/papers"], 150,
                {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})]


def bench(out, toy):
    """tools.bench at paper sizes; at toy size the quickstart's."""
    def command(name, kind, *options, seconds=60):
        file = name.replace(" ", "_")
        short = ["--repeats", "1", "--threads", "1"] if toy else []
        return Command(name, ["-m", "tools.bench", kind, *options, "--json", f"{out}/{file}.json",
                              *short], seconds)

    def train(name, config, stage, *options):
        """A training step compiled, as train.py runs it, with and without recomputing."""
        if toy:
            config, options = "configs/quickstart.toml", ["--rows", "2"]
        else:
            config, options = f"configs/paper/{config}.toml", [*options, "--compile"]
        return command(name, "train", "--config", config, "--stage", stage, *options, seconds=100)

    quick = ["--config", "configs/quickstart.toml", "--seconds", "1"] if toy else []
    music = quick or ["--config", "configs/paper/calm_music.toml"]
    fast = ["--fast", "static"] if toy else ["--fast", "static", "graph"]

    # in the order of what one wants to know first, since time may run out
    commands = [
        train("train music", "calm_music", "lm"),
        train("train pocket", "pocket_tts", "lm"),
        train("train speech", "calm_speech", "lm")]
    if not toy:
        commands += [command("heads music", "heads", "--domain", "music", "--fast", "graph"),
                     command("heads speech", "heads", "--domain", "speech", "--fast", "graph"),
                     command("heads music eager", "heads", "--domain", "music")]
    commands += [
        command("sample", "sample", *quick, *fast, seconds=90),
        train("train vae music", "calm_music", "vae", "--rows", "4"),
        train("train audiocalm", "audiocalm", "audiocalm", "--rows", "4", "--checkpoint"),
        command("vae", "vae", *music)]
    if not toy:
        commands.append(command("audiocalm", "audiocalm", "--seconds", "5",
                                "--lengths", "5", "10"))
    return commands


def train(out, toy):
    """The longest useful training."""
    config = ["train.py", "--config", "configs/h100.toml", "--out", f"{out}/h100"]
    if toy:
        config += ["--device", "cpu", "--data.manifest", "", "--data.valid", "",
                   "--toy.clips", "32", "--toy.valid_clips", "8", "--toy.words", "true"]
        for stage in ("vae", "lm", "consistency"):
            config += [f"--train.{stage}.steps", "2", f"--train.{stage}.batch", "2",
                       f"--train.{stage}.micro_batch", "0"]
    return [Command("train", config, 570)]


PARTS = {"correct": correct, "bench": bench, "train": train}


# ---------------------------------------------------------------- running them

def run(command, log):
    """Run one command, its output into the log -> "ok", "exit N" or "stopped after N s"."""
    log.write(f"\n$ python {' '.join(command.arguments)}\n")
    log.flush()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(command.environment or {})}
    try:
        done = subprocess.run([PYTHON, *command.arguments], stdout=log, stderr=subprocess.STDOUT,
                              env=environment, timeout=command.seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {command.seconds:.0f} s"
    return "ok" if done.returncode == 0 else f"exit {done.returncode}"


def last_line(path, start):
    """The last line that was written behind byte `start` of the log."""
    with open(path, encoding="utf8", errors="replace") as f:
        f.seek(start)
        lines = [line for line in f.read().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               prog="python -m tools.gpu_day")
    p.add_argument("part", choices=PARTS)
    p.add_argument("--out", default="out/gpu_day", help="folder of logs and figures "
                                                        "(default out/gpu_day)")
    p.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    p.add_argument("--only", metavar="NAME", help="commands whose name contains this")
    p.add_argument("--minutes", type=number(float, above=0), default=9.5,
                   help="start no command after so many minutes (default 9.5)")
    return p.parse_args()


def main():
    args = parse()
    os.makedirs(args.out, exist_ok=True)
    path = f"{args.out}/{args.part}.log"
    start = time.monotonic()
    deadline = start + 60 * args.minutes

    failed = 0
    with open(path, "w", encoding="utf8") as log:
        for command in PARTS[args.part](args.out, args.toy):
            if args.only and args.only not in command.name:
                continue
            left = deadline - time.monotonic()
            if left < 5:
                print(f"{command.name:16s} not started, the time is up", flush=True)
                failed += 1
                continue
            command.seconds = min(command.seconds, left)
            began = time.monotonic()
            position = log.tell()
            result = run(command, log)
            failed += result != "ok"
            print(f"{command.name:16s} {result:8s} {time.monotonic() - began:4.0f} s  "
                  f"{last_line(path, position)[:300]}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    cli(main)
