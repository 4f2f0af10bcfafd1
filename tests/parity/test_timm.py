"""Every network that timm has too gives the same logits with timm's weights, at full width."""

import jax
import numpy as np
import pytest

import resnet_jax as rj

timm = pytest.importorskip("timm", reason="timm is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tests.parity.record import randomize, relative_error  # noqa: E402 (needs torch)

ONLY_HERE = {
    *rj.list_models("plain*"),
    *rj.list_models("*_cifar"),
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
    *("resnetv2_110", "resnetv2_164", "resnetv2_200", "wide_resnet28_10"),
    *("resnetv2_18", "resnetv2_34"),  # timm's first block differs, see weights/pretrained.py
}


@pytest.mark.parametrize("name", [name for name in rj.list_models() if name not in ONLY_HERE])
def test_same_logits_as_timm(name):
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    randomize(network, offset=0.0)  # forward only, so no ReLU input is too near to 0
    model = rj.create_model(name, num_classes=network.num_classes)
    if sum(model.stage_sizes) > 60:
        # So many random blocks amplify rounding: PyTorch's float32 is 30% off its float64 itself.
        for key, tensor in network.state_dict().items():
            if key.endswith("bn3.weight"):
                tensor.mul_(0.2)
    variables = rj.from_torch(model, network.state_dict())
    images = np.random.default_rng(0).normal(size=(2, 96, 64, 3)).astype(np.float32)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = network(inputs).numpy()
        exact = network.double()(inputs.double()).numpy()
    logits = jax.jit(lambda variables, x: model.apply(variables, x, train=False))(variables, images)
    # BiT's standardised kernels amplify rounding past 1e-5 in PyTorch too; then being nearer to
    # the exact result than PyTorch's float32 is has to do.
    error, theirs = relative_error(logits, exact), relative_error(expected, exact)
    assert relative_error(logits, expected) < 1e-5 or error < theirs
    assert rj.to_torch(model, variables).keys() == {
        key for key in network.state_dict() if not key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet50d", "resnet50t", "resnetrs50", "resnet50", "seresnet50"])
def test_same_logits_as_timm_with_dilation(name, output_stride):
    """At odd sizes, with narrow networks."""
    torch.manual_seed(0)
    network = timm.create_model(name, output_stride=output_stride, channels=(8, 16, 24, 32)).eval()
    randomize(network, offset=0.0)
    model = rj.create_model(name, output_stride=output_stride, stage_widths=(8, 16, 24, 32))
    images = np.random.default_rng(0).normal(size=(2, 97, 70, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    variables = rj.from_torch(model, network.state_dict())
    logits = jax.jit(lambda variables, x: model.apply(variables, x, train=False))(variables, images)
    assert relative_error(logits, expected) < 1e-5
