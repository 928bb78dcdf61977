"""ResNets with torchvision's names, the student around them, and its file."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ngd_fast.errors import UserError
from ngd_fast.student.networks import build_student, compile_network, weight_decay_groups
from ngd_fast.student.resnet import ResNet, parse_arch
from ngd_fast.student.weights import load_backbone_weights, load_student, save_student

# Parameters as torchvision documents them, less its classifier's (features * 1000 + 1000).
TORCHVISION_PARAMETERS = {
    18: 11_689_512 - 513_000,
    34: 21_797_672 - 513_000,
    50: 25_557_032 - 2_049_000,
}
META = {"arch": "resnet18-w4", "class_names": list("abcdefgh"), "image_size": 24, "mean": 0.5, "std": 0.25}
META |= {"embedding_dim": 256, "logit_scale": 2.0, "epoch": 3, "config_name": "B0", "seed": 1}


@pytest.mark.parametrize("depth", TORCHVISION_PARAMETERS)
def test_resnet_has_as_many_parameters_as_torchvisions(depth):
    with torch.device("meta"):
        network = ResNet(depth)
    assert sum(p.numel() for p in network.parameters()) == TORCHVISION_PARAMETERS[depth]


@pytest.mark.parametrize("depth", TORCHVISION_PARAMETERS)
def test_resnet_is_torchvisions(depth):
    models = pytest.importorskip("torchvision.models")
    theirs = models.get_model(f"resnet{depth}").eval()
    ours = ResNet(depth)
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == ["fc.weight", "fc.bias"]
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("conv1.weight", (64, 3, 7, 7)),
        ("layer1.0.conv3.weight", (256, 64, 1, 1)),
        ("layer2.0.downsample.0.weight", (512, 256, 1, 1)),
        ("layer4.2.bn2.running_var", (512,)),
    ],
)
def test_resnet50_names_and_shapes(key, shape):
    with torch.device("meta"):
        assert tuple(ResNet(50).state_dict()[key].shape) == shape


def test_bottleneck_strides_in_the_3x3_convolution():
    with torch.device("meta"):
        block = ResNet(50).layer2[0]
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)


def test_student_gives_unit_features_and_a_linear_head_on_them():
    torch.manual_seed(0)
    student = build_student("resnet18-w4", logit_scale=3.0).eval()
    features, logits = student(torch.randn(5, 3, 24, 24))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(logits, 3.0 * F.linear(features, student.head.weight, student.head.bias))
    assert features.shape == (5, 256) and logits.shape == (5, 8)


def test_features_and_logits_stay_float32_under_autocast():
    student = build_student("resnet18-w4").eval()
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = student(torch.randn(2, 3, 24, 24))
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_seed_decides_the_weights():
    torch.manual_seed(3)
    first = build_student("resnet18-w4").state_dict()
    torch.manual_seed(3)
    second = build_student("resnet18-w4").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("arch", ["resnet19", "resnet18-w0", "vgg16", "keras:resnet18", "resnet18-wide"])
def test_unknown_arch_is_named(arch):
    with pytest.raises(UserError, match=arch):
        build_student(arch)


def test_pretrained_needs_a_package():
    with pytest.raises(UserError, match=r"model\.weights"):
        build_student("resnet18", pretrained=True)


def test_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_student("timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match="pip install torchvision"):
        build_student("torchvision:resnet18")


def test_arch_names():
    assert parse_arch("resnet50") == (50, 64)
    assert parse_arch("resnet18-w16") == (18, 16)
    assert parse_arch("convnext") is None


def test_weight_decay_can_spare_vectors():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed, spared = weight_decay_groups(module, 0.05, everything=False)
    assert [p.ndim for p in decayed["params"]] == [4] and [p.ndim for p in spared["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert len(weight_decay_groups(module, 0.05, everything=True)[0]["params"]) == 4


@pytest.mark.parametrize("deterministic", [True, False])
def test_reductions_are_timed_only_where_bits_may_differ(deterministic, monkeypatch):
    given = []

    def compile_fx(graph, inputs, *, config_patches, **_):
        given.append(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    compile_network(nn.Linear(2, 2), deterministic=deterministic)(torch.ones(1, 2))
    (options,) = given
    assert bool(options) is deterministic
    assert options in ({}, {"deterministic": True}, {"triton.autotune_pointwise": False})


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    student = build_student("resnet18-w4", logit_scale=2.0).to(memory_format=torch.channels_last)
    save_student(tmp_path / "student_best.safetensors", student.state_dict(), META)
    return student, tmp_path / "student_best.safetensors"


def test_student_comes_back_from_its_file(saved):
    student, path = saved
    loaded, meta = load_student(path.parent)  # the run folder stands for its best student
    assert meta == META and not loaded.training
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        for ours, theirs in zip(loaded(images), student.eval()(images)):
            torch.testing.assert_close(ours, theirs)


def test_equal_students_are_equal_bytes(saved, tmp_path):
    student, path = saved
    save_student(tmp_path / "again.safetensors", student.state_dict(), META)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_truncated_student_is_refused(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        load_student(path)


def test_file_without_metadata_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="metadata"):
        load_student(tmp_path / "other.safetensors")


def test_weights_of_another_arch_are_refused(saved, tmp_path):
    student, _ = saved
    save_student(tmp_path / "x.safetensors", student.state_dict(), {**META, "arch": "resnet18-w8"})
    with pytest.raises(UserError, match="does not hold the weights of resnet18-w8"):
        load_student(tmp_path / "x.safetensors")


def test_missing_student_is_named(tmp_path):
    with pytest.raises(UserError, match=r"student_best\.safetensors"):
        load_student(tmp_path)


def test_metadata_is_json_under_one_key(saved):
    from safetensors import safe_open

    with safe_open(saved[1], framework="pt") as file:
        assert json.loads(file.metadata()["ngd_fast"]) == META


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbone_weights_load_and_report(tmp_path, suffix):
    source, target = ResNet(18, 4), ResNet(18, 4)
    state = {f"module.{key}": value for key, value in source.state_dict().items() if key != "bn1.bias"}
    state["module.fc.weight"] = torch.zeros(1000, 32)
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    report = load_backbone_weights(target, path)
    assert report.missing == ("bn1.bias",) and report.unexpected == ("fc.weight",)
    assert "1 not used (fc.weight)" in str(report)
    assert torch.equal(target.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_backbone_weights_of_another_shape_are_refused(tmp_path):
    torch.save(ResNet(18, 8).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"conv1\.weight is \[8, 3, 7, 7\], the backbone's is \[4, 3, 7, 7\]"):
        load_backbone_weights(ResNet(18, 4), tmp_path / "w.pth")


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="without unpickling"):
        load_backbone_weights(ResNet(18, 4), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_a_student_of_ours_gives_its_backbone(saved):
    target = ResNet(18, 4)
    report = load_backbone_weights(target, saved[1])
    assert report.missing == () and set(report.unexpected) >= {"head.weight", "projection.bias"}
    assert torch.equal(target.conv1.weight, saved[0].backbone.conv1.weight)


def test_every_size_is_compiled(monkeypatch):
    """Also beyond the eight that PyTorch takes at first."""
    compiled = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **_: (compiled.append(graph), graph.forward)[1]
    )
    network = compile_network(nn.Linear(2, 2), deterministic=False)
    for rows in range(2, 12):
        network(torch.ones(rows, 2))
    assert len(compiled) == 10
