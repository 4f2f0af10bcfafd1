"""The smallest network that a run can train, as a registered one; not in `rj.list_models()`.

In a process of its own, as a configuration file:
    python train.py --config=tests/tiny.py
"""

import contextlib

import resnet_jax as rj
from resnet_jax.config.schema import Config, Model
from resnet_jax.models import registry

NAME = "tiny"


def _register():
    rj.register_model(
        NAME,
        image_size=8,
        stage_sizes=(1,),
        stage_widths=(16,),
        block_cls=rj.BasicBlock,
        stem_cls=rj.CifarStem,
        num_classes=10,
    )


@contextlib.contextmanager
def registered():
    """Until the end of the block."""
    _register()
    try:
        yield
    finally:
        registry._ARCHITECTURES.pop(NAME)


def get_config():
    """For the rest of the process."""
    _register()
    return Config(model=Model(name=NAME))
