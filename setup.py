"""Builds the extension; metadata is in pyproject.toml, every decision in dndetr/_build.py."""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


# By its path: importing dndetr would need torch, which a build must not.
sys.path.insert(0, str(ROOT / "dndetr"))
import _build  # noqa: E402

sys.path.pop(0)


class BuildExtension(build_ext):
    """Hands the one extension to ``_build.build`` and keeps its record next to it."""

    def build_extension(self, ext):
        self.target = Path(self.get_ext_fullpath(ext.name))
        try:
            record = _build.build(ROOT / "csrc", self.target, Path(self.build_temp))
        except _build.BuildError as failure:
            raise SystemExit(f"dndetr: {failure}") from None
        if record.built:
            print(f"dndetr: dndetr._C {record.reason}; CUDA {'on' if record.cuda else 'off'}: {record.cuda_reason}")
        else:
            print(f"dndetr: installed WITHOUT compiled ops, the plain paths run instead. Reason: {record.reason}")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        package = ROOT / "dndetr"
        if not self.target.is_file():
            (package / self.target.name).unlink(missing_ok=True)
        shutil.copyfile(self.target.with_name(_build.RECORD), package / _build.RECORD)


setup(
    # optional: an install without a compiler is complete; BuildExtension decides and says so.
    ext_modules=[Extension("dndetr._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
