"""Trains a network.

    python train.py                                          handwritten digits, in a minute
    python train.py --config=configs/cifar.py:resnet56 --workdir=runs/cifar10
    python train.py --config=configs/cifar.py --config.optimizer.learning_rate=0.2
    python train.py --help                                   every field

The flags give a configuration, and `resnet_jax.training.loop.train(config, workdir)` does the rest;
call that from a notebook.
"""

import sys

from resnet_jax.errors import check_system

if __name__ == "__main__":
    check_system()  # what follows imports modules that Windows does not have
    from resnet_jax.cli.parser import main

    sys.exit(main(["train", *sys.argv[1:]]))
