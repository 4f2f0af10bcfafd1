"""ImageNet in one hour: Goyal et al. 2017, arXiv:1706.02677.

Command: python -m resnet_jax prepare imagenet2012 --manual_dir=DIR
         python train.py --config=configs/imagenet_goyal2017.py[:MODEL]
Hardware: 8 TPU chips for batch 256; any number, with the batch scaled along.
Expected: ResNet-50 76.40% top-1 at batch 256, 76.26% at 8,192 (Table 1), 90 epochs.
"""

from resnet_jax.config import Config, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import IMAGENET


def get_config(model: str = "resnet50") -> Config:
    """Linear scaling with warm-up: set train.batch_size to what the machine holds."""
    return Config(
        model=Model(name=model, zero_init_residual=True),
        data=IMAGENET.data(crop="random_resized", eval_resize=256, workers=8),
        augment=IMAGENET.augment(
            flip=True,
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            pca=0.1,
        ),
        optimizer=Optimizer(learning_rate=0.1, base_batch=256, nesterov=True, weight_decay=1e-4),
        schedule=Schedule(
            name="step",
            boundaries=(30 / 90, 60 / 90, 80 / 90),
            warmup_epochs=5.0,
            # From 0.1, the rate of 256 images, to the 3.2 of 8,192 (section 2.2).
            warmup_start=256 / 8192,
        ),
        train=Train(epochs=90.0, batch_size=256),
    )
