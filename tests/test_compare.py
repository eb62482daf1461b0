"""The compare command, end to end on a few images."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from short_runs import SMALL

from dndetr import compare
from dndetr.compare import Arguments, make_plan
from dndetr.runs.console import Console

FEW = [*SMALL, "--epochs", "2", "--batch-size", "4", "--train-images", "8", "--val-images", "6", "--log-every", "1"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def rows(folder: Path, event: str) -> list[dict]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").open()) if row["event"] == event]


def test_the_default_is_denoising_on_and_off_from_the_same_start(capsys):
    folder = compare.run(["--seeds", "1", "--quiet", *FEW])
    assert folder == Path("runs/compare-1")
    names = {"compare.png", "verdict.json", "comparison.json", "groups-3-seed-42", "groups-0-seed-42"}
    assert {path.name for path in folder.iterdir()} == names
    told = json.loads((folder / "verdict.json").read_text())
    assert (told["field"], told["values"], told["seeds"]) == ("denoising.groups", ["3", "0"], [42])
    assert "final AP" in capsys.readouterr().out
    first = [rows(folder / run["folder"], "train")[0] for run in told["runs"]]
    assert first[0]["denoising"] > 0 == first[1]["denoising"]
    # Same weights and same images: before the first update the matching queries cannot tell the two apart.
    assert first[0]["matching"] == pytest.approx(first[1]["matching"], rel=1e-5)
    for run in told["runs"]:
        assert run["epochs"] == [1, 2] and run["seconds"][1] > run["seconds"][0] > 0


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_stopped(monkeypatch, capsys):
    step_ended = Console.step_ended
    steps = []

    def signal_in_the_second_run(self, step, *arguments):
        step_ended(self, step, *arguments)
        steps.append(step)
        if len(steps) == 7:  # 4 of the first run, 3 of the second
            os.kill(os.getpid(), signal.SIGTERM)

    run, trained = compare.train.run, []
    monkeypatch.setattr(compare.train, "run", lambda flags: trained.append(flags[0]) or run(flags))
    monkeypatch.setattr(Console, "step_ended", signal_in_the_second_run)
    with pytest.raises(SystemExit):
        compare.main([*FEW, "--output", "both", "--seeds", "1", "--quiet"])
    assert "python -m dndetr.compare --resume both" in capsys.readouterr().err
    assert json.loads(Path("both/verdict.json").read_text())["comparisons"] == []
    before = Path("both/groups-3-seed-42/checkpoint.pt").stat().st_mtime_ns
    assert compare.main(["--resume", "both", "--quiet"]) == 0
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4] and len(trained) == 3, "finished runs are reused, the other is continued"
    assert Path("both/groups-3-seed-42/checkpoint.pt").stat().st_mtime_ns == before
    assert len(json.loads(Path("both/verdict.json").read_text())["comparisons"]) == 1
    # A run folder that was killed before its first checkpoint is made anew; more seeds are added.
    Path("both/groups-0-seed-43").mkdir()
    Path("both/groups-0-seed-43/config.json").write_text("{}")
    assert compare.main(["--resume", "both", "--seeds", "2", "--quiet"]) == 0
    told = json.loads(Path("both/verdict.json").read_text())
    assert told["seeds"] == [42, 43] and len(steps) == 16 and len(trained) == 5


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [(["3", "0"], 10, 992, 42)]),
        (["--epochs=3", "--seed", "7"], [(["3", "0"], 3, 992, 7)]),
        (["--preset", "small", "--data", "d"], [(["4", "0"], 43, 2000, 42)]),
        (["--denoising.label-noise", "0.1"], [(["3", "0"], 10, 992, 42)]),
    ],
    ids=["default", "shorter", "preset", "other-flag"],
)
def test_flags_are_handed_on(flags, expected):
    plan = make_plan(Arguments(), flags)
    for values, epochs, images, seed in expected:
        config = compare.train.parse(plan.arguments(values[0], plan.first_seed))
        assert plan.values == values and config.denoising.groups == int(values[0])
        assert (config.epochs, config.train_images, config.seed) == (epochs, images, seed)
    assert [config for config, _ in plan.runs()] == [*plan.values, *plan.values[::-1], *plan.values]


def test_values_that_make_the_same_file_name_have_folders_of_their_own():
    values = ["runs/a", "runs a", "runs_a~2", "b"]
    plan = compare.Plan("init", values, 42, 1, [])
    folders = [plan.folder(value, 42) for value in values]
    assert len(set(folders)) == 4 and folders[3] == "init-b-seed-42"


def test_any_setting_can_be_compared():
    cases = {
        "optimizer.ema": (("0", "0.99"), lambda config: config.optimizer.ema, [0, 0.99]),
        "images.augment": (("true", "false"), lambda config: config.images.augment, [True, False]),
        "lr": (("1e-3", "2e-3"), lambda config: config.lr, [1e-3, 2e-3]),
        "optimizer.drops": (("0.5 0.8", "0.8"), lambda config: config.optimizer.drops, [(0.5, 0.8), (0.8,)]),
        "model.decoder-layers": (("2", "3"), lambda config: config.model.decoder_layers, [2, 3]),
    }
    for field, (values, get, expected) in cases.items():
        plan = make_plan(Arguments(field=field, values=values, seeds=1), [])
        configs = [compare.train.parse(plan.arguments(value, 42)) for value in values]
        assert [get(config) for config in configs] == expected
        assert len({plan.folder(value, 42) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--field", "denoising.group"], "--field denoising.group: give the name of a setting"),
        (["--field", "denoising"], "--field denoising: give the name of a setting"),
        (["--field", "seed", "--values", "1", "2"], "--field seed: give the name of a setting"),
        (["--field", "lr"], "give two or more different values of --field lr"),
        (["--values", "5", "5"], "give two or more different values"),
        (["--values", "5", "many"], "many"),
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
        (["--denoising.groups", "3"], "--denoising.groups is what is compared"),
        (["--preset", "small"], "--preset small needs data"),
        (["--seed", "x"], "--seed x: give 0 or more"),
        (["--lrr", "1"], "Unrecognized options: --lrr"),
        (["--resume", "nowhere"], "no comparison was started there"),
    ],
    ids=lambda value: "_".join(value).strip("-") if isinstance(value, list) else "",
)
def test_mistakes_are_one_plain_line_and_leave_nothing(flags, message, tmp_path, capsys):
    assert compare.main(flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_resuming_changes_nothing_but_the_number_of_seeds(tmp_path, capsys):
    (tmp_path / "comparison.json").write_text("{}")
    for flags, told in ((["--values", "1", "2"], "--values"), (["--lr", "1"], "--lr 1")):
        assert compare.main(["--resume", str(tmp_path), *flags]) == 1
        assert f"leave out {told}" in capsys.readouterr().err


def test_a_run_without_evaluations_cannot_be_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "_finish", lambda run, arguments: run.mkdir(parents=True, exist_ok=True))
    assert compare.main([*FEW, "--output", "both", "--quiet"]) == 1
    run = Path("both/groups-3-seed-42")
    told = f"error: {run}/metrics.jsonl has no evaluation to compare: remove {run} to train it anew\n"
    assert capsys.readouterr().err == told


def test_a_run_that_ended_before_its_epochs_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.train, "run", lambda flags: pytest.fail("it has ended"))
    (tmp_path / "run").mkdir()
    written = [{"event": "eval", "step": 4, "epoch": 1}, {"event": "end", "step": 4, "reason": "AP has not risen"}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    compare._finish(tmp_path / "run", [*FEW, "--patience", "1"])
