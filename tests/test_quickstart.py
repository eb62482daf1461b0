"""The notebook of the documentation: it runs, and what is stored of it speaks of no machine."""

import json
import re

import pytest
from notebooks import cells, executed, nbformat, outputs


@pytest.fixture
def quickstart(root):
    return nbformat.read(root / "docs" / "quickstart.ipynb", as_version=4)


def test_it_was_executed_in_order_and_is_small(root, quickstart):
    code = [cell for cell in quickstart.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for output in outputs(quickstart))
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs(quickstart)) == 3
    assert (root / "docs" / "quickstart.ipynb").stat().st_size < 300_000


def test_its_outputs_name_no_place(quickstart):
    text = json.dumps(
        [[output.get("text"), output.get("data", {}).get("text/plain")] for output in outputs(quickstart)]
    )
    assert "AP" in text and not re.search(r"(?<![\w.])~?/[\w.]+|[A-Z]:\\\\", text)


def test_its_links_lead_somewhere(root, quickstart):
    text = "".join(cell.source for cell in quickstart.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 2 and all((root / "docs" / link).exists() for link in links)


def unmeasured(notebook) -> list[str]:
    """The lines that were printed, without those that have numbers that machines differ in."""
    text = "".join(output.get("text", "") for output in outputs(notebook))
    return [line for line in text.splitlines() if not re.search(r"\d\.\d", line)]


@pytest.mark.slow
def test_it_runs(tmp_path, quickstart):
    """With a fifth of its epochs, whose rows hold nothing but what machines differ in."""
    said = unmeasured(quickstart)
    (training,) = (cell for cell in quickstart.cells if "epochs=10," in cell.source)
    training.source = training.source.replace("epochs=10,", "epochs=2,")
    done = executed(quickstart, tmp_path, timeout=500)
    assert unmeasured(done) == said, "execute it again, and store it"
    shown = [output for output in outputs(done) if "text/html" in output.get("data", {})]
    assert len(shown) == 3 and "step 100/100" in shown[0].data["text/html"]


@pytest.mark.slow
def test_a_cell_that_is_interrupted_shows_one_line_and_leaves_the_run(tmp_path):
    training = """
import os, signal, time
import dndetr


class Interrupting(dndetr.Listener):
    def step_ended(self, step, images, waited):
        time.sleep(0.5)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)


dndetr.fit(epochs=2, batch_size=4, train_images=12, val_images=6, listeners=[Interrupting()])
"""
    done = executed(cells(training, 'dndetr.TrainedRun("runs/tiny-1").status'), tmp_path, allow_errors=True)
    *_, before, live, table, error = outputs(done)[:-1]
    assert before.text.splitlines()[-1].split()[:2] == ["6", "ring"]  # the table of classes
    assert "step 4/6" in live.data["text/html"] and table.text.split()[0] == "epoch"
    assert error.traceback == ["interrupted; runs/tiny-1 is saved: go on with dndetr.fit(resume='runs/tiny-1')"]
    assert outputs(done)[-1].data["text/plain"] == "'stopped'"
