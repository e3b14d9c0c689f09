"""The inner monologue while audio is generated: which text tokens run beside the next latent.

    z_long (B, C) ─► text logits ─┬─ given text: does the next word begin? ─► its bytes, then PAD
                                  └─ no text:    the model's own tokens
                                         │
                                  embedding (B, C), beside the latent of this position

Training needs none of this: there the words of the batch stand beside the latents (calm.py).

Source: CALM (arXiv 2509.06926), speech continuation; bytes in place of its tokens are ours.
"""
import torch

from data import END, PAD
from discrete import sample_codes


class NoMonologue:
    """The counterpart of Monologue where no text runs beside the latents: always pad (B, C)."""

    def __init__(self, pad):
        self.pad = pad

    def step(self, z_long, generator):
        return self.pad

    def finished(self, device):
        return torch.ones((), dtype=torch.bool, device=device)              # any row may end


class Monologue:
    """The text stream during generation: n tokens per row and position, PAD between words.

    texts: B lists of byte tokens with spaces between words. The stream keeps to a given text: the
    model's probability of anything but PAD is the probability that the next word begins (END comes
    after the last word), and the bytes of a word follow each other. A row with an empty text
    writes its own, sampled with `temperature` from the top_k likeliest tokens (0 = all).
    longest_pause: see CALMConfig. text_logits, embeds: n functions, z (B, C) -> (B, vocab) and
    tokens (B,) -> (B, C); pad (B, C): the embedding of PAD.
    """

    def __init__(self, texts, longest_pause, text_logits, embeds, pad, temperature=1.0, top_k=0):
        self.longest_pause = longest_pause
        self.text_logits = text_logits
        self.embeds = embeds
        self.pad = pad
        self.temperature = temperature
        self.top_k = top_k

        # per row: words to come, the rest of the word that has begun, positions since the last word
        words = [bytes(text).split() for text in texts]
        self.writes_own = [not row for row in words]
        self.remaining = [[[*word, ord(" ")] for word in row] for row in words]
        for row in self.remaining:
            if row:
                row.append([END])
        self.current = [[] for _ in words]
        self.pause = [0] * len(words)

    def step(self, z_long, generator):
        """z_long (B, C) -> embedding of the next n text tokens (B, C)."""
        # whether a word begins, at temperature 1: the words of a given text keep their pace
        p = self.text_logits[0](z_long).float().softmax(-1)                 # (B, vocab)
        begins = torch.rand(len(p), generator=generator, device=p.device) < 1 - p[:, PAD]

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
            return tokens + [PAD] * (n - len(tokens))
        self.pause[row] += 1
        return predicted if self.writes_own[row] else [PAD] * n

    def finished(self, device):
        """Rows (B,) whose given text is complete."""
        return torch.tensor([not (current or remaining)
                             for current, remaining in zip(self.current, self.remaining)],
                            device=device)
