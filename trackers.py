"""What a training logs, sent to a tracker too, beside log.jsonl and samples/.

    [log]
    tracker = "tensorboard"        or wandb, trackio; imported only when named

    a row of the log ─► figures ────────► STAGE/head, STAGE/valid_energy_speech, ...
    samples/*.wav, *.png ─► sound, image ─► STAGE/speech1, ...

tensorboard writes to OUT/tensorboard, wandb and trackio to their project "nanocalm", where a run
has the name of its folder. A resumed training goes on in the same run; steps that it repeats are there
twice. wandb and trackio get a stage's step as the figure STAGE/step, since every stage begins at 0.
"""
import functools
import importlib
import importlib.util
import os
import re
import tomllib
import zlib

from cli import BadInput


@functools.cache
def open_tracker(name, out, config):
    """A tracker by its name, "" = none -> send(stage, step, figures, sounds=(), picture="").

    config: the run's, as TOML. figures: {name: number}; sounds: [(title, wav (ch, S), rate), ...]
    of the picture at that path. Errors: BadInput where it is not installed or does not open.
    """
    if not name:
        return lambda *_: None
    if importlib.util.find_spec(name) is None:
        raise BadInput(f"log.tracker: {name} is not installed; pip install {name}, or leave it out")
    try:
        return to_tensorboard(out) if name == "tensorboard" else to_project(name, out, config)
    except Exception as e:
        raise BadInput(f"log.tracker: {name} cannot be opened ({e}); mend that or leave it out"
                       ) from e


def tags(stage, sounds, picture):
    """Names of sounds and of their picture, without its step: so that steps follow each other."""
    name = re.sub(rf"^step\d+_({stage}_)?|\.png$", "", os.path.basename(picture))
    return f"{stage}/{name}", [f"{stage}/{name}_{i}" for i, _ in enumerate(sounds, 1)]


def to_tensorboard(out):
    """send() of open_tracker for TensorBoard."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(f"{out}/tensorboard")

    def send(stage, step, figures, sounds=(), picture=""):
        for name, value in figures.items():
            writer.add_scalar(f"{stage}/{name}", value, step)
        image, names = tags(stage, sounds, picture)
        for name, (_, wav, rate) in zip(names, sounds):
            writer.add_audio(name, wav[:1].cpu(), step, rate)
        if picture:
            writer.add_image(image, imread(picture), step, dataformats="HWC")
        writer.flush()

    return send


def to_project(name, out, config):
    """send() of open_tracker for wandb, and for trackio, which has the same functions."""
    tracker = importlib.import_module(name)
    run = os.path.basename(os.path.abspath(out))
    own = {"id": f"{zlib.crc32(os.path.abspath(out).encode()):08x}"} if name == "wandb" else {}
    tracker.init(project="nanocalm", name=run, config=tomllib.loads(config), resume="allow", **own)

    def send(stage, step, figures, sounds=(), picture=""):
        row = {f"{stage}/{figure}": value for figure, value in figures.items()}
        image, names = tags(stage, sounds, picture)
        for tag, (title, wav, rate) in zip(names, sounds):
            row[tag] = tracker.Audio(wav[0].cpu().numpy(), caption=title, sample_rate=rate)
        if picture:
            row[image] = tracker.Image(picture)
        tracker.log(row | {f"{stage}/step": step})

    return send


if __name__ == "__main__":
    print("trackers.py is a library, used by train.py")
