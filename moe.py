"""A-MoME: one more feed-forward network in each layer, for speech only. Nothing is routed.

    rows of a batch, sorted by kind            one layer of the backbone
    ┌──────────────┐
    │ speech       │    x ─► norm ─► h ─┬─► shared MLP ───────────────────► + ─► residual stream
    │ speech       │                    └─► expert ── on h[:n_speech] ─────►
    ├──────────────┤
    │ sound        │    x ─► norm ─► h ───► shared MLP ─────────────────────► residual stream
    │ music        │
    └──────────────┘

        y = MLP(h) + E(h)   in every position of a speech row (text, prompt, clean and noisy blocks)
        y = MLP(h)          elsewhere
        E(h) = down(silu(gate h) * up h), down = 0 at the start

A transcript fixes what is heard when, a caption only what is heard: the two pull the shared weights
apart, and speech wins (AudioCALM, arXiv 2606.23080, A-MoME). The expert gives speech weights of its
own; sound and music compute what they would without it, bit for bit, in the same time
(tests/test_moe.py). A position's kind is known, so there is no router and no balancing loss, and
with speech first in the batch the expert runs on a slice, not on a mask. A model that generates
sound or music does not load it.

Not given in the paper, so chosen: it stands in every layer, beside the shared MLP, and reads the
same norm (one write to the residual stream, no norm of its own); it serves the whole row, text
included, because "this is speech" holds for the row; its last matrix starts at zero, so that
training starts from the shared model. experts = "all" is the control of the ablation: such an
expert for each kind.
Precision: matrix products in the autocast dtype.
"""
import torch
import torch.nn as nn

from backbone import MLP, BackboneConfig


class Experts(nn.Module):
    """kinds: names in the order of a sorted batch's rows; owners: those that have an expert."""

    def __init__(self, dim, hidden, layers, kinds, owners):
        super().__init__()
        self.kinds = tuple(kinds)
        cfg = BackboneConfig(dim=dim, heads=1, mlp="swiglu", mlp_dim=hidden)
        self.of = nn.ModuleDict({kind: nn.ModuleList(MLP(cfg) for _ in range(layers))
                                 for kind in owners})
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if "down" in name else nn.init.normal_(p, std=0.02)

    def serve(self, counts):
        """counts: rows of each kind in the batch -> one callable (h, y) -> y a layer, or None.

        None where no row has an expert, in eval mode: not a single operation is added. In training
        an expert without rows still runs, on nothing: its gradient is then zero, not missing, as
        processes that sum their gradients need.
        """
        counts = [int(n) for n in counts]
        busy = any(n and kind in self.of for kind, n in zip(self.kinds, counts))
        if not busy and not (self.training and len(self.of)):
            return None

        def add(layer):
            def expert(h, y):                                               # (B, T, C) each
                rows = zip(self.kinds, h.split(counts), y.split(counts))
                return torch.cat([y + self.of[kind][layer](h) if kind in self.of else y
                                  for kind, h, y in rows])
            return expert
        layers = len(next(iter(self.of.values())))
        return [add(layer) for layer in range(layers)]
