"""The networks of the family as a table: a name, its paper, and its choice of `ResNet`'s fields.

Names are those of timm where it has the network. tests/models/networks.csv has the parameters and
multiply-adds of each.
"""

from __future__ import annotations

import functools
from typing import Any

from resnet_jax.models.blocks import (
    BasicBlock,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
)
from resnet_jax.models.stem import CifarStem, DeepStem, ImageNetStem

Fields = dict[str, Any]

_HE_2015 = "He et al. 2015, arXiv:1512.03385"
_HE_2016 = "He et al. 2016, arXiv:1603.05027"
_ZAGORUYKO_2016 = "Zagoruyko & Komodakis 2016, arXiv:1605.07146"
_XIE_2017 = "Xie et al. 2017, arXiv:1611.05431"
_HU_2018 = "Hu et al. 2018, arXiv:1709.01507"
_HE_2018 = "He et al. 2018, arXiv:1812.01187"
_KOLESNIKOV_2020 = "Kolesnikov et al. 2020, arXiv:1912.11370"
_WU_2018 = "Wu & He 2018, arXiv:1803.08494"
_WANG_2020 = "Wang et al. 2020, arXiv:1910.03151"
_BELLO_2021 = "Bello et al. 2021, arXiv:2103.07579"

# Blocks of each stage, by the number of layers (bottlenecks from 50 up; He et al. 2015, Table 1).
_18, _26, _34, _50 = (2, 2, 2, 2), (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3)
_101, _152, _200 = (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)

_BASIC: Fields = {"block_cls": BasicBlock}
_BOTTLENECK: Fields = {"block_cls": BottleneckBlock}
_BASIC_V2: Fields = {"block_cls": PreActBasicBlock}
_BOTTLENECK_V2: Fields = {"block_cls": PreActBottleneckBlock}
_PLAIN: Fields = {"shortcut": "none"}
# He et al. 2015, section 4.2: 6n + 2 layers for 32x32 images.
_SMALL_IMAGES: Fields = {"num_classes": 10, "image_size": 32}
_CIFAR: Fields = _SMALL_IMAGES | {"stem_cls": CifarStem, "stage_widths": (16, 32, 64)}
_CIFAR_A: Fields = _CIFAR | _BASIC | {"shortcut": "A"}
_CIFAR_PLAIN: Fields = _CIFAR | _BASIC | _PLAIN
# ImageNet widths on the CIFAR stem, as small-image repositories train them.
_WIDE_CIFAR: Fields = _SMALL_IMAGES | {"stem_cls": functools.partial(CifarStem, features=64)}
# He et al. 2018: C has the deep stem, and D also averages in the shortcut. S and T are timm's
# wider and slimmer stems.
_C: Fields = _BOTTLENECK | {"stem_cls": DeepStem}
_D: Fields = _C | {"shortcut": "D"}
_S: Fields = _C | {"stem_cls": functools.partial(DeepStem, widths=(64, 64, 128))}
_T: Fields = _D | {"stem_cls": functools.partial(DeepStem, widths=(24, 32, 64))}
_SE: Fields = {"se_ratio": 1 / 16}
_ECA: Fields = {"eca": True}
# ResNet-RS: D with a strided convolution in place of the max pool, and squeeze-and-excitation.
_RS: Fields = _D | {"stem_cls": functools.partial(DeepStem, conv_pool=True), "se_ratio": 0.25}
# BiT: v2 with GroupNorm and weight standardization.
_BIT: Fields = _BOTTLENECK_V2 | {
    "stem_cls": functools.partial(ImageNetStem, zero_pool_padding=True),
    "norm": "group",
    "weight_standardization": True,
}


def _groups(cardinality: int, base_width: int) -> Fields:
    return {"cardinality": cardinality, "base_width": base_width}


def _size(image_size: int) -> Fields:
    return {"image_size": image_size}


# fmt: off
# ruff: noqa: E501
# name: (paper, blocks of each stage, other fields); image_size is the network's usual one, or 224.
TABLE: dict[str, tuple[str, tuple[int, ...], Fields]] = {
    "resnet18": (_HE_2015, _18, _BASIC),
    "resnet34": (_HE_2015, _34, _BASIC),
    "resnet26": (_HE_2015, _26, _BOTTLENECK),
    "resnet50": (_HE_2015, _50, _BOTTLENECK),
    "resnet101": (_HE_2015, _101, _BOTTLENECK),
    "resnet152": (_HE_2015, _152, _BOTTLENECK),
    "resnet200": (_HE_2016, _200, _BOTTLENECK),
    "resnet50_gn": (_WU_2018, _50, _BOTTLENECK | {"norm": "group"}),
    "plain18": (_HE_2015, _18, _BASIC | _PLAIN),
    "plain34": (_HE_2015, _34, _BASIC | _PLAIN),

    # For CIFAR.
    "resnet20": (_HE_2015, (3, 3, 3), _CIFAR_A),
    "resnet32": (_HE_2015, (5, 5, 5), _CIFAR_A),
    "resnet44": (_HE_2015, (7, 7, 7), _CIFAR_A),
    "resnet56": (_HE_2015, (9, 9, 9), _CIFAR_A),
    "resnet110": (_HE_2015, (18, 18, 18), _CIFAR_A),
    "resnet1202": (_HE_2015, (200, 200, 200), _CIFAR_A),
    "plain20": (_HE_2015, (3, 3, 3), _CIFAR_PLAIN),
    "plain32": (_HE_2015, (5, 5, 5), _CIFAR_PLAIN),
    "plain44": (_HE_2015, (7, 7, 7), _CIFAR_PLAIN),
    "plain56": (_HE_2015, (9, 9, 9), _CIFAR_PLAIN),
    "plain110": (_HE_2015, (18, 18, 18), _CIFAR_PLAIN),
    "resnet8_cifar": (_HE_2015, (1, 1, 1), _WIDE_CIFAR | _BASIC | {"stage_widths": (64, 128, 256)}),
    "resnet18_cifar": (_HE_2015, _18, _WIDE_CIFAR | _BASIC),
    "resnet34_cifar": (_HE_2015, _34, _WIDE_CIFAR | _BASIC),
    "resnet50_cifar": (_HE_2015, _50, _WIDE_CIFAR | _BOTTLENECK),
    "resnet101_cifar": (_HE_2015, _101, _WIDE_CIFAR | _BOTTLENECK),
    "resnet152_cifar": (_HE_2015, _152, _WIDE_CIFAR | _BOTTLENECK),

    # Wider instead of deeper.
    "wide_resnet50_2": (_ZAGORUYKO_2016, _50, _BOTTLENECK | {"base_width": 128}),
    "wide_resnet101_2": (_ZAGORUYKO_2016, _101, _BOTTLENECK | {"base_width": 128}),
    "wide_resnet28_10": (_ZAGORUYKO_2016, (4, 4, 4), _CIFAR | _BASIC_V2 | {"stage_widths": (160, 320, 640)}),

    # Other stems and shortcuts ("Bag of tricks").
    "resnet50c": (_HE_2018, _50, _C),
    "resnet101c": (_HE_2018, _101, _C),
    "resnet152c": (_HE_2018, _152, _C),
    "resnet18d": (_HE_2018, _18, _D | _BASIC),
    "resnet34d": (_HE_2018, _34, _D | _BASIC),
    "resnet26d": (_HE_2018, _26, _D),
    "resnet50d": (_HE_2018, _50, _D),
    "resnet101d": (_HE_2018, _101, _D),
    "resnet152d": (_HE_2018, _152, _D),
    "resnet200d": (_HE_2018, _200, _D | _size(256)),
    "resnet50s": (_HE_2018, _50, _S),
    "resnet101s": (_HE_2018, _101, _S),
    "resnet152s": (_HE_2018, _152, _S),
    "resnet10t": (_HE_2018, (1, 1, 1, 1), _T | _BASIC | _size(176)),
    "resnet14t": (_HE_2018, (1, 1, 1, 1), _T | _size(176)),
    "resnet26t": (_HE_2018, _26, _T | _size(256)),
    "resnet50t": (_HE_2018, _50, _T),

    # More groups: ResNeXt.
    "resnext50_32x4d": (_XIE_2017, _50, _BOTTLENECK | _groups(32, 4)),
    "resnext50d_32x4d": (_XIE_2017, _50, _D | _groups(32, 4)),
    "resnext101_32x4d": (_XIE_2017, _101, _BOTTLENECK | _groups(32, 4)),
    "resnext101_32x8d": (_XIE_2017, _101, _BOTTLENECK | _groups(32, 8)),
    "resnext101_32x16d": (_XIE_2017, _101, _BOTTLENECK | _groups(32, 16)),
    "resnext101_32x32d": (_XIE_2017, _101, _BOTTLENECK | _groups(32, 32)),
    "resnext101_64x4d": (_XIE_2017, _101, _BOTTLENECK | _groups(64, 4)),

    # Channel gates: SE-ResNet, SE-ResNeXt and ECA-Net.
    "seresnet50": (_HU_2018, _50, _BOTTLENECK | _SE),
    "seresnet101": (_HU_2018, _101, _BOTTLENECK | _SE),
    "seresnet152": (_HU_2018, _152, _BOTTLENECK | _SE),
    "seresnet152d": (_HU_2018, _152, _D | _SE | _size(256)),
    "seresnext50_32x4d": (_HU_2018, _50, _BOTTLENECK | _SE | _groups(32, 4)),
    "seresnext101_32x4d": (_HU_2018, _101, _BOTTLENECK | _SE | _groups(32, 4)),
    "seresnext101_32x8d": (_HU_2018, _101, _BOTTLENECK | _SE | _groups(32, 8)),
    "seresnext101_64x4d": (_HU_2018, _101, _BOTTLENECK | _SE | _groups(64, 4)),
    "seresnext101d_32x8d": (_HU_2018, _101, _D | _SE | _groups(32, 8)),
    "seresnext26d_32x4d": (_HU_2018, _26, _D | _SE | _groups(32, 4)),
    "seresnext26t_32x4d": (_HU_2018, _26, _T | _SE | _groups(32, 4)),
    "ecaresnet26t": (_WANG_2020, _26, _T | _ECA | _size(256)),
    "ecaresnet50t": (_WANG_2020, _50, _T | _ECA | _size(256)),
    "ecaresnet50d": (_WANG_2020, _50, _D | _ECA),
    "ecaresnet101d": (_WANG_2020, _101, _D | _ECA),
    "ecaresnet269d": (_WANG_2020, (3, 30, 48, 8), _D | _ECA | _size(320)),
    "ecaresnetlight": (_WANG_2020, (1, 1, 11, 3), _BOTTLENECK | _ECA | {"shortcut": "D"}),
    "resnetrs50": (_BELLO_2021, _50, _RS | _size(160)),
    "resnetrs101": (_BELLO_2021, _101, _RS | _size(192)),
    "resnetrs152": (_BELLO_2021, _152, _RS | _size(256)),
    "resnetrs200": (_BELLO_2021, _200, _RS | _size(256)),
    "resnetrs270": (_BELLO_2021, (4, 29, 53, 4), _RS | _size(256)),
    "resnetrs350": (_BELLO_2021, (4, 36, 72, 4), _RS | _size(288)),
    "resnetrs420": (_BELLO_2021, (4, 44, 87, 4), _RS | _size(320)),

    # Pre-activation (v2), for ImageNet and for CIFAR (section 4: 164 layers are bottlenecks).
    "resnetv2_18": (_HE_2016, _18, _BASIC_V2),
    "resnetv2_34": (_HE_2016, _34, _BASIC_V2),
    "resnetv2_50": (_HE_2016, _50, _BOTTLENECK_V2),
    "resnetv2_101": (_HE_2016, _101, _BOTTLENECK_V2),
    "resnetv2_152": (_HE_2016, _152, _BOTTLENECK_V2),
    "resnetv2_200": (_HE_2016, _200, _BOTTLENECK_V2),
    "resnetv2_110": (_HE_2016, (18, 18, 18), _CIFAR | _BASIC_V2),
    "resnetv2_164": (_HE_2016, (18, 18, 18), _CIFAR | _BOTTLENECK_V2),
    "resnetv2_50x1_bit": (_KOLESNIKOV_2020, _50, _BIT),
    "resnetv2_101x1_bit": (_KOLESNIKOV_2020, _101, _BIT),
}
# fmt: on

# Networks with a constructor that `resnet_jax` makes on demand: `rj.SEResNet50(...)`.
CONSTRUCTORS = {
    "BiTResNet50x1": "resnetv2_50x1_bit",
    "BiTResNet101x1": "resnetv2_101x1_bit",
    **{f"PlainNet{depth}": f"plain{depth}" for depth in (18, 20, 32, 34, 44, 56, 110)},
    **{f"ResNet{depth}Cifar": f"resnet{depth}_cifar" for depth in (8, 18, 34, 50, 101, 152)},
    **{f"SEResNet{depth}": f"seresnet{depth}" for depth in (50, 101, 152)},
    **{f"ResNetRS{depth}": f"resnetrs{depth}" for depth in (50, 101, 152)},
    **{f"ResNetV2_{n}": f"resnetv2_{n}" for n in (18, 34, 50, 101, 110, 152, 164, 200)},
    **{f"ResNeXt{kind}": f"resnext{kind}" for kind in ("50_32x4d", "101_32x8d", "101_64x4d")},
    **{f"WideResNet{kind}": f"wide_resnet{kind}" for kind in ("28_10", "50_2", "101_2")},
    **{f"ResNet{n.upper()}": f"resnet{n}" for n in ("50c", "50d", "50t", "101d", "152d", "200")},
}
