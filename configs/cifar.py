"""CIFAR-10 and CIFAR-100 as in He et al. 2015, section 4.2.

Command: python -m resnet_jax prepare cifar10
         python train.py --config=configs/cifar.py[:DATASET,MODEL]
Hardware: one GPU or TPU chip.
Expected error on CIFAR-10 in % (the paper's Table 6): ResNet-20 8.75, 32 7.51, 44 7.17, 56 6.97,
110 6.43; plain nets get worse with depth (Figure 6). The paper trains no network on CIFAR-100;
wide_cifar100.py is a recipe with figures.
DATASET: cifar10 (default) or cifar100.
MODEL: resnet20 (default), resnet32 ... resnet110, resnet1202, plain20 ... plain110, and the
networks with ImageNet's widths, resnet18_cifar ... resnet152_cifar.
Examples: cifar.py:resnet56, cifar.py:cifar100, cifar.py:cifar100,plain20.
"""

from resnet_jax.config import Config, Evaluate, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import CIFAR10, CIFAR100

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def get_config(choice: str = "") -> Config:
    """64,000 steps of 128 images; the learning rate drops tenfold at 1/2 and at 3/4 of them."""
    first, _, rest = choice.partition(",")
    dataset, model = (first, rest) if first in DATASETS else ("cifar10", choice)
    model = model or "resnet20"
    # The paper trains ResNet-110 at a tenth of the rate until it learns, about 400 steps.
    deep = model in ("resnet110", "resnet1202", "plain110")
    return Config(
        model=Model(name=model),
        data=DATASETS[dataset].data(train_split="train[:90%]"),
        augment=DATASETS[dataset].augment(flip=True, pad=4),
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
