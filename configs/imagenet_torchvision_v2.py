"""ImageNet as torchvision's IMAGENET1K_V2 weights were trained (pytorch.org/blog, 2021).

Command: python -m resnet_jax prepare imagenet2012 --manual_dir=DIR
         python train.py --config=configs/imagenet_torchvision_v2.py[:MODEL]
Hardware: 8 GPUs or 8 TPU chips, days.
Expected: top-1 of ResNet-50 80.86%, 101 81.89%, 152 82.28% (torchvision's table), 600 epochs.
"""

from resnet_jax.config import Config, Evaluate, Loss, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import IMAGENET


def get_config(model: str = "resnet50") -> Config:
    """600 epochs with everything: TrivialAugment, mixing, erasing, EMA, repeats."""
    epochs, batch_size, ema_every = 600.0, 1024, 32
    # The recipe's 0.99998 is not what an update keeps: torchvision scales its complement.
    ema_decay = 1 - (1 - 0.99998) * batch_size * ema_every / epochs
    return Config(
        model=Model(name=model, dtype="bfloat16"),
        data=IMAGENET.data(
            image_size=176,
            crop="random_resized",
            eval_size=224,
            eval_resize=232,
            repeats=4,
            workers=8,
        ),
        augment=IMAGENET.augment(
            flip=True,
            trivial=True,
            erase=0.1,
            mixup=0.2,
            cutmix=1.0,
        ),
        optimizer=Optimizer(learning_rate=0.5, weight_decay=2e-5),
        schedule=Schedule(name="cosine", warmup_epochs=5.0, warmup_start=0.01),
        loss=Loss(label_smoothing=0.1),
        train=Train(epochs=epochs, batch_size=batch_size, ema_decay=ema_decay, ema_every=ema_every),
        evaluate=Evaluate(every_epochs=5.0),
    )
