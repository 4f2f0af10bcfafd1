"""The smallest network that a run can train, as a registered one; not in `rj.list_models()`.

In a process of its own, as a configuration file:
    python train.py --config=tests/tiny.py
"""

import contextlib
import functools

import resnet_jax as rj
from resnet_jax.config.schema import Config, Model
from resnet_jax.models import registry

NAME = "tiny"
_construct = functools.partial(
    rj.ResNet,
    stage_sizes=(1,),
    stage_widths=(16,),
    block_cls=rj.BasicBlock,
    stem_cls=rj.CifarStem,
    num_classes=10,
)
_ARCHITECTURE = registry.Architecture(
    NAME, _construct, "none", parameters=5_306, multiply_adds=322_720, image_size=8
)


@contextlib.contextmanager
def registered():
    """Until the end of the block."""
    registry._ARCHITECTURES[NAME] = _ARCHITECTURE
    try:
        yield
    finally:
        registry._ARCHITECTURES.pop(NAME)


def get_config():
    """For the rest of the process."""
    registry._ARCHITECTURES[NAME] = _ARCHITECTURE
    return Config(model=Model(name=NAME))
