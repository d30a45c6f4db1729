"""Picture files: whatever people have lying about, as RGB; pictures as tensors and back."""

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

CACHE = "runs/cache"  # what was found out or encoded once, and is read again by the next run
PICTURE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
OTHER_ENDINGS = (".heic", ".heif", ".jxl", ".psd", ".svg", ".raw", ".dng")  # which Pillow does not read


def open_picture(path, size=None):
    """A picture file (its path, or an open file) as RGB (PIL) in sRGB, whatever it holds; with `size`, scaled
    and centre-cropped to (size, size).

    Colors are converted from the file's ICC profile; transparency is laid on white, the first frame of an
    animation is taken, 16-bit greyscale is scaled to 8 bits, CMYK, palettes and greyscale are converted.
    Raises OSError (or one of its kind) when the file is corrupt or truncated.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            profile = picture.info.get("icc_profile")
            picture = ImageOps.exif_transpose(picture)  # phones write the pixels lying down and say so
            if picture.mode.startswith(("I", "F")):  # 16 or 32 bits: Pillow's conversion would clip
                values = np.asarray(picture, dtype=np.float32)
                wide = picture.mode.startswith("I;16") or values.max() > 255
                top = 65535.0 if wide else 255.0 if values.max() > 1 else 1.0
                picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
            picture = to_srgb(picture, profile)
            if picture.mode == "RGBA":
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise OSError(f"{path} is not a readable picture: {error}") from error
    return picture if size is None else cut_square(picture, size)


def to_srgb(picture, profile):
    """The picture with its colors converted from an ICC profile (bytes or None) to sRGB; as it is where the
    profile is sRGB already, belongs to another kind of picture, or is damaged: so do viewers."""
    if not profile:
        return picture
    if picture.mode == "P":
        picture = picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (OSError, ImageCms.PyCMSError):
        return picture


def cut_square(picture, size, across=0.5, down=0.5):
    """The largest square of a picture, scaled to (size, size); `across` and `down` in [0, 1] say which one.

    It is cut while it is scaled: a picture of 1 x 20,000 pixels, scaled first, would have ten million rows.
    """
    side = min(picture.size)
    left, top = (picture.width - side) * across, (picture.height - side) * down
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_tensor(pictures):
    """A list of equally large RGB pictures (PIL) -> (B, 3, H, W) float32 in [-1, 1]."""
    x = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (B, H, W, 3) uint8
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x):
    """(B, 3, H, W) in [-1, 1] -> a list of B RGB pictures (PIL)."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(picture) for picture in x]
