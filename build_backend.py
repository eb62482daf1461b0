"""The build backend of pyproject.toml: setuptools', and CUDA's compiler from PyPI where there is a GPU and no nvcc.

pip asks a backend what a build needs before it makes the environment of that build.
"""

import os
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (all hooks but the two below)

# The package itself would need torch.
sys.path.insert(0, str(Path(__file__).parent / "dndetr"))
import _build

sys.path.pop(0)


def get_requires_for_build_wheel(config_settings=None):
    """What setuptools asks for, and the compiler if it is to come from PyPI."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _build.requirements(os.environ)


def get_requires_for_build_editable(config_settings=None):
    """The same for ``pip install -e``."""
    return build_meta.get_requires_for_build_editable(config_settings) + _build.requirements(os.environ)
