"""The inner monologue in tokens of a tokenizer: what stands beside which latent. Those of bytes are
in plumbing/test_data.py, the model's side in test_calm.py."""
import numpy as np
import pytest
import torch

from backbone import BackboneConfig
from calm import CALM, CALMConfig
from cli import BadInput
from clips import decode_text
from config import Config, build
from data import KINDS, Clip, DataConfig, encode_text, vocabulary
from heads import HeadConfig
from latents import LatentBatches
from monologue import Monologue, WordTokens, late_words, word_stream

tokenizers = pytest.importorskip("tokenizers")

RATE = 12.5                                        # latents per second
# the pieces of a tiny SentencePiece vocabulary, whose numbers are the ids
PIECES = ["<unk>", "\u2581", "\u2581the", "\u2581ca", "t", "s", "\u2581sa", "e", "\u2581I", "'ll",
          "<s>"]
UNK, SPACE, THE, CA, T, S, SA, E, I, LL, BOS = range(len(PIECES))
PAD = len(PIECES)
END = PAD + 1                                      # the kind of speech

WORDS = [["the", 0.0, 0.2], ["cat", 0.24, 0.5], ["sat", 0.7, 0.96]]


def sentencepiece(path):
    """data with a tokenizer.json that adds <s> to a text, as Llama's does."""
    t = tokenizers.Tokenizer(tokenizers.models.Unigram(
        [(piece, -2.0 if len(piece) > 1 else -4.0) for piece in PIECES], unk_id=0))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    t.decoder = tokenizers.decoders.Metaspace()
    t.add_special_tokens(["<s>"])
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)])
    t.save(str(path / "tokenizer.json"))
    return DataConfig(tokenizer=str(path), text_len=16, frames=14)


def byte_level(path):
    """data with a BPE over bytes, as GPT-2's and Qwen's: a letter of two bytes is two tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*letters, "th", "the", "\u0120c"])}
    t = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab, [("t", "h"), ("th", "e"), ("\u0120", "c")]))
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    t.save(str(path / "tokenizer.json"))
    return DataConfig(tokenizer=str(path), text_len=16, frames=14), vocab


def test_words_with_times_become_a_stream_of_tokens_at_12_5_hz(tmp_path):
    """A word begins at floor(12.5 t), its tokens follow each other, the end at floor(12.5 0.96)."""
    tokens = WordTokens(sentencepiece(tmp_path))
    stream = word_stream(WORDS, 14, RATE, 1, tokens)
    assert stream.shape == (14, 1) and stream.dtype == np.int64
    assert stream[:, 0].tolist() == [THE, PAD, PAD, CA, T, PAD, PAD, PAD, SA, T, PAD, PAD, END, PAD]

    pairs = word_stream(WORDS, 14, RATE, 2, tokens)
    none = [PAD, PAD]
    assert pairs.tolist() == [[THE, PAD], none, none, [CA, T], *[none] * 4, [SA, T], *[none] * 3,
                              [END, PAD], none]


def test_the_monologue_has_the_tokens_of_the_text(tmp_path):
    """One vocabulary for prompts and monologue: the tokens of all words are those of their text."""
    cfg = sentencepiece(tmp_path)
    tokens = WordTokens(cfg)
    text = "the cat I'll sat s tes"
    kind, bos, *ids = encode_text(text, "speech", cfg)
    assert (kind, bos) == (END, BOS)
    of_words = tokens.of_words(text.split())
    assert sum(of_words, []) == ids and of_words[2] == [I, LL] and len(of_words) == 6

    # and generation finds the words in the text's tokens, without what the tokenizer adds
    assert tokens.of_text([bos, *ids, PAD, PAD]) == of_words
    assert tokens.of_text([bos]) == tokens.of_text([]) == []


def test_a_letter_of_two_tokens_stays_in_its_word(tmp_path):
    cfg, vocab = byte_level(tmp_path)
    tokens = WordTokens(cfg)
    of_words = tokens.of_words(["the", "caf\u00e9", "the"])
    pieces = [[piece for i in word for piece, j in vocab.items() if i == j] for word in of_words]
    assert pieces == [["the"], ["\u0120c", "a", "f", "\u00c3", "\u00a9"], ["\u0120", "the"]]
    assert tokens.of_text(encode_text("the caf\u00e9 the", "speech", cfg)[1:]) == of_words


class Numbered:
    """A latent cache whose clips have 14 frames."""
    dim, levels = 2, 0
    frames = np.array([14, 14])

    def __len__(self):
        return 2

    def get(self, i):
        return np.zeros((14, 4), np.float16)


def test_a_row_has_the_tokens_beside_its_frames_and_the_ids_of_this_vocabulary(tmp_path):
    cfg = sentencepiece(tmp_path)
    clips = [Clip("a.wav", "the cat sat", words=WORDS), Clip("b.wav", "the cat sat")]
    batches = LatentBatches(clips, Numbered(), cfg, 2, 2, RATE, 1)
    rows = {bool(row["aligned"]): row for row in map(batches.row, range(2))}
    assert batches.late_words == ""
    assert rows[True]["words"].tolist() == word_stream(WORDS, 14, RATE, 1, WordTokens(cfg)).tolist()
    assert rows[True]["text"].tolist() == [END] + [PAD] * 16
    assert rows[False]["words"].tolist() == [[PAD]] * 14
    assert decode_text(rows[False]["text"], cfg) == "the cat sat"


def test_tokens_that_come_faster_than_frames_are_one_line(tmp_path):
    tokens = WordTokens(sentencepiece(tmp_path))
    fast = [["cat", 0.1 * i, 0.1 * i + 0.1] for i in range(60)]            # 20 tokens per second
    line = late_words([Clip("a.wav", words=fast)], RATE, 1, tokens)
    # 120 tokens end at 9.6 s, the words at 6 s
    assert line == ("monologue: words fall up to 3.6 s behind the audio, more than 0.5 s in 1 of 1 "
                    "clips: 12.5 tokens per second are too few; set lm.monologue_tokens = 2 or a "
                    "higher frame rate")
    assert late_words([Clip("a.wav", words=fast)], RATE, 2, tokens) == ""


def test_a_given_text_is_spoken_in_its_tokens_and_then_the_end(tmp_path):
    cfg = sentencepiece(tmp_path)
    same = torch.nn.Identity()                       # logits in, tokens out
    ids = encode_text("the cat", "speech", cfg)[1:]
    words = Monologue([ids], longest_pause=2, text_logits=[same], embeds=[same], pad=None,
                      word_tokens=WordTokens(cfg))
    never = torch.zeros(1, vocabulary(cfg))
    never[:, PAD] = 1e4                              # the model always predicts PAD
    stream = [words.step(never, None).item() for _ in range(11)]
    assert stream == [PAD, PAD, THE, PAD, PAD, CA, T, PAD, PAD, END, PAD]
    assert words.finished("cpu").tolist() == [True]


def test_the_loss_and_generation_of_a_model_use_the_tokenizer_s_ids(tmp_path):
    """Fault: PAD was 256 whatever the vocabulary."""
    cfg = sentencepiece(tmp_path)
    config = build(Config, {"lm": {"monologue": True}, "data": {"tokenizer": str(tmp_path)}})
    torch.manual_seed(0)
    table = CALMConfig(backbone=BackboneConfig(dim=16, layers=1, heads=2), monologue=True,
                       head=HeadConfig(width=16, blocks=1), longest_pause=1)
    net = CALM.from_config(table, config.vae, cfg, KINDS).double()
    net.eos.bias.data.fill_(100.0)                   # would end at once
    D = config.vae.latent_dim
    one = torch.ones(1, dtype=torch.long)
    batch = {"x": torch.randn(1, 14, D).double(), "frames": 14 * one, "ended": one > 0,
             "text": torch.tensor([[END]]), "text_len": one, "kind": 0 * one,
             "prompt": torch.zeros(1, 0, D).double(), "prompt_len": 0 * one, "aligned": one > 0,
             "words": torch.tensor(word_stream(WORDS, 14, RATE, 1, WordTokens(cfg)))[None]}
    loss, metrics = net.loss(batch)
    loss.backward()
    assert 0 < metrics["text"] < 10 and net.text.weight.grad[PAD].abs().sum() > 0

    embedded = []
    embed = net.text.forward
    net.text.forward = lambda ids: embedded.append(ids.flatten().tolist()) or embed(ids)
    text = torch.tensor([encode_text("the cat sat", "speech", cfg)])
    frames = list(net.generate(text, kind=0, max_frames=40, steps=1,
                               generator=torch.Generator().manual_seed(0)))
    stream = [ids[0] for ids in embedded if len(ids) == 1]
    assert [i for i in stream if i != PAD] == [END, THE, CA, T, SA, T, END]      # kind, words, end
    # six tokens, of which two run ahead of the audio
    assert 3 <= len(frames) < 40


def test_a_monologue_without_the_kind_s_token_is_refused():
    with pytest.raises(BadInput, match="lm.monologue: .* data.kind_token = true"):
        build(Config, {"lm": {"monologue": True}, "data": {"kind_token": False}})
