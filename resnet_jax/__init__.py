"""ResNets for JAX: "Deep Residual Learning for Image Recognition" (He et al. 2015) and its family.

Importing this loads jax and flax; everything else is loaded by the function that needs it.
"""

from typing import TYPE_CHECKING, Any

from resnet_jax.errors import (
    ConfigError,
    DataError,
    DivergedError,
    ExportError,
    ModelError,
    PeerError,
    ResNetJaxError,
    StoppedError,
    WeightsError,
)
from resnet_jax.errors import importing as _importing
from resnet_jax.errors import is_installed as _is_installed
from resnet_jax.models.architectures import CONSTRUCTORS as _CONSTRUCTORS
from resnet_jax.models.attention import SqueezeExcite
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResidualBlock,
    Shortcut,
)
from resnet_jax.models.constructors import (
    ResNet18,
    ResNet20,
    ResNet32,
    ResNet34,
    ResNet44,
    ResNet50,
    ResNet56,
    ResNet101,
    ResNet110,
    ResNet152,
    ResNet1202,
)
from resnet_jax.models.constructors import constructor_named as _constructor_named
from resnet_jax.models.folding import fold_batch_norm
from resnet_jax.models.layers import Conv, StochasticDepth
from resnet_jax.models.norms import BatchNorm, GroupNorm
from resnet_jax.models.registry import (
    Architecture,
    create_model,
    list_models,
    model_info,
    register_model,
)
from resnet_jax.models.resnet import FeatureInfo, ResNet, Stage
from resnet_jax.models.stem import CifarStem, DeepStem, ImageNetStem
from resnet_jax.models.summary import Summary, summary
from resnet_jax.weights.convert import from_torch, to_torch
from resnet_jax.weights.files import load_weights, save_weights
from resnet_jax.weights.pretrained import Preprocessing, Pretrained, load_pretrained

if TYPE_CHECKING:  # what `__getattr__` makes, with the fields that type checkers know
    from resnet_jax.inference.classifier import Classifier as Classifier

    BiTResNet101x1 = ResNet50
    BiTResNet50x1 = ResNet50
    PlainNet110 = ResNet50
    PlainNet18 = ResNet50
    PlainNet20 = ResNet50
    PlainNet32 = ResNet50
    PlainNet34 = ResNet50
    PlainNet44 = ResNet50
    PlainNet56 = ResNet50
    ResNeXt101_32x8d = ResNet50
    ResNeXt101_64x4d = ResNet50
    ResNeXt50_32x4d = ResNet50
    ResNet101Cifar = ResNet50
    ResNet101D = ResNet50
    ResNet152Cifar = ResNet50
    ResNet152D = ResNet50
    ResNet18Cifar = ResNet50
    ResNet200 = ResNet50
    ResNet34Cifar = ResNet50
    ResNet50C = ResNet50
    ResNet50Cifar = ResNet50
    ResNet50D = ResNet50
    ResNet50T = ResNet50
    ResNet8Cifar = ResNet50
    ResNetRS101 = ResNet50
    ResNetRS152 = ResNet50
    ResNetRS50 = ResNet50
    ResNetV2_101 = ResNet50
    ResNetV2_110 = ResNet50
    ResNetV2_152 = ResNet50
    ResNetV2_164 = ResNet50
    ResNetV2_18 = ResNet50
    ResNetV2_200 = ResNet50
    ResNetV2_34 = ResNet50
    ResNetV2_50 = ResNet50
    SEResNet101 = ResNet50
    SEResNet152 = ResNet50
    SEResNet50 = ResNet50
    WideResNet101_2 = ResNet50
    WideResNet28_10 = ResNet50
    WideResNet50_2 = ResNet50

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "BasicBlock",
    "BatchNorm",
    "BottleneckBlock",
    "CifarStem",
    "ConfigError",
    "Conv",
    "DataError",
    "DeepStem",
    "DivergedError",
    "ExportError",
    "FeatureInfo",
    "GroupNorm",
    "ImageNetStem",
    "ModelError",
    "PeerError",
    "PreActBasicBlock",
    "PreActBottleneckBlock",
    "Preprocessing",
    "Pretrained",
    "ResNet",
    "ResNet18",
    "ResNet20",
    "ResNet32",
    "ResNet34",
    "ResNet44",
    "ResNet50",
    "ResNet56",
    "ResNet101",
    "ResNet110",
    "ResNet152",
    "ResNet1202",
    "ResNetJaxError",
    "ResidualBlock",
    "Shortcut",
    "SqueezeExcite",
    "Stage",
    "StochasticDepth",
    "StoppedError",
    "Summary",
    "WeightsError",
    "__version__",
    "create_model",
    "fold_batch_norm",
    "from_torch",
    "list_models",
    "load_pretrained",
    "load_weights",
    "model_info",
    "register_model",
    "save_weights",
    "summary",
    "to_torch",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _CONSTRUCTORS:
            return _constructor_named(name)
        # It reads images, which takes more than jax and flax. Not in __all__, for the same reason.
        if name == "Classifier":
            with _importing("resnet_jax.Classifier", ConfigError):
                from resnet_jax.inference.classifier import Classifier

            return Classifier
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_CONSTRUCTORS, *(["Classifier"] if _is_installed("PIL") else [])])
