"""Trains a network.

    python train.py                                          handwritten digits, in a minute or two
    python train.py --config=configs/cifar.py:resnet56 --workdir=runs/cifar10
    python train.py --config=configs/cifar.py --config.optimizer.learning_rate=0.2
    python train.py --help                                   flags and common fields
    python train.py --help=all                               every field

The flags describe a configuration for `resnet_jax.training.loop.train(config, workdir)`, which
notebooks call directly.
"""

import sys

from resnet_jax.errors import check_system

if __name__ == "__main__":
    check_system()  # the imports below need modules that Windows lacks
    from resnet_jax.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
