"""A dataset of your own: anything that NumPy can hold, listed in a file of JSON lines.

    pip install -e '.[train,report]'
    python examples/own_dataset.py

Each example becomes a file and a line in a list; the trainer reads that list (`data.name =
"jsonl:FILE"`). Photos are listed as they are. Other measurements, such as spectrograms or satellite
images, are saved as `.npy` with any number of channels. Here they are digits with the two
components of their gradient.
"""

import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import resnet_jax as rj
from resnet_jax.config import Augment, Config, Data, Model, Optimizer, Schedule, Train
from resnet_jax.training.loop import train

NETWORK = "resnet20"


def measure(digit: np.ndarray) -> np.ndarray:
    """[8, 8] with values from 0 to 16 -> uint8 [8, 8, 3]: brightness and its two derivatives."""
    along_y, along_x = np.gradient(digit)
    channels = np.stack([16 * digit - 8, 8 * along_y + 128, 8 * along_x + 128], axis=-1)
    return np.clip(np.rint(channels), 0, 255).astype(np.uint8)


def write_dataset(folder: Path) -> Path:
    """Writes the examples and their list; returns the list."""
    digits = load_digits()
    (folder / "arrays").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (digit, label) in enumerate(zip(digits.images, digits.target)):
        path = Path("arrays", f"{number:04}.npy")  # relative to the list
        np.save(folder / path, measure(digit))
        split = "test" if number % 5 == 0 else "train"
        lines.append({"path": str(path), "label": f"digit {label}", "split": split})
    file = folder / "digits.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def main(folder: str = "runs/own_dataset", epochs: float = 10.0) -> float:
    """Trains on the list, and returns the accuracy on its test split."""
    file = write_dataset(Path(folder, "data"))
    config = Config(
        model=Model(name=NETWORK),
        data=Data(name=f"jsonl:{file}", image_size=8),  # classes and channels follow from the data
        augment=Augment(pad=1, mean=(0.3, 0.5, 0.5), std=(0.38, 0.2, 0.2)),
        optimizer=Optimizer(learning_rate=0.05, nesterov=True),
        schedule=Schedule(warmup_epochs=1.0),
        train=Train(epochs=epochs, batch_size=64),
    )
    result = train(config, Path(folder, "run"))

    classifier = rj.Classifier.load(result.workdir)
    [[best, *_]] = classifier(measure(load_digits().images[0]))
    print(f"the first example: {best.name}, {best.probability:.1%}")
    return result.metrics["top1"]


if __name__ == "__main__":
    main()
