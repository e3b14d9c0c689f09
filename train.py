"""Train: python train.py --config configs/quickstart.toml [--section.key value ...] [--fresh]
[--print]

One loop for all stages. A config names its stages in order; finished ones are skipped, an
interrupted one resumes where its last checkpoint was, with the same numbers as if it had never
stopped: a step is a pure function of (weights, optimizer, step number), because data and noise are
drawn from (seed, step, row).

    clips ─► [vae]  waveform crops ─► VAE-GAN ─► vae.pt
                                                   │ encode all clips once ─► latents/
             [lm]   latents + text ─► CALM with a flow head ─► lm.pt
    [consistency]   the same weights, one-step objective ─► consistency.pt   (of TrigFlow, also
                                            as its teacher; LSD, if the flow was rectified_flow)
    [distill]       another run's model with guidance ─► a smaller backbone, distill.pt
      [audiocalm]   latents + text ─► AudioCALM, all kinds, block by block ─► audiocalm.pt
  [audiocalm_lsd]   the same weights, a block in 1 to 4 passes ─► audiocalm_lsd.pt

Several GPUs: torchrun --standalone --nproc_per_node=8 train.py --config ...
`batch` is the global batch: every process takes its share of the same rows, gradients are summed
once a step, the result is the same for any number of processes that share the micro-batches evenly
(8 rows in micro-batches of 2: 1, 2 or 4 processes; tests/test_train.py). Close to the same only:
vae.balance and an RVQ, whose running means go on once a micro-batch.

    --out DIR               run folder (else the config's)
    --data.manifest M       train on your own audio: a manifest.jsonl or a folder
                            (python data.py -h)
    --train.lm.steps 500    any other value of the config
    --fresh                 start over: delete this run's checkpoints, latents and log; with
                            --stages lm those of that stage alone
    --print                 show the resolved config and stop

A run folder: config.toml, log.jsonl, loss.png, vae.pt, lm.pt, consistency.pt, latents/, samples/.
Ctrl-C saves a checkpoint first. Exit status: 0 done, 2 your mistake (one line says which),
130 interrupted.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn

import toy
from calm import CALM
from config import (FASTER, MODELS, STAGES, build, dump, load, load_checkpoint, load_weights,
                    make_model, save_checkpoint, stage_model, Config)
from data import (KINDS, AudioBatches, BadInput, LatentBatches, LatentCache, Parser,
                  Prefetch, cli, digest, draw_spectrograms, encode_text, load_audio, load_clips,
                  load_manifest, save_audio, seconds_of)
from discrete import DISCRETE
from heads import LSD, Consistency
from vae import VAE, VAEGAN, spectral_losses


class Runtime:
    """Device, precision, compilation and processes, chosen once and said aloud."""

    def __init__(self, cfg):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        device = cfg.device if cfg.device != "auto" else "cuda" if cuda else "mps" if mps else "cpu"
        if device == "cuda" and not cuda or device == "mps" and not mps:
            raise BadInput(f"device: '{device}' is not available here; use auto or cpu")
        # Gradients of near-silent audio are full of denormal numbers, which x86 handles in
        # microcode: a VAE step on recordings took .82 s, and .32 s without them. Before any worker
        # starts.
        torch.set_flush_denormal(True)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        why = "chosen" if cfg.dtype != "auto" else "no bf16 here"
        bf16 = cfg.dtype == "bf16"
        if cfg.dtype == "auto" and device == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
            bf16, why = True, "Ampere or newer"
        self.device, self.bf16 = device, bf16
        self.compile = cfg.compile == "yes" or cfg.compile == "auto" and device == "cuda"
        if self.world > 1:
            # a day: the others wait while the first process encodes the corpus
            dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                    timeout=datetime.timedelta(days=1))
            if device == "cuda":
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
        if device == "cuda":
            torch.set_float32_matmul_precision("high")       # TF32 in what stays fp32
        self.say(f"device {self.device} "
                 f"({'chosen' if cfg.device != 'auto' else 'best available'}), "
                 f"{'bf16' if bf16 else 'fp32'} ({why}), "
                 f"compile {'on' if self.compile else 'off'}, "
                 f"{self.world} process(es), {torch.get_num_threads()} CPU threads")

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)

    def to(self, batch):
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}


# ---------------------------------------------------------------- stages
# A stage has: model (saved), optimized {optimizer name: module}, averaged (module whose EMA is
# kept), batch(step, rows), losses(batch, step) yielding (optimizer name, loss, metrics),
# validate(module, step) -> figures, finish(module), compile().

class VAEStage:
    """Waveform crops -> VAE-GAN; at the end the latents' mean and std become buffers of the VAE."""

    def __init__(self, cfg, runtime, clips, valid):
        self.cfg, self.runtime, self.clips, self.valid = cfg, runtime, clips, valid
        try:
            self.model = VAEGAN(cfg.vae)
        except ValueError as e:                      # the teacher cannot be loaded
            raise BadInput(f"vae.{e}") from None
        self.averaged = self.model.vae
        learning = [part for name, part in self.model.named_children()     # the VAE, to_teacher
                    if name not in ("disc", "balancer")]
        self.optimized = {"vae": torch.nn.ModuleList(learning)}
        if self.model.disc is not None:
            self.optimized["disc"] = self.model.disc
        hop, rate = cfg.vae.hop, cfg.vae.sample_rate
        self.batch = AudioBatches(clips, cfg.data, rate, cfg.vae.channels, cfg.train.vae.batch, hop)

    def compile(self):
        for part in (self.model.vae.encoder, self.model.vae.decoder):
            part.compile()

    def losses(self, batch, step):
        return self.model.losses(batch["audio"], step)

    def clip(self, clip, seconds):
        wav = load_audio(clip.audio, self.cfg.vae.sample_rate, self.cfg.vae.channels,
                         seconds=seconds, allow_silence=True)
        return torch.tensor(wav)[None].to(self.runtime.device)

    def validate(self, vae, step):
        """Mean log10-mel distance on held-out clips; two clips of each kind rendered beside their
        original.
        """
        cfg, total, shown = self.cfg, [], dict.fromkeys(KINDS, 0)
        for clip in [c for kind in KINDS for c in [c for c in self.valid if c.kind == kind][:16]]:
            wav = self.clip(clip, 5.0)
            rec = vae.decode(vae.encode(wav)[0])[..., :wav.shape[-1]]
            if wav.shape[-1] >= 2048:
                total.append(spectral_losses(wav, rec, cfg.vae, [1024], ["mel"])["mel"].item())
            if shown[clip.kind] < 2:
                shown[clip.kind] += 1
                name = f"{cfg.out}/samples/step{step:08d}_vae_{clip.kind}{shown[clip.kind]}"
                save_audio(f"{name}_original.wav", wav[0].cpu().numpy(), cfg.vae.sample_rate)
                save_audio(f"{name}_reconstruction.wav", rec[0].cpu().numpy(), cfg.vae.sample_rate)
                draw_spectrograms(f"{name}.png", [("original", wav[0]), ("reconstruction", rec[0])],
                                  cfg.vae.sample_rate)
        return {"valid_mel": sum(total) / max(len(total), 1)}

    def finish(self, vae):
        """Mean and std over posterior samples of some 400 clips (all, if there are fewer than 800)
        -> buffers.
        """
        vae.measure(self.clip(clip, 10.0)
                    for clip in self.clips[:: max(1, len(self.clips) // 400)])


class LMStage:
    """Cached latents and text -> the language model of the stage's name. "consistency" starts from
    lm.pt, "audiocalm_lsd" from audiocalm.pt, and changes the objective.
    """

    def __init__(self, cfg, runtime, clips, valid, name):
        self.cfg, self.runtime, self.valid = cfg, runtime, valid
        state = load_checkpoint(f"{cfg.out}/vae.pt", "cpu")
        if not state["done"]:
            raise BadInput(f"{cfg.out}/vae.pt: its training is not finished; "
                           f"put \"vae\" before \"{name}\" in stages")
        self.vae = VAE(cfg.vae)
        weights = state["ema"] or {
            k[4:]: v for k, v in state["model"].items() if k.startswith("vae.")}
        load_weights(self.vae, weights, f"{cfg.out}/vae.pt")
        self.vae.to(runtime.device).eval()
        table = getattr(cfg, MODELS[name][1])
        self.levels = cfg.vae.codebooks if table.head.objective in DISCRETE else 0     # of codes
        what = [self.levels] if self.levels else []
        # a new VAE or corpus: new latents
        self.key = digest(weights, [c.audio for c in clips], *what)
        train, held = (self.cache(clips, self.key),
                       self.cache(valid, digest(weights, [c.audio for c in valid], *what)))
        stage = getattr(cfg.train, name)
        rate = cfg.vae.frame_rate if getattr(table, "monologue", False) else 0.0
        self.batch = LatentBatches(clips, train, cfg.data, stage.batch, cfg.vae.latent_dim, rate)
        self.held = LatentBatches(valid, held, dataclasses.replace(cfg.data, weights={}),
                                  len(valid), cfg.vae.latent_dim, rate)
        self.name, self.model = name, make_model(cfg, name)
        if name in FASTER:
            path = f"{cfg.out}/{FASTER[name]}.pt"
            state = load_checkpoint(path, "cpu")
            weights = state["ema"] or state["model"]
            if not state["done"]:
                raise BadInput(f"{path}: its training is not finished; "
                               f"put \"{FASTER[name]}\" before \"{name}\" in stages")
            try:
                self.model.head.load_flow(
                    {k[5:]: v for k, v in weights.items() if k.startswith("head.")})
            except RuntimeError:
                raise BadInput(f"{path}: its head has other sizes than the config's") from None
            load_weights(self.model, self.model.state_dict() | weights, path)
            if getattr(stage, "teacher", False):
                self.model.to(runtime.device).requires_grad_(False)
                self.model.head.teach()
                self.model.head.requires_grad_(True)
        self.averaged = self.model
        self.optimized = {name: self.model}

    def cache(self, clips, key):
        cfg = self.cfg

        @torch.no_grad()
        def encode(wav):
            wav = wav.to(self.runtime.device)
            with self.runtime.autocast():
                return (self.vae.encode_codes(wav) if self.levels
                        else torch.cat(self.vae.encode(wav), -1)).cpu()

        if self.runtime.rank == 0:
            LatentCache.build(clips, encode, folder=f"{cfg.out}/latents", key=key,
                              sample_rate=cfg.vae.sample_rate, channels=cfg.vae.channels,
                              hop=cfg.vae.hop, dim=cfg.vae.latent_dim, levels=self.levels,
                              batch_seconds=60.0)
        if self.runtime.world > 1:
            dist.barrier()
        return LatentCache.build(clips, encode, folder=f"{cfg.out}/latents", key=key,
                                 sample_rate=cfg.vae.sample_rate, channels=cfg.vae.channels,
                                 hop=cfg.vae.hop, dim=cfg.vae.latent_dim, levels=self.levels,
                                 batch_seconds=60.0, show=False)

    def compile(self):
        head = self.model.head
        self.model.backbone.compile()
        if hasattr(self.model, "short"):
            self.model.short.compile()
        if isinstance(head, (Consistency, LSD)) and isinstance(self.model, CALM):
            # dynamo gives up on a compiled network inside an eager jvp, for good and in silence
            head.loss = torch.compile(head.loss)
        else:
            head.net.compile()

    def prepare(self, batch):
        """Draw latents from their posteriors and normalise them: x (B, T, 2D) -> (B, T, D).

        Codes (B, T, K) stay as they are.
        """
        if self.levels:
            return batch
        for name in ("x", "prompt"):
            mean, logvar = batch[name].chunk(2, -1)
            batch[name] = self.vae.normalize(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
        s = torch.arange(batch["x"].shape[1], device=batch["x"].device)
        batch["x"] = batch["x"] * (s < batch["frames"][:, None])[..., None]
        return batch

    def losses(self, batch, step):
        if isinstance(self.model.head, Consistency):
            self.model.head.it.fill_(step)
        loss, metrics = self.model.loss(self.prepare(batch))
        yield self.name, loss, metrics

    def validate(self, model, step):
        """Held-out loss with fixed noise; clips of each kind from text, and held-out clips
        continued.
        """
        cfg = self.cfg
        torch.manual_seed(1)
        rows = range(min(64, len(self.valid)))
        _, metrics = model.loss(self.prepare(self.runtime.to(self.held(0, rows))))
        for kind in KINDS:
            clips = [c for c in self.valid if c.kind == kind]
            texts = cfg.sample.texts.get(kind) or sorted(
                {c.text for c in clips if c.text
                 and len(encode_text(c.text, kind, cfg.data)) <= 1 + cfg.data.text_len})
            for i, text in enumerate(
                    texts[:: max(1, len(texts) // max(1, cfg.sample.count))][:cfg.sample.count]):
                self.render(model, f"step{step:08d}_{self.name}_{kind}{i + 1}", kind, text, i)
            longer = [c for c in clips if seconds_of(c) > cfg.sample.prompt_seconds + 1]
            for i, clip in enumerate(
                    longer[:: max(1, len(longer) // max(1, cfg.sample.count))][:cfg.sample.count]):
                wav = torch.tensor(load_audio(clip.audio, cfg.vae.sample_rate, cfg.vae.channels,
                                              seconds=cfg.sample.prompt_seconds))
                history = model.listen(self.vae, wav[None].to(self.runtime.device))
                self.render(model, f"step{step:08d}_{self.name}_{kind}_continued{i + 1}",
                            kind, "", i, history=history)
        return {f"valid_{k}": v.item() for k, v in metrics.items()}

    def render(self, model, name, kind, text, seed, **options):
        cfg, device = self.cfg, self.runtime.device
        tokens = torch.tensor([encode_text(text, kind, cfg.data)], dtype=torch.long, device=device)
        # every new length of the cache would be compiled anew
        with torch.compiler.set_stance("force_eager"):
            wav, = model.render(self.vae, tokens, kind=KINDS.index(kind),
                                seconds=cfg.sample.seconds, steps=cfg.sample.steps or None,
                                temperature=cfg.sample.temperature, guidance=cfg.sample.cfg,
                                noise=cfg.sample.noise,
                                generator=torch.Generator(device).manual_seed(seed), **options)
        save_audio(f"{cfg.out}/samples/{name}.wav", wav.cpu().numpy(), cfg.vae.sample_rate)
        draw_spectrograms(f"{cfg.out}/samples/{name}.png",
                          [(f"{kind}: {text or 'continued'}", wav)], cfg.vae.sample_rate)

    def finish(self, model):
        pass


class DistillStage(LMStage):
    """A student's backbone learns the teacher's guided Z (CALM.regress); head and EOS are the
    teacher's and stay. Nothing is dropped: with guidance learned, sample with cfg = 1. The VAE is
    the one beside the teacher, unless the student's run has one.
    """

    def __init__(self, cfg, runtime, clips, valid, name):
        path = cfg.train.distill.teacher
        state, vae = load_checkpoint(path, "cpu"), f"{os.path.dirname(path)}/vae.pt"
        if runtime.rank == 0 and not os.path.exists(f"{cfg.out}/vae.pt") and os.path.exists(vae):
            shutil.copyfile(vae, f"{cfg.out}/vae.pt")
        if runtime.world > 1:
            dist.barrier()
        super().__init__(cfg, runtime, clips, valid, name)
        other = build(Config, state["config"])
        if MODELS.get(state["stage"], (None,))[0] is not CALM:
            raise BadInput(f"train.distill.teacher: {path} is no CALM but \"{state['stage']}\"")
        theirs = stage_model(other, state["stage"])
        for table in (cfg.lm, theirs):
            if table.monologue or table.head.objective in DISCRETE:
                raise BadInput("train.distill: is for latents with text before them, "
                               "not for a monologue or codes")
        if cfg.lm.head.objective != theirs.head.objective:
            raise BadInput(f"lm.head.objective: must be the teacher's, '{theirs.head.objective}'")
        teacher = make_model(other, state["stage"])
        weights = state["ema"] or state["model"]
        load_weights(teacher, weights, path)
        # in a list: not ours to save
        self.teacher = [teacher.to(runtime.device).eval().requires_grad_(False)]
        copied = {k: v for k, v in weights.items() if not k.startswith("backbone.")}
        load_weights(self.model, {k: v for k, v in self.model.state_dict().items()
                                  if k.startswith("backbone.")} | copied, path)
        self.model.head.requires_grad_(False)
        self.model.eos.requires_grad_(False)

    def losses(self, batch, step):
        loss, metrics = self.model.regress(self.prepare(batch), self.teacher[0],
                                           self.cfg.train.distill.guidance)
        yield self.name, loss, metrics

    def compile(self):
        super().compile()
        self.teacher[0].backbone.compile()


def read_log(out):
    """The whole lines of log.jsonl: a killed run may have left half of one."""
    if not os.path.exists(f"{out}/log.jsonl"):
        return []
    with open(f"{out}/log.jsonl") as f:
        return [line for line in f if line.endswith("\n")]


def draw_losses(out):
    """loss.png: every logged figure of every stage against the step; held-out ones are dots."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = [json.loads(line) for line in read_log(out)]
    curves = {}                                      # (stage, name) -> [(step, value), ...]
    for row in rows:
        for name in row.keys() - {"stage", "step", "rate"}:
            curves.setdefault((row["stage"], name), []).append((row["step"], row[name]))
    trained = [key for key in curves if not key[1].startswith("valid_")]
    trained.sort(key=lambda key: ([r["stage"] for r in rows].index(key[0]), key[1]))
    if not trained:
        return
    columns, lines = 4, -(-len(trained) // 4)
    fig, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained",
                             figsize=(3 * columns, 2 * lines))
    for ax in axes.flat[len(trained):]:
        ax.set_axis_off()
    for ax, (stage, name) in zip(axes.flat, trained):
        ax.plot(*zip(*curves[stage, name]), lw=0.9)
        if (stage, f"valid_{name}") in curves:
            ax.plot(*zip(*curves[stage, f"valid_{name}"]), "o", ms=4)
        ax.set_title(f"{stage}: {name}", fontsize=8)
        ax.tick_params(labelsize=6)
    fig.savefig(f"{out}/loss.png", dpi=80)
    plt.close(fig)


# ---------------------------------------------------------------- the loop

def seed_for(seed, step, row):
    """Noise of a micro-batch: a function of the global step and its first global row."""
    return (seed * 1_000_003 + step) * 1_000_003 + row & 0x7FFF_FFFF_FFFF_FFFF


def schedule(cfg, step):
    """Learning-rate factor: linear warm-up, then cosine from 1 to lr_end."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    share = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * share))


class Muon:
    """torch.optim.Muon for the matrices of linear layers and convolutions, AdamW for the rest.

    Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that
    directions with small gradients are learned as fast as those with large ones: what a VAE on
    log-spectra needs, where a frame's level drowns its shape (LOG.md). A convolution (out, in, k)
    is a matrix (out, in · k), a transposed one (in, out · k), by a view. Steps have AdamW's size
    (Liu et al. 2025), so that one learning rate serves both. Depthwise kernels, embeddings, norms
    and biases are AdamW's.
    """

    def __init__(self, module, adamw, lr, weight_decay):
        self.weights = [m.weight for m in module.modules()
                        if isinstance(m, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d))
                        and getattr(m, "groups", 1) == 1]
        self.views = [p.detach().flatten(1) for p in self.weights]
        mine = set(map(id, self.weights))
        self.adamw = adamw([p for p in module.parameters() if id(p) not in mine])
        self.muon = torch.optim.Muon(self.views, lr=lr, weight_decay=weight_decay,
                                     adjust_lr_fn="match_rms_adamw")
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self, set_to_none=True):
        self.adamw.zero_grad(set_to_none)
        for p in self.weights:
            p.grad = None

    def step(self):
        for p, view in zip(self.weights, self.views):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        self.muon.step()
        self.adamw.step()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


def make_optimizers(stage, cfg, device):
    def adamw(parameters):
        groups = [{"params": [p for p in parameters if p.dim() >= 2],
                   "weight_decay": cfg.weight_decay},
                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas),
                                 fused=not device.startswith("mps"))

    if cfg.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise BadInput(f"optimizer: muon needs torch 2.9 or newer, this is {torch.__version__}; "
                       "use adamw")
    # discriminators (2-d convolutions with weight norm) stay with AdamW
    return {name: Muon(module, adamw, cfg.lr, cfg.weight_decay)
            if cfg.optimizer == "muon" and name != "disc" else adamw(list(module.parameters()))
            for name, module in stage.optimized.items()}


def gradients(stage, batches, step, runtime, seed, total):
    """Fill .grad with the gradient of the mean loss over the global batch; return the mean metrics.

    The loss of a micro-batch is a mean over its positions and weighs as its rows do: where rows are
    of different length, positions of a short micro-batch weigh more than those of a long one.
    batches: [(rows, batch), ...] this process's micro-batches; total: rows of the global batch.
    """
    sums = {}
    for rows, batch in batches:
        torch.manual_seed(seed_for(seed, step, rows.start))
        share = len(rows) / total
        with runtime.autocast():
            for name, loss, metrics in stage.losses(runtime.to(batch), step):
                with torch.autocast(runtime.device.split(":")[0], enabled=False):
                    (loss * share).backward()        # what is fp32 forward stays so backward
                for key, value in ({name: loss.detach()} | metrics).items():
                    sums[key] = sums.get(key, 0.0) + value * share
    if runtime.world > 1:
        grads = [p.grad for p in stage.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]
                         + [torch.stack([sums[k].float() for k in sums])])
        dist.all_reduce(flat)
        for g in grads:
            g.copy_(flat[:g.numel()].view_as(g))
            flat = flat[g.numel():]
        sums = dict(zip(sums, flat))
    return sums


class EMA:
    """Averaged weights w̄ ← d w̄ + (1 - d) w, with d growing to its value over the first steps."""

    def __init__(self, module, decay):
        self.module, self.decay = module, decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        current = self.module.state_dict()
        floats = [k for k, v in current.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.state[k] for k in floats],
                             [current[k].detach() for k in floats], 1 - decay)
        for k in current.keys() - set(floats):
            self.state[k].copy_(current[k])


@contextlib.contextmanager
def weights_of(module, state):
    """The module with other weights for a while, in eval mode, without gradients."""
    own = {k: v.detach().clone() for k, v in module.state_dict().items()}
    if state is not None:
        module.load_state_dict(state)
    module.eval()
    with torch.no_grad():
        yield module
    module.train()
    if state is not None:
        module.load_state_dict(own)


def train(stage, name, cfg, runtime):
    """Run one stage to its end; resume from cfg.out/<name>.pt if it is there."""
    c, out, path = getattr(cfg.train, name), cfg.out, f"{cfg.out}/{name}.pt"
    if c.batch % runtime.world:
        raise BadInput(
            f"train.{name}.batch: {c.batch} rows cannot be shared by {runtime.world} processes")
    mine = c.batch // runtime.world
    micro = c.micro_batch or mine
    if mine % micro:
        raise BadInput(
            f"train.{name}.micro_batch: {micro} does not divide the {mine} rows of a process")
    stage.model.to(runtime.device).train()
    parts = dict(stage.averaged.named_children())
    for part in c.freeze:
        if part not in parts:
            raise BadInput(f"train.{name}.freeze: unknown '{part}'; valid: {', '.join(parts)}")
        parts[part].requires_grad_(False)
    optimizers = make_optimizers(stage, c, runtime.device)
    ema, first = EMA(stage.averaged, c.ema) if c.ema else None, 0
    taught = getattr(getattr(stage.model, "head", None), "teacher", None)
    known = {k: v.clone() for k, v in stage.model.state_dict().items()
             if taught and not k.startswith("head.")}
    if os.path.exists(path):
        state = load_checkpoint(path, runtime.device)
        load_weights(stage.model, state["model"], path)
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
        if ema:
            ema.state = state["ema"] or EMA(stage.averaged, c.ema).state
        first = state["step"]
    elif c.init:
        state = load_checkpoint(c.init, runtime.device)
        weights = state["ema"] or {k.removeprefix("vae."): v for k, v in state["model"].items()
                                   if name != "vae" or k.startswith("vae.")}
        load_weights(stage.averaged, weights, c.init)
        if ema:
            ema = EMA(stage.averaged, c.ema)
        runtime.say(f"{name}: starts from {c.init} ({state['step']} steps)")
    if any(not torch.equal(v, known[k]) for k, v in stage.model.state_dict().items() if k in known):
        raise BadInput(f"train.{name}.teacher: {path if first else c.init} has another backbone "
                       f"than {out}/{FASTER[name]}.pt, which teaches; use --fresh or --out")
    del known
    if runtime.compile:
        stage.compile()
    size = sum(p.numel() for p in stage.model.parameters())
    runtime.say(f"{name}: {size / 1e6:.2f}M parameters, {c.steps} steps of {c.batch} rows = "
                f"{runtime.world} process(es) x {mine // micro} micro-batch(es) x {micro}"
                + (f"; resuming at step {first}" if first else ""))
    # what was logged after the checkpoint will come again
    if runtime.rank == 0:
        log = [line for line in read_log(out)
               if json.loads(line)["stage"] != name or json.loads(line)["step"] <= first]
        with open(f"{out}/log.jsonl", "w") as f:
            f.writelines(log)

    def batches(step):
        starts = range(runtime.rank * mine, (runtime.rank + 1) * mine, micro)
        return [(range(s, s + micro), stage.batch(step, range(s, s + micro))) for s in starts]

    def save(step, done=False):
        if runtime.rank == 0:
            save_checkpoint(path, {"stage": name, "step": step, "done": done,
                                   "config": dataclasses.asdict(cfg),
                                   "model": stage.model.state_dict(),
                                   "ema": ema.state if ema else None,
                                   "optimizers": {k: o.state_dict()
                                                  for k, o in optimizers.items()}})

    def write(row):
        if runtime.rank == 0:
            with open(f"{out}/log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def validate(step):
        with weights_of(stage.averaged, ema.state if ema else None) as module:
            found = stage.validate(module, step)
        write({"stage": name, "step": step, **{k: round(v, 5) for k, v in found.items()}})
        runtime.say(f"{name} {step}/{c.steps} | "
                    + " ".join(f"{k} {v:.4f}" for k, v in found.items()))

    stop = []
    old = {s: signal.signal(s, lambda s, _: stop.append(1) or signal.signal(s, signal.SIG_DFL))
           for s in (signal.SIGINT, signal.SIGTERM)}
    prefetch = Prefetch(batches, first)
    logged_at, bad, last_logged = time.perf_counter(), 0, first
    try:
        for step in range(first, c.steps):
            for key, optimizer in optimizers.items():
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = (c.disc_lr or c.lr if key == "disc" else c.lr) * schedule(c, step)
            sums = gradients(stage, next(prefetch), step, runtime, cfg.seed, c.batch)
            norms = {}
            for key, optimizer in optimizers.items():
                parameters = [p for p in stage.optimized[key].parameters() if p.grad is not None]
                norms[f"grad_{key}"] = (torch.nn.utils.clip_grad_norm_(parameters, c.clip)
                                        if parameters else torch.zeros(()))
            finite = bool(torch.stack([v.float().to(runtime.device) for v in (
                *norms.values(), *sums.values())]).isfinite().all())
            bad = 0 if finite else bad + 1
            if bad == 10:
                raise FloatingPointError(
                    f"{name}: ten steps in a row were not finite at step {step}: "
                    + ", ".join(f"{k} {float(v):.3g}" for k, v in (sums | norms).items()))
            if finite:
                for optimizer in optimizers.values():
                    optimizer.step()
            else:
                runtime.say(f"{name} {step}: loss or gradient is not finite, "
                            f"step skipped ({bad} in a row)")
            if ema:
                ema.update(step)
            at = step + 1
            if at % c.log_every == 0 or at == c.steps:
                now = time.perf_counter()
                rate = (at - last_logged) / (now - logged_at)
                last_logged, logged_at = at, now
                row = {k: round(float(v), 5) for k, v in (sums | norms).items()}
                write({"stage": name, "step": at, **row, "rate": round(rate, 2)})
                left = (c.steps - at) / rate
                shown = " ".join(f"{k} {v:.3f}" for k, v in row.items()
                                 if "loss_" not in k and "grad" not in k)
                runtime.say(f"{name} {at}/{c.steps} | {shown} | {rate:.1f} steps/s | "
                            f"eta {int(left // 60)}:{int(left % 60):02d}")
            if c.valid_every and at % c.valid_every == 0 and at < c.steps and runtime.rank == 0:
                validate(at)
            if at % c.save_every == 0 and at < c.steps or stop:
                save(at)
            if stop:
                runtime.say(f"{name}: interrupted, {path} holds step {at}; "
                            "the same command goes on from there")
                sys.exit(130)
    finally:
        prefetch.close()
        for s, handler in old.items():
            signal.signal(s, handler)
    with weights_of(stage.averaged, ema.state if ema else None) as module:
        stage.finish(module)
        if ema:
            ema.state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    if runtime.rank == 0:
        validate(c.steps)
        save(c.steps, done=True)
        draw_losses(out)
    if runtime.world > 1:
        dist.barrier()


def corpus(cfg, runtime):
    """Training and held-out clips: the manifest's, or the toy corpus, made on first use."""
    if cfg.data.manifest:
        return load_clips(cfg.data)
    folder = f"{cfg.out}/toy"
    if runtime.rank == 0:
        toy.make(cfg.toy, folder, cfg.vae.sample_rate)
    if runtime.world > 1:
        dist.barrier()
    return tuple(load_manifest(f"{folder}/{part}.jsonl") for part in ("train", "valid"))


def start_over(out, stages):
    """Delete what these stages left in the run folder; without its VAE, nothing there is worth
    anything.
    """
    stages = STAGES if "vae" in stages else stages
    for stage in stages:
        if os.path.exists(f"{out}/{stage}.pt"):
            os.remove(f"{out}/{stage}.pt")
    log = [line for line in read_log(out) if json.loads(line)["stage"] not in stages]
    with open(f"{out}/log.jsonl", "w") as f:
        f.writelines(log)
    if "vae" in stages:
        shutil.rmtree(f"{out}/latents", ignore_errors=True)


def refuse_changed_model(cfg, path, stage, say):
    """Refuse to go on with a checkpoint whose model tables differ from the config's.

    -> whether it is finished; says so if its [train] table was another one.
    """
    state = load_checkpoint(path, "cpu")
    saved = build(Config, state["config"])
    for table in ("vae",) if stage == "vae" else ("vae", MODELS[stage][1]):
        old, new = (dump(getattr(c, table)).splitlines() for c in (saved, cfg))
        wrong = next(((a, b) for a, b in zip(old, new) if a != b), None)
        if wrong:
            raise BadInput(f"{path}: trained with [{table}] {wrong[0]}, "
                           f"the config now says {wrong[1]}; "
                           "use --fresh to start over or --out for another run folder")
    old, new = (dataclasses.asdict(getattr(c.train, stage)) for c in (saved, cfg))
    for key in old:
        if state["done"] and old[key] != new[key] and not key.endswith("_every"):
            say(f"{stage}: was trained with {key} = {old[key]}, not {new[key]}, and is finished; "
                f"to train on, use --out with --train.{stage}.init {path}")
    return state["done"]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False,
                    usage="train.py --config FILE [--section.key value ...] [--fresh] [--print]")
    parser.add_argument("--config", required=True, help="an experiment: configs/*.toml")
    parser.add_argument("--fresh", action="store_true", help="start this run over")
    parser.add_argument("--print", action="store_true", help="show the resolved config and stop")
    arguments, overrides = parser.parse_known_args()
    cfg = load(arguments.config, overrides)
    if arguments.print:
        print(dump(cfg), end="")
        return
    runtime = Runtime(cfg)
    try:
        os.makedirs(f"{cfg.out}/samples", exist_ok=True)
    except OSError as e:
        raise BadInput(f"out: {cfg.out} cannot be made ({e.strerror}); use --out") from None
    clips, valid = corpus(cfg, runtime)
    for name in cfg.stages:
        init, begun = getattr(cfg.train, name).init, os.path.exists(f"{cfg.out}/{name}.pt")
        if init and not os.path.exists(init) and (arguments.fresh or not begun):
            raise BadInput(f"train.{name}.init: {init}: no such checkpoint; train that run first")
    if arguments.fresh and runtime.rank == 0:
        start_over(cfg.out, cfg.stages)
    if runtime.world > 1:
        dist.barrier()                               # nobody looks before the old ones are gone
    done = {s: refuse_changed_model(cfg, f"{cfg.out}/{s}.pt", s, runtime.say)
            for s in cfg.stages if os.path.exists(f"{cfg.out}/{s}.pt")}
    if runtime.rank == 0:
        with open(f"{cfg.out}/config.toml", "w") as f:
            f.write(dump(cfg))
    runtime.say(f"data: {len(clips)} training clips, {len(valid)} held out")
    lacks = {k for k, w in cfg.data.weights.items() if w > 0} - {c.kind for c in clips}
    if lacks:
        runtime.say(f"data: no {' and no '.join(sorted(lacks))} there; the others share the weight "
                    f"of data.weights")
    for name in cfg.stages:
        if done.get(name):
            runtime.say(f"{name}: finished before, skipped")
            continue
        torch.manual_seed(cfg.seed)
        stage = (VAEStage(cfg, runtime, clips, valid) if name == "vae"
                 else (DistillStage if name == "distill" else LMStage)(
                     cfg, runtime, clips, valid, name))
        train(stage, name, cfg, runtime)
    runtime.say(f"done: listen to {cfg.out}/samples/, look at {cfg.out}/loss.png")
    if runtime.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
