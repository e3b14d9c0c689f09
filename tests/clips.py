"""Small corpora of sine tones, made with numpy, for the tests of data, latents and corpora."""
import numpy as np
import soundfile as sf
import torch

from data import Clip, load_tokenizer, pad_id

RATE = 8000


def tone(path, seconds=0.5, rate=RATE, hz=440.0, channels=1):
    """Writes a sine, the second channel silent, and makes parent folders -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = np.zeros((int(seconds * rate), channels))
    wav[:, 0] = 0.5 * np.sin(2 * np.pi * hz * np.arange(len(wav)) / rate)
    sf.write(path, wav, rate)
    return str(path)


def corpus(folder, n=12, kind="speech", longest=2.0):
    """n clips of growing length, two speakers; the number of the clip is in its text and pitch."""
    return [Clip(tone(folder / f"{kind}{i}.wav", 0.3 + (longest - 0.3) * i / n, hz=200 + 50 * i),
                 f"text {i}", kind, speaker=f"voice{i % 2}" if kind == "speech" else "",
                 id=f"{kind}{i}") for i in range(n)]


def decode_text(ids, cfg=None):
    """Token ids (list or tensor) -> text; specials are dropped, broken bytes become U+FFFD."""
    ids = [i for i in map(int, ids) if i < pad_id(cfg)]
    if cfg and cfg.tokenizer:
        return load_tokenizer(cfg.tokenizer).decode(ids)
    return bytes(ids).decode("utf-8", "replace")


def same(a, b):
    """Whether two batches hold equal tensors under equal names."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
