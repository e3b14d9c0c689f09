"""The speech expert: one more feed-forward network per layer, for speech only. Nothing is routed.

    rows of a batch, sorted by kind            one layer of the backbone
    ┌──────────────┐
    │ speech       │    x ─► norm ─► h ─┬─► shared MLP ───────────────────► + ─► residual stream
    │ speech       │                    └─► expert ── on h[:n_speech] ─────►
    ├──────────────┤
    │ sound        │    x ─► norm ─► h ───► shared MLP ─────────────────────► residual stream
    │ music        │
    └──────────────┘

        y = MLP(h) + E(h)   at every position of a speech row (text, prompt, clean and noisy blocks)
        y = MLP(h)          in all other rows
        E(h) = down(silu(gate h) * up h), with down = 0 at initialisation

A transcript fixes which sounds occur and when, a caption only which sounds occur. The two tasks
pull the shared weights apart, and speech dominates (AudioCALM, arXiv 2606.23080). The
expert gives speech its own weights; sound and music compute exactly what they would without it,
bit for bit and in the same time (tests/papers/test_moe.py). The kind of every row is given, so
there is no router and no balancing loss, and because speech comes first in the batch, the expert
runs on a slice instead of a mask. A model that generates only sound or music does not load it.

Not given in the paper, so chosen here: every layer has an expert, beside the shared MLP, reading
the same norm (one write to the residual stream, no norm of its own); the expert serves the whole
row, text included, because the kind is a property of the row; its last matrix starts at zero, so
that training starts from the shared model. experts = "all" is the control of the ablation: one
such expert for each kind.
Precision: matrix products in the autocast dtype.
"""
from functools import partial

import torch
import torch.nn as nn

from backbone import MLP, BackboneConfig


class Experts(nn.Module):
    """The experts of all layers, for the kinds that have one.

    kinds: names of all kinds, in the order of a sorted batch's rows.
    expert_kinds: names of the kinds that have an expert.
    """

    def __init__(self, dim, hidden, layers, kinds, expert_kinds):
        super().__init__()
        self.kinds = tuple(kinds)
        self.layers = layers
        # MLP reads only dim, mlp and mlp_dim
        cfg = BackboneConfig(dim=dim, heads=1, mlp="swiglu", mlp_dim=hidden)
        # kind -> its expert in each layer
        self.of = nn.ModuleDict({kind: nn.ModuleList(MLP(cfg) for _ in range(layers))
                                 for kind in expert_kinds})
        for name, p in self.named_parameters():
            if "down" in name:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=0.02)

    def per_layer(self, counts):
        """One callable (h, y) -> y per layer, for a batch with counts[i] rows of kinds[i]; or None.

        In eval mode, None if no row has an expert: the backbone then does exactly what it does
        without experts. In training an expert without rows still runs, on an empty slice: its
        gradient is then zero instead of missing, as processes that sum their gradients need.
        """
        counts = [int(n) for n in counts]
        used = any(n > 0 and kind in self.of for kind, n in zip(self.kinds, counts))
        if not used and not (self.training and len(self.of)):
            return None
        return [partial(add_experts, [self.of[kind][layer] if kind in self.of else None
                                      for kind in self.kinds], counts)
                for layer in range(self.layers)]


def add_experts(experts, counts, h, y):
    """Add each kind's expert (None: it has none) to y on its counts[i] rows, sorted by kind.

    h, y: (B, T, C) -> (B, T, C). The layer's number is not in here: a compiled layer would be
    compiled anew for each.
    """
    rows = []
    for expert, h_kind, y_kind in zip(experts, h.split(counts), y.split(counts)):
        if expert is not None:
            y_kind = y_kind + expert(h_kind)                                    # A-MoME
        rows.append(y_kind)
    return torch.cat(rows)
