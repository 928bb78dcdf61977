"""The fused stem on a GPU: what the emulator cannot show."""

import pytest
import torch
from stem_cases import error, exact, faces, layers, too_close_to_call

from ngd_fast.student import stem

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _built():
    reason = stem.why_not_here(torch.device("cuda"))
    assert not reason, reason  # a machine with a GPU must have it: a skip here would hide a broken build


def make(dtype=torch.bfloat16, count=8, size=224, channels=64):
    conv, norm = layers(channels)
    images, grad_out = faces(count, size, size, dtype), torch.randn(count, channels, size // 4, size // 4).to(dtype)
    return conv.cuda().to(memory_format=torch.channels_last), norm.cuda(), images.cuda(), grad_out.cuda()


def run_stem(function, conv, norm, images, grad_out):
    out = function(images, conv, norm)
    return out.detach(), *torch.autograd.grad(out, (conv.weight, norm.weight, norm.bias), grad_out)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("dtype", "count", "size", "channels"),
    [
        (torch.bfloat16, 8, 224, 64),
        (torch.float16, 8, 224, 64),
        (torch.bfloat16, 1, 16, 32),
        (torch.bfloat16, 33, 112, 96),
        (torch.float16, 3, 48, 128),
    ],
)
def test_values_and_gradients(dtype, count, size, channels, training):
    conv, norm, images, grad_out = make(dtype, count, size, channels)
    norm.train(training)
    # One window of a million whose gradient goes to another pixel costs the kernel's some 2^-12: a few, and the test
    # would see the choice among values that are equal in float32, not what becomes of the gradient.
    unsure = too_close_to_call(images, conv, norm)
    assert unsure.double().mean() < 0.01
    grad_out = grad_out.masked_fill(unsure, 0)
    want, want_grads, moved = exact(images, conv, norm, grad_out)
    out, *grads = run_stem(stem.grey_stem, conv, norm, images, grad_out)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(out.double(), want, rtol=step + 2**-19, atol=2e-5)
    for got, wanted in zip(grads, want_grads, strict=True):
        assert error(got, wanted) < step
    torch.testing.assert_close(norm.running_var.double(), moved.running_var, rtol=1e-5, atol=1e-6)


def test_same_bits_from_run_to_run():
    conv, norm, images, grad_out = make()
    first = run_stem(stem.grey_stem, conv, norm, images, grad_out)
    for _ in range(3):
        assert all(map(torch.equal, first, run_stem(stem.grey_stem, conv, norm, images, grad_out)))


def test_compiled_and_captured():
    conv, norm, images, grad_out = make()
    compiled = torch.compile(stem.grey_stem, fullgraph=True)
    first = run_stem(stem.grey_stem, conv, norm, images, grad_out)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run_stem(compiled, conv, norm, images, grad_out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_stem(compiled, conv, norm, images, grad_out)
    norm.reset_running_stats()
    graph.replay()
    assert all(map(torch.equal, first, captured))
    assert int(norm.num_batches_tracked) == 1


def test_images_and_gradient_anywhere_in_memory():
    """A view that begins two bytes behind 16 of them, which the kernels cannot read as they are."""
    conv, norm, images, grad_out = make(count=2, size=32)

    def moved(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    grad_out = grad_out.permute(0, 2, 3, 1).contiguous()
    plain, shifted = (
        run_stem(stem.grey_stem, conv, norm, move(images), move(grad_out).permute(0, 3, 1, 2))
        for move in (torch.clone, moved)
    )
    assert all(map(torch.equal, plain, shifted))


def test_images_on_the_cpu_are_named():
    conv, norm, images, _ = make(count=1, size=16)
    with pytest.raises(ValueError, match="images: wanted a tensor on a GPU, got one on cpu"):
        stem.grey_stem(images.cpu(), conv, norm)


def test_offsets_beyond_32_bits():
    """More than 2^31 values in the output, of eight images again and again."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of device memory")
    conv, norm, images, grad_out = make()
    norm.eval()
    few, *few_grads = run_stem(stem.grey_stem, conv, norm, images, grad_out)
    times = 2**31 // few.numel() + 1
    images, grad_out = (tensor.repeat(times, 1, 1, 1) for tensor in (images, grad_out))
    out, *grads = run_stem(stem.grey_stem, conv, norm, images, grad_out)
    assert torch.equal(out[:8], few) and torch.equal(out[-8:], few)
    for got, want in zip(grads, few_grads):
        # Sums of float32 over a thousand times as many rows; a wrong offset would change the first digit.
        assert error(got / times, want.double()) < 1e-2
