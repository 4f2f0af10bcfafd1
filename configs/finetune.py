"""Fine-tuning of a pretrained network on any TFDS classification set, or on a folder of images.

Command: python train.py --config=configs/finetune.py:tfds:oxford_flowers102
         python train.py --config=configs/finetune.py:folder:PATH --config.data.eval_split=val
         ... --config.checkpoint.init_from=resnet50.safetensors   (a file, a workdir, a Hub name)
Hardware: one GPU or TPU chip, minutes. Expected: depends on the dataset; Kornblith et al. 2019
(arXiv:1805.08974) report 97% on Flowers-102 and 92% on Pets for ImageNet's ResNet-50.

The weights say which network it is and how its images are prepared; what they say is printed first.
A flag such as --config.data.image_size=160 wins.
"""

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


def get_config(data: str = "tfds:oxford_flowers102") -> Config:
    """The head at the full learning rate, the backbone at a tenth of it.

    What is empty here is taken from the weights, the head too where it has the data's classes.
    """
    return Config(
        model=Model(name="", dtype="bfloat16"),
        data=Data(
            name=data,
            channels=0,
            image_size=0,
            crop="random_resized",
            crop_area=(0.35, 1.0),
            interpolation="",
            eval_resize=0,
            eval_crop="",
        ),
        augment=Augment(flip=True, mean=(), std=()),
        optimizer=Optimizer(
            learning_rate=0.05, nesterov=True, weight_decay=1e-4, backbone_rate=0.1
        ),
        schedule=Schedule(name="cosine", warmup_epochs=1.0),
        train=Train(epochs=20.0, batch_size=64),
        checkpoint=Checkpoint(init_from="timm/resnet50.a1_in1k", reset_head=None),
    )
