import io

import numpy as np
import pytest
import torch
from PIL import Image

from ngd_fast.faces.corruptions import CORRUPTIONS, SEVERITIES, corrupt


@pytest.fixture(scope="module")
def images():
    """Smooth grey faces of three equal channels, in 256 steps."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.random((6, 1, 6, 6), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(small, (48, 48), mode="bicubic").clamp(0, 1)
    return ((smooth * 255).round() / 255).expand(-1, 3, -1, -1).contiguous()


ROWS = torch.arange(6)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_severity_is_worse_and_stays_an_image(images, name):
    before = images.clone()
    distance = []
    for severity in SEVERITIES:
        made = corrupt(images, name, severity, rows=ROWS, grey=True)
        assert made.shape == images.shape
        assert made.min() >= 0
        assert made.max() <= 1
        torch.testing.assert_close((made * 255).round(), made * 255, atol=1e-3, rtol=0)
        assert torch.equal(made[:, 0], made[:, 1]), "grey faces stay grey"
        distance.append(float((made - images).square().mean()))
    assert torch.equal(images, before), "the caller's images are left alone"
    assert distance[0] > 0 or name == "gaussian_blur", "the weakest blur is a fifth of a pixel here"
    # not each above the one before: half the pixels fit a grid that a 0.6th of them does not
    assert all(b > a for a, b in zip(distance, distance[2:])), distance
    assert distance[4] > 2 * distance[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_neither_the_batch_nor_other_faces_matter(images, name):
    whole = corrupt(images, name, 3, seed=5, rows=ROWS)
    parts = [corrupt(images[i : i + 1], name, 3, seed=5, rows=ROWS[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def test_noise_is_normal_seeded_and_different_for_every_face():
    flat = torch.full((4, 3, 64, 64), 0.5)
    noise = corrupt(flat, "gaussian_noise", 1, seed=1, rows=torch.arange(4)) - 0.5
    assert abs(float(noise.mean())) < 2e-3
    assert float(noise.std()) == pytest.approx(0.08, rel=0.03)
    inside = float((noise.abs() < 0.08).float().mean())
    assert inside == pytest.approx(0.683, abs=0.02)
    assert float(torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max()) < 0.05
    assert float(torch.corrcoef(noise.transpose(0, 1).flatten(1)).fill_diagonal_(0).abs().max()) < 0.05
    again = corrupt(flat, "gaussian_noise", 1, seed=1, rows=torch.arange(4)) - 0.5
    other = corrupt(flat, "gaussian_noise", 1, seed=2, rows=torch.arange(4)) - 0.5
    assert torch.equal(noise, again)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.03


def test_blur_is_a_gaussian(images):
    from scipy.ndimage import gaussian_filter

    made = corrupt(images, "gaussian_blur", 5, rows=ROWS)
    sigma = 6 * 48 / 224
    want = gaussian_filter(images[0, 0].double().numpy(), sigma, mode="mirror", truncate=3.2)
    np.testing.assert_allclose(made[0, 0], want, atol=0.006)


def test_jpeg_is_pillows(images):
    pixels = (images[2] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=7)
    made = corrupt(images, "jpeg", 5, rows=ROWS)[2]
    np.testing.assert_array_equal((made * 255).round().permute(1, 2, 0), np.asarray(Image.open(file)))


def test_brightness_keeps_hue_and_occlusion_hides_a_box():
    colour = torch.tensor([0.4, 0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, 20, 20)
    made = corrupt(colour, "brightness", 2, rows=ROWS[:1])[0, :, 0, 0]
    torch.testing.assert_close(made, torch.tensor([0.6, 0.3, 0.15]), atol=0.003, rtol=0)
    black = torch.zeros(1, 3, 20, 20)
    assert float(corrupt(black, "brightness", 1, rows=ROWS[:1]).mean()) == pytest.approx(0.1, abs=0.003)
    hidden = corrupt(black, "occluded_eyes", 5, rows=ROWS[:1])[0, 0] > 0
    assert hidden[5:11, 2:18].all()
    assert int(hidden.sum()) == 6 * 16


def test_rotation_turns_neighbours_to_different_sides(images):
    two = images[:1].repeat(2, 1, 1, 1)
    left, right = corrupt(two, "rotation", 5, rows=ROWS[:2])
    mirrored = corrupt(two.flip(3), "rotation", 5, rows=ROWS[:2])
    torch.testing.assert_close(left, mirrored[1].flip(2), atol=0.005, rtol=0)
    assert float((left - right).abs().mean()) > 0.01


@pytest.mark.parametrize(("name", "severity"), [("fog", 1), ("jpeg", 0), ("jpeg", 6)])
def test_unknown(images, name, severity):
    with pytest.raises(ValueError, match="wanted one of"):
        corrupt(images, name, severity, rows=ROWS)
