"""Detectors of transformers in folders."""

import shutil

import pytest


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
