"""What a training will need, before it runs: python train.py --config FILE --plan [--gpus 16]

    config ─► the stage's model and one micro-batch as fake tensors (shapes without memory)
              ─► forward and backward ─┬─► FLOPs of each operation     ─► steps per second, days
                                       └─► bytes alive, at their peak  ─► does it fit?

One paragraph per stage and number of GPUs:

    parameters   of all that the stage trains
    state        bytes that stay: weights and both moments of AdamW in fp32 (12 per parameter),
                 averaged weights (4 more)
    pass         peak of one micro-batch beside that: activations, and gradients as they come; in
                 bf16 autocast and eager, which is an upper limit: compiled layers keep less
    FLOPs        matrix products, attention and convolutions of a step, 2 per multiplication and
                 addition; recomputing (train.STAGE.checkpoint) is not counted
    time         at 40 and 55 % of the 989 TFLOP/s that an H100 has in bf16
    disk         a checkpoint while it replaces the last one; latents of an hour of audio

Compiled on an H100 (LOG.md), GB at the peak against the plan: calm_music 45.3 of 48.8, calm_speech
40.6 of 45.1, pocket_tts 20.2 of 29.7.
AudioCALM's layers split their rows by kind on the host, which fake tensors do not allow: of its
memory only the state is given.
"""
import dataclasses
import gc
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from config import LM_STAGES, STAGES, make_model, stage_table
from data import KINDS, PAD
from discrete import DISCRETE
from gan import VAEGAN
from parallel import Losses
from stages import recompute_activations

H100 = 989e12                           # FLOP/s in bf16, NVIDIA's figure without sparsity


# ---------------------------------------------------------------- a stage on random rows

class RandomRows:
    """A stage as train.py's functions see it, on one micro-batch of random rows of full length.

    The VAE's discriminators take part from the start; a WavLM teacher does not.
    """
    starts_in_parts = False

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


def forward_backward(trainer, batch, bf16):
    """The losses of a micro-batch and their gradients, as train.py computes them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = Losses(trainer)(batch, 10 ** 9, None)
    loss.backward()


def measure(cfg, stage, rows, bf16=True):
    """One micro-batch on fake tensors -> (parameters, FLOPs of a row, bytes at the peak).

    Bytes of activations and gradients, beside weights and batch. FLOPs and bytes are None for
    AudioCALM. The VAE's losses take all windows and its discriminators the whole crop.
    """
    cfg = dataclasses.replace(cfg, gan=dataclasses.replace(cfg.gan, loss_scales=0, disc_seconds=0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = RandomRows(cfg, stage, rows, "cpu")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        row = first_row(trainer.batch)
        with FlopCounterMode(display=False) as counter:
            forward_backward(trainer, row, bf16)
        if getattr(cfg.train, stage).checkpoint:
            recompute_activations(trainer.model)
        trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        with Live() as live:
            forward_backward(trainer, trainer.batch, bf16)
    return parameters, counter.get_total_flops(), live.peak


# ---------------------------------------------------------------- in words

def plan(cfg, gpus, gigabytes=80.0):
    """The paragraphs for the config's stages on so many GPUs of so many GB."""
    return "\n".join(plan_stage(cfg, stage, gpus, gigabytes) for stage in cfg.stages)


def plan_stage(cfg, stage, gpus, gigabytes):
    """The paragraph of one stage."""
    stage_cfg = getattr(cfg.train, stage)
    rows = -(-stage_cfg.batch // gpus)
    micro = stage_cfg.micro_batch or rows
    parameters, flops, of_pass = measure(cfg, stage, micro)

    # memory of one GPU
    state = parameters * (16 if stage_cfg.ema else 12)
    text = (f"{stage}: {parameters / 1e6:,.1f}M parameters; {stage_cfg.batch} rows per step on "
            f"{gpus} GPU(s) = {rows // micro} micro-batch(es) of {micro}\n"
            f"  memory per GPU: state {state / 1e9:.1f} GB")
    if of_pass is not None:
        peak = (state + of_pass) / 1e9
        advice = f"train.{stage}.micro_batch smaller, or train.{stage}.checkpoint = true"
        fits = "fits" if peak < gigabytes else f"does not fit: {advice}"
        text += f", pass {of_pass / 1e9:.1f}, peak {peak:.1f} of {gigabytes:g}: {fits}"

    # time
    if flops is not None:
        total = flops * stage_cfg.batch
        text += f"\n  FLOPs per step: {total / 1e12:,.2f} T"
        for share in (0.40, 0.55):
            speed = share * H100 * gpus / total
            days = stage_cfg.steps / speed / 86400
            text += f"; at {share:.0%} of an H100 {speed:.2f} steps/s, {days:.2f} days"

    # disk
    text += f"\n  disk: {2 * parameters * 16 / 1e9:.1f} GB for checkpoints"
    if stage in LM_STAGES:
        per_hour = 3600 * cfg.vae.frame_rate * 2 * cfg.vae.latent_dim * 2
        text += f", {per_hour / 1e6:.0f} MB of latents per hour of audio"
    return text


if __name__ == "__main__":
    print("plan.py is a library, used by train.py --plan and tools.bench train")
