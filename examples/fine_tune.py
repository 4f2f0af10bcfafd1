"""Fine-tunes a network on your photos, starting from weights of PyTorch, of a run or of the Hub.

    pip install -e '.[train,report]'
    python examples/fine_tune.py PHOTOS WEIGHTS

PHOTOS has the images as PHOTOS/train/CLASS/*.jpg and PHOTOS/val/CLASS/*.jpg. WEIGHTS is a .pth or
.safetensors file, a workdir, or a name on the Hub such as timm/resnet50.a1_in1k (which needs the
extra "hub"). The weights say which network it is, and how its images are resized and normalized.
"""

import sys
from pathlib import Path

import resnet_jax as rj
from resnet_jax.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Model,
    Optimizer,
    Schedule,
    Train,
)
from resnet_jax.training.loop import train


def make_config(photos: str, weights: str) -> Config:
    """Fine-tuning with a small learning rate for the backbone; ""/0/() come from the weights."""
    return Config(
        model=Model(name=""),
        data=Data(
            name=f"folder:{photos}",
            eval_split="val",
            crop="random_resized",
            crop_area=(0.35, 1.0),
            upright=True,  # cameras store how they were held
            image_size=0,
            interpolation="",
            eval_crop="",
        ),
        augment=Augment(flip=True, mean=(), std=()),
        optimizer=Optimizer(learning_rate=0.02, nesterov=True, backbone_rate=0.1),
        schedule=Schedule(name="cosine", warmup_epochs=1.0),
        train=Train(epochs=10.0, batch_size=32),
        checkpoint=Checkpoint(init_from=weights, reset_head=None),  # a new head for new classes
    )


def main(photos: str, weights: str, workdir: str = "runs/fine_tuned") -> None:
    """Trains, and prints the network's answer for one photo of each class."""
    config = make_config(photos, weights)
    result = train(config, workdir)
    print(f"{result.metrics['top1']:.1%} of the photos in val are classified correctly")

    classifier = rj.Classifier.load(workdir)  # the best state of the run
    files = [next(folder.iterdir()) for folder in sorted(Path(photos, "val").iterdir())]
    for file, (best, *_) in zip(files, classifier(files)):
        print(f"{file}: {best.name} ({best.probability:.0%})")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except rj.ResNetJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
