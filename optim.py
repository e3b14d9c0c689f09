"""Optimizers and learning rate: AdamW (the papers), or Muon for matrices and AdamW for the rest.

    trainer.optimized {"vae": .., "disc": ..} ─► make_optimizers ─► {"vae": Muon, "disc": AdamW}
    step ─► schedule ─► factor of the learning rate: linear warm-up, then a cosine to lr_end

Sources: AdamW (Loshchilov & Hutter 2019), CALM Table 9; Muon (Jordan et al. 2024), with steps of
AdamW's size (Liu et al. 2025).
"""
import math

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized

from cli import BadInput
from processes import whole

# modules whose weight is a matrix, a kernel or a table; gains of norms and scales are in others
WEIGHTS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)


def schedule(cfg, step):
    """The factor of the learning rate at a step: linear warm-up, then cosine from 1 to lr_end."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    share = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizers(trainer, cfg, device, key="optimizer"):
    """{name: optimizer} for trainer.optimized {name: module}; cfg: StageConfig.

    Weight decay acts on the weights of linear layers, convolutions and embeddings (StageConfig).
    Discriminators (2-d convolutions with weight norm) stay with AdamW. key: of the choice in the
    config, for the message. Errors: BadInput where this torch has no Muon.
    """
    if cfg.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise BadInput(f"{key}: muon needs torch 2.9 or newer, this is {torch.__version__}; "
                       "use adamw")

    def adamw(module, without=()):
        parameters = [p for p in module.parameters() if id(p) not in without]
        decayed = {id(p) for p in weights_that_decay(module)}
        groups = [{"params": [p for p in parameters if id(p) in decayed],
                   "weight_decay": cfg.weight_decay},
                  {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas),
                                 fused=not device.startswith("mps"))

    optimizers = {}
    for name, module in trainer.optimized.items():
        if cfg.optimizer == "muon" and name != "disc":
            optimizers[name] = Muon(module, adamw, cfg.lr, cfg.weight_decay)
        else:
            optimizers[name] = adamw(module)
    return optimizers


def weights_that_decay(module):
    """The weights of linear layers, convolutions and embeddings within a module.

    Not their biases, gains of norms, scales (C,) or (C, 1) of residual branches, single learned
    vectors. Of a weight with weight norm, g v / |v|, only v: g is a gain.
    """
    for layer in module.modules():
        if not isinstance(layer, WEIGHTS):
            continue
        if is_parametrized(layer, "weight"):
            yield layer.parametrizations.weight.original1                   # v
        else:
            yield layer.weight


class Muon:
    """torch.optim.Muon for the matrices of linear layers and convolutions, AdamW for the rest.

    Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that directions with
    small gradients are learned as fast as those with large ones: what a VAE on log-spectra needs,
    where a frame's level drowns its shape (LOG.md). A convolution (out, in, k) is a matrix
    (out, in · k), a transposed one (in, out · k), by a view. Steps have AdamW's size, so that one
    learning rate serves both. Depthwise kernels, embeddings, norms and biases are AdamW's.

    Sharded matrices (parallel.py) stay sharded, but where the processes cannot share the rows
    evenly: then each makes the whole step.
    """

    def __init__(self, module, adamw, lr, weight_decay):
        self.weights = [m.weight for m in module.modules() if is_matrix(m)]
        self.views = [p.detach().flatten(1) for p in self.weights]
        self.uneven = [i for i, view in enumerate(self.views) if isinstance(view, DTensor)
                       and len(view) % view.device_mesh.size()]
        for i in self.uneven:
            self.views[i] = self.views[i].full_tensor()
        self.adamw = adamw(module, without={id(p) for p in self.weights})
        self.muon = torch.optim.Muon(self.views, lr=lr, weight_decay=weight_decay,
                                     adjust_lr_fn="match_rms_adamw")
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    @property
    def state(self):
        """{parameter (or its matrix): its running means}, as torch's optimizers have it."""
        return self.muon.state | self.adamw.state

    def zero_grad(self, set_to_none=True):
        self.adamw.zero_grad(set_to_none)
        for p in self.weights:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for p, view in zip(self.weights, self.views):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        for i in self.uneven:
            self.views[i].copy_(self.weights[i].full_tensor().flatten(1))
            self.views[i].grad = whole(self.views[i].grad)

        self.muon.step()
        self.adamw.step()

        # the shards of what every process has stepped
        for i in self.uneven:
            p = self.weights[i]
            p.copy_(distribute_tensor(self.views[i].view_as(p), p.device_mesh, p.placements,
                                      src_data_rank=None))

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


def is_matrix(module):
    """Whether Muon takes this layer's weight: a linear layer or a convolution without groups."""
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and module.groups == 1
