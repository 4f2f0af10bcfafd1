"""A residual block of your own, and a recipe that trains a network of such blocks.

    pip install -e '.[train]'
    python examples/own_block.py                                            # prints its layers
    python train.py --config=examples/own_block.py --workdir=runs/res2net   # trains it
    python -m resnet_jax evaluate runs/res2net --recipe=examples/own_block.py

The block is that of Res2Net (Gao et al. 2019, Figure 2b): a bottleneck whose 3x3 convolution is
split into groups that see each other's outputs, so one block has filters of several sizes.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

import resnet_jax as rj
from resnet_jax.config import Augment, Config, Data, Model, Optimizer, Schedule, Train


class Res2NetBlock(rj.ResidualBlock):
    """1x1, a cascade of 3x3 convolutions on quarters of the channels, 1x1 to four times as many.

    Called on [N, H, W, C] with `train`, it returns [N, H/s, W/s, 4 width].
    """

    expansion: ClassVar[int] = 4  # output channels per `width`
    scales: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv_norm_relu(y, features, size, name, **options):
            y = self.conv_cls(features, size, name=f"conv{name}", **options)(y)
            return nn.relu(self.norm_cls(name=f"norm{name}")(y, train))

        # Strides and dilations come from the network; a stride is taken by every 3x3 convolution.
        options = {"stride": self.stride, "dilation": self.dilation}
        first, *rest = jnp.split(conv_norm_relu(x, self.width, 1, "1"), self.scales, axis=-1)
        outputs = []
        for index, part in enumerate(rest):
            # The resolution changes in the first block of a stage, where the parts stay apart.
            sees_previous = outputs and not self.halves
            y = part + outputs[-1] if sees_previous else part
            outputs.append(conv_norm_relu(y, y.shape[-1], 3, f"2_{index}", **options))
        if self.halves:
            first = nn.avg_pool(first, (3, 3), (self.stride,) * 2, ((1, 1), (1, 1)))
        y = jnp.concatenate([first, *outputs], axis=-1)  # [N, H/s, W/s, width]
        y = self.conv_cls(self.features, 1, name="conv3")(y)
        y = self.norm_cls(scale_init=self.last_scale_init, name="norm3")(y, train)
        return nn.relu(self.add_shortcut(y, x, train))


# At the top of the file, so that every process that imports the recipe knows the name.
rj.register_model(
    "res2net29_cifar",
    block_cls=Res2NetBlock,
    stem_cls=rj.CifarStem,
    stage_sizes=(3, 3, 3),
    stage_widths=(16, 32, 64),
    num_classes=10,
    image_size=32,
    paper="Gao et al. 2019, arXiv:1904.01169",
)


def get_config() -> Config:
    """Trains it on scikit-learn's digits; `--config.data.name=folder:PATH` for your images."""
    return Config(
        model=Model(name="res2net29_cifar"),
        data=Data(name="digits", image_size=16),
        augment=Augment(pad=2, mean=(0.3,), std=(0.38,)),
        optimizer=Optimizer(learning_rate=0.1, nesterov=True, weight_decay=5e-4),
        schedule=Schedule(name="cosine", warmup_epochs=1.0),
        train=Train(epochs=12.0, batch_size=64),
    )


if __name__ == "__main__":
    print(rj.summary(rj.create_model("res2net29_cifar"), (1, 32, 32, 3)))
