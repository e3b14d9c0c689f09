"""What several tests need: a tiny experiment, a way to run commands, one finished run."""
import json
import os
import subprocess
import sys

from cli import BadInput
from config import WALL_CLOCK
from corpora import flite

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# a whole experiment, small enough to train in seconds
TINY = """
out = "{out}"
stages = ["vae", "lm", "consistency"]
threads = 1
device = "cpu"
[toy]
clips = 24
valid_clips = 8
voices = 1
digits_min = 1
digits_max = 2
words = true
[data]
crop_seconds = 0.4
frames = 16
prompt_frames = 4
text_len = 32
[vae]
sample_rate = 16000
latent_dim = 4
ratios = [4, 10, 4, 4]
encoder = "stft"
decoder = "istft"
stft_hop = 160
block = "seanet"
res_layers = 1
context = 10.0
width = 2
width_max = 16
dim = 16
heads = 2
encoder_layers = 1
decoder_layers = 1
[gan]
loss_windows = [512, 256]
loss_scales = 1
loss_floor = 1e-5
disc_windows = [256]
disc_width = 4
disc_start = 3
[gan.loss_weights]
mel = 1.0
adv = 0.1
feat = 0.1
kl = 0.01
[lm]
short_layers = 1
[lm.backbone]
dim = 16
layers = 1
heads = 2
[lm.head]
width = 16
blocks = 1
multiplier = 2
[audiocalm]
expert_dim = 16
[audiocalm.backbone]
dim = 16
layers = 1
heads = 2
[audiocalm.head]
width = 16
[train.vae]
lr = 1e-3
steps = 12
batch = 4
warmup = 2
save_every = 4
log_every = 1
ema = 0.9
[train.lm]
optimizer = "adamw"
lr = 1e-3
steps = 12
batch = 4
save_every = 4
log_every = 1
ema = 0.9
[train.consistency]
teacher = false
optimizer = "adamw"
lr = 1e-3
grad_clip = 1.0
ema = 0.0
steps = 4
batch = 4
log_every = 1
[train.audiocalm]
optimizer = "adamw"
lr = 1e-3
ema = 0.0
steps = 2
batch = 4
log_every = 1
[sample]
seconds = 0.4
count = 1
steps = 2
"""


def write(folder, text=TINY, out="run"):
    """folder/tiny.toml, whose run is folder/run -> its path."""
    path = f"{folder}/tiny.toml"
    with open(path, "w") as f:
        f.write(text.format(out=f"{folder}/{out}"))
    return path


def run(*arguments, **options):
    """Run one command in its own process: run("train.py", ...) or run("-m", "tools.bench")."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env,
                          capture_output=True, text=True, **options)


def logged(out):
    """The rows of log.jsonl without the speed."""
    with open(f"{out}/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows]


try:
    engine = flite.Flite()
except BadInput:
    engine = None                                      # Debian's package is not there
