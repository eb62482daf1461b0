"""Where kernels get their tiles: from tables, unless they are to be measured."""

import pytest
import torch

triton = pytest.importorskip("triton")

from dndetr.kernels import product_tiles, tiles  # noqa: E402
from dndetr.kernels.product_tiles import CANDIDATES, TABLES, Class, Tile, product_tile  # noqa: E402

GPU = torch.device("cuda", 0)
FASTEST, TOO_LARGE = Tile(64, 128, 32, 4, 2), Tile(128, 256, 64, 8, 4)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What is asked of a GPU is answered as by an H100 that measures; launched(): which tiles were."""
    launched = []

    def launch(tile):
        if tile == TOO_LARGE:
            raise triton.runtime.errors.OutOfResources(300, 227, "shared memory")
        launched.append(tile)

    def measure(run):
        run()
        return 1.0 if launched[-1] == FASTEST else 2.0

    monkeypatch.setattr(triton.testing, "do_bench", measure)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tiles, "table_of", lambda device: 90)
    monkeypatch.setattr(tiles, "_tuned", {})
    monkeypatch.setattr(product_tiles, "processors", lambda device: 132)
    return launch, launched


def test_nothing_is_measured_unless_asked_for(on_a_gpu, monkeypatch):
    launch, launched = on_a_gpu
    monkeypatch.delenv("DNDETR_AUTOTUNE", raising=False)
    found = Class("backward", "relu", "many")
    assert tiles.chosen(found, TABLES, CANDIDATES, GPU, launch) == TABLES[90][found] and not launched
    monkeypatch.setenv("DNDETR_AUTOTUNE", "1")
    assert tiles.chosen(found, TABLES, CANDIDATES, torch.device("cpu"), launch) == TABLES[90][found] and not launched
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tiles.chosen(found, TABLES, CANDIDATES, GPU, launch) == TABLES[90][found] and not launched


def test_each_class_is_measured_once(on_a_gpu, monkeypatch, capsys):
    launch, launched = on_a_gpu
    monkeypatch.setenv("DNDETR_AUTOTUNE", "1")
    found = Class("forward", "prelu", "few")
    for _ in range(2):
        assert tiles.chosen(found, TABLES, CANDIDATES, GPU, launch) == FASTEST
    assert launched == [tile for tile in CANDIDATES if tile != TOO_LARGE]
    assert capsys.readouterr().out == f"    {found}: {FASTEST},\n"
    tiles.chosen(found._replace(load="many"), TABLES, CANDIDATES, GPU, launch)
    assert len(launched) == 2 * len(CANDIDATES) - 2


def test_products_of_many_rows_have_larger_tiles(on_a_gpu, fake_cuda, monkeypatch):
    monkeypatch.delenv("DNDETR_AUTOTUNE", raising=False)

    def taken(kernel, rows, slope=None):
        return product_tile(kernel, torch.empty(rows, 2048, device="cuda"), slope, None)

    few, many = Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)
    for kernel in ("forward", "backward"):
        assert taken(kernel, 1) == taken(kernel, 1000) == few
    assert taken("forward", 44446) == taken("backward", 8000, torch.empty(1)) == many
    assert taken("backward", 44446) == many._replace(registers=128)


def test_tables_hold_every_class_and_only_candidates():
    for kind, table in TABLES.items():
        assert table.keys() == TABLES[90].keys()
        assert kind == "amd" or set(table.values()) <= set(CANDIDATES)
