"""Batches per second: do the processor cores feed the GPUs?

    python -m tools.bench feed [--config configs/paper/calm_music.toml] [--clips 128] [--seconds 30]
                               [--processes 1 2] [--need 1510] [--latents 55] [--json figures.json]

    wav, flac, ogg, mp3   clips of noise and tones ─► AudioBatches: crops of data.crop_seconds
    latents               clips of random numbers  ─► LatentBatches: rows of data.frames

Every clip is opened once, as in a corpus of millions, and only its crop is decoded (data.py); files
lie in the page cache. Rows are made by 1, 2, ... processes as in training (data.processes), which
ends with the batch in this process' memory. Audio comes at 44.1 kHz and is resampled where the
config has another rate.

    ms of CPU     user and system time of the processes per row
    cores         what is needed, times that. --need: audio rows per second; the default is the VAE
                  of calm_music on eight H100 at 40 percent of their peak, as train.py --plan says:
                  23.6 steps per second of 64 rows of 12 s. --latents: latent rows per second; the
                  default is its language model, 3 rows in 438 ms on one H100 (measured)

Precision: audio float32 in a batch.
"""
import dataclasses
import os
import resource
import statistics
import tempfile
import time
from contextlib import closing

import numpy as np
import soundfile as sf
import torch

import decoder
from cli import number
from config import load
from data import AudioBatches, Clip
from latents import LatentBatches, LatentCache
from prefetch import Workers
from tools.bench.timing import processor

FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}
RATE = 44100                        # Hz, of the files
DISTINCT = 4                        # files that are encoded; the others are links to them
ROWS = 8                            # of a batch


def add_options(parser):
    parser.add_argument("--config", default="configs/paper/calm_music.toml",
                        help="the experiment (default configs/paper/calm_music.toml)")
    parser.add_argument("--clips", type=number(int, 2 * ROWS), default=128,
                        help="audio files of each format (default 128)")
    parser.add_argument("--seconds", type=number(float, above=0), default=30.0,
                        help="length of a clip (default 30)")
    parser.add_argument("--processes", type=number(int, 1), nargs="+", default=[1, 2],
                        help="processes that make batches (default 1 2)")
    parser.add_argument("--need", type=number(float, above=0), default=1510.0,
                        help="audio rows per second that are needed (default 1510)")
    parser.add_argument("--latents", type=number(float, above=0), default=55.0,
                        help="latent rows per second that are needed (default 55)")


def run(args):
    """Time all kinds -> {kind: {processes: {"rows per second", "ms of CPU", "cores"}}}."""
    cfg = load(args.config, ["--data.ram_gb", "0"])
    print(f"{args.config}: rows per second, {args.clips} clips of {args.seconds:g} s, "
          f"{processor('cpu')}")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            clips = audio_clips(folder, kind, args.clips, args.seconds)
            batches = AudioBatches(clips, dataclasses.replace(cfg.data, weights={}),
                                   cfg.vae.sample_rate, cfg.vae.channels, ROWS, cfg.vae.hop)
            figures[kind] = measure(kind, batches, args, args.need)
        figures["latents"] = measure("latents", latent_batches(folder, clips, cfg), args,
                                     args.latents)
    return figures


def audio_clips(folder, ending, n, seconds):
    """n audio files of one format -> their Clips."""
    g = np.random.default_rng(0)
    t = np.arange(int(seconds * RATE)) / RATE
    clips = []
    for i in range(n):
        path = f"{folder}/{i:05d}.{ending}"
        if i < DISTINCT:
            wav = 0.3 * np.sin(2 * np.pi * 220 * (i + 1) * t) + 0.03 * g.standard_normal(len(t))
            # Vorbis takes no more than this at a time
            with sf.SoundFile(path, "w", RATE, 1, FORMATS[ending], format=ending) as file:
                for first in range(0, len(wav), RATE):
                    file.write(wav[first:first + RATE])
        else:
            os.link(f"{folder}/{i % DISTINCT:05d}.{ending}", path)
        clips.append(Clip(path, f"text {i}", "music", duration=seconds))
    return clips


def latent_batches(folder, clips, cfg):
    """LatentBatches of random latents, twice as long as a row."""
    frames = 2 * cfg.data.frames
    dim = cfg.vae.latent_dim

    def encode(audio, state=None):
        return torch.randn(len(audio), audio.shape[-1], 2 * dim)

    # one sample a frame: what is measured is how rows are read
    rate = max(1, round(frames / clips[0].duration))
    cache = LatentCache.build(clips, encode, folder=folder, key="latents", sample_rate=rate,
                              channels=1, hop=1, dim=dim, show=False)
    return LatentBatches(clips, cache, dataclasses.replace(cfg.data, weights={}), ROWS, dim)


def measure(kind, batches, args, need):
    """{processes: figures} of one kind of batches, and their lines."""
    steps = args.clips // ROWS
    figures = {}
    for processes in args.processes:
        passes = [one_pass(batches, steps, processes) for _ in range(args.repeats)]
        rows_per_second = statistics.median(steps * ROWS / wall for wall, _ in passes)
        cpu = statistics.median(1000 * cpu / (steps * ROWS) for _, cpu in passes)
        cores = need * cpu / 1000
        figures[processes] = {"rows per second": round(rows_per_second, 1),
                              "ms of CPU": round(cpu, 2), "cores": round(cores, 1)}
        print(f"  {kind:8s} {processes} process(es)  {rows_per_second:8.0f} rows/s  "
              f"{cpu:7.2f} ms of CPU a row  {cores:6.1f} cores for {need:g} rows/s",
              flush=True)
    return figures


def one_pass(batches, steps, processes):
    """Make every batch once -> (seconds, seconds of CPU in the workers)."""
    decoder.measured_info.cache_clear()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    feed = Workers(lambda step: batches(step, range(ROWS)), 0, steps, processes, pin=False)
    with closing(feed):
        # the start of the processes is not measured
        next(feed)
        start = time.perf_counter()
        for _ in range(steps - 1):
            next(feed)
        wall = (time.perf_counter() - start) * steps / (steps - 1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
