"""``export --to transformers``: what transformers makes of the folder alone, the way back, what cannot be written."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from short_runs import environment, short_run, write_pictures

from dndetr import evaluate, export, load, train
from dndetr.config import from_dict, to_dict
from dndetr.runs.checkpoint import load_checkpoint
from dndetr.runs.model_card import model_card

transformers = pytest.importorskip("transformers", reason='transformers is not installed (pip install -e ".[hf]")')

_SMALL = {"model.width": "32", "model.heads": "4", "model.hidden": "48", "model.encoder-layers": "1"}
_SMALL |= {"model.decoder-layers": "2", "model.queries": "7", "model.backbone.depth": "18", "workers": "0"}
_SMALL |= {"images.recipe": "fixed", "images.canvas": "64 96", "model.backbone.planes": "16 16 24 32"}
_VECTORS = {"preset": "dn-deformable-detr-r50", "model.query-positions": "vectors", "model.no-label-indicator": ""}
_VECTORS |= {"model.no-query-scale": ""}
KINDS = {
    "dn-detr": {"preset": "dn-detr-r50", "model.backbone.norm": "batch"},
    "dn-detr-patterns": {"preset": "dn-detr-r50", "model.patterns": "2", "model.encoder-layers": "0"},
    "vectors": _VECTORS | {"model.one-to-many": "5"},
    "vectors-plain": _VECTORS | {"model.no-box-refinement": "", "model.shared-heads": "", "model.levels": "3"},
    "vectors-own-heads": _VECTORS | {"model.no-box-refinement": ""},
    "vectors-one-pair": _VECTORS | {"model.shared-heads": ""},
    "two-stages": _VECTORS | {"model.proposals": "objects", "model.proposal-padding": "official"},
}


# Two differ from another only in whose heads are shared, and are slow tests.
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind in ("vectors-own-heads", "vectors-one-pair") else kind
        for kind in KINDS
    ],
)


def flags(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", *value.split())]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Classes of which two have the same name, with ids that are no rows."""
    folder = tmp_path_factory.mktemp("pictures")
    return write_pictures(folder / "data", classes=((3, "cell"), (7, "dust"), (12, "cell")))


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run of each kind, trained when it is first asked for: its heads and anchors are none of the initial ones."""
    known = {}

    def trained(kind: str):
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind) / "run"
            settings = _SMALL | {"data": str(pictures), "lr": "3e-3", "optimizer.clip-norm": "9"} | KINDS[kind]
            known[kind] = short_run(folder, *flags(settings))
        return known[kind]

    return trained


@pytest.fixture
def exported(run, tmp_path, capsys):
    """The folder of a kind, and the lines that were printed."""

    def folder(kind: str):
        path = tmp_path / "given" / kind
        assert export.main([str(run(kind)), "--to", "transformers", str(path)]) == 0, capsys.readouterr().err
        return path, capsys.readouterr().out

    return folder


def weights(checkpoint: dict) -> dict:
    return checkpoint["model"] if checkpoint.get("ema") is None else checkpoint["ema"]


def settings_without_paths(checkpoint: dict) -> dict:
    """What a run's settings are where it is not."""
    gone = {"data": None, "output": None, "given": {"data": Path(checkpoint["config"]["data"]).name}}
    return checkpoint["config"] | gone


@every_kind
def test_the_folder_comes_back_to_the_bit(kind, run, exported):
    path, told = exported(kind)
    assert "the same as the model in transformers" in told and "0.001, which transformers has not" in told
    ours, back = load_checkpoint(run(kind)), load_checkpoint(path)
    assert (back["config"], back["blank"], back["notes"]) == (settings_without_paths(ours), [], [])
    for file in path.iterdir():
        assert str(Path(ours["config"]["data"]).parent).encode() not in file.read_bytes(), file.name
    assert back["classes"] == [tuple(entry) for entry in ours["classes"]] == [(3, "cell"), (7, "dust"), (12, "cell")]
    assert back["model"].keys() == weights(ours).keys()
    for name, value in weights(ours).items():
        assert back["model"][name].dtype == value.dtype and back["model"][name].equal(value), name
    assert sorted(file.name for file in path.iterdir()) == [
        *("README.md", "config.json", "dndetr.safetensors", "model.safetensors", "preprocessor_config.json"),
    ]


@every_kind
def test_transformers_finds_every_tensor(kind, exported):
    path, _ = exported(kind)
    _, told = transformers.AutoModelForObjectDetection.from_pretrained(path, output_loading_info=True)
    assert not any(told.values())


_ALONE = """
import json, sys

class Nothing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "dndetr":
            raise ImportError("dndetr is not there")

sys.meta_path.insert(0, Nothing())
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

detect = pipeline("object-detection", model=sys.argv[1])
AutoModelForObjectDetection.from_pretrained(sys.argv[1]), AutoImageProcessor.from_pretrained(sys.argv[1])
print(json.dumps(detect(sys.argv[2], threshold=0.0)))
"""


@pytest.fixture
def photo(pictures, tmp_path):
    """A photo of the canvas' size, since resizing differs in its last digits."""
    Image.open(pictures / "val" / "2.jpg").convert("RGB").resize((96, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def demand_alike(found: list[dict], ours) -> None:
    """What a pipeline of transformers has found is what we find."""
    assert len(found) == 7 * 3 and {row["label"] for row in found} == {"cell (id 3)", "dust", "cell (id 12)"}
    for row, score, name, box in zip(found, ours.scores, ours.names, ours.boxes_xyxy.tolist(), strict=True):
        assert row["score"] == pytest.approx(score.item(), abs=1e-4)
        assert row["label"] == name or abs(ours.scores - score).sort().values[1] < 1e-4  # equal scores, in any order
        sides = [row["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")]
        assert row["label"] != name or sides == pytest.approx(box, abs=1.01)  # the pipeline cuts off digits


@pytest.mark.parametrize("kind", ["dn-detr", "two-stages"])
def test_the_pipeline_finds_what_we_find(kind, run, exported, photo):
    path, _ = exported(kind)
    found = transformers.pipeline("object-detection", model=str(path))(str(photo), threshold=0.0)
    demand_alike(found, load(run(kind), "cpu").predict(photo, threshold=0.0)[0])


@pytest.mark.slow
def test_a_process_that_cannot_import_us_finds_what_we_find(run, exported, photo, tmp_path):
    path, _ = exported("dn-detr")
    done = subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(path), str(photo)],
        **{"cwd": tmp_path, "capture_output": True, "text": True, "check": True},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    demand_alike(found, load(run("dn-detr"), "cpu").predict(photo, threshold=0.0)[0])


@pytest.mark.parametrize("kind", ["dn-detr", pytest.param("vectors", marks=pytest.mark.slow)])
def test_evaluation_and_training_go_on_where_they_were(kind, run, exported, tmp_path, capsys):
    path, _ = exported(kind)
    scores, data = [], from_dict(load_checkpoint(run(kind))["config"]).data
    for name, model in (("by_us", run(kind)), ("by_them", path)):
        assert evaluate.main([str(model), "--data", data, "--output", str(tmp_path / name)]) == 0
        scores.append([(tmp_path / name / file).read_text() for file in ("metrics.json", "detections_val.json")])
    assert scores[0] == scores[1]
    capsys.readouterr()
    few = ["--epochs", "1", "--batch-size", "4", "--lr", "1e-20", "--workers", "0"]
    assert train.main([*few, "--init", str(path), "--data", data, "--output", str(tmp_path / "next")]) == 0
    told = capsys.readouterr().out
    assert "the model is the file's, trained as --preset" in told and "re-made" not in told
    start, ours = load_checkpoint(tmp_path / "next"), weights(load_checkpoint(run(kind)))
    assert start["config"]["model"] == load_checkpoint(run(kind))["config"]["model"]
    trained = {name for name in ours if "running_" not in name and "num_batches" not in name}
    assert all(torch.allclose(start["model"][name], ours[name], rtol=0, atol=1e-12) for name in trained)


def test_weights_that_were_trained_further_win(exported, run):
    path, _ = exported("dn-detr-patterns")
    model = transformers.AutoModelForObjectDetection.from_pretrained(path)
    with torch.no_grad():
        model.model.patterns.weight.add_(0.5)
        model.class_embed.bias.add_(1)
    model.save_pretrained(path)
    content, before = load_checkpoint(path), weights(load_checkpoint(run("dn-detr-patterns")))
    now, unknown = content["model"], before["queries.label_enc.weight"][-1:]
    assert now["decoder.class_embed.bias"].allclose(before["decoder.class_embed.bias"] + 1)
    expected = torch.nn.functional.pad(unknown, (0, 1)) + before["queries.patterns.weight"] + 0.5
    torch.testing.assert_close(now["queries.patterns.weight"], expected)
    assert now["queries.label_enc.weight"][:-1].equal(before["queries.label_enc.weight"][:-1])
    assert now["queries.label_enc.weight"][-1].count_nonzero() == 0
    assert content["classes"] == [(3, "cell"), (7, "dust"), (12, "cell")]
    with pytest.warns(UserWarning, match="its weights were changed since dndetr exported them"):
        assert load(path, "cpu").config.model.box_eps == 1e-5


def test_other_classes_are_theirs(exported):
    path, _ = exported("vectors-plain")
    other = {"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    model = transformers.AutoModelForObjectDetection.from_pretrained(path, ignore_mismatched_sizes=True, **other)
    model.save_pretrained(path)
    content = load_checkpoint(path)
    assert content["classes"] == [(0, "a"), (1, "b")] and "queries.label_enc.weight" in content["blank"]


def test_the_card(exported, run):
    path, _ = exported("dn-detr")
    card = (path / "README.md").read_text()
    about = yaml.safe_load(card.split("---\n")[1])
    assert about["library_name"] == "transformers" and about["pipeline_tag"] == "object-detection"
    assert about["datasets"] == ["data"] and "license" in about
    (results,) = about["model-index"][0]["results"]
    rows = [json.loads(line) for line in (run("dn-detr") / "metrics.jsonl").read_text().splitlines()]
    ap = next(row["AP"] for row in rows if row["event"] == "eval")
    assert {metric["type"]: metric["value"] for metric in results["metrics"]}["AP"] == pytest.approx(ap, abs=1e-4)
    assert "| preset | dn-detr-r50 |" in card and "| epochs | 1 of 1 |" in card


def test_any_name_of_data_is_read_from_the_card():
    name = 'bees: "\N{HONEYBEE}" # é'
    config = replace(train.parse([]), data=name)
    card = model_card("new", "dab-detr", "DAB-DETR", config, [(1, "bee")], {"AP": 0.5})
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == [config.data_name]


def test_a_detector_of_theirs_can_be_given_on(exported, pictures, tmp_path, capsys):
    """What was never ours has an image to be compared on, and no denoising to speak of."""
    path, _ = exported("two-stages")
    (path / "dndetr.safetensors").unlink()
    photo = str(pictures / "val" / "0.jpg")
    assert export.main([str(path), "--to", "transformers", str(tmp_path / "again"), "--image", photo]) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Deformable DETR for 3 classes" in card and "rained" not in card and "model-index" not in card
    first, again = (load_checkpoint(tmp_path / place)["model"] for place in ("given/two-stages", "again"))
    assert first.keys() == again.keys() and all(first[name].equal(again[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"preset": "dn-deformable-detr-r50"},
            "a dn-deformable-detr whose queries have anchors: of ours, transformers",
        ),
        ({"preset": "dino-r50"}, "--model.query-positions vectors"),
        ({"preset": "dn-deformable-encoder-r50"}, "the presets dn-detr-r50 and dn-detr-r101"),
        ({"preset": "dn-detr-r50-dc5"}, "--model.backbone.dilation True"),
        ({"preset": "dn-detr-r50", "model.backbone.stem": "small"}, "--model.backbone.stem small: give imagenet"),
        ({"preset": "dn-detr-r50", "model.backbone.norm": "group"}, "--model.backbone.norm group: give frozen or"),
        ({"preset": "dn-detr-r50", "model.temperature": "20.5 20"}, "--model.temperature 20.5 20"),
        (_VECTORS | {"model.width": "48"}, "--model.width 48: give a multiple of 32"),
        (_VECTORS | {"model.decoder-layers": "1"}, "--model.decoder-layers 1: give 2 or more, or two stages"),
        (_VECTORS | {"model.proposals": "selected"}, "--model.proposals selected: give objects"),
        (_VECTORS | {"model.position-shift": "0"}, "--model.position-shift 0.0: give 0.5"),
    ],
)
def test_what_transformers_has_no_counterpart_of(settings, told, tmp_path, capsys):
    from dndetr.hf.written_config import to_transformers

    config = train.parse(flags(_SMALL | settings))
    with pytest.raises(ValueError) as error:
        to_transformers(config, [(1, "cell")])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--output model.onnx or model.pt2, or a new folder, --to transformers DIR"),
        (["--to", "transformers", "new", "--output", "a.onnx"], "give a new file"),
        (["--to", "transformers", "new", "--format", "onnx"], "--format onnx: give no format with --to transformers"),
        (["--to", "transformers", "there"], "there is already there and not empty"),
        (["--to", "mmdet", "new"], "error: --to mmdet new: give transformers and a path (python"),
        (["--to", "transformers"], "error: --to transformers: give transformers and a path (python"),
        (["--to", "transformers", "new", "--image", "none.jpg"], "none.jpg"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments, told, run, tmp_path, monkeypatch, capsys):
    model = run("dn-detr")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert export.main([str(model), *arguments]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_differs_is_not_written(run, tmp_path, monkeypatch, capsys):
    from dndetr.runs import written_detector

    real = written_detector.to_detector

    def wrong(state, config):
        theirs, kept = real(state, config)
        theirs["class_embed.bias"] = theirs["class_embed.bias"] + 0.01
        return theirs, kept

    monkeypatch.setattr(written_detector, "to_detector", wrong)
    assert export.main([str(run("dn-detr")), "--to", "transformers", str(tmp_path / "new")]) == 1
    assert "does not do what the model does" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_without_transformers_it_is_said_what_to_install(run, tmp_path):
    code = textwrap.dedent("""
        import sys
        sys.modules["transformers"] = None
        from importlib import metadata
        version = metadata.version
        def hidden(name):
            if name == "transformers":
                raise metadata.PackageNotFoundError(name)
            return version(name)
        metadata.version = hidden
        from dndetr import export
        sys.exit(export.main(sys.argv[1:]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(run("dn-detr")), "--to", "transformers", str(tmp_path / "new")],
        **{"env": environment(), "capture_output": True, "text": True},
    )
    assert done.returncode == 1 and "pip install 'transformers" in done.stderr and not any(tmp_path.iterdir())


def test_settings_survive_as_they_were(exported, run):
    path, _ = exported("vectors")
    assert to_dict(load(path, "cpu").config) == settings_without_paths(load_checkpoint(run("vectors")))
