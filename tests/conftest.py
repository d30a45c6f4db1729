"""Fixtures that the tests of several stages share."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # pytest runs several workers side by side (pyproject.toml), one core each

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with the project's assets, so that runs/ of the project stays as it is."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "assets").symlink_to(Path(__file__).parent.parent / "assets")
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
