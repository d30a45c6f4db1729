"""3b  One norm, and no convolution beside the block: the channels stay, so the shortcut is a plain sum."""

from torch import nn


class Block(nn.Module):
    def __init__(self, cfg, c_in, c_out):
        super().__init__()

        def depthwise():
            return nn.Conv2d(c_out, c_out, 3, padding=1, groups=c_out, bias=False)

        def pointwise():
            return nn.Conv2d(c_out, c_out, 1)

        norm = nn.GroupNorm(cfg.groups, c_out)
        self.body = nn.Sequential(depthwise(), pointwise(), depthwise(), norm, nn.SiLU(), pointwise())

    def forward(self, x):
        return x + self.body(x)
