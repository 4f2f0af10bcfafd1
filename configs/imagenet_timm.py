"""ImageNet by procedures A1, A2 and A3 of Wightman et al. 2021 (arXiv:2110.00476).

Command: python -m resnet_jax prepare imagenet2012 --manual_dir=DIR
         python train.py --config=configs/imagenet_timm.py[:PROCEDURE,MODEL]
Hardware: 8 or more TPU chips or GPUs (batch 2,048).
Expected: top-1 of ResNet-18/34/50/101/152 (timm's weights)
  a1, 600 epochs: 71.50/76.42/80.38/81.49/82.00
  a2, 300 epochs: 70.63/75.52/79.83/81.34/81.76
  a3, 100 epochs: 68.25/73.00/78.05/79.84/80.55
PROCEDURE: a1, a2 or a3 (default). MODEL: resnet50 (default) or any other for ImageNet.
Examples: imagenet_timm.py:a2, imagenet_timm.py:a1,resnet101.
"""

from resnet_jax.config import Config, Evaluate, Loss, Model, Optimizer, Schedule, Train
from resnet_jax.config.presets import IMAGENET

# What differs: Table 2 of the paper. A cosine that ends at `final` of the rate ends at 1e-6.
A1 = {
    "epochs": 600.0,
    "learning_rate": 5e-3,
    "final": 2e-4,
    "weight_decay": 0.01,
    "image_size": 224,
    "repeats": 3,
    "stochastic_depth": 0.05,
    "rand_magnitude": 7.0,
    "mixup": 0.2,
    "label_smoothing": 0.1,
}
A2 = A1 | {"epochs": 300.0, "weight_decay": 0.02, "mixup": 0.1, "label_smoothing": 0.0}
A3 = A2 | {
    "epochs": 100.0,
    "learning_rate": 8e-3,
    "final": 1.25e-4,
    "image_size": 160,
    "repeats": 1,
    "stochastic_depth": 0.0,
    "rand_magnitude": 6.0,
}
PROCEDURES = {"a1": A1, "a2": A2, "a3": A3}


def get_config(choice: str = "a3") -> Config:
    """LAMB and a binary cross-entropy."""
    procedure, _, model = choice.partition(",")
    if procedure not in PROCEDURES:
        raise ValueError(f"{procedure!r} is not a procedure of this recipe: a1, a2 or a3")
    values = PROCEDURES[procedure]
    return Config(
        model=Model(
            name=model or "resnet50",
            dtype="bfloat16",
            stochastic_depth_rate=values["stochastic_depth"],
        ),
        data=IMAGENET.data(
            image_size=values["image_size"],
            crop="random_resized",
            interpolation="bicubic",
            eval_size=224 if values["image_size"] != 224 else 0,
            eval_resize=235,
            repeats=values["repeats"],
            workers=8,
        ),
        augment=IMAGENET.augment(
            flip=True,
            rand_layers=2,
            rand_magnitude=values["rand_magnitude"],
            rand_magnitude_std=0.5,
            mixup=values["mixup"],
            cutmix=1.0,
        ),
        optimizer=Optimizer(
            name="lamb",
            learning_rate=values["learning_rate"],
            weight_decay=values["weight_decay"],
            clip_norm=1.0,
        ),
        schedule=Schedule(
            name="cosine", warmup_epochs=5.0, warmup_start=0.01, final=values["final"]
        ),
        loss=Loss(name="bce", label_smoothing=values["label_smoothing"], bce_threshold=0.2),
        train=Train(epochs=values["epochs"], batch_size=2048),
        evaluate=Evaluate(every_epochs=5.0),
    )
