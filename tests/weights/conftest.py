"""A run whose workdir is a source of weights."""

import pytest

from resnet_jax import config as c
from resnet_jax.training.loop import train

# The recorder needs other frameworks, which the default suite does without.
collect_ignore = ["record_foreign.py"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_model):
    """Two steps, with shared statistics, a moving average, and two outputs more than digits."""
    folder = tmp_path_factory.mktemp("run")
    config = c.Config(
        model=c.Model(name="tiny", bn_sync="all", num_classes=12),
        data=c.Data(image_size=8, eval_size=12, eval_resize=15, interpolation="bicubic"),
        augment=c.Augment(mean=(0.3,), std=(0.38,)),
        train=c.Train(steps=2, batch_size=16, ema_decay=0.5),
        log=c.Log(tensorboard=False),
    )
    train(config, folder)
    return folder
