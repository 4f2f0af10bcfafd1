"""Fine-tunes a network on your photos, starting from weights of PyTorch, of a run or of the Hub.

    pip install -e '.[train,report]'
    python examples/fine_tune.py PHOTOS WEIGHTS

PHOTOS has the images as PHOTOS/train/CLASS/*.jpg and PHOTOS/val/CLASS/*.jpg. WEIGHTS is a .pth or
.safetensors file, a workdir, or a name on the Hub such as timm/resnet50.a1_in1k (which needs the
extra "hub"). The weights say which network it is, and how its images are resized and normalized.
"""

import sys
from pathlib import Path

import jax

import resnet_jax as rj
from resnet_jax.config import Config
from resnet_jax.config.flags import parse_train_flags
from resnet_jax.training.loop import train


def make_config(photos: str, weights: str) -> Config:
    """The recipe configs/finetune.py, for photos of a camera; flags set any field of it."""
    flags = [
        f"--config=finetune:folder:{photos}",
        f"--config.checkpoint.init_from={weights}",
        "--config.data.eval_split=val",
        "--config.data.upright=true",  # cameras store how they were held
        "--config.train.epochs=10",
        "--config.train.batch_size=32",
        "--config.optimizer.learning_rate=0.02",  # of the new head; the backbone has a tenth
    ]
    if jax.default_backend() == "cpu":
        flags.append("--config.model.dtype=float32")  # bfloat16 is slower there
    return parse_train_flags(flags)[0]


def main(photos: str, weights: str, workdir: str = "runs/fine_tuned") -> None:
    """Trains, and prints the network's answer for one photo of each class."""
    config = make_config(photos, weights)
    result = train(config, workdir)
    print(f"{result.metrics['top1']:.1%} of the photos in val are classified correctly")

    classifier = rj.Classifier.load(workdir)  # the best state of the run
    one_of_each = {file.parent: file for file in sorted(Path(photos, "val").glob("*/*.jpg"))}
    files = list(one_of_each.values())
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
