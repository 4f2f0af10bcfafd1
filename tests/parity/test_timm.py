"""Every network that timm has too gives the same logits with timm's weights, at full width."""

import jax
import numpy as np
import pytest

import resnet_jax as rj

timm = pytest.importorskip("timm", reason="timm is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")

ONLY_HERE = {
    *rj.list_models("plain*"),
    *rj.list_models("*_cifar"),
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
    *("resnetv2_110", "resnetv2_164", "resnetv2_200", "wide_resnet28_10"),
    *("resnetv2_18", "resnetv2_34"),  # timm's first block differs, see weights/pretrained.py
}


def randomize(network):
    """Gives norms random scales, biases and statistics, so that each of them shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
                tensor.normal_(0, 0.1, generator=generator)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.0, generator=generator)


@pytest.mark.parametrize("name", [name for name in rj.list_models() if name not in ONLY_HERE])
def test_same_logits_as_timm(name):
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    randomize(network)
    model = rj.create_model(name, num_classes=network.num_classes)
    variables = rj.from_torch(model, network.state_dict())
    images = np.random.default_rng(0).normal(size=(2, 96, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    logits = jax.jit(lambda variables, x: model.apply(variables, x, train=False))(variables, images)
    assert relative_error(logits, expected) < 1e-5
    assert rj.to_torch(model, variables).keys() == {
        key for key in network.state_dict() if not key.endswith("num_batches_tracked")
    }


def relative_error(value, expected):
    value, expected = np.asarray(value), np.asarray(expected)
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)
