"""CIFAR-10 in as few seconds as possible, in the spirit of the record runs.

After ResNet-9 in DAWNBench (Page 2018, "How to train your ResNet": wide first layers, one cycle,
large batches, label smoothing, test-time flip) and airbench (Jordan 2024, arXiv:2404.00498:
alternating flips, averaged weights). Their networks without shortcuts reach 94% in 10 to 24 epochs;
here it is a residual network, ResNet-8 with widths 64, 128 and 256.

The steps are a multiple of train.steps_per_call, and nothing stops them before the last one: a
single program is compiled, which on a GPU takes longer than ten epochs.

Command: python -m resnet_jax prepare cifar10
         python train.py --config=configs/cifar10_speedrun.py[:DATA]
Hardware: one GPU or TPU chip. Expected: not measured there yet.
DATA: cifar10 (default) or fashion_mnist (float32, 128 images a step, for a CPU).
"""

from resnet_jax.config import Config, Evaluate, Log, Loss, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import CIFAR10, FASHION_MNIST

DATASETS = {"cifar10": CIFAR10, "fashion_mnist": FASHION_MNIST}


def get_config(data: str = "cifar10") -> Config:
    """Ten epochs (9.98) of 512 images a step; the dataset lies on the device."""
    if data not in DATASETS:
        raise ValueError(f"{data!r} is not a dataset of this recipe: cifar10 or fashion_mnist")
    config = Config(
        model=Model(name="resnet8_cifar", dtype="bfloat16", bn_momentum=0.8),
        data=DATASETS[data].data(),
        augment=DATASETS[data].augment(flip_alternates=True, pad=4, cutout=8),
        optimizer=Optimizer(learning_rate=0.4, nesterov=True, weight_decay=5e-4),
        schedule=Schedule(name="one_cycle", warmup_epochs=2.0, warmup_start=0.1),
        loss=Loss(label_smoothing=0.1),
        train=Train(steps=975, batch_size=512, steps_per_call=75, ema_decay=0.98),
        evaluate=Evaluate(every_epochs=10.0, flip=True),
        log=Log(every_steps=75),
    )
    if data == "fashion_mnist":
        config.model.dtype = "float32"
        config.augment.pad, config.augment.cutout = 2, 0
        config.optimizer.learning_rate = 0.1
        config.train = Train(epochs=10.0, batch_size=128, ema_decay=0.98)
        config.evaluate.every_epochs = 5.0
        config.log.every_steps = 25
    return config
