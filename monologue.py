"""The inner monologue: which text tokens stand beside the latents, in training and generation.

    training    words with times ─► word_stream ─► tokens (T, n), beside the latents of a row

                seconds   0.0         0.24               0.5
                words     the         cat                (end)
                bytes     t h e _ - - c a t _ - -  - - - LF  - -        - = PAD
                tokens    ▁the    - - ▁ca t       - - -  END - -

    generation  z_long (B, C) ─► text logits ─┬─ given text: does the next word begin? ─► its
                                              │              tokens, then PAD
                                              └─ no text:    the model's own tokens
                                                     │
                                              embedding (B, C), beside the latent of this position

Tokens are bytes, or those of data.tokenizer (WordTokens), the same as those of a text before the
audio. latents.py makes the batches, calm.py has the losses.

Source: CALM (arXiv 2509.06926), speech continuation; bytes in place of its tokens are ours.
"""
import math

import numpy as np
import torch

from data import load_tokenizer, pad_id
from manifest import columns
from discrete import sample_codes

SPACE = 32
LINE_FEED = 10


# ---------------------------------------------------------------------------- words and tokens

class WordTokens:
    """The tokens of words: bytes, or those of a tokenizer.

    cfg: DataConfig; None = bytes. pad: the id where no word is; end: the id behind the last word.

        bytes       [t h e _] [c a t _]      a space closes each word; end is the line feed
        tokenizer   [▁the] [▁ca t]           as it cuts the whole text; end is the id that else
                                             begins a text as "speech"
    """

    def __init__(self, cfg=None):
        self.tokenizer = load_tokenizer(cfg.tokenizer) if cfg and cfg.tokenizer else None
        self.pad = pad_id(cfg)
        self.end = self.pad + 1 if self.tokenizer else LINE_FEED

    def of_words(self, words):
        """["the", "cat"] -> the ids of each, [[id, ...], ...]."""
        if self.tokenizer is None:
            return [[*word.encode("utf-8"), SPACE] for word in words]

        # one text: what a token is depends on the space before it
        text = " ".join(words)
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        word_at = [i for i, word in enumerate(words) for _ in word + " "]   # of each character

        # a token belongs to the word of its first character that is no space
        ids = [[] for _ in words]
        for token, (first, end) in zip(encoded.ids, encoded.offsets):
            part = text[first:end]
            first += len(part) - len(part.lstrip())
            ids[word_at[first]].append(token)
        return ids

    def of_text(self, ids):
        """The ids of a text without its kind -> those of its words, as of_words gives them."""
        ids = [i for i in ids if i < self.pad]
        if self.tokenizer is None:
            return [[*word, SPACE] for word in bytes(ids).split()]
        words = self.tokenizer.decode(ids).split()
        return [word for word in self.of_words(words) if word]


def word_frames(words, frame_rate, per_frame=1, tokens=None):
    """[(ids, first frame, seconds by which that is late), ...] of words and of the end."""
    tokens = tokens or WordTokens()
    ids_of = [*tokens.of_words([word for word, _, _ in words]), [tokens.end]]
    starts = [start for _, start, _ in words] + [words[-1][2]]

    placed = []
    free = 0                                              # first frame after the word before
    for ids, start in zip(ids_of, starts):
        # 1e-6: 1.16 s at 25 Hz is 28.999... in floats
        first = max(int(start * frame_rate + 1e-6), free)
        free = first + math.ceil(len(ids) / per_frame)
        placed.append((ids, first, first / frame_rate - start))
    return placed


def word_stream(words, frames, frame_rate, per_frame=1, tokens=None):
    """The text beside the frames -> (frames, per_frame) int64.

    words: [[word, start, end], ...] in seconds. The tokens of a word lie in consecutive frames,
    from the one where the word starts or, if that is later, where the word before it is complete.
    `end` follows where the last word ends; all other places hold `pad`. Tokens beyond the last
    frame are cut. frame_rate: frames per second; per_frame: tokens beside a frame; tokens:
    WordTokens, by default bytes.

    The end marks that no word follows. Without it "no word yet" and "no more words" would be the
    same, and generation could pause for seconds in the middle of a text.
    """
    tokens = tokens or WordTokens()
    stream = np.full(frames * per_frame, tokens.pad)
    for ids, first, _ in word_frames(words, frame_rate, per_frame, tokens):
        first *= per_frame
        stream[first:first + len(ids)] = ids[:max(0, len(stream) - first)]
    return stream.reshape(frames, per_frame)


def late_words(clips, frame_rate, per_frame, tokens=None):
    """One line if the words of a monologue fall more than 0.5 s behind the audio in any of the
    first 1,000 aligned clips, else "".
    """
    with_words = np.flatnonzero(columns(clips).column("has_words"))[:1000]
    aligned = [clips[i].words for i in with_words]
    tokens = tokens or WordTokens()

    def delays(n):
        return [max(late for _, _, late in word_frames(words, frame_rate, n, tokens))
                for words in aligned]

    late = [seconds for seconds in delays(per_frame) if seconds > 0.5]
    if not late:
        return ""
    enough = next((n for n in range(per_frame + 1, 9) if max(delays(n)) <= 0.5), 8)
    unit = "tokens" if tokens.tokenizer else "bytes"
    return (f"monologue: words fall up to {max(late):.1f} s behind the audio, more than 0.5 s in "
            f"{len(late):,} of {len(aligned):,} clips: {frame_rate * per_frame:g} {unit} per "
            f"second are too few; set lm.monologue_tokens = {enough} or a higher frame rate")


# ---------------------------------------------------------------------------- generation

class NoMonologue:
    """The counterpart of Monologue where no text runs beside the latents: always pad (B, C)."""

    def __init__(self, pad):
        self.pad = pad

    def step(self, z_long, generator):
        return self.pad

    def finished(self, device):
        return torch.ones((), dtype=torch.bool, device=device)              # any row may end

    def overdue(self, most, device):
        return torch.zeros((), dtype=torch.bool, device=device)             # none must


class Monologue:
    """The text stream during generation: n tokens per row and position, PAD between words.

    texts: B lists of ids without the kind, which `word_tokens` (None: bytes) splits into words. The
    stream keeps to a given text: the model's probability of anything but PAD is the probability
    that the next word begins (the end comes after the last word), and the tokens of a word follow
    each other. A row with an empty text writes its own, sampled with `temperature` from the top_k
    likeliest tokens (0 = all). longest_pause: see CALMConfig. text_logits, embeds: n functions,
    z (B, C) -> (B, vocab) and tokens (B,) -> (B, C); pad (B, C): the embedding of PAD.
    """

    def __init__(self, texts, longest_pause, text_logits, embeds, pad, temperature=1.0, top_k=0,
                 word_tokens=None):
        self.longest_pause = longest_pause
        self.text_logits = text_logits
        self.embeds = embeds
        self.pad = pad
        self.temperature = temperature
        self.top_k = top_k

        # per row: words to come, the rest of the word that has begun, positions since the last word
        word_tokens = word_tokens or WordTokens()
        self.no_word = word_tokens.pad
        self.remaining = [word_tokens.of_text(text) for text in texts]
        self.writes_own = [not row for row in self.remaining]
        for row in self.remaining:
            if row:
                row.append([word_tokens.end])
        self.current = [[] for _ in texts]
        self.pause = [0] * len(texts)

    def step(self, z_long, generator):
        """z_long (B, C) -> embedding of the next n text tokens (B, C)."""
        # whether a word begins, at temperature 1: the words of a given text keep their pace
        p = self.text_logits[0](z_long).float().softmax(-1)                 # (B, vocab)
        begins = torch.rand(len(p), generator=generator, device=p.device) < 1 - p[:, self.no_word]

        # what the model writes itself
        predicted = self.sample(z_long, generator)                          # (B, n)
        tokens = []
        for row, (begin, own) in enumerate(zip(begins.tolist(), predicted.tolist())):
            tokens.append(self.next_tokens(row, begin, own))
        tokens = torch.tensor(tokens, device=p.device)                      # (B, n)
        return sum(embed(tokens[:, i]) for i, embed in enumerate(self.embeds))

    def sample(self, z, generator):
        """z (B, C) -> n tokens (B, n), one after the other."""
        tokens = []
        for i, logits in enumerate(self.text_logits):
            if i > 0:
                z = z + self.embeds[i - 1](tokens[-1])
            tokens.append(sample_codes(logits(z), self.temperature, self.top_k, generator))
        return torch.stack(tokens, 1)

    def next_tokens(self, row, begin, predicted):
        """The next n tokens of a row; predicted: the model's, for a row without a given text."""
        n = len(self.embeds)
        waited = self.pause[row] >= self.longest_pause
        if not self.current[row] and self.remaining[row] and (begin or waited):
            self.current[row] = self.remaining[row].pop(0)

        if self.current[row]:
            self.pause[row] = 0
            tokens = self.current[row][:n]
            self.current[row] = self.current[row][n:]
            return tokens + [self.no_word] * (n - len(tokens))
        self.pause[row] += 1
        return predicted if self.writes_own[row] else [self.no_word] * n

    def finished(self, device):
        """Rows (B,) whose given text is complete."""
        return torch.tensor([not (current or remaining)
                             for current, remaining in zip(self.current, self.remaining)],
                            device=device)

    def overdue(self, most, device):
        """Rows (B,) whose given text has been complete for `most` positions."""
        return torch.tensor([not own and not remaining and pause >= most for own, remaining, pause
                             in zip(self.writes_own, self.remaining, self.pause)], device=device)
