"""What train.py's one loop asks of each stage: the model, its batches, its losses, its validation.

                         model           optimized            batch(step, rows)  losses(batch, step)
    VAEStage             VAEGAN          "vae", "disc"        waveform crops     gan.py, eq. 2
    LMStage              CALM, AudioCALM the stage's name     cached latents     model.loss
    ConsistencyStage     CALM            "consistency"        cached latents     model.loss
    DistillStage         CALM            "distill"            cached latents     model.regress

A stage has:
    model        what is saved and resumed
    batch(step, rows) -> {name: tensor}: the rows `rows` of a step's global batch
    losses(batch, step, source) -> iterator of (optimizer's name, loss, metrics), one per optimizer;
        source: of random numbers (noise.py)
    optimized    {optimizer's name: module}
    averaged     the module whose average (EMA) is kept
    validate(module) -> {figure: number}: held-out figures
    render(module, step) -> iterator of (path of a picture, [(title, wav), ...]): samples/*.wav
    seconds(batch): of audio in it
    some_unused: whether some of its weights have no gradient in some steps
    plain(): a model like `averaged`, on one process
    finish(module): after the last step, with the averaged weights
    check_loaded(path): after a checkpoint was loaded into the model
    recompute_activations(): train.STAGE.checkpoint
    compile(): torch.compile what is worth it

Which class trains which stage stands in config.STAGES.
"""
import contextlib
import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch

from adaln import AdaLNMLP
from audio import load_audio, save_audio
from backbone import Transformer
from calm import CALM
from checkpoint import load_checkpoint, load_weights
from cli import BadInput, atomic
from config import (LM_STAGES, STAGES, build_saved, encoder_id, make_model, refuse_other_table,
                    saved_config, stage_seed, stage_table, vae_weights)
from data import KINDS, AudioBatches, encode_text, fits, seconds_of
from discrete import DISCRETE
from gan import VAEGAN, spectral_losses
from generate import render, sampling_options
from latents import LatentBatches, LatentCache, ListOf, digest
from locks import owned
from manifest import columns
from page import comment
from prompts import encode_prompt
from remote import is_remote
from vae import VAE, sample_posterior


def recompute_activations(model):
    """Let the transformers and heads of a model recompute what is inside their layers."""
    for module in model.modules():
        if isinstance(module, (Transformer, AdaLNMLP)):
            module.checkpoint = True


def open_held_out(clips, cfg):
    """Read the beginning of every held-out clip: one that cannot be read would fail the first
    validation, hours later. Errors: BadInput naming the file, also where the first clips are all
    silent, as those of a broken export are.
    """
    def peak(clip, seconds=0.1):
        wav = load_audio(clip.audio, cfg.vae.sample_rate, cfg.vae.channels, seconds=seconds,
                         allow_silence=True)
        return abs(wav).max()

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(peak, clips):
            continue

    # ten seconds of the first ones
    first = clips[:8]
    if max(peak(clip, 10.0) for clip in first) < 1e-4:
        raise BadInput(f"{first[0].audio}: silent (peak below 0.0001), as all of the first "
                       f"{len(first)} held-out clips are; python -m corpora.scan check drops such "
                       "files from a manifest")


class VAEStage:
    """Waveform crops -> VAE-GAN; at the end the latents' mean and std become buffers of the VAE."""
    some_unused = True                           # the discriminators learn from a later step on

    def __init__(self, cfg, runtime, clips, valid, name):
        self.cfg = cfg
        self.runtime = runtime
        self.clips = clips
        self.valid = valid
        try:
            self.model = VAEGAN(cfg.vae, cfg.gan)
        except ValueError as e:                      # the teacher cannot be loaded
            raise BadInput(f"gan.{e}") from None
        self.averaged = self.model.vae
        # of a VAE whose latents it needs: none
        self.encoder = ""

        # one optimizer for the VAE and the projection to the teacher, one for the discriminators
        learning = [part for part_name, part in self.model.named_children()
                    if part_name not in ("disc", "balancer")]
        self.optimized = {"vae": torch.nn.ModuleList(learning)}
        if self.model.disc is not None:
            self.optimized["disc"] = self.model.disc

        self.batch = AudioBatches(clips, cfg.data, cfg.vae.sample_rate, cfg.vae.channels,
                                  cfg.train.vae.batch, cfg.vae.hop)

    def recompute_activations(self):
        recompute_activations(self.model)

    def compile(self):
        self.model.vae.encoder.compile()
        self.model.vae.decoder.compile()

    def check_loaded(self, path):
        """Any weights of the right shapes may go on."""

    def seconds(self, batch):
        return len(batch["audio"]) * batch["audio"].shape[-1] / self.cfg.vae.sample_rate

    def losses(self, batch, step, source=None):
        return self.model.losses(batch["audio"], step, source)

    def load_clip(self, clip, seconds):
        """The first seconds of a clip, (1, ch, S), on the device."""
        wav = load_audio(clip.audio, self.cfg.vae.sample_rate, self.cfg.vae.channels,
                         seconds=seconds, allow_silence=True)
        return torch.tensor(wav)[None].to(self.runtime.device)

    def validate(self, vae):
        """Mean log10-mel distance on up to 16 held-out clips of each kind.

        valid_mel has one window, of 1024 samples, whatever gan.loss_windows says: it compares runs
        with each other, and is not comparable with the training loss of the same name. Clips of
        less than two windows are not measured.
        """
        distances = []
        for kind in KINDS:
            for clip in columns(self.valid).of_kind(kind)[:16]:
                wav, rec = self.reconstruct(vae, clip)
                if wav.shape[-1] >= 2048:
                    distance = spectral_losses(wav, rec, self.cfg.vae.sample_rate, [1024], ["mel"],
                                               self.cfg.gan.loss_floor)
                    distances.append(distance["mel"].item())
        return {"valid_mel": sum(distances) / max(len(distances), 1)}

    def reconstruct(self, vae, clip):
        """The first 5 s of a clip and what the VAE makes of them, (1, ch, S) both."""
        wav = self.load_clip(clip, 5.0)
        return wav, vae.decode(vae.encode(wav)[0])[..., :wav.shape[-1]]

    def render(self, vae, step):
        """Held-out clips of each kind beside their reconstructions."""
        sample_rate = self.cfg.vae.sample_rate
        for kind in KINDS:
            clips = columns(self.valid).of_kind(kind)
            for i, clip in enumerate(shown_clips(clips, kind, self.cfg)):
                (wav,), (rec,) = self.reconstruct(vae, clip)                        # (ch, S)
                path = f"{self.cfg.out}/samples/step{step:08d}_vae_{kind}{i + 1}"
                save_audio(f"{path}_original.wav", wav.cpu().numpy(), sample_rate,
                           comment=comment(clip.text, "held-out clip"))
                save_audio(f"{path}_reconstruction.wav", rec.cpu().numpy(), sample_rate,
                           comment=comment(clip.text, "reconstruction by nanoCALM's vae"))
                yield f"{path}.png", [("original", wav), ("reconstruction", rec)]

    def finish(self, vae):
        """The first 10 s of every n-th clip (400 to 799 of them, or all) -> latent_mean and
        latent_std of the VAE. With a frozen encoder they stay as they were.
        """
        c = self.cfg.train.vae
        if c.init and "encoder" in c.freeze:
            # the latents are the old ones: language models on them stay valid
            return
        some = self.clips[:: max(1, len(self.clips) // 400)]
        vae.set_latent_statistics(self.load_clip(clip, 10.0) for clip in some)


class LMStage:
    """Cached latents and text -> the language model of the stage's name.

    A stage that goes on from another's weights (config.STAGES: consistency from lm, audiocalm_lsd
    from audiocalm) changes the objective.
    """
    some_unused = False

    def __init__(self, cfg, runtime, clips, valid, name):
        self.cfg = cfg
        self.runtime = runtime
        self.valid = valid
        self.name = name

        # the trained VAE, and the latents of every clip
        weights = self.load_vae()
        self.encoder = encoder_id(weights)
        table = stage_table(cfg, name)
        # K, 0 for latents
        self.code_levels = cfg.vae.codebooks if table.head.objective in DISCRETE else 0
        train_latents = self.cache_latents(clips, weights)
        valid_latents = self.cache_latents(valid, weights)
        self.note_other_caches(train_latents.path, valid_latents.path)

        # the model; some stages start from another's weights
        self.model = make_model(cfg, name)
        if STAGES[name].after:
            self.load_stage_before(STAGES[name].after)
        self.averaged = self.model
        self.optimized = {name: self.model}

        # batches: the kinds' weights hold for training only
        frame_rate = cfg.vae.frame_rate
        monologue = self.model.monologue
        batch_size = getattr(cfg.train, name).batch
        data = dataclasses.replace(cfg.data, seed=stage_seed(cfg.data.seed, name))
        self.batch = LatentBatches(clips, train_latents, data, batch_size, cfg.vae.latent_dim,
                                   frame_rate, monologue)
        for sentence in (self.batch.late_words, self.batch.clips_cut()):
            if sentence:
                runtime.say(sentence)
        self.held_out = LatentBatches(valid, valid_latents,
                                      dataclasses.replace(cfg.data, weights={}), len(valid),
                                      cfg.vae.latent_dim, frame_rate, monologue)

    def load_vae(self):
        """self.vae from the run's vae.pt -> its weights.

        Errors: BadInput where it was trained with another [vae], whose latents would be others."""
        path = f"{self.cfg.out}/vae.pt"
        state = self.finished(path, "vae")
        refuse_other_table(path, saved_config(state, path), self.cfg, "vae")
        weights = vae_weights(state)
        self.vae = VAE(self.cfg.vae)
        load_weights(self.vae, weights, path)
        self.vae.to(self.runtime.device).eval()
        return weights

    def finished(self, path, stage):
        """The checkpoint of a stage that must come before this one, or BadInput."""
        state = load_checkpoint(path, "cpu")
        if not state["done"]:
            raise BadInput(f"{path}: its training is not finished; "
                           f"put \"{stage}\" before \"{self.name}\" in stages")
        return state

    def cache_latents(self, clips, weights):
        """The LatentCache of clips. Its key names what the latents depend on but the state of the
        files, which LatentCache.build compares: the VAE's weights, config and precision, the files
        and the levels. What lacks is encoded by all processes together.
        """
        cfg = self.cfg
        clips = columns(clips)
        names = ListOf(len(clips), clips.paths())
        precision = "bf16" if self.runtime.bf16 else "fp32"
        key = digest(weights, cfg.vae, precision, names, self.code_levels)
        folder = cfg.data.latents or f"{cfg.out}/latents"
        if is_remote(folder):
            return LatentCache(f"{folder}/{key}")

        @torch.no_grad()
        def encode(wav, state=None):
            wav = wav.to(self.runtime.device)
            with self.runtime.autocast():
                if self.code_levels:
                    return self.vae.encode_codes(wav, state)
                return torch.cat(self.vae.encode(wav, state), -1)

        # the first process asks for all, then every process encodes its share
        lock = contextlib.nullcontext()
        if self.runtime.rank == 0:
            os.makedirs(folder, exist_ok=True)
            lock = owned(folder, "latents are being made", wait=True)
        with lock:
            self.runtime.wait()
            return LatentCache.build(clips, encode, folder=folder, key=key,
                                     sample_rate=cfg.vae.sample_rate, channels=cfg.vae.channels,
                                     hop=cfg.vae.hop, dim=cfg.vae.latent_dim,
                                     levels=self.code_levels, rank=self.runtime.rank,
                                     world=self.runtime.world, wait=self.runtime.wait)

    def note_other_caches(self, *used):
        """Say how many caches this stage does not use: they are left to the user to delete."""
        if self.cfg.data.latents:
            return                                       # others may be other runs'
        folder = used[0].parent
        others = [path for path in folder.iterdir() if path.is_dir() and path not in used]
        if others:
            self.runtime.say(f"latents: {len(others)} other caches in {folder}, of other weights, "
                             "settings or clips, are not used by this stage")

    def load_stage_before(self, before):
        """Load the weights of the stage `before`, whose objective was another one."""
        path = f"{self.cfg.out}/{before}.pt"
        state = self.finished(path, before)
        weights = state["ema"] or state["model"]

        # first the head: load_flow also fills what the old objective lacks (LSD's second time);
        # then all shared weights, strictly
        head = {k.removeprefix("head."): v for k, v in weights.items() if k.startswith("head.")}
        try:
            self.model.head.load_flow(head)
        except RuntimeError:
            raise BadInput(f"{path}: its head has other sizes than the config's") from None
        load_weights(self.model, self.model.state_dict() | weights, path)

    def check_loaded(self, path):
        """Any weights of the right shapes may go on."""

    def recompute_activations(self):
        recompute_activations(self.model)

    def compile(self):
        self.model.compile_for_training()

    def seconds(self, batch):
        return batch["frames"].sum().item() / self.cfg.vae.frame_rate

    def plain(self):
        return make_model(self.cfg, self.name)

    def prepare(self, batch, source=None):
        """Draw latents from their posteriors and normalise them: x (B, T, 2D) -> (B, T, D).

        Codes (B, T, K) stay as they are.
        """
        if self.code_levels:
            return batch
        for name in ("x", "prompt"):
            mean, logvar = batch[name].chunk(2, -1)
            batch[name] = self.vae.normalize(sample_posterior(mean, logvar, source))

        # behind the clip's end: 0, the mean latent; prompt is cut by prompt_len
        s = torch.arange(batch["x"].shape[1], device=batch["x"].device)
        batch["x"] = batch["x"] * (s < batch["frames"][:, None])[..., None]
        return batch

    def losses(self, batch, step, source=None):
        self.model.head.set_step(step)
        loss, metrics = self.model.loss(self.prepare(batch, source), source)
        yield self.name, loss, metrics

    def validate(self, model):
        """The metrics of up to 64 held-out rows, with fixed noise, in forward passes as large as in
        training -> {"valid_NAME": mean, in which a pass counts as its rows do, or the largest value
        where the name ends in _max}.
        """
        torch.manual_seed(1)
        stage_cfg = getattr(self.cfg.train, self.name)
        micro = stage_cfg.micro_batch or stage_cfg.batch
        count = min(64, len(self.valid))
        sums = {}
        weights = {}                                     # a pass without music has no figure of it
        maxima = {}                                      # of metrics named ..._max
        for first in range(0, count, micro):
            rows = range(first, min(first + micro, count))
            batch = self.prepare(self.runtime.to(self.held_out(0, rows)))
            with self.runtime.autocast():
                _, metrics = model.loss(batch)
            for key, value in metrics.items():
                if key.endswith("_max"):
                    maxima[key] = max(maxima.get(key, float(value)), float(value))
                    continue
                sums[key] = sums.get(key, 0.0) + float(value) * len(rows)
                weights[key] = weights.get(key, 0) + len(rows)
        means = {key: sums[key] / weights[key] for key in sums}
        return {f"valid_{key}": value for key, value in (means | maxima).items()}

    def render(self, model, step):
        """Clips of each kind from text, and held-out clips continued."""
        for kind in KINDS:
            clips = columns(self.valid).of_kind(kind)
            yield from self.render_texts(model, step, kind, clips)
            yield from self.render_continuations(model, step, kind, clips)

    def render_texts(self, model, step, kind, clips):
        """The texts of a kind that are shown."""
        for i, text in enumerate(shown_texts(clips, kind, self.cfg)):
            name = f"step{step:08d}_{self.name}_{kind}{i + 1}"
            yield self.save_generation(model, name, kind, text, i)

    def render_continuations(self, model, step, kind, clips):
        """The first seconds of some held-out clips, continued without text."""
        cfg = self.cfg
        longer = [c for c in clips if seconds_of(c) > cfg.sample.prompt_seconds + 1]
        for i, clip in enumerate(some_of(longer, cfg.sample.count)):
            wav = load_audio(clip.audio, cfg.vae.sample_rate, cfg.vae.channels,
                             seconds=cfg.sample.prompt_seconds, allow_silence=True)
            wav = torch.tensor(wav)[None].to(self.runtime.device)
            name = f"step{step:08d}_{self.name}_{kind}_continued{i + 1}"
            yield self.save_generation(model, name, kind, "", i,
                                       history=encode_prompt(model, self.vae, wav))

    def save_generation(self, model, name, kind, text, seed, **options):
        """One generation -> samples/NAME.wav, and what its picture shows."""
        cfg, device = self.cfg, self.runtime.device
        tokens = torch.tensor([encode_text(text, kind, cfg.data)], dtype=torch.long, device=device)
        wav, = render(model, self.vae, tokens, kind=KINDS.index(kind),
                      seconds=cfg.sample.seconds, **sampling_options(cfg.sample),
                      generator=torch.Generator(device).manual_seed(seed), **options)
        save_audio(f"{cfg.out}/samples/{name}.wav", wav.cpu().numpy(), cfg.vae.sample_rate,
                   comment=comment(text, f"synthetic audio, generated by nanoCALM's {self.name}"))
        return f"{cfg.out}/samples/{name}.png", [(f"{kind}: {text or 'continued'}", wav)]

    def finish(self, model):
        """Nothing is measured after the last step."""


def some_of(items, count):
    """`count` of the items, evenly spaced from the first on."""
    return items[:: max(1, len(items) // max(1, count))][:count]


def shown_texts(clips, kind, cfg):
    """The texts of a kind that language models say in samples/: the config's, else some of the
    held-out ones.
    """
    texts = cfg.sample.texts.get(kind)
    if not texts:
        texts = sorted({c.text for c in clips if c.text and fits(c.text, kind, cfg.data)})
    return some_of(texts, cfg.sample.count)


def shown_clips(clips, kind, cfg):
    """The held-out clips of a kind that the VAE reconstructs there: those of shown_texts, so that
    a page has them side by side; else the first two.
    """
    first = {c.text: c for c in reversed(clips)}
    return [first[text] for text in shown_texts(clips, kind, cfg) if text in first] or clips[:2]


class ConsistencyStage(LMStage):
    """The flow's weights -> a head that draws in one step. With train.consistency.teacher the flow
    itself gives dx/dt (consistency distillation), and the head alone learns: what makes the
    teacher's z must stay as it is.
    """

    def __init__(self, cfg, runtime, clips, valid, name):
        super().__init__(cfg, runtime, clips, valid, name)
        self.fixed = {}                                  # weights that a checkpoint must not change
        if cfg.train.consistency.teacher:
            self.model.to(runtime.device).requires_grad_(False)
            self.model.head.teach()
            self.model.head.requires_grad_(True)
            self.model.head_guidance = cfg.train.consistency.guidance
            self.fixed = {k: v.clone() for k, v in self.model.state_dict().items()
                          if not k.startswith("head.")}

    def plain(self):
        model = super().plain()
        model.head.teacher = self.model.head.teacher
        return model

    def check_loaded(self, path):
        """BadInput where a checkpoint has another backbone than the one that the teacher reads."""
        state = self.model.state_dict()
        if any(not torch.equal(state[k], v) for k, v in self.fixed.items()):
            raise BadInput(f"train.{self.name}.teacher: {path} has another backbone than "
                           f"{self.cfg.out}/{STAGES[self.name].after}.pt, which teaches; "
                           "use --fresh or --out")


class DistillStage(LMStage):
    """A student's backbone learns the teacher's guided Z and its EOS the teacher's probability
    (CALM.regress); the head is the teacher's and stays. Nothing is dropped: with guidance learned,
    sample with cfg = 1. The VAE is the one beside the teacher, unless the student's run has one.
    """
    some_unused = True                               # the short context's

    def __init__(self, cfg, runtime, clips, valid, name):
        path = cfg.train.distill.teacher
        state = load_checkpoint(path, "cpu")
        self.copy_vae(cfg, runtime, f"{os.path.dirname(path)}/vae.pt")
        super().__init__(cfg, runtime, clips, valid, name)

        # the teacher
        weights = state["ema"] or state["model"]
        teacher = self.load_teacher(state, weights, path)
        self.teacher = teacher.to(runtime.device).eval().requires_grad_(False)

        # everything but the backbone is copied; the head stays as it is
        own = {k: v for k, v in self.model.state_dict().items() if k.startswith("backbone.")}
        copied = {k: v for k, v in weights.items() if not k.startswith("backbone.")}
        load_weights(self.model, own | copied, path)
        self.model.head.requires_grad_(False)

    def copy_vae(self, cfg, runtime, vae):
        """The VAE beside the teacher becomes the run's, where the run has none."""
        if runtime.rank == 0 and not os.path.exists(f"{cfg.out}/vae.pt") and os.path.exists(vae):
            with atomic(f"{cfg.out}/vae.pt") as temp:
                shutil.copyfile(vae, temp)
        runtime.wait()

    def load_teacher(self, state, weights, path):
        """The teacher's model, or BadInput where this student cannot learn from it."""
        stage = state["stage"]
        if stage not in LM_STAGES or STAGES[stage].model is not CALM:
            raise BadInput(f"train.distill.teacher: {path} is no CALM but \"{stage}\"")
        teacher_cfg = saved_config(state, path)
        teacher_table = stage_table(teacher_cfg, stage)
        for table in (self.cfg.lm, teacher_table):
            if table.monologue or table.head.objective in DISCRETE:
                raise BadInput("train.distill: is for latents with text before them, "
                               "not for a monologue or codes")
        objective = teacher_table.head.objective
        if self.cfg.lm.head.objective != objective:
            raise BadInput(f"lm.head.objective: must be the teacher's, '{objective}'")

        teacher = build_saved(teacher_cfg, stage, weights, path)
        load_weights(teacher, weights, path)
        return teacher

    def losses(self, batch, step, source=None):
        loss, metrics = self.model.regress(self.prepare(batch, source), self.teacher,
                                           self.cfg.train.distill.guidance, source)
        yield self.name, loss, metrics

    def compile(self):
        super().compile()
        self.teacher.backbone.compile()
