"""A disk that is full; detectors of transformers in folders."""

import resource
import shutil
import signal

import pytest


@pytest.fixture
def full_disk():
    """No file of this process may grow past 64 KiB: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder of each variant, saved when it is first asked for, and the model itself."""
    import transformers_detectors as theirs

    known = {}

    def folder(variant: str):
        if variant not in known:
            model = (theirs.VARIANTS | theirs.OTHER_BACKBONES)[variant]()
            path = tmp_path_factory.mktemp(variant)
            model.save_pretrained(path)
            known[variant] = path, model
        return known[variant]

    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A folder of one's own, to be changed."""

    def folder(variant: str):
        path, model = saved(variant)
        return shutil.copytree(path, tmp_path / "detector"), model

    return folder
