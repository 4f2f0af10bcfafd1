"""PyTorch networks to compare with, with the layer names of the code they stand for."""

from torch import nn


class ReviewBottleneck(nn.Module):
    """The block of the ResNet-50 review that this project started from, with its names."""

    expansion = 4

    def __init__(self, in_channels, width, stride):
        super().__init__()
        out_channels = width * self.expansion
        self.residual_function = nn.Sequential(
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.residual_function(x) + self.shortcut(x))


class TorchvisionBasicBlock(nn.Module):
    """A basic block with torchvision's names."""

    expansion = 1

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or in_channels != width:
            projection = nn.Conv2d(in_channels, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def make_stages(block, sizes, width):
    """One Sequential of blocks a stage; the stem gives `width` channels."""
    in_channels = width
    for index, size in enumerate(sizes):
        blocks = []
        for number in range(size):
            stride = 2 if index > 0 and number == 0 else 1
            blocks.append(block(in_channels, width * 2**index, stride))
            in_channels = width * 2**index * block.expansion
        yield nn.Sequential(*blocks)


class ReviewResNet(nn.Module):
    """The review's ResNet-50: conv1, conv2 ... conv5, fc; width 64 is the real one."""

    def __init__(self, width=64, num_classes=10):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        stages = make_stages(ReviewBottleneck, (3, 4, 6, 3), width)
        self.conv2, self.conv3, self.conv4, self.conv5 = stages
        self.avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width * ReviewBottleneck.expansion, num_classes)

    def maps(self, x):
        maps = {"stem": self.conv1(x)}
        maps["stage1"] = self.conv2(maps["stem"])
        maps["stage2"] = self.conv3(maps["stage1"])
        maps["stage3"] = self.conv4(maps["stage2"])
        maps["stage4"] = self.conv5(maps["stage3"])
        return maps

    def forward(self, x):
        return self.fc(self.avg_pool(self.maps(x)["stage4"]).flatten(1))


class TorchvisionResNet18(nn.Module):
    """ResNet-18 with torchvision's names; width 64 is the real one."""

    def __init__(self, width=64, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = make_stages(TorchvisionBasicBlock, (2, 2, 2, 2), width)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    def maps(self, x):
        maps = {"stem": self.maxpool(self.relu(self.bn1(self.conv1(x))))}
        maps["stage1"] = self.layer1(maps["stem"])
        maps["stage2"] = self.layer2(maps["stage1"])
        maps["stage3"] = self.layer3(maps["stage2"])
        maps["stage4"] = self.layer4(maps["stage3"])
        return maps

    def forward(self, x):
        return self.fc(self.avgpool(self.maps(x)["stage4"]).flatten(1))
