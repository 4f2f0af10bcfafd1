"""ImageNet as in He et al. 2015, section 3.4.

Command: python -m resnet_jax prepare imagenet2012 --manual_dir=DIR
         python train.py --config=configs/imagenet_he2015.py[:MODEL]
Hardware: 4 GPUs or 4 TPU chips (batch 256).
Expected: single-crop error of ResNet-50 24.7% (authors' release); ten-crop 22.85% (Table 3).
"""

from resnet_jax.config import Config, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import IMAGENET


def get_config(model: str = "resnet50") -> Config:
    """Scale jitter, color shift, and a learning rate that drops on plateaus."""
    return Config(
        model=Model(name=model, stride_in_1x1=model in ("resnet50", "resnet101", "resnet152")),
        data=IMAGENET.data(
            crop="scale_jitter",
            jitter_sides=(256, 480),
            eval_resize=256,
            workers=8,
        ),
        augment=IMAGENET.augment(flip=True, pca=0.1),
        optimizer=Optimizer(learning_rate=0.1, weight_decay=1e-4, decay_norms_and_biases=True),
        schedule=Schedule(name="plateau", factor=0.1, patience=5),
        train=Train(steps=600_000, batch_size=256),
    )
