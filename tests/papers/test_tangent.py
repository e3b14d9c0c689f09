"""
The tangent that the head's network carries by hand (adaln.py) against torch.func.jvp: values,
gradients, number of matrix products, memory, precision, and compiled by inductor.

    pytest tests/papers/test_tangent.py                 6 s on one thread
    INDUCTOR=1 pytest tests/papers/test_tangent.py      80 s more of g++ (on CUDA it always runs)
"""
import os

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import adaln
from heads import HEADS, AdaLNMLP, HeadConfig, consistency_tangent

D, C, WIDTH, BLOCKS, M, N = 4, 6, 32, 2, 3, 5


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def network(two_times=False, time_norm=False, dtype=torch.float64, width=WIDTH, blocks=BLOCKS):
    """A network with random weights, because a new one outputs zero everywhere."""
    net = AdaLNMLP(D, C, width, blocks, two_times, time_norm)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net.to(dtype)


def inputs(dtype=torch.float64, n=N):
    """x_t, t, z, dx, dt, s; z is shared by the M samples."""
    x_t, dx = torch.randn(2, M, n, D, dtype=dtype)
    t, dt, s = torch.rand(3, M, n, dtype=dtype)
    return x_t, t, torch.randn(n, C, dtype=dtype), dx, dt, s


def functorch(net, x_t, t, z, dx, dt):
    return torch.func.jvp(lambda x, t: net(x, t, z), (x_t, t), (dx, dt))


def functorch_s(net, x_t, t, z, s):
    return torch.func.jvp(lambda s: net(x_t, t, z, s), (s,), (torch.ones_like(s),))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------- values

@pytest.mark.parametrize("layer", ["sinusoid", "silu", "layer norm", "layer norm without weight",
                                   "std norm"])
def test_the_tangent_of_each_layer_is_its_derivative(layer):
    x, dx = torch.randn(2, 7, 9, dtype=torch.float64)
    norms = {"layer norm": adaln.LayerNorm(9), "std norm": adaln.StdNorm(9),
             "layer norm without weight": adaln.LayerNorm(9, affine=False)}
    if layer in norms:
        norm = norms[layer].double()
        for p in norm.parameters():
            p.data += torch.randn_like(p)
        function, tangent = norm, norm.tangent
    else:
        function = {"sinusoid": adaln.sinusoid, "silu": nn.functional.silu}[layer]
        tangent = {"sinusoid": adaln.sinusoid_tangent, "silu": adaln.silu_tangent}[layer]
    _, expected = torch.func.jvp(function, (x,), (dx,))
    torch.testing.assert_close(tangent(x, dx), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("time_norm", [False, True])
def test_both_tangents_are_those_of_functorch(time_norm):
    net = network(two_times=True, time_norm=time_norm)
    x_t, t, z, dx, dt, s = inputs()
    for got, expected in ((net.jvp(x_t, t, z, dx, dt), functorch(net, x_t, t, z, dx, dt)),
                          (net.jvp_s(x_t, t, z, s), functorch_s(net, x_t, t, z, s))):
        assert expected[1].abs().mean() > 0.01
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_in_fp32_they_are_those_of_functorch_to_rounding():
    net = network(two_times=True, dtype=torch.float32)
    x_t, t, z, dx, dt, s = inputs(torch.float32)
    for got, expected in ((net.jvp(x_t, t, z, dx, dt), functorch(net, x_t, t, z, dx, dt)),
                          (net.jvp_s(x_t, t, z, s), functorch_s(net, x_t, t, z, s))):
        assert torch.equal(got[0], expected[0])
        assert relative(got[1], expected[1]) < 1e-5


# ---------------------------------------------------------------------------------------- gradients

@pytest.mark.parametrize("time_norm", [False, True])
def test_gradients_through_f_and_its_slope_by_s_are_those_of_functorch(time_norm):
    net = network(two_times=True, time_norm=time_norm)
    x_t, t, z, _, _, s = inputs()
    z.requires_grad_()
    weights = torch.randn(2, M, N, D, dtype=torch.float64)

    def grads(outputs):
        loss = sum((w * y.square()).sum() for w, y in zip(weights, outputs, strict=True))
        return torch.autograd.grad(loss, [z, *net.parameters()])
    got = grads(net.jvp_s(x_t, t, z, s))
    expected = grads(functorch_s(net, x_t, t, z, s))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_gradients_through_f_are_those_of_the_forward_and_dF_has_none():
    net = network()
    x_t, t, z, dx, dt, _ = inputs()
    F, dF = net.jvp(x_t, t, z, dx, dt)
    assert not dF.requires_grad
    got = torch.autograd.grad(F.square().sum(), list(net.parameters()))
    expected = torch.autograd.grad(net(x_t, t, z).square().sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_without_gradients_nothing_has_a_graph():
    """Validation computes the losses under no_grad."""
    net = network(two_times=True)
    x_t, t, z, dx, dt, s = inputs()
    with torch.no_grad():
        outputs = (*net.jvp(x_t, t, z, dx, dt), *net.jvp_s(x_t, t, z, s))
    assert not any(y.requires_grad for y in outputs)


# --------------------------------------------------------------------------------------------- cost

def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_a_tangent_costs_two_products_per_layer_that_moves_and_none_for_z():
    """torch.func.jvp takes three, one of them with zeros."""
    net = network(two_times=True)
    x_t, t, z, dx, dt, s = inputs()
    one, cond = flops(lambda: net(x_t, t, z)), flops(lambda: net.cond(z))
    assert flops(lambda: net.jvp(x_t, t, z, dx, dt)) == 2 * one - cond
    assert flops(lambda: functorch(net, x_t, t, z, dx, dt)) == 3 * one - 2 * cond

    # by s: neither x_t nor t moves
    both, still = flops(lambda: net(x_t, t, z, s)), flops(
        lambda: (net.cond(z), net.input(x_t), net.time(adaln.sinusoid(t))))
    assert flops(lambda: net.jvp_s(x_t, t, z, s)) == 2 * both - still


def test_a_step_of_consistency_costs_a_forward_more_than_one_of_trigflow():
    """Fault: it cost three more, and on CUDA in TF32: 42 % of the FLOPs of calm_music."""
    def step(name):
        cfg = HeadConfig(objective=name, width=WIDTH, blocks=BLOCKS, multiplier=M)
        head = HEADS[name](D, C, cfg)
        z, x = torch.randn(N, C, requires_grad=True), torch.randn(N, D)
        return head.net, lambda: head.loss(z, x)[0].mean().backward()
    x_t, t, z, _, _, _ = inputs(torch.float32)
    net, trigflow = step("trigflow")
    _, consistency = step("consistency")
    forward, cond = flops(lambda: net(x_t, t, z)), flops(lambda: net.cond(z))
    assert flops(consistency) == flops(trigflow) + forward - cond


def test_the_tangent_of_consistency_stores_nothing_for_the_backward():
    net = network()
    x_t, t, z, dx, dt, _ = inputs()

    def stored(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda v: sizes.append(v.numel()) or v, lambda v: v):
            out = function()
        return sizes, out
    assert stored(lambda: net.jvp(x_t, t, z, dx, dt))[0] == stored(lambda: net(x_t, t, z))[0]


# ---------------------------------------------------------------------------------------- precision

def test_under_bf16_autocast_only_the_products_are_bf16(monkeypatch):
    net = network(two_times=True, dtype=torch.float32)
    x_t, t, z, dx, dt, s = inputs(torch.float32)
    seen = set()
    for name in ("silu_tangent", "sinusoid_tangent", "linear_tangent"):
        function = getattr(adaln, name)

        def watched(*args, function=function):
            out = function(*args)
            seen.update({args[1].dtype, out.dtype})
            return out
        monkeypatch.setattr(adaln, name, watched)
    with torch.autocast("cpu", torch.bfloat16):
        dF = net.jvp(x_t, t, z, dx, dt)[1]
        dFds = net.jvp_s(x_t, t, z, s)[1]
    assert seen == {torch.float32} == {dF.dtype, dFds.dtype}
    assert 1e-4 < relative(dF, functorch(net, x_t, t, z, dx, dt)[1]) < 0.05     # autocast was on


def test_in_bf16_consistencys_target_is_off_by_a_hundredth_and_not_to_one_side():
    """The relative error of g; its mean over 4000 draws is what training cannot average away.

    Here the weights are random; on a trained head of 256 x 4: 9e-3, 2e-2 (99 %) and 3e-4.
    """
    net = network(dtype=torch.float32, width=128, blocks=4)
    n = 4000
    x, eps = torch.randn(2, n, D)
    z = torch.randn(n, C)
    t = torch.atan((-0.4 + 1.4 * torch.randn(n)).exp())
    cos, sin = t.cos()[:, None], t.sin()[:, None]

    def target(net, dtype=torch.float32):
        args = (cos * x + sin * eps, t, cos * eps - sin * x, z)
        with torch.no_grad():
            g = consistency_tangent(net, *(v.to(dtype) for v in args))[1]
        return g / (g.norm(dim=-1, keepdim=True) + 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        g = target(net)
    exact = target(net.double(), torch.float64)
    error = (g - exact).norm(dim=-1) / exact.norm(dim=-1)
    bias = (g - exact).mean(0).norm() / exact.norm(dim=-1).mean()
    print(f"error: median {error.median():.1e}, 99 % {error.quantile(0.99):.1e}; bias {bias:.1e}")
    assert 1e-4 < error.median() < 0.02 and error.quantile(0.99) < 0.1 and bias < 5e-3


# -------------------------------------------------------------------------------------- compilation

needs_inductor = pytest.mark.skipif(
    not torch.cuda.is_available() and "INDUCTOR" not in os.environ,
    reason="INDUCTOR=1 runs it: 80 s of g++ on a CPU")


@pytest.mark.parametrize("name", ["consistency", "lsd"])
@pytest.mark.parametrize("backend", [
    "aot_eager", pytest.param("inductor", marks=needs_inductor)])
def test_a_compiled_loss_is_one_graph_that_later_steps_use_again(name, backend):
    """Fault: in the first backward of LSD, inductor died of "ZeroTensors are immutable"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = HeadConfig(objective=name, width=WIDTH, blocks=1, multiplier=2, warmup=4)
    head = HEADS[name](D, C, cfg).to(device)
    for p in head.net.parameters():
        p.data += 0.1 * torch.randn_like(p)

    def step(loss, number):
        torch.manual_seed(number)
        head.set_step(number)
        head.zero_grad()
        z, x = torch.randn(N, C, device=device), torch.randn(N, D, device=device)
        value = loss(z, x, None, head.draws(x))[0].sum()
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in head.parameters())]

    # the same random numbers as without compilation, on one process
    with torch._inductor.config.patch(fallback_random=True, compile_threads=1):
        compiled = torch.compile(head.loss, backend=backend, fullgraph=True)
        for number in range(4):
            with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
                got = step(compiled, number)
            for a, b in zip(got, step(head.loss, number), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["trigflow", "consistency", "lsd"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_recomputed_activations_give_the_same_gradients(name, backend):
    torch.manual_seed(0)
    head = HEADS[name](4, 8, HeadConfig(objective=name, width=16, blocks=2)).double()
    for p in head.parameters():
        p.data += 0.1 * torch.randn_like(p)
    z = torch.randn(3, 5, 8, dtype=torch.double)
    x = torch.randn(3, 5, 4, dtype=torch.double)

    def gradients():
        torch._dynamo.reset()
        loss = torch.compile(head.loss, backend=backend, fullgraph=True) if backend else head.loss
        head.zero_grad()
        torch.manual_seed(1)
        loss(z, x)[0].mean().backward()
        return [p.grad.clone() for p in head.parameters() if p.grad is not None]

    kept = gradients()
    head.net.checkpoint = True
    for a, b in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
