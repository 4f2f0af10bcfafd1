"""CIFAR-100 on ImageNet's widths, as github.com/weiaicunzai/pytorch-cifar100 trains it.

Command: python -m resnet_jax prepare cifar100
         python train.py --config=configs/wide_cifar100.py[:MODEL]
Hardware: one GPU or TPU chip. Expected error in % (that repository): resnet18_cifar 24.39,
34 23.24, 50 22.61, 101 22.22, 152 22.31.
"""

from resnet_jax.config import Config, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import CIFAR100


def get_config(model: str = "resnet18_cifar") -> Config:
    """200 epochs, the learning rate times 0.2 at epochs 60, 120 and 160."""
    return Config(
        model=Model(name=model),
        data=CIFAR100.data(),
        augment=CIFAR100.augment(flip=True, pad=4, rotate=15.0),
        optimizer=Optimizer(learning_rate=0.1, weight_decay=5e-4, decay_norms_and_biases=True),
        schedule=Schedule(
            name="step", boundaries=(60 / 200, 120 / 200, 160 / 200), factor=0.2, warmup_epochs=1.0
        ),
        train=Train(epochs=200.0, batch_size=128),
    )
