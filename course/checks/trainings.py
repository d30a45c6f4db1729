"""Questions about trainings: what their folders say, and whether the answer says the same."""

import json
from pathlib import Path

import numpy as np

from common.training import Log
from course.exercise import Hint


class Training:
    """A finished run folder: .settings (its flags, as config.json has them), .last(column), .median(column) of its log.csv."""

    def __init__(self, folder, settings, table):
        self.folder, self.settings, self.table = folder, settings, table

    def column(self, name):
        values = np.array(self.table.column(name), dtype=float)
        values = values[np.isfinite(values)]
        if not len(values):
            raise Hint(f"the log.csv of {self.folder} has no numbers under {name!r}: did the run end before its first row?")
        return values

    def last(self, name):
        return float(self.column(name)[-1])

    def median(self, name):
        return float(np.median(self.column(name)))


def finished(folder):
    """The Training in a folder. Raises Hint if there is none, or if it has not come to its end."""
    folder = Path(str(folder))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        table = Log(folder / "log.csv", resume_step=10**9)
        settings, steps = config["settings"], config["step"]
    except (OSError, ValueError, KeyError, IndexError):
        raise Hint(f"{folder} holds no run with a log yet: run the exercise's own command, with --out {folder}.") from None
    if steps < settings["steps"]:
        raise Hint(f"{folder} is at step {steps} of {settings['steps']}: run its command with --resume.")
    return Training(folder, settings, table)


def only_differs(a, b, *flags):
    """Raises Hint unless both runs had the same flags but for these."""
    other = [name for name in a.settings if name not in flags and a.settings[name] != b.settings.get(name)]
    if other:
        raise Hint(f"{a.folder} and {b.folder} also differ in --{other[0].replace('_', '-')}: then the comparison says nothing.")


def said(name, answer, values, lowest):
    """Raises Hint unless `answer` is the key of the lowest (highest) of `values`."""
    if answer not in values:
        raise Hint(f"{name} must be one of {', '.join(map(repr, values))}, not {answer!r}.")
    right = (min if lowest else max)(values, key=values.get)
    if answer != right:
        told = ", ".join(f"{value:.4g} for {key}" for key, value in values.items())
        raise Hint(f"{name} is {answer!r}, but your own logs say {told}.")
