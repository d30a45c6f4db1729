"""Questions about trainings: what their folders say, and whether the answer says the same."""

import csv
import json
import math
import statistics
from pathlib import Path

from course.exercise import Hint


class Training:
    """A finished run: .settings (its flags), .last(column) and .median(column) of its log.csv."""

    def __init__(self, folder, settings, rows):
        self.folder, self.settings, self.rows = folder, settings, rows

    def column(self, name):
        values = [value for row in self.rows if math.isfinite(value := float(row.get(name) or "nan"))]
        if not values:
            raise Hint(f"the log.csv of {self.folder} has no numbers under {name!r}: did the run end before "
                       f"its first row?")
        return values

    def last(self, name):
        return self.column(name)[-1]

    def median(self, name):
        return statistics.median(self.column(name))


def finished(folder, steps):
    """The Training in a folder. Raises Hint if there is none, if it has not ended, or if it was too short."""
    folder = Path(str(folder))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        with open(folder / "log.csv", newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        settings, step, planned = config["settings"], config["step"], config["settings"]["steps"]
    except (OSError, ValueError, KeyError):
        raise Hint(f"{folder} holds no run with a log yet: run the exercise's own command, with --out "
                   f"{folder}.") from None
    if step < planned:
        raise Hint(f"{folder} is at step {step} of {planned}: run its command with --resume.")
    if planned < steps:
        raise Hint(f"{folder} was trained for {planned} steps, and much of that is warm-up, in which little "
                   f"is learned yet: "
                   f"give it the exercise's {steps}.")  # fmt: skip
    return Training(folder, settings, rows)


def only_differs(a, b, *flags):
    """Raises Hint unless both runs had the same flags but for these."""
    other = [name for name in a.settings if name not in flags and a.settings[name] != b.settings.get(name)]
    if other:
        raise Hint(f"{a.folder} and {b.folder} also differ in --{other[0].replace('_', '-')}: "
                   "then the comparison says nothing.")  # fmt: skip


def said(name, answer, values, lowest):
    """Raises Hint unless `answer` is the key of the lowest (highest) of `values`."""
    if answer not in values:
        raise Hint(f"{name} must be one of {', '.join(map(repr, values))}, not {answer!r}.")
    right = (min if lowest else max)(values, key=values.get)
    if answer != right:
        told = ", ".join(f"{value:.4g} for {key}" for key, value in values.items())
        raise Hint(f"{name} is {answer!r}, but your own logs say {told}.")
