"""What a training will need, before it runs: train.py --config FILE --plan [--gpus 16] [--fit 80]

    config ─► the stage's model and one micro-batch as fake tensors (shapes without memory)
              ─► forward and backward ─┬─► FLOPs of each operation     ─► steps per second, days
                                       └─► bytes alive, at their peak  ─► does it fit?

One paragraph per stage and number of GPUs:

    parameters   of all that the stage trains
    state        bytes that stay: weights and both moments of AdamW in fp32 (12 per parameter),
                 averaged weights (4 more); sharded (train.shard), a part of each
    pass         peak of one micro-batch beside that: activations, and gradients as they come; in
                 bf16 autocast and eager, which is an upper limit: compiled layers keep less
    FLOPs        matrix products, attention and convolutions of a step, 2 per multiplication and
                 addition; recomputing (train.STAGE.checkpoint) is not counted
    time         at 40 and 55 % of the 989 TFLOP/s that an H100 has in bf16
    disk         a checkpoint while it replaces the last one; latents of an hour of audio

Compiled on an H100 (LOG.md), GB at the peak against the plan: calm_music 45.3 of 48.8, calm_speech
40.6 of 45.1, pocket_tts 20.2 of 29.7.
--fit 80 chooses train.STAGE.micro_batch, .checkpoint and train.shard for GPUs of 80 GB.
"""
import dataclasses
import gc
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from cli import BadInput
from config import LM_STAGES, STAGES, make_model, stage_table
from data import KINDS, PAD
from discrete import DISCRETE
from gan import VAEGAN
from parallel import Losses, layers_of
from stages import recompute_activations

H100 = 989e12                           # FLOP/s in bf16, NVIDIA's figure without sparsity
PEAKS = {"H100": H100, "H200": H100, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


def peak_flops(device, bf16):
    """FLOP/s in bf16 of the CUDA device in use, 0 where they are not known here or not used."""
    if not (device.startswith("cuda") and bf16):
        return 0
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if key in name), 0)


# ---------------------------------------------------------------- a stage on random rows

class RandomRows:
    """A stage as train.py's functions see it, on one micro-batch of random rows of full length.

    The VAE's discriminators take part from the start; a WavLM teacher does not.
    """
    some_unused = False

    def __init__(self, cfg, stage, rows, device):
        self.stage = stage
        with torch.device(device):
            if stage == "vae":
                self.model = make_vae(cfg)
                self.batch = random_audio(cfg, rows)
            else:
                self.model = make_model(cfg, stage)
                self.model.static_shapes = True
                self.batch = random_latents(cfg, stage, rows, self.model.monologue)
        self.model.train()

        self.averaged = self.model
        self.optimized = {stage: self.model}
        if stage == "vae":
            self.averaged = self.model.vae
            self.optimized = {"vae": self.model.vae}
            if self.model.disc is not None:
                self.optimized["disc"] = self.model.disc

    def losses(self, batch, step, source=None):
        if self.stage == "vae":
            yield from self.model.losses(batch["audio"], step, source)
        else:
            loss, metrics = self.model.loss(dict(batch), source)
            yield self.stage, loss, metrics

    def compile(self):
        if self.stage == "vae":
            self.model.vae.encoder.compile()
            self.model.vae.decoder.compile()
        else:
            self.model.compile_for_training()


def make_vae(cfg):
    """The VAE and its discriminators, without the teacher, whose weights are not ours."""
    weights = {k: v for k, v in cfg.gan.loss_weights.items() if k != "distill"}
    gan = dataclasses.replace(cfg.gan, disc_start=0, disc_warmup=0, loss_weights=weights)
    return VAEGAN(cfg.vae, gan)


def random_audio(cfg, rows):
    """{"audio": (rows, channels, S)}: crops as long as in training."""
    hop = cfg.vae.hop
    samples = -(-round(cfg.data.crop_seconds * cfg.vae.sample_rate) // hop) * hop
    return {"audio": 0.1 * torch.randn(rows, cfg.vae.channels, samples)}


def random_latents(cfg, stage, rows, monologue):
    """A batch of LatentBatches' layout: every row as long as data.frames, with text and prompt."""
    frames = cfg.data.frames
    prompt_frames = cfg.data.prompt_frames
    x = torch.randn(rows, frames, cfg.vae.latent_dim)
    prompt = torch.randn(rows, prompt_frames, cfg.vae.latent_dim)
    if stage_table(cfg, stage).head.objective in DISCRETE:
        levels = cfg.vae.codebooks
        x = torch.randint(cfg.vae.codebook_size, (rows, frames, levels))
        prompt = torch.randint(cfg.vae.codebook_size, (rows, prompt_frames, levels))

    text_len = 1 if monologue else 1 + cfg.data.text_len
    return {"x": x,
            "frames": torch.full((rows,), frames),
            "ended": torch.ones(rows, dtype=torch.bool),
            "text": torch.randint(PAD, (rows, 1 + cfg.data.text_len)),
            "text_len": torch.full((rows,), text_len),
            "kind": torch.arange(rows) % len(KINDS),
            "counts": [len(range(i, rows, len(KINDS))) for i in range(len(KINDS))],
            "prompt": prompt,
            "prompt_len": torch.full((rows,), prompt_frames),
            "words": torch.full((rows, frames, monologue), PAD),
            "aligned": torch.ones(rows, dtype=torch.bool)}


def first_row(batch):
    """A batch of one row, of the first kind."""
    row = {name: value[:1] for name, value in batch.items()}
    return row | {"counts": [1] + [0] * (len(KINDS) - 1)} if "counts" in row else row


# ---------------------------------------------------------------- counting

class Live(TorchDispatchMode):
    """Bytes of the storages alive that operations under it made: `now`, and `peak` so far."""

    def __init__(self):
        super().__init__()
        self.known = weakref.WeakKeyDictionary()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size):
        self.now -= size


def forward(trainer, batch, bf16):
    """The loss of a micro-batch, as train.py computes it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = Losses(trainer)(batch, 10 ** 9, None)
    return loss


@dataclasses.dataclass
class Cost:
    """What a stage and one of its micro-batches cost."""
    # numbers in all its weights, in its largest layer, and in what belongs to no layer
    parameters: int
    layer: int
    root: int
    # FLOPs of one row, forward and backward
    flops: int
    # bytes that the forward pass keeps for the backward pass, and the peak of both with gradients
    kept: int
    peak: int


def measure(cfg, stage, rows, bf16=True):
    """The Cost of a stage with micro-batches of so many rows, on fake tensors.

    Bytes are of activations and gradients, beside weights and batch. The VAE's losses take all
    windows and its discriminators the whole crop.
    """
    cfg = dataclasses.replace(cfg, gan=dataclasses.replace(cfg.gan, loss_scales=0, disc_seconds=0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = RandomRows(cfg, stage, rows, "cpu")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(trainer.model)]

        with FlopCounterMode(display=False) as counter:
            forward(trainer, first_row(trainer.batch), bf16).backward()
        if getattr(cfg.train, stage).checkpoint:
            recompute_activations(trainer.model)
        trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        with Live() as live:
            loss = forward(trainer, trainer.batch, bf16)
            kept = live.now
            loss.backward()
    return Cost(parameters, max(layers, default=0), parameters - sum(layers),
                counter.get_total_flops(), kept, live.peak)


def measure_rows(cfg, stage, choices, bf16=True):
    """{rows: Cost} for several sizes of a micro-batch: bytes grow evenly with the rows, so two are
    measured and the others lie on their line.
    """
    one, two = (measure(cfg, stage, rows, bf16) for rows in (1, 2))
    return {rows: dataclasses.replace(one, kept=one.kept + (rows - 1) * (two.kept - one.kept),
                                      peak=one.peak + (rows - 1) * (two.peak - one.peak))
            for rows in choices}


def memory(cost, gpus, shard, ema):
    """(bytes that stay, bytes of a pass) of one GPU.

    Sharded: 1/gpus of the state and of the gradients; beside what the forward pass keeps, the root
    and two gathered layers with the gradients of one.
    """
    state = cost.parameters * (16 if ema else 12)
    if not shard:
        return state, cost.peak
    gathered = 4 * (2 * cost.root + 3 * cost.layer)
    return state / gpus, max(cost.kept, cost.peak - 4 * cost.parameters) + gathered \
        + 4 * cost.parameters / gpus


# ---------------------------------------------------------------- what fits

USABLE = 0.92                   # of a GPU's memory: the rest is CUDA's, NCCL's and lost in gaps
ENOUGH = 2048                   # positions of a pass that keep a GPU busy


def fit(cfg, stage, gpus, gigabytes):
    """The config with micro_batch, checkpoint and shard of a stage so that it fits into so many GB.

    In this order: as many rows per pass as fit; sharded, where fewer than ENOUGH positions fit;
    recomputing, where that does not help. Errors: BadInput where one row does not fit.
    """
    stage_cfg = getattr(cfg.train, stage)
    if stage_cfg.batch % gpus:
        raise BadInput(f"train.{stage}.batch: {stage_cfg.batch} rows cannot be shared by {gpus} "
                       "GPUs")
    rows = stage_cfg.batch // gpus
    choices = [n for n in range(rows, 0, -1) if rows % n == 0]
    positions = cfg.data.frames if stage in LM_STAGES else ENOUGH
    can_shard = gpus > 1 and stage in LM_STAGES

    for checkpoint in (False, True):
        changed = with_stage(cfg, stage, checkpoint=checkpoint)
        costs = measure_rows(changed, stage, choices)
        for shard in (False, True)[:1 + can_shard]:
            for micro in choices:
                enough = checkpoint or micro == rows or micro * positions >= ENOUGH
                if enough and sum(memory(costs[micro], gpus, shard, stage_cfg.ema)) \
                        < USABLE * gigabytes * 1e9:
                    # 0 is all rows of a GPU, which is then no change
                    micro = 0 if micro == rows and not stage_cfg.micro_batch else micro
                    train = dataclasses.replace(cfg.train, shard=cfg.train.shard or shard)
                    return with_stage(dataclasses.replace(cfg, train=train), stage,
                                      checkpoint=checkpoint, micro_batch=micro)
    raise BadInput(f"{stage}: one row does not fit into {gigabytes:g} GB on {gpus} GPU(s); use "
                   "more GPUs or shorter rows (data.frames, data.crop_seconds)")


def with_stage(cfg, stage, **changes):
    """The config with other values in [train.STAGE]."""
    stage_cfg = dataclasses.replace(getattr(cfg.train, stage), **changes)
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **{stage: stage_cfg}))


# ---------------------------------------------------------------- in words

def plan(cfg, gpus, gigabytes=80.0, fitted=False):
    """The paragraphs for the config's stages on so many GPUs of so many GB; fitted: with the
    micro-batches and sharding that `fit` chooses, and the command line that sets them.
    """
    texts = []
    options = []
    for stage in cfg.stages:
        if fitted:
            # what one stage needs does not shard the others
            own = fit(cfg, stage, gpus, gigabytes)
            options += changed_options(cfg, own, stage)
            texts.append(plan_stage(own, stage, gpus, gigabytes))
        else:
            texts.append(plan_stage(cfg, stage, gpus, gigabytes))
    if fitted:
        texts.append("options: " + (" ".join(dict.fromkeys(options)) or "none, it fits as it is"))
    return "\n".join(texts)


def changed_options(old, new, stage):
    """What `fit` changed, as train.py takes it."""
    before, after = (getattr(cfg.train, stage) for cfg in (old, new))
    options = [f"--train.{stage}.{key} {str(getattr(after, key)).lower()}"
               for key in ("micro_batch", "checkpoint")
               if getattr(before, key) != getattr(after, key)]
    if new.train.shard and not old.train.shard:
        options.append("--train.shard true")
    return options


def plan_stage(cfg, stage, gpus, gigabytes):
    """The paragraph of one stage."""
    stage_cfg = getattr(cfg.train, stage)
    rows = -(-stage_cfg.batch // gpus)
    micro = stage_cfg.micro_batch or rows
    cost = measure(cfg, stage, micro)
    shard = cfg.train.shard and gpus > 1 and stage in LM_STAGES

    # memory of one GPU
    state, of_pass = memory(cost, gpus, shard, stage_cfg.ema)
    how = [name for name, used in (("sharded", shard), ("recomputing", stage_cfg.checkpoint))
           if used]
    fits = "fits" if state + of_pass < USABLE * gigabytes * 1e9 else "does not fit: see --fit"
    text = (f"{stage}: {cost.parameters / 1e6:,.1f}M parameters; {stage_cfg.batch} rows per step "
            f"on {gpus} GPU(s) = {-(-rows // micro)} micro-batch(es) of {micro}"
            f"{', ' + ' and '.join(how) if how else ''}\n"
            f"  memory per GPU: state {state / 1e9:.1f} GB, pass {of_pass / 1e9:.1f}, peak "
            f"{(state + of_pass) / 1e9:.1f} of {gigabytes:g}: {fits}")

    # time and audio
    total = cost.flops * stage_cfg.batch
    text += f"\n  FLOPs per step: {total / 1e12:,.2f} T"
    for share in (0.40, 0.55):
        speed = share * H100 * gpus / total
        days = stage_cfg.steps / speed / 86400
        text += f"; at {share:.0%} of an H100 {speed:.2f} steps/s, {days:.2f} days"
    seconds = stage_cfg.batch * seconds_of_a_row(cfg, stage)
    text += (f"\n  audio: {seconds / 60:,.1f} minutes per step at most, "
             f"{seconds * stage_cfg.steps / 3600:,.0f} hours in all")

    # disk
    text += f"\n  disk: {2 * cost.parameters * 16 / 1e9:.1f} GB for checkpoints"
    if stage in LM_STAGES:
        per_hour = 3600 * cfg.vae.frame_rate * 2 * cfg.vae.latent_dim * 2
        text += f", {per_hour / 1e6:.0f} MB of latents per hour of audio"
    return text


def seconds_of_a_row(cfg, stage):
    """The longest audio in a row."""
    return cfg.data.crop_seconds if stage == "vae" else cfg.data.frames / cfg.vae.frame_rate


if __name__ == "__main__":
    print("plan.py is a library, used by train.py --plan and tools.bench train")
