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
    ResNetJaxError,
    StoppedError,
    WeightsError,
)
from resnet_jax.models.attention import SqueezeExcite
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResidualBlock,
    Shortcut,
)
from resnet_jax.models.layers import Conv, StochasticDepth
from resnet_jax.models.norms import BatchNorm, GroupNorm
from resnet_jax.models.registry import (
    Architecture,
    BiTResNet50x1,
    BiTResNet101x1,
    PlainNet18,
    PlainNet20,
    PlainNet32,
    PlainNet34,
    PlainNet44,
    PlainNet56,
    PlainNet110,
    ResNet8Cifar,
    ResNet18,
    ResNet18Cifar,
    ResNet20,
    ResNet32,
    ResNet34,
    ResNet34Cifar,
    ResNet44,
    ResNet50,
    ResNet50C,
    ResNet50Cifar,
    ResNet50D,
    ResNet50T,
    ResNet56,
    ResNet101,
    ResNet101Cifar,
    ResNet101D,
    ResNet110,
    ResNet152,
    ResNet152Cifar,
    ResNet152D,
    ResNet200,
    ResNet1202,
    ResNetRS50,
    ResNetRS101,
    ResNetRS152,
    ResNetV2_18,
    ResNetV2_34,
    ResNetV2_50,
    ResNetV2_101,
    ResNetV2_110,
    ResNetV2_152,
    ResNetV2_164,
    ResNetV2_200,
    ResNeXt50_32x4d,
    ResNeXt101_32x8d,
    ResNeXt101_64x4d,
    SEResNet50,
    SEResNet101,
    SEResNet152,
    WideResNet28_10,
    WideResNet50_2,
    WideResNet101_2,
    create_model,
    list_models,
    model_info,
)
from resnet_jax.models.resnet import (
    FeatureInfo,
    ResNet,
    Stage,
)
from resnet_jax.models.stem import (
    CifarStem,
    DeepStem,
    ImageNetStem,
)
from resnet_jax.models.summary import (
    Summary,
    summary,
)
from resnet_jax.weights.convert import (
    from_torch,
    to_torch,
)
from resnet_jax.weights.files import (
    load_weights,
    save_weights,
)
from resnet_jax.weights.pretrained import (
    Preprocessing,
    Pretrained,
    load_pretrained,
)

if TYPE_CHECKING:
    from resnet_jax.inference.classifier import Classifier as Classifier

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "BasicBlock",
    "BatchNorm",
    "BiTResNet50x1",
    "BiTResNet101x1",
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
    "PlainNet18",
    "PlainNet20",
    "PlainNet32",
    "PlainNet34",
    "PlainNet44",
    "PlainNet56",
    "PlainNet110",
    "PreActBasicBlock",
    "PreActBottleneckBlock",
    "Preprocessing",
    "Pretrained",
    "ResNeXt50_32x4d",
    "ResNeXt101_32x8d",
    "ResNeXt101_64x4d",
    "ResNet",
    "ResNet8Cifar",
    "ResNet18",
    "ResNet18Cifar",
    "ResNet20",
    "ResNet32",
    "ResNet34",
    "ResNet34Cifar",
    "ResNet44",
    "ResNet50",
    "ResNet50C",
    "ResNet50Cifar",
    "ResNet50D",
    "ResNet50T",
    "ResNet56",
    "ResNet101",
    "ResNet101Cifar",
    "ResNet101D",
    "ResNet110",
    "ResNet152",
    "ResNet152Cifar",
    "ResNet152D",
    "ResNet200",
    "ResNet1202",
    "ResNetJaxError",
    "ResNetRS50",
    "ResNetRS101",
    "ResNetRS152",
    "ResNetV2_18",
    "ResNetV2_34",
    "ResNetV2_50",
    "ResNetV2_101",
    "ResNetV2_110",
    "ResNetV2_152",
    "ResNetV2_164",
    "ResNetV2_200",
    "ResidualBlock",
    "SEResNet50",
    "SEResNet101",
    "SEResNet152",
    "Shortcut",
    "SqueezeExcite",
    "Stage",
    "StochasticDepth",
    "StoppedError",
    "Summary",
    "WeightsError",
    "WideResNet28_10",
    "WideResNet50_2",
    "WideResNet101_2",
    "__version__",
    "create_model",
    "from_torch",
    "list_models",
    "load_pretrained",
    "load_weights",
    "model_info",
    "save_weights",
    "summary",
    "to_torch",
]


def __getattr__(name: str) -> Any:
    # It reads images, which takes more than jax and flax. Not in __all__, for the same reason.
    if name == "Classifier":
        from resnet_jax.inference.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Classifier"])
