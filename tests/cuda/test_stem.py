"""The fused stem's own code, run by the emulator behind its operators, against the four layers in float64."""

import copy

import pytest
import torch
from emulated_stem import give_cpu_kernels
from stem_cases import error, exact, faces, layers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_fast import selfcheck
from ngd_fast.student import stem
from ngd_fast.student.resnet import ResNet


@pytest.fixture(scope="module")
def on_cpu(emulator):
    """Gives the stem's operators their emulated kernels. Yields the emulator."""
    library = give_cpu_kernels(emulator)
    yield emulator
    library._destroy()


def plain(images, conv, norm, grad_out):
    """Output and gradients layer by layer in the images' dtype, as autocast runs them."""
    norm = copy.deepcopy(norm)
    with torch.autocast("cpu", images.dtype):
        out = nn.functional.max_pool2d(norm(conv(images.expand(-1, 3, -1, -1))).relu(), 3, 2, 1)
    return out.detach(), torch.autograd.grad(out, (conv.weight, norm.weight, norm.bias), grad_out.to(out.dtype))


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


CASES = {
    "one image of the least size": (1, 4, 16, 32, torch.bfloat16),
    "48 px": (3, 48, 48, 64, torch.bfloat16),
    "float16, four warps busy": (2, 32, 64, 128, torch.float16),
    "several strips and columns of tiles, 96 channels": (1, 12, 240, 96, torch.float16),
    "224 px wide, two chunks of rows": (1, 64, 224, 64, torch.bfloat16),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(on_cpu, case, training):
    count, height, width, channels, dtype = CASES[case]
    conv, norm = layers(channels)
    norm.train(training)
    images = faces(count, height, width, dtype)
    grad_out = torch.randn(count, channels, height // 4, width // 4).to(dtype)
    want, want_grads, moved = exact(images, conv, norm, grad_out)
    out = stem.grey_stem(images, conv, norm)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    # one rounding, to 8 or 11 bits, and the four bits that carry the place
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(out.double(), want, rtol=step + 2**-19, atol=2e-5)
    torch.testing.assert_close(norm.running_mean.double(), moved.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), moved.running_var, rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == moved.num_batches_tracked
    grads = torch.autograd.grad(out, (conv.weight, norm.weight, norm.bias), grad_out)
    for got, wanted in zip(grads, want_grads, strict=True):
        assert got.shape == wanted.shape
        # gradients of windows that share their largest value are added in dtype
        assert error(got, wanted) < step


def test_no_worse_than_layer_by_layer(on_cpu):
    conv, norm = layers(64)
    images, grad_out = faces(4, 32, 48, torch.bfloat16), torch.randn(4, 64, 8, 12).bfloat16()
    want, want_grads, _ = exact(images, conv, norm, grad_out)
    their_out, their_grads = plain(images, conv, norm, grad_out)
    out = stem.grey_stem(images, conv, copy.deepcopy(norm))
    assert error(out, want) < error(their_out, want)
    out = stem.grey_stem(images, conv, norm)
    for got, theirs, wanted in zip(
        torch.autograd.grad(out, (conv.weight, norm.weight, norm.bias), grad_out), their_grads, want_grads
    ):
        assert error(got, wanted) < error(theirs, wanted)


def test_same_bits_whatever_the_schedule(on_cpu):
    conv, norm = layers(64)
    images, grad_out = faces(3, 16, 32, torch.bfloat16), torch.randn(3, 64, 4, 8).bfloat16()
    results = []
    for seed in (0, 1, 2):
        on_cpu.machine(seed=seed)
        out = stem.grey_stem(images, conv, copy.deepcopy(norm))
        results.append((out, *torch.autograd.grad(out, tuple(conv.parameters()), grad_out)))
    on_cpu.machine()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("multiprocessors", [1, 7])
def test_any_number_of_multiprocessors(on_cpu, multiprocessors):
    conv, norm = layers(32)
    images, grad_out = faces(5, 32, 16, torch.float16), torch.randn(5, 32, 8, 4).half()
    on_cpu.machine(multiprocessors=multiprocessors, capability=80)
    out = stem.grey_stem(images, conv, copy.deepcopy(norm))
    grads = torch.autograd.grad(out, tuple(conv.parameters()), grad_out)
    on_cpu.machine()
    want, want_grads, _ = exact(images, conv, norm, grad_out)
    assert error(out, want) < 2**-11
    assert error(grads[0], want_grads[0]) < 2**-11


def test_folded_batch_norm(on_cpu):
    conv, norm = layers(32)
    norm.eval()
    images = faces(2, 16, 32, torch.bfloat16)
    folded = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm).requires_grad_(False)
    assert stem.why_not_layers(folded, nn.Identity()) == ""
    got = stem.grey_stem(images, folded, nn.Identity())
    want = stem.grey_stem(images, conv, norm).detach()
    assert not got.requires_grad
    assert error(got, want.double()) < 2**-7  # of two kernels that are rounded apart


def test_the_check_that_users_run_passes(on_cpu):
    """ngd-fast doctor --check: what it says of the kernels on a GPU."""
    assert selfcheck._stem(torch.device("cpu"), torch.bfloat16).ok


def test_planes_and_channels_last_kernels(on_cpu):
    conv, norm = layers(32)
    images, grad_out = faces(1, 16, 16, torch.bfloat16), torch.randn(1, 32, 4, 4).bfloat16()
    grads = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        own = copy.deepcopy(conv).to(memory_format=memory_format)
        out = stem.grey_stem(images, own, copy.deepcopy(norm))
        out.backward(grad_out)
        assert own.weight.grad.is_contiguous(memory_format=memory_format)
        grads.append(own.weight.grad)
    assert torch.equal(*grads)


def test_kernel_of_one_plane_and_no_gradient(on_cpu):
    conv, norm = layers(32, inputs=1)
    images = faces(1, 16, 16, torch.bfloat16)
    with torch.no_grad():
        out = stem.grey_stem(images, conv, copy.deepcopy(norm))
    want, _, _ = exact(images, conv, norm, torch.zeros(1, 32, 4, 4))
    assert error(out, want) < 2**-8
    args = (images, conv.weight, norm.weight, norm.bias, None, None, True, 1e-5)
    out, *_ = torch.ops.ngd_fast.stem_fwd(*args, False)
    with pytest.raises(RuntimeError, match="without want_index"):
        out.sum().backward()


def test_backward_makes_no_zeros_for_what_has_no_gradient(on_cpu):
    conv, norm = layers(32)
    out = stem.grey_stem(faces(1, 16, 16, torch.bfloat16), conv, norm)
    with Operators() as called:
        out.backward(torch.ones_like(out))
    assert "ngd_fast::stem_bwd" in called.names and not any("zeros" in name for name in called.names)


def test_no_incoming_gradient(on_cpu):
    conv, norm = layers(32)
    torch._C._functions.UndefinedGrad()(stem.grey_stem(faces(1, 16, 16, torch.bfloat16), conv, norm)).sum().backward()
    assert all(p.grad is None for p in (*conv.parameters(), *norm.parameters()))


def test_a_constant_channel(on_cpu):
    """No variance: batch norm gives its shift, and no gradient reaches the kernel through it."""
    conv, norm = layers(32)
    with torch.no_grad():
        conv.weight[0] = 0
        norm.bias[0], norm.bias[1] = 0.5, -9.0
        norm.weight[1] = 0.1
    images, grad_out = faces(2, 16, 16, torch.bfloat16), torch.randn(2, 32, 4, 4).bfloat16()
    out = stem.grey_stem(images, conv, norm)
    assert (out[:, 0] == 0.5).all()
    assert (out[:, 1] == 0).all()  # ReLU took them all
    grads = torch.autograd.grad(out, (conv.weight, norm.weight, norm.bias), grad_out)
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[1] == 0).all() for grad in grads)


def test_nan_stays_nan(on_cpu):
    conv, norm = layers(32)
    with torch.no_grad():
        conv.weight[3, 0, 0, 0] = torch.nan
    out = stem.grey_stem(faces(1, 16, 16, torch.bfloat16), conv, norm)
    assert out[:, 3].isnan().all()
    assert not out[:, :3].isnan().any()


def test_opcheck(on_cpu):
    conv, norm = layers(32)
    images = faces(1, 16, 16, torch.bfloat16)
    for statistics, training in (((None, None), True), ((norm.running_mean, norm.running_var), False)):
        args = (images, conv.weight, norm.weight, norm.bias, *statistics, training, 1e-5, True)
        torch.library.opcheck(torch.ops.ngd_fast.stem_fwd.default, args)


class TestResNet:
    @pytest.fixture
    def fused(self, on_cpu, monkeypatch):
        """Lets a ResNet take the fused stem on the CPU, where the tests have given it kernels."""
        monkeypatch.setattr(stem, "why_not_here", lambda device: "")
        return on_cpu

    def step(self, run, network, images):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(images)
        out.float().square().mean().backward()
        return out.detach(), network.conv1.weight.grad.clone()

    def test_like_layer_by_layer(self, fused):
        torch.manual_seed(0)
        # in eval mode: the statistics of few images would blow the rounding up from layer to layer
        network = ResNet(18, width=32).to(memory_format=torch.channels_last).eval()
        images = faces(4, 32, 32, torch.bfloat16)
        out, grad = self.step(network, network, images)
        their_out, their_grad = self.step(network, network, images.expand(-1, 3, -1, -1))
        network.double()
        want = network(images.double())
        (want_grad,) = torch.autograd.grad(want.square().mean(), network.conv1.weight)
        assert not torch.equal(out, their_out)
        assert error(out, want) < 1.5 * error(their_out, want)
        assert error(grad, want_grad) < 1.5 * error(their_grad, want_grad)

    def test_compiled_in_one_graph(self, fused):
        torch.manual_seed(0)
        network = ResNet(18, width=32)
        images = faces(4, 32, 32, torch.bfloat16)
        start = copy.deepcopy(network.bn1.state_dict())
        out, grad = self.step(network.stem, network, images)
        moved = copy.deepcopy(network.bn1.state_dict())
        network.bn1.load_state_dict(start)
        compiled = torch.compile(network.stem, fullgraph=True, backend="aot_eager")
        compiled_out, compiled_grad = self.step(compiled, network, images)
        assert torch.equal(compiled_out, out)
        torch.testing.assert_close(compiled_grad, grad)
        for name, value in network.bn1.state_dict().items():
            torch.testing.assert_close(value, moved[name])

    def test_what_does_not_fit_runs_layer_by_layer(self, fused, monkeypatch):
        monkeypatch.setattr(stem, "grey_stem", None)  # whoever calls it fails
        network = ResNet(18, width=32)
        for images in (faces(2, 32, 32, torch.float32), faces(2, 32, 40, torch.bfloat16).float()):
            grey, colour = copy.deepcopy(network)(images), copy.deepcopy(network)(images.expand(-1, 3, -1, -1))
            torch.testing.assert_close(grey, colour)


def test_says_why_not():
    conv, norm = layers(32)
    images = torch.zeros(1, 1, 32, 32, dtype=torch.bfloat16)
    assert "needs a GPU" in stem.why_not(images, conv, norm)
    assert "SyncBatchNorm" in stem.why_not_layers(conv, nn.SyncBatchNorm(32))
    assert "folded" in stem.why_not_layers(conv, nn.Identity())
    assert "bias" in stem.why_not_layers(nn.Conv2d(3, 32, 7, 2, 3), norm)
    assert "7 x 7" in stem.why_not_layers(nn.Conv2d(3, 32, 3, 2, 1, bias=False), norm)
    assert "multiple of 32" in stem.why_not_layers(layers(16)[0], layers(16)[1])
    assert "multiples" in stem.why_not_size(224, 220)
    assert stem.why_not_size(224, 224) == stem.why_not_layers(conv, norm) == ""
