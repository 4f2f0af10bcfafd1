"""CIFAR-100 as in He et al. 2015, section 4.2.

Command: python -m resnet_jax prepare cifar100
         python train.py --config=configs/cifar100.py[:MODEL]
Hardware: one GPU or TPU chip.
Expected: the paper trains no network on CIFAR-100; wide_cifar100.py is a recipe with figures.
MODEL: resnet20 (default), resnet32 ... resnet110, resnet1202, plain20 ... plain110, and the
networks with ImageNet's widths, resnet18_cifar ... resnet152_cifar.
"""

from resnet_jax.config import (
    Augment,
    Config,
    Data,
    Evaluate,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config(model: str = "resnet20") -> Config:
    """64,000 steps of 128 images; the learning rate drops tenfold at 1/2 and at 3/4 of them."""
    # The paper warms ResNet-110 up at a tenth of the rate until it learns, about 400 steps.
    deep = model in ("resnet110", "resnet1202", "plain110")
    return Config(
        model=Model(name=model),
        data=Data(name="tfds:cifar100", train_split="train[:90%]", image_size=32),
        augment=Augment(
            flip=True,
            pad=4,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
        ),
        optimizer=Optimizer(learning_rate=0.1, weight_decay=1e-4, decay_norms_and_biases=True),
        schedule=Schedule(
            name="step",
            boundaries=(0.5, 0.75),
            warmup_epochs=1.2 if deep else 0.0,
            warmup_start=0.1,
        ),
        train=Train(steps=64_000, batch_size=128),
        evaluate=Evaluate(every_epochs=5.0),
    )
