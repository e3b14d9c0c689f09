"""An expert changes its own kind and nothing else, and costs the others nothing."""
import pytest
import torch

from backbone import BackboneConfig, Transformer
from moe import Experts

KINDS = ("speech", "sound", "music")


def model(expert_kinds, C=16, layers=2):
    torch.manual_seed(0)
    net = Transformer(BackboneConfig(dim=C, layers=layers, heads=2))
    experts = Experts(C, 24, layers, KINDS, expert_kinds)
    for p in experts.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net, experts.eval(), torch.randn(6, 5, C)


def test_sound_and_music_are_bitwise_the_same_with_and_without_the_speech_expert():
    net, experts, x = model(["speech"])
    plain = net(x)
    mixed = net(x, experts=experts.per_layer([2, 3, 1]))
    assert torch.equal(plain[2:], mixed[2:])
    assert ((plain - mixed)[:2].abs().amax((1, 2)) > 1e-2).all()


def test_a_batch_without_rows_of_an_experts_kind_gets_no_expert_at_all():
    _, experts, _ = model(["speech"])
    assert experts.per_layer([0, 4, 2]) is None
    assert Experts(16, 24, 2, KINDS, []).per_layer([3, 2, 1]) is None


def test_an_expert_outputs_zero_at_initialisation():
    net, _, x = model([])
    experts = Experts(16, 24, 2, KINDS, KINDS)
    assert torch.equal(net(x, experts=experts.per_layer([2, 2, 2])), net(x))


def test_each_of_three_experts_sees_the_rows_of_its_kind_only():
    net, experts, x = model(KINDS)
    for kind in KINDS:
        experts.zero_grad()
        y = net(x, experts=experts.per_layer([1, 2, 3]))
        rows = {"speech": slice(0, 1), "sound": slice(1, 3), "music": slice(3, 6)}[kind]
        y[rows].sum().backward()
        learned = {k for k in KINDS if any(p.grad is not None and p.grad.abs().sum() > 0
                                           for p in experts.of[k].parameters())}
        assert learned == {kind}


def test_in_training_an_expert_without_rows_has_a_gradient_of_zero():
    """Processes sum gradients in one flat tensor: a missing one would shift all later ones."""
    net, experts, x = model(["speech"])
    net(x, experts=experts.train().per_layer([0, 4, 2])).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("hidden, experts", [(24, 1), (40, 3)])
def test_an_expert_has_three_matrices_per_layer(hidden, experts):
    count = sum(p.numel() for p in Experts(16, hidden, 2, KINDS, KINDS[:experts]).parameters())
    assert count == experts * 2 * 3 * 16 * hidden
