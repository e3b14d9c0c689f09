"""Models of other packages, with random weights: PyPI `moshi` and `pocket-tts`.

    Mimi          ─► encode, decode           for vae.py
    Pocket TTS    ─► audio, latents           for sample.py

The packages are imported where they are used: most machines have neither.
"""
import copy
import math
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from importlib import resources

import torch

from cli import BadInput

PEER_WORDS = 4000               # vocabulary of the tokenizer that Pocket TTS gets


@contextmanager
def installed(package):
    """Turn a failed import within the block into BadInput that names the package to install."""
    try:
        yield
    except ImportError as e:
        raise BadInput(f"--peer {package}: {e.name} is not installed: "
                       f"pip install {package}") from None


# ---------------------------------------------------------------- Mimi

def moshi_mimi():
    """Mimi of PyPI `moshi` -> (module, encode: wav -> latents, decode: latents -> wav)."""
    from moshi.models.loaders import get_mimi
    peer = get_mimi(None, device="cpu").eval()

    def encode(wav):
        return peer.encode_to_latent(wav, quantize=False).mT                   # (1, T, D)

    def decode(z):
        upsampled = peer._to_encoder_framerate(z.mT.contiguous())              # (1, D, 2 T)
        return peer.decoder(peer.decoder_transformer(upsampled)[0])

    return peer, encode, decode


def pocket_tts_mimi():
    """Mimi of PyPI `pocket-tts` -> (module, encode: wav -> latents, decode: latents -> wav)."""
    from pocket_tts.models.mimi import build_mimi
    from pocket_tts.modules.stateful_module import init_states
    from pocket_tts.utils.config import MimiConfig

    peer = build_mimi(MimiConfig(**pocket_tts_config()["mimi"])).eval()
    for name, module in peer.named_modules():            # under it a module finds its state
        module._module_absolute_name = name

    def decode(z):
        state = init_states(peer, batch_size=1, sequence_length=16 * z.shape[1])
        return peer.decode_from_latent(z, state)

    return peer, peer.encode_to_latent, decode


MIMI = {"moshi": moshi_mimi, "pocket-tts": pocket_tts_mimi}


# ---------------------------------------------------------------- Pocket TTS

def pocket_tts_config():
    """The tables of pocket-tts's English model."""
    import yaml
    path = resources.files("pocket_tts") / "config" / "english.yaml"
    return yaml.safe_load(path.read_text())


def pocket_tts_model(frames):
    """Pocket TTS's English model with random weights; it always generates `frames` latents."""
    import tokenizers
    from pocket_tts.models.tts_model import TTSModel
    from pocket_tts.utils.config import Config

    table = pocket_tts_config()
    table["weights_path"] = None
    table["weights_path_without_voice_cloning"] = None

    # a tokenizer of words w0 w1 ...
    with tempfile.TemporaryDirectory() as folder:
        words = {f"w{i}": i for i in range(PEER_WORDS)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(f"{folder}/tokenizer.json")
        table["flow_lm"]["lookup_table"]["tokenizer_path"] = f"{folder}/tokenizer.json"

        # temperature 0.7, 1 step, no clamp of the noise, and an EOS threshold that nothing reaches
        peer = TTSModel._from_pydantic_config_with_weights(
            Config(**table), 0.7, 1, None, float("inf"))

    peer._estimate_max_gen_len = lambda tokens: frames
    return peer.eval()


def pocket_tts_int8(peer):
    """A copy of Pocket TTS with its own int8 weights."""
    from pocket_tts.quantization import RECOMMENDED_CONFIG, apply_dynamic_int8
    small = copy.deepcopy(peer)
    small._estimate_max_gen_len = peer._estimate_max_gen_len
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_dynamic_int8(small.flow_lm, RECOMMENDED_CONFIG)
    return small


def pocket_tts_runs(peer, text, voice):
    """Pocket TTS as a contestant of sample.py -> (audio, latents), the functions described there.

    text (1, L) tokens; voice (1, P, C), embedded.
    """
    from pocket_tts.modules.stateful_module import init_states
    words = " ".join(f"w{i}" for i in text[0].tolist())

    def after_voice(room):
        state = init_states(peer.flow_lm, 1, room)
        peer._run_flow_lm_and_increment_step(state, audio_conditioning=voice)
        return state

    @torch.no_grad()
    def audio():
        pieces = peer._generate_audio_stream_short_text(
            after_voice(voice.shape[1]), words, 2, False, threading.Event())
        for wav in pieces:
            yield wav.shape[-1]

    @torch.no_grad()
    def latents(count):
        state = after_voice(voice.shape[1] + text.shape[1] + count)
        peer._run_flow_lm_and_increment_step(state, text_tokens=text)

        seconds = []
        x = torch.full((1, 1, peer.flow_lm.ldim), math.nan)    # NaN stands for BOS there
        for _ in range(count):
            start = time.perf_counter()
            x, _ = peer._run_flow_lm_and_increment_step(state, backbone_input_latents=x)
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    return audio, latents
