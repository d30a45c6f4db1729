"""6d  A 1x1 convolution is a linear layer at every pixel: its weights are (out, in, 1, 1)."""

from torch import nn


def as_conv(linear):
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    conv.weight = nn.Parameter(linear.weight[:, :, None, None])
    conv.bias = linear.bias
    return conv
