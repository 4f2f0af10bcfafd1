"""CIFAR-10 as in He et al. 2015, section 4.2.

Command: python -m resnet_jax prepare cifar10
         python train.py --config=configs/cifar10.py[:MODEL]
Hardware: one GPU or TPU chip.
Expected error in % (the paper's Table 6): ResNet-20 8.75, 32 7.51, 44 7.17, 56 6.97, 110 6.43;
plain nets get worse with depth (Figure 6).
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
        data=Data(name="tfds:cifar10", train_split="train[:90%]", image_size=32),
        augment=Augment(
            flip=True,
            pad=4,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
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
