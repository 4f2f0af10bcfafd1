"""Every member of the family by name: one entry is one choice of ResNet's fields.

Names are those of timm where it has the network. Each entry records what a test can hold it to:
parameters and multiply-adds with the entry's own number of classes and image size.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any

from resnet_jax.errors import ModelError, unknown_name
from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
)
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.stem import CifarStem, DeepStem, ImageNetStem

HE_2015 = "He et al. 2015, arXiv:1512.03385"
HE_2016 = "He et al. 2016, arXiv:1603.05027"
ZAGORUYKO_2016 = "Zagoruyko & Komodakis 2016, arXiv:1605.07146"
XIE_2017 = "Xie et al. 2017, arXiv:1611.05431"
HU_2018 = "Hu et al. 2018, arXiv:1709.01507"
HE_2018 = "He et al. 2018, arXiv:1812.01187"
KOLESNIKOV_2020 = "Kolesnikov et al. 2020, arXiv:1912.11370"
WU_2018 = "Wu & He 2018, arXiv:1803.08494"
WANG_2020 = "Wang et al. 2020, arXiv:1910.03151"
BELLO_2021 = "Bello et al. 2021, arXiv:2103.07579"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is known of a registered model.

    Args:
      name: Its name for `create_model`.
      constructor: Makes the module; takes the fields of `ResNet` as keywords. A function of this
        package where the model has one, such as `resnet_jax.ResNet50`.
      paper: Where it comes from.
      parameters: Trainable parameters with its default number of classes.
      multiply_adds: Of convolutions and head, for one image of `image_size`.
      image_size: Side in pixels of the images it was made for.
    """

    name: str
    constructor: Callable[..., ResNet]
    paper: str
    parameters: int
    multiply_adds: int
    image_size: int


_ARCHITECTURES: dict[str, Architecture] = {}
_FIELDS = {field.name for field in dataclasses.fields(ResNet)}  # linen's name and parent too

_DOCUMENTATION = """{name}: {paper}.

{parameters:,} parameters and {giga:.3g} G multiply-adds for {side}x{side} pixels and {classes} classes.

Args:
  **overrides: Any field of `ResNet`, such as num_classes or dtype.

Returns:
  A `ResNet`: images [N, H, W, C] -> logits [N, num_classes].

Raises:
  ModelError: An unknown field, or a value that is not allowed.

Example:
  >>> import resnet_jax as rj
  >>> rj.{constructor}(num_classes=7).num_classes
  7
"""


def _register(
    name: str,
    constructor: str,
    paper: str,
    parameters: int,
    multiply_adds: int,
    image_size: int = 224,
    **fields: Any,
) -> Callable[..., ResNet]:
    """Adds an architecture and returns its constructor, which has a name and documentation."""
    _register_name(name, paper, parameters, multiply_adds, image_size, **fields)

    def construct(**overrides: Any) -> ResNet:
        return _construct(name, fields, **overrides)

    construct.__name__ = construct.__qualname__ = constructor
    construct.__doc__ = _DOCUMENTATION.format(
        name=name,
        constructor=constructor,
        paper=paper,
        parameters=parameters,
        giga=multiply_adds / 1e9,
        side=image_size,
        classes=fields.get("num_classes", 1000),
    )
    _ARCHITECTURES[name] = dataclasses.replace(_ARCHITECTURES[name], constructor=construct)
    return construct


def _register_name(
    name: str,
    paper: str,
    parameters: int,
    multiply_adds: int,
    image_size: int = 224,
    **fields: Any,
) -> None:
    """Adds an architecture that only `create_model` makes."""
    constructor = functools.partial(_construct, name, fields)
    _ARCHITECTURES[name] = Architecture(
        name, constructor, paper, parameters, multiply_adds, image_size
    )


def _construct(name: str, fields: Mapping[str, Any], /, **overrides: Any) -> ResNet:
    for field in overrides:
        if field == "pretrained":
            raise ModelError(f"{name}: weights come from rj.load_pretrained or rj.load_weights")
        if field not in _FIELDS:
            raise ModelError(f"{name}: {unknown_name('field', field, _FIELDS)}")
    return ResNet(**{**fields, **overrides})


def create_model(name: str, **overrides: Any) -> ResNet:
    """Makes a registered model.

    Args:
      name: One of `list_models()`.
      **overrides: Fields of `ResNet` that differ from the registered ones.

    Returns:
      The module, without parameters.

    Raises:
      ModelError: (a ValueError) An unknown name or field, with the closest ones; a field value
        that is not allowed.

    Example:
      >>> create_model("resnet50", num_classes=10).num_classes
      10
    """
    return model_info(name).constructor(**overrides)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models.

    Args:
      pattern: Shell-style: "*", "?" and "[...]".

    Returns:
      The names that match, in alphabetical order.

    Example:
      >>> list_models("resnext50*")
      ['resnext50_32x4d', 'resnext50d_32x4d']
    """
    return sorted(fnmatch.filter(_ARCHITECTURES, pattern))


def model_info(name: str) -> Architecture:
    """What is known of a registered model: paper, parameters, multiply-adds, image size.

    Args:
      name: One of `list_models()`.

    Returns:
      Its entry.

    Raises:
      ModelError: (a ValueError) An unknown name, with the closest ones.

    Example:
      >>> model_info("resnet50").parameters
      25557032
    """
    if name not in _ARCHITECTURES:
        raise ModelError(unknown_name("model", name, _ARCHITECTURES))
    return _ARCHITECTURES[name]


# fmt: off
# ruff: noqa: E501
# One network a line; the counts are checked by tests/models/test_registry.py.

# He et al. 2015, Table 1. v1.5 (stride on the 3x3) unless stride_in_1x1=True.
_basic = functools.partial(_register, block_cls=BasicBlock)
_bottleneck = functools.partial(_register, block_cls=BottleneckBlock)
ResNet18 = _basic("resnet18", "ResNet18", HE_2015, 11_689_512, 1_814_073_344, stage_sizes=(2, 2, 2, 2))
ResNet34 = _basic("resnet34", "ResNet34", HE_2015, 21_797_672, 3_663_761_408, stage_sizes=(3, 4, 6, 3))
ResNet50 = _bottleneck("resnet50", "ResNet50", HE_2015, 25_557_032, 4_089_184_256, stage_sizes=(3, 4, 6, 3))
ResNet101 = _bottleneck("resnet101", "ResNet101", HE_2015, 44_549_160, 7_801_405_440, stage_sizes=(3, 4, 23, 3))
ResNet152 = _bottleneck("resnet152", "ResNet152", HE_2015, 60_192_808, 11_513_626_624, stage_sizes=(3, 8, 36, 3))
ResNet200 = _bottleneck("resnet200", "ResNet200", HE_2016, 64_673_832, 15_007_481_856, stage_sizes=(3, 24, 36, 3))
PlainNet18 = _basic("plain18", "PlainNet18", HE_2015, 11_515_688, 1_794_805_760, stage_sizes=(2, 2, 2, 2), shortcut="none")
PlainNet34 = _basic("plain34", "PlainNet34", HE_2015, 21_623_848, 3_644_493_824, stage_sizes=(3, 4, 6, 3), shortcut="none")

# He et al. 2015, section 4.2: 6n + 2 layers for 32x32 images.
_cifar = functools.partial(_basic, image_size=32, num_classes=10, stem_cls=CifarStem, stage_widths=(16, 32, 64))
_residual = functools.partial(_cifar, shortcut="A")
_plain = functools.partial(_cifar, shortcut="none")
ResNet20 = _residual("resnet20", "ResNet20", HE_2015, 269_722, 40_551_040, stage_sizes=(3, 3, 3))
ResNet32 = _residual("resnet32", "ResNet32", HE_2015, 464_154, 68_862_592, stage_sizes=(5, 5, 5))
ResNet44 = _residual("resnet44", "ResNet44", HE_2015, 658_586, 97_174_144, stage_sizes=(7, 7, 7))
ResNet56 = _residual("resnet56", "ResNet56", HE_2015, 853_018, 125_485_696, stage_sizes=(9, 9, 9))
ResNet110 = _residual("resnet110", "ResNet110", HE_2015, 1_727_962, 252_887_680, stage_sizes=(18, 18, 18))
ResNet1202 = _residual("resnet1202", "ResNet1202", HE_2015, 19_421_274, 2_829_238_912, stage_sizes=(200, 200, 200))
PlainNet20 = _plain("plain20", "PlainNet20", HE_2015, 269_722, 40_551_040, stage_sizes=(3, 3, 3))
PlainNet32 = _plain("plain32", "PlainNet32", HE_2015, 464_154, 68_862_592, stage_sizes=(5, 5, 5))
PlainNet44 = _plain("plain44", "PlainNet44", HE_2015, 658_586, 97_174_144, stage_sizes=(7, 7, 7))
PlainNet56 = _plain("plain56", "PlainNet56", HE_2015, 853_018, 125_485_696, stage_sizes=(9, 9, 9))
PlainNet110 = _plain("plain110", "PlainNet110", HE_2015, 1_727_962, 252_887_680, stage_sizes=(18, 18, 18))

# ImageNet widths on the CIFAR stem, as small-image repositories train them.
_wide_cifar = functools.partial(_register, paper=HE_2015, image_size=32, num_classes=10, stem_cls=functools.partial(CifarStem, features=64))
ResNet8Cifar = _wide_cifar("resnet8_cifar", "ResNet8Cifar", parameters=1_227_594, multiply_adds=194_710_016, block_cls=BasicBlock, stage_sizes=(1, 1, 1), stage_widths=(64, 128, 256))
ResNet18Cifar = _wide_cifar("resnet18_cifar", "ResNet18Cifar", parameters=11_173_962, multiply_adds=555_422_720, block_cls=BasicBlock, stage_sizes=(2, 2, 2, 2))
ResNet34Cifar = _wide_cifar("resnet34_cifar", "ResNet34Cifar", parameters=21_282_122, multiply_adds=1_159_402_496, block_cls=BasicBlock, stage_sizes=(3, 4, 6, 3))
ResNet50Cifar = _wide_cifar("resnet50_cifar", "ResNet50Cifar", parameters=23_520_842, multiply_adds=1_297_829_888, stage_sizes=(3, 4, 6, 3))
ResNet101Cifar = _wide_cifar("resnet101_cifar", "ResNet101Cifar", parameters=42_512_970, multiply_adds=2_509_983_744, stage_sizes=(3, 4, 23, 3))
ResNet152Cifar = _wide_cifar("resnet152_cifar", "ResNet152Cifar", parameters=58_156_618, multiply_adds=3_722_137_600, stage_sizes=(3, 8, 36, 3))

# Wider instead of deeper.
WideResNet50_2 = _bottleneck("wide_resnet50_2", "WideResNet50_2", ZAGORUYKO_2016, 68_883_240, 11_398_021_120, stage_sizes=(3, 4, 6, 3), base_width=128)
WideResNet101_2 = _bottleneck("wide_resnet101_2", "WideResNet101_2", ZAGORUYKO_2016, 126_886_696, 22_753_050_624, stage_sizes=(3, 4, 23, 3), base_width=128)
WideResNet28_10 = _register("wide_resnet28_10", "WideResNet28_10", ZAGORUYKO_2016, 36_479_194, 5_243_328_768, 32, num_classes=10, block_cls=PreActBasicBlock, stem_cls=CifarStem, stage_sizes=(4, 4, 4), stage_widths=(160, 320, 640))

# More groups: ResNeXt; channel gates: SE-ResNet.
ResNeXt50_32x4d = _bottleneck("resnext50_32x4d", "ResNeXt50_32x4d", XIE_2017, 25_028_904, 4_230_479_872, stage_sizes=(3, 4, 6, 3), cardinality=32, base_width=4)
ResNeXt101_32x8d = _bottleneck("resnext101_32x8d", "ResNeXt101_32x8d", XIE_2017, 88_791_336, 16_414_015_488, stage_sizes=(3, 4, 23, 3), cardinality=32, base_width=8)
ResNeXt101_64x4d = _bottleneck("resnext101_64x4d", "ResNeXt101_64x4d", XIE_2017, 83_455_272, 15_460_270_080, stage_sizes=(3, 4, 23, 3), cardinality=64, base_width=4)
SEResNet50 = _bottleneck("seresnet50", "SEResNet50", HU_2018, 28_088_024, 4_091_699_200, stage_sizes=(3, 4, 6, 3), se_ratio=1 / 16)
SEResNet101 = _bottleneck("seresnet101", "SEResNet101", HU_2018, 49_326_872, 7_806_148_608, stage_sizes=(3, 4, 23, 3), se_ratio=1 / 16)
SEResNet152 = _bottleneck("seresnet152", "SEResNet152", HU_2018, 66_821_848, 11_520_204_800, stage_sizes=(3, 8, 36, 3), se_ratio=1 / 16)

# He et al. 2018 ("Bag of tricks"): C has the deep stem, D also averages in the shortcut; T is D with a slimmer stem.
_deep = functools.partial(_bottleneck, stem_cls=DeepStem)
_tiered = functools.partial(_bottleneck, stem_cls=functools.partial(DeepStem, widths=(24, 32, 64)), shortcut="D")
ResNet50C = _deep("resnet50c", "ResNet50C", HE_2018, 25_576_264, 4_328_824_832, stage_sizes=(3, 4, 6, 3))
ResNet50D = _deep("resnet50d", "ResNet50D", HE_2018, 25_576_264, 4_328_824_832, stage_sizes=(3, 4, 6, 3), shortcut="D")
ResNet101D = _deep("resnet101d", "ResNet101D", HE_2018, 44_568_392, 8_041_046_016, stage_sizes=(3, 4, 23, 3), shortcut="D")
ResNet152D = _deep("resnet152d", "ResNet152D", HE_2018, 60_212_040, 11_753_267_200, stage_sizes=(3, 8, 36, 3), shortcut="D")
ResNet50T = _tiered("resnet50t", "ResNet50T", HE_2018, 25_573_728, 4_297_213_952, stage_sizes=(3, 4, 6, 3))

# ResNet-RS: D with a strided convolution in place of the max pool, and squeeze-and-excitation.
_rs = functools.partial(_bottleneck, stem_cls=functools.partial(DeepStem, conv_pool=True), shortcut="D", se_ratio=0.25)
ResNetRS50 = _rs("resnetrs50", "ResNetRS50", BELLO_2021, 35_691_912, 2_278_629_376, 160, stage_sizes=(3, 4, 6, 3))
ResNetRS101 = _rs("resnetrs101", "ResNetRS101", BELLO_2021, 63_618_696, 6_012_157_952, 192, stage_sizes=(3, 4, 23, 3))
ResNetRS152 = _rs("resnetrs152", "ResNetRS152", BELLO_2021, 86_621_576, 15_527_886_848, 256, stage_sizes=(3, 8, 36, 3))

# Pre-activation (v2), for ImageNet and for CIFAR (section 4: 164 layers are bottlenecks).
_basic_v2 = functools.partial(_register, block_cls=PreActBasicBlock)
_bottleneck_v2 = functools.partial(_register, block_cls=PreActBottleneckBlock)
_cifar_v2 = functools.partial(_register, image_size=32, num_classes=10, stem_cls=CifarStem, stage_widths=(16, 32, 64))
ResNetV2_18 = _basic_v2("resnetv2_18", "ResNetV2_18", HE_2016, 11_687_720, 1_814_073_344, stage_sizes=(2, 2, 2, 2))
ResNetV2_34 = _basic_v2("resnetv2_34", "ResNetV2_34", HE_2016, 21_795_880, 3_663_761_408, stage_sizes=(3, 4, 6, 3))
ResNetV2_50 = _bottleneck_v2("resnetv2_50", "ResNetV2_50", HE_2016, 25_549_352, 4_089_184_256, stage_sizes=(3, 4, 6, 3))
ResNetV2_101 = _bottleneck_v2("resnetv2_101", "ResNetV2_101", HE_2016, 44_541_480, 7_801_405_440, stage_sizes=(3, 4, 23, 3))
ResNetV2_152 = _bottleneck_v2("resnetv2_152", "ResNetV2_152", HE_2016, 60_185_128, 11_513_626_624, stage_sizes=(3, 8, 36, 3))
ResNetV2_200 = _bottleneck_v2("resnetv2_200", "ResNetV2_200", HE_2016, 64_666_152, 15_007_481_856, stage_sizes=(3, 24, 36, 3))
ResNetV2_110 = _cifar_v2("resnetv2_110", "ResNetV2_110", HE_2016, 1_730_522, 253_149_824, block_cls=PreActBasicBlock, stage_sizes=(18, 18, 18))
ResNetV2_164 = _cifar_v2("resnetv2_164", "ResNetV2_164", HE_2016, 1_703_258, 247_646_720, block_cls=PreActBottleneckBlock, stage_sizes=(18, 18, 18))

# BiT: v2 with GroupNorm and weight standardisation.
_bit = functools.partial(_bottleneck_v2, stem_cls=functools.partial(ImageNetStem, zero_pool_padding=True), norm="group", weight_standardization=True)
BiTResNet50x1 = _bit("resnetv2_50x1_bit", "BiTResNet50x1", KOLESNIKOV_2020, 25_549_352, 4_089_184_256, stage_sizes=(3, 4, 6, 3))
BiTResNet101x1 = _bit("resnetv2_101x1_bit", "BiTResNet101x1", KOLESNIKOV_2020, 44_541_480, 7_801_405_440, stage_sizes=(3, 4, 23, 3))

# Networks that timm has weights for and that only `create_model` makes.
_named = functools.partial(_register_name, block_cls=BottleneckBlock)
_named_c = functools.partial(_named, stem_cls=DeepStem)
_named_s = functools.partial(_named, stem_cls=functools.partial(DeepStem, widths=(64, 64, 128)))
_named_d = functools.partial(_named_c, shortcut="D")
_named_t = functools.partial(_named, **_tiered.keywords)
_named_rs = functools.partial(_named, **_rs.keywords)
# He et al. 2015 and 2018 in other depths and with other norms.
_named("resnet26", HE_2015, 15_995_176, 2_342_256_640, stage_sizes=(2, 2, 2, 2))
_named("resnet50_gn", WU_2018, 25_557_032, 4_089_184_256, stage_sizes=(3, 4, 6, 3), norm="group")
_named_t("resnet10t", HE_2018, 5_435_488, 698_688_000, 176, stage_sizes=(1, 1, 1, 1), block_cls=BasicBlock)
_named_t("resnet14t", HE_2018, 10_081_632, 1_067_618_816, 176, stage_sizes=(1, 1, 1, 1))
_named_t("resnet26t", HE_2018, 16_011_872, 3_330_359_296, 256, stage_sizes=(2, 2, 2, 2))
_named_d("resnet18d", HE_2018, 11_708_744, 2_053_713_920, stage_sizes=(2, 2, 2, 2), block_cls=BasicBlock)
_named_d("resnet34d", HE_2018, 21_816_904, 3_903_401_984, stage_sizes=(3, 4, 6, 3), block_cls=BasicBlock)
_named_d("resnet26d", HE_2018, 16_014_408, 2_581_897_216, stage_sizes=(2, 2, 2, 2))
_named_d("resnet200d", HE_2018, 64_693_064, 19_913_981_952, 256, stage_sizes=(3, 24, 36, 3))
_named_c("resnet101c", HE_2018, 44_568_392, 8_041_046_016, stage_sizes=(3, 4, 23, 3))
_named_c("resnet152c", HE_2018, 60_212_040, 11_753_267_200, stage_sizes=(3, 8, 36, 3))
_named_s("resnet50s", HE_2018, 25_680_808, 5_444_337_664, stage_sizes=(3, 4, 6, 3))
_named_s("resnet101s", HE_2018, 44_672_936, 9_156_558_848, stage_sizes=(3, 4, 23, 3))
_named_s("resnet152s", HE_2018, 60_316_584, 12_868_780_032, stage_sizes=(3, 8, 36, 3))
# ResNeXt, squeeze-and-excitation, and both; with D's stem and shortcut where the name has a d.
_named("resnext101_32x4d", XIE_2017, 44_177_704, 7_969_996_800, stage_sizes=(3, 4, 23, 3), cardinality=32, base_width=4)
_named("resnext101_32x16d", XIE_2017, 194_026_792, 36_163_289_088, stage_sizes=(3, 4, 23, 3), cardinality=32, base_width=16)
_named("resnext101_32x32d", XIE_2017, 468_530_472, 87_106_781_184, stage_sizes=(3, 4, 23, 3), cardinality=32, base_width=32)
_named_d("resnext50d_32x4d", XIE_2017, 25_048_136, 4_470_120_448, stage_sizes=(3, 4, 6, 3), cardinality=32, base_width=4)
_named("seresnext50_32x4d", HU_2018, 27_559_896, 4_232_994_816, stage_sizes=(3, 4, 6, 3), cardinality=32, base_width=4, se_ratio=1 / 16)
_named("seresnext101_32x4d", HU_2018, 48_955_416, 7_974_739_968, stage_sizes=(3, 4, 23, 3), cardinality=32, base_width=4, se_ratio=1 / 16)
_named("seresnext101_32x8d", HU_2018, 93_569_048, 16_418_758_656, stage_sizes=(3, 4, 23, 3), cardinality=32, base_width=8, se_ratio=1 / 16)
_named("seresnext101_64x4d", HU_2018, 88_232_984, 15_465_013_248, stage_sizes=(3, 4, 23, 3), cardinality=64, base_width=4, se_ratio=1 / 16)
_named_d("seresnext101d_32x8d", HU_2018, 93_588_280, 16_658_399_232, stage_sizes=(3, 4, 23, 3), cardinality=32, base_width=8, se_ratio=1 / 16)
_named_d("seresnext26d_32x4d", HU_2018, 16_809_512, 2_711_740_416, stage_sizes=(2, 2, 2, 2), cardinality=32, base_width=4, se_ratio=1 / 16)
_named_t("seresnext26t_32x4d", HU_2018, 16_806_976, 2_680_129_536, stage_sizes=(2, 2, 2, 2), cardinality=32, base_width=4, se_ratio=1 / 16)
_named_d("seresnet152d", HU_2018, 66_841_080, 15_357_157_376, 256, stage_sizes=(3, 8, 36, 3), se_ratio=1 / 16)
# ECA-Net: a gate from the means of neighboring channels.
_named_t("ecaresnet26t", WANG_2020, 16_011_916, 3_330_405_888, 256, stage_sizes=(2, 2, 2, 2), eca=True)
_named_t("ecaresnet50t", WANG_2020, 25_573_814, 5_612_148_480, 256, stage_sizes=(3, 4, 6, 3), eca=True)
_named_d("ecaresnet50d", WANG_2020, 25_576_350, 4_328_912_640, stage_sizes=(3, 4, 6, 3), eca=True)
_named_d("ecaresnet101d", WANG_2020, 44_568_563, 8_041_220_864, stage_sizes=(3, 4, 23, 3), eca=True)
_named_d("ecaresnet269d", WANG_2020, 102_093_077, 41_364_716_288, 320, stage_sizes=(3, 30, 48, 8), eca=True)
_named("ecaresnetlight", WANG_2020, 30_162_046, 4_089_287_424, stage_sizes=(1, 1, 11, 3), shortcut="D", eca=True)
# Deeper ResNet-RS.
_named_rs("resnetrs200", BELLO_2021, 93_209_992, 20_093_386_752, 256, stage_sizes=(3, 24, 36, 3))
_named_rs("resnetrs270", BELLO_2021, 129_861_448, 26_950_189_056, 256, stage_sizes=(4, 29, 53, 4))
_named_rs("resnetrs350", BELLO_2021, 163_956_168, 43_493_793_792, 288, stage_sizes=(4, 36, 72, 4))
_named_rs("resnetrs420", BELLO_2021, 191_891_656, 63_942_344_704, 320, stage_sizes=(4, 44, 87, 4))
# fmt: on
