"""The transformer attends to the right positions; feeding it in chunks changes nothing."""
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from cli import BadInput
from backbone import BackboneConfig, KVCache, Transformer, rope, rotations
from schema import build

CASES = [dict(), dict(window=5), dict(kv_heads=2), dict(qk_norm=True), dict(mlp="gelu", window=3),
         dict(head_dim=12, kv_heads=1)]


def model(**changes):
    torch.manual_seed(0)
    net = Transformer(BackboneConfig(dim=32, layers=2, heads=4, **changes)).double()
    for p in net.parameters():              # large enough for attention to matter
        p.data += 0.2 * torch.randn_like(p)
    return net.eval()


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_output_at_every_prefix_is_the_output_of_the_prefix_alone(changes):
    net, x = model(**changes), torch.randn(2, 14, 32, dtype=torch.float64)
    y = net(x)
    for n in range(1, 15):
        torch.testing.assert_close(net(x[:, :n]), y[:, :n], atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("sizes", [[1] * 14, [3, 1, 6, 4], [13, 1], [1, 12, 1]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_fed_in_any_pieces_equals_the_full_forward(changes, sizes, grad):
    net, x, cache = model(**changes), torch.randn(2, 14, 32, dtype=torch.float64), KVCache()
    with torch.set_grad_enabled(grad):
        parts = [net(piece, cache) for piece in x.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), net(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [0, 5])
@torch.no_grad()
def test_a_cache_survives_its_buffer_filling_up(window):
    net, x, cache = model(window=window), torch.randn(2, 200, 32, dtype=torch.float64), KVCache()
    parts = [net(piece, cache) for piece in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), net(x), atol=1e-12, rtol=0)
    assert cache.pos == 200


@torch.no_grad()
def test_a_cached_step_writes_in_place_instead_of_copying_the_cache():
    net, cache = model(), KVCache()
    net(torch.randn(1, 10, 32, dtype=torch.float64), cache)
    addresses = []
    for _ in range(40):
        net(torch.randn(1, 1, 32, dtype=torch.float64), cache)
        addresses.append(cache.kv[0][0].data_ptr())
    assert len(set(addresses)) == 1


def test_a_window_limits_both_the_view_and_the_cache():
    net, cache = model(window=3), KVCache()
    x = torch.randn(1, 20, 32, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(net(x)[0, 19].sum(), x)
    used = (grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
    assert used == list(range(20 - 1 - 2 * 2, 20))        # two layers, each two positions back
    for i in range(20):
        net(x[:, i:i + 1].detach(), cache)
    assert cache.kv[0][0].shape[2] == 2 and cache.pos == 20


def test_a_model_that_is_not_causal_sees_the_future():
    net, x = model(causal=False), torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(net(x)[0, 0].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).all()


def test_rotary_positions_depend_on_distance_only():
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64),
            torch.randn(1, 1, 1, 8, dtype=torch.float64))
    rotate = lambda x, i: rope(x, *rotations(torch.tensor([i]), 8, 1e4, x.dtype))
    score = lambda i, j: (rotate(q, i) * rotate(k, j)).sum()
    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-12, rtol=0)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize("changes, layers, width, heads, millions", [
    (dict(mlp="gelu", mlp_dim=6144), 48, 1536, 24, 1359), (dict(mlp_dim=4032), 48, 1536, 24, 1345),
    (dict(mlp="gelu", mlp_dim=6144), 4, 1536, 24, 113)], ids=str)
def test_table_9_sizes_give_the_parameter_counts_of_the_paper(
        changes, layers, width, heads, millions):
    with torch.device("meta"):
        net = Transformer(BackboneConfig(dim=width, layers=layers, heads=heads, **changes))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    "changes", [dict(heads=3), dict(kv_heads=3), dict(mlp="relu"), dict(window=-1),
                dict(head_dim=5)], ids=str)
def test_impossible_sizes_are_refused_by_name(changes):
    with pytest.raises(BadInput, match=list(changes)[0]):
        build(BackboneConfig, {"dim": 32, "heads": 4, **changes}, "backbone")


def test_explicit_positions_and_mask_reproduce_the_default_rule():
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    i = torch.arange(9)
    for changes in (dict(), dict(window=4, kv_heads=2)):
        net = model(**changes)
        rule = i[:, None] >= i
        if net.cfg.window:
            rule &= i[:, None] - i < net.cfg.window
        for mask in (rule, rule.expand(2, 1, 9, 9)):
            torch.testing.assert_close(net(x, positions=i, mask=mask), net(x), atol=1e-12, rtol=0)
        torch.testing.assert_close(net(x, positions=i.expand(2, 9) + torch.tensor([[0], [40]])),
                                   net(x), atol=1e-12, rtol=0)             # only distances matter


def test_a_permuted_sequence_with_its_positions_and_mask_is_the_same_set():
    net, x = model(), torch.randn(1, 8, 32, dtype=torch.float64)
    order = torch.randperm(8)
    y = net(x[:, order], positions=order[None], mask=order[:, None] >= order)
    torch.testing.assert_close(y, net(x)[:, order], atol=1e-12, rtol=0)


@torch.no_grad()                                     # flex_attention has no backward on CPU
@pytest.mark.parametrize("changes", [dict(), dict(kv_heads=2)], ids=str)
def test_flex_attention_gives_what_a_dense_mask_gives(changes):
    net, x = model(**changes), torch.randn(2, 12, 32, dtype=torch.float64)
    length = torch.tensor([12, 7])
    rule = lambda b, h, q, k: (q // 3 >= k // 3) & ((k < length[b]) | (q == k))
    b, i = torch.arange(2)[:, None, None], torch.arange(12)
    mask = create_block_mask(rule, 2, None, 12, 12, device="cpu")
    torch.testing.assert_close(net(x, mask=mask), net(x, mask=rule(b, 0, i[:, None], i)[:, None]),
                               atol=1e-12, rtol=0)


def test_reading_a_cache_leaves_it_as_it_was():
    net, cache, x = model(), KVCache(), torch.randn(1, 9, 32, dtype=torch.float64)
    net(x[:, :6], cache)
    before = {i: (k.clone(), v.clone()) for i, (k, v) in cache.kv.items()}
    everything = torch.ones(3, 9, dtype=torch.bool)
    first = net(x[:, 6:], cache.copy(), mask=everything)
    assert torch.equal(net(x[:, 6:], cache.copy(), mask=everything), first)
    assert cache.pos == 6
    for i, (k, v) in cache.kv.items():
        assert torch.equal(k, before[i][0]) and torch.equal(v, before[i][1])
    i = torch.arange(9)                              # the same, in one pass: 6 causal, then a block
    whole = net(x, mask=(i[:, None] >= i) | (i[:, None] >= 6))
    torch.testing.assert_close(first, whole[:, 6:], atol=1e-12, rtol=0)


def test_a_trimmed_cache_keeps_its_first_and_last_positions_and_counts_on():
    net, cache, x = model(), KVCache(), torch.randn(1, 10, 32, dtype=torch.float64)
    net(x, cache)
    k = cache.kv[1][0]
    cache.trim(2, 5)
    assert torch.equal(cache.kv[1][0], torch.cat([k[:, :, :2], k[:, :, 5:]], 2))
    assert cache.pos == 10
    cache.trim(2, 5)
    assert cache.kv[0][0].shape[2] == 7


def dense(net, x):
    """The forward pass with the window as a dense mask."""
    q = torch.arange(x.shape[1])[:, None]
    k = torch.arange(x.shape[1])[None]
    return net(x, mask=(k <= q) & (q - k < net.cfg.window))


@pytest.mark.parametrize("changes", [dict(window=10), dict(window=1), dict(window=70),
                                     dict(window=10, kv_heads=2)], ids=str)
@pytest.mark.parametrize("length", [300, 320, 321, 450])
def test_a_window_over_a_long_sequence_gives_what_the_dense_mask_gives(changes, length):
    net = model(**changes)
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    outputs = [net(x), dense(net, x)]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((y * weight).sum(), [x, *net.parameters()]) for y in outputs]
    for banded, expected in zip(*gradients):
        torch.testing.assert_close(banded, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sizes", [[3, 400, 1, 300], [300, 404], [9, 290, 405]], ids=str)
def test_a_cache_fed_in_long_pieces_equals_the_dense_mask(sizes):
    net = model(window=10)
    x = torch.randn(2, 704, 32, dtype=torch.float64)
    cache = KVCache()
    with torch.no_grad():
        parts = [net(piece, cache) for piece in x.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), dense(net, x), atol=1e-12, rtol=0)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that is made."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_memory_of_a_window_grows_with_the_length_and_not_with_its_square():
    """Fault: the short context (10 latents) and the VAE's layers made masks and scores of T x T."""
    net = model(window=10).float()
    largest = []
    for length in (2000, 4000, 8000):
        with Largest() as mode, torch.no_grad():
            net(torch.randn(1, length, 32))
        largest.append(mode.elements / length)
    assert max(largest) < 300                               # 4 heads x 73 keys; T x T has 8000
    assert largest[2] < 1.05 * largest[0]


@pytest.mark.parametrize("window", [0, 3])
def test_recomputed_activations_give_the_same_gradients(window):
    torch.manual_seed(0)
    net = Transformer(BackboneConfig(dim=16, layers=3, heads=2, window=window)).double()
    x = torch.randn(2, 9, 16, dtype=torch.double)

    def gradients():
        net.zero_grad()
        net(x).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    kept = gradients()
    net.checkpoint = True
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = net(x).square().sum()
    net.checkpoint = False
    few = len(saved)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net(x)
    assert few < (len(saved) - few) / 3

    net.zero_grad()
    loss.backward()
    for a, p in zip(kept, net.parameters(), strict=True):
        assert torch.equal(a, p.grad)
