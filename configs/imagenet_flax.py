"""ImageNet as Flax's example trains it (github.com/google/flax, examples/imagenet).

Command: python -m resnet_jax prepare imagenet2012 --manual_dir=DIR
         python train.py --config=configs/imagenet_flax.py[:MODEL]
Hardware: 8 TPU chips or 8 GPUs.
Expected: ResNet-50 76.4-76.7% top-1 (that example's README), 100 epochs.
"""

from resnet_jax.config import Config, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import IMAGENET


def get_config(model: str = "resnet50") -> Config:
    """100 epochs with a cosine."""
    return Config(
        model=Model(name=model, dtype="bfloat16", zero_init_residual=True),
        data=IMAGENET.data(
            crop="random_resized",
            interpolation="bicubic",
            eval_resize=256,
            workers=8,
        ),
        augment=IMAGENET.augment(flip=True),
        optimizer=Optimizer(learning_rate=0.1, base_batch=256, nesterov=True, weight_decay=1e-4),
        schedule=Schedule(name="cosine", warmup_epochs=5.0),
        train=Train(epochs=100.0, batch_size=1024),
    )
