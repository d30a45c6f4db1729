"""6e  The commands of the exercise; LOST_PER_BIT is what your own verification.json says."""

import json
from pathlib import Path

BUILD_6 = "build6"
BUILD_4 = "build4"
MORE_DECIBELS = 6


def decibels(folder):
    report = json.loads((Path(folder) / "verification.json").read_text(encoding="utf-8-sig"))
    return min(size["decibels"] for size in report["parts"]["unet"]["sizes"].values())


LOST_PER_BIT = (decibels(BUILD_6) - decibels(BUILD_4)) / 2
