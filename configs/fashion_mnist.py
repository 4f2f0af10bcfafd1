"""Fashion-MNIST (Xiao et al. 2017: 60,000 images of clothes, 28x28 pixels) on a CIFAR ResNet.

Command: python -m resnet_jax prepare fashion_mnist
         python train.py --config=configs/fashion_mnist.py[:MODEL]
Hardware: 2 CPU cores. Expected: see README.md, where the measured run is.
MODEL is any network for small images, such as resnet56, plain20 or resnet18_cifar.
"""

from resnet_jax.config import Config, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import FASHION_MNIST


def get_config(model: str = "resnet20") -> Config:
    """Eight epochs of a network for small images."""
    return Config(
        model=Model(name=model),
        data=FASHION_MNIST.data(),
        augment=FASHION_MNIST.augment(flip=True, pad=2),
        optimizer=Optimizer(learning_rate=0.1, nesterov=True, weight_decay=5e-4),
        schedule=Schedule(name="one_cycle", warmup_epochs=2.0, warmup_start=0.1),
        train=Train(epochs=8.0, batch_size=128),
    )
