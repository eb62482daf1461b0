"""Runs on data as LVIS has them: federated annotations and repeated images, resumed, scored, and refused."""

import json
import shlex

import pytest
import torch
from lvis_folders import change, write_lvis
from short_runs import SMALL, stopped_after

from dndetr import check_data, evaluate, train
from dndetr.runs.checkpoint import load_checkpoint

RUN = [*SMALL, *shlex.split("--epochs 2 --batch-size 2 --images.recipe fixed --denoising.groups 2 --log-every 1")]
REPEATED = ["--repeat-threshold", "0.5"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lvis(tmp_path_factory):
    return write_lvis(tmp_path_factory.mktemp("data") / "lvis")


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[row[key] for key in ("step", "loss", "grad_norm", "label")] for row in rows if row["event"] == "train"]


def test_federated_annotations_make_the_class_loss_less_and_are_told(lvis, capsys):
    plain = train.run([*RUN, "--data", str(lvis), "--epochs", "1", "--output", "plain"])
    told = capsys.readouterr().out
    stated = f"{lvis}: 11 of 12 training images say which classes were looked for"
    assert f"{stated}; with --loss.federated others would be no negatives there\n" in told
    federated = train.run([*RUN, "--data", str(lvis), "--epochs", "1", "--output", "federated", "--loss.federated"])
    assert f"{stated}, others are no negatives there\n" in capsys.readouterr().out
    before, after = losses(plain), losses(federated)
    assert len(before) == len(after) == 6
    assert after[0][3] < before[0][3] and after[0][1] < before[0][1]  # of the same weights and images
    results = json.loads((federated / "detections_val.json").read_text())
    assert {row["image_id"] for row in results} == {3000, 3001, 3002, 3003}
    assert {row["category_id"] for row in results} <= {2, 4, 6, 8, 10}
    assert evaluate.main([str(federated), "--device", "cpu", "--output", "evaluation"]) == 0


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_run_with_repeats_is_resumed_exactly(lvis, capsys, step):
    """Classes by their shares of 12 images: sqrt(0.5 / share) is 2.449 of 1 image (eggs), 1.225 of 4, 1.414 of 3."""
    both = [*RUN, "--data", str(lvis), *REPEATED, "--loss.federated", "--batch-size", "4", "--evaluate-every", "2"]
    whole = train.run([*both, "--output", "whole"])
    line = "--repeat-threshold 0.5: 16 images in an epoch, since 11 of 12 come up to 3 times\n"
    assert line in capsys.readouterr().out
    assert [row[0] for row in losses(whole)] == [*range(1, 9)]
    with stopped_after(step):
        train.main([*both, "--output", "stopped"])
    assert load_checkpoint("stopped")["step"] == step
    resumed = train.run(["--resume", "stopped", "--quiet"])
    assert losses(resumed) == losses(whole)
    ends = [load_checkpoint(folder)["model"] for folder in (whole, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repeat-threshold", "0"], "--repeat-threshold 0.0: give a share of the images, above 0 and up to 1"),
        (["--repeat-threshold", "1.5"], "--repeat-threshold 1.5: give a share of the images, above 0 and up to 1"),
        (["--repeat-threshold", "nan"], "--repeat-threshold nan: give a share of the images, above 0 and up to 1"),
        ([*REPEATED, "--overfit", "2"], "--repeat-threshold: --overfit has its images equally often: leave one out"),
        (
            [*REPEATED, "--data", "shapes"],
            "--repeat-threshold: --data shapes has new images in every epoch: leave one out",
        ),
        (
            ["--loss.federated", "--data", "shapes"],
            "--loss.federated: --data shapes is annotated in full: leave one out",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(lvis, tmp_path, capsys, flags, said):
    assert train.main([*RUN, "--data", str(lvis), *flags]) != 0
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1) and said in error
    assert not list(tmp_path.iterdir())


def test_data_annotated_in_full_are_told_and_not_trained_on(tmp_path, capsys):
    root = write_lvis(tmp_path / "lvis", 4)

    def forget(document):
        for image in document["images"]:
            image.pop("neg_category_ids", None)
            image.pop("not_exhaustive_category_ids", None)

    change(root, forget)
    assert train.main([*RUN, "--data", str(root), "--loss.federated"]) == 1
    assert capsys.readouterr().err == (
        f"error: {root}/annotations/lvis_v1_train.json: --loss.federated: no image has neg_category_ids or "
        "not_exhaustive_category_ids, so all are annotated in full: leave it out\n"
    )


def test_the_check_reads_it(lvis, capsys):
    assert check_data.main([str(lvis)]) == 0
    assert "training would start" in capsys.readouterr().out
