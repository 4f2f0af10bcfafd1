"""Real handwritten digits (UCI, 1,797 images of 8x8 pixels, from scikit-learn) on a small ResNet.

Command: python train.py
Hardware: 2 CPU cores. Expected: at least 98% of the 360 test digits, in a minute or two.
"""

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


def get_config() -> Config:
    """The configuration that bare `python train.py` trains."""
    return Config(
        model=Model(name="resnet20"),
        # The digits are 8x8: twice that leaves the last stage 4x4 pixels.
        data=Data(name="digits", image_size=16),
        augment=Augment(pad=2, rotate=12.0, mixup=0.3, mean=(0.3,), std=(0.38,)),
        optimizer=Optimizer(learning_rate=0.1, nesterov=True, weight_decay=5e-4),
        schedule=Schedule(name="cosine", warmup_epochs=1.0),
        loss=Loss(label_smoothing=0.1),
        train=Train(epochs=24.0, batch_size=64),
        evaluate=Evaluate(every_epochs=4.0),
        log=Log(every_steps=50),
    )
