"""Plain against residual networks of growing depth: He et al. 2015, Figure 6, on a CPU.

Command: python -m resnet_jax prepare fashion_mnist
         python train.py --config=configs/degradation/fashion_mnist.py:plain56
         python train.py --config=configs/degradation/fashion_mnist.py:resnet56
         python -m resnet_jax report runs/fashion_mnist-plain56 runs/fashion_mnist-resnet56
Hardware: 2 CPU cores, two to seven minutes a run. Measured: docs/degradation.md.
MODEL: plain20, plain32, plain44, plain56, plain110 and resnet20 ... resnet110. The paper's own
experiment, on CIFAR-10 with a GPU or TPU, is configs/cifar.py with the same names.
"""

from resnet_jax.config import Config, Evaluate, Log, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import FASHION_MNIST


def get_config(model: str = "plain20") -> Config:
    """The paper's recipe in small: a fifth of the images, at 14x14 pixels, for six epochs.

    The first epoch raises the learning rate: in so few steps a deep network does not recover from
    starting with all of it (the paper too starts its 110 layers at a tenth, section 4.2).
    """
    return Config(
        model=Model(name=model),
        data=FASHION_MNIST.data(train_split="train[:20%]", image_size=14),
        augment=FASHION_MNIST.augment(flip=True, pad=1),
        optimizer=Optimizer(learning_rate=0.05, weight_decay=1e-4, decay_norms_and_biases=True),
        schedule=Schedule(name="step", boundaries=(0.5, 0.75), warmup_epochs=1.0),
        train=Train(epochs=6.0, batch_size=64),
        evaluate=Evaluate(every_epochs=1.0),
        log=Log(every_steps=47),
    )
