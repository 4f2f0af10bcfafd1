"""A small ResNet from scratch on a few hundred to a few thousand small images.

Command: python train.py --config=configs/few_images.py:folder:PATH --config.data.eval_split=val
         python train.py --config=configs/few_images.py --config.data.train_split="train[:33%]"
Hardware: 2 CPU cores, minutes. Expected: 98.9% of the 360 test digits after the second command,
which trains on 474. On these, configs/digits.py reaches 97.8%, and 90.0% with 8 epochs, 59 steps.

So few images give few steps in an epoch: 480 of them take 8 steps of 64 images, and the usual
number of epochs ends before the network has learned. Here batches are small and epochs are many;
every image is seen differently each time. Where a pretrained network exists for such images,
configs/finetune.py is better still.

With as many steps, configs/cifar.py does as well on photos: docs/results.md has the figures.
"""

import dataclasses

from resnet_jax.config import (
    Augment,
    Config,
    Data,
    Evaluate,
    Log,
    Loss,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config(data: str = "digits") -> Config:
    """Sixty epochs in batches of 32, with images moved, turned and mixed."""
    if data == "digits":  # 8x8 pixels, and mirrored digits are none
        size, augment = 16, Augment(pad=2, mean=(0.3,), std=(0.38,))
    else:
        size, augment = 32, Augment(pad=4, flip=True, mean=(0.5,), std=(0.25,))
    return Config(
        model=Model(name="resnet20"),
        data=Data(name=data, image_size=size),
        augment=dataclasses.replace(augment, rotate=12.0, mixup=0.2),
        optimizer=Optimizer(learning_rate=0.05, nesterov=True, weight_decay=1e-3),
        schedule=Schedule(name="cosine", warmup_epochs=3.0),
        loss=Loss(label_smoothing=0.1),
        train=Train(epochs=60.0, batch_size=32),
        evaluate=Evaluate(every_epochs=20.0),
        log=Log(every_steps=50),
    )
