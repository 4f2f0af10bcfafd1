"""ImageNet by procedure A1 of Wightman et al. 2021 ("ResNet strikes back", arXiv:2110.00476).

Command: python -m resnet_jax prepare imagenet2012 --manual_dir=DIR
         python train.py --config=configs/imagenet_timm_a1.py[:MODEL]
Hardware: 8 or more TPU chips or GPUs (batch 2,048).
Expected: top-1 of ResNet-18/34/50/101/152 71.50/76.42/80.38/81.49/82.00
(timm's weights).
"""

from resnet_jax.config import (
    Augment,
    Config,
    Data,
    Evaluate,
    Loss,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config(model: str = "resnet50") -> Config:
    """600 epochs with LAMB and a binary cross-entropy."""
    return Config(
        model=Model(name=model, dtype="bfloat16", stochastic_depth_rate=0.05),
        data=Data(
            name="tfds:imagenet2012",
            eval_split="validation",
            image_size=224,
            crop="random_resized",
            interpolation="bicubic",
            eval_resize=235,
            repeats=3,
            workers=8,
        ),
        augment=Augment(
            flip=True,
            rand_layers=2,
            rand_magnitude=7.0,
            rand_magnitude_std=0.5,
            mixup=0.2,
            cutmix=1.0,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        optimizer=Optimizer(name="lamb", learning_rate=5e-3, weight_decay=0.01, clip_norm=1.0),
        schedule=Schedule(name="cosine", warmup_epochs=5.0, warmup_start=0.01, final=2e-4),
        loss=Loss(name="bce", label_smoothing=0.1, bce_threshold=0.2),
        train=Train(epochs=600.0, batch_size=2048),
        evaluate=Evaluate(every_epochs=5.0),
    )
