"""The benchmark of fused kernels without a GPU: both sides compute the same, and what is recorded adds up."""

import bench_fused
import ceilings
import pytest
import torch

SMALL = {
    "stem": lambda: bench_fused.of_stem((2, 3, 13, 18), 4, torch.float32, "cpu", "reference"),
    "frozen_norm": lambda: bench_fused.of_frozen_norm((2, 8, 3, 5), False, "cpu", "reference"),
    "frozen_norm, of the shortcut, too": lambda: bench_fused.of_frozen_norm((2, 8, 3, 5), True, "cpu", "reference"),
    "add_norm": lambda: bench_fused.of_add_norm((2, 7, 16), False, "cpu", "reference"),
    "add_norm, with position": lambda: bench_fused.of_add_norm((2, 7, 16), True, "cpu", "reference"),
    "column_sums": lambda: bench_fused.of_column_sums((50, 16), None, "cpu", "reference"),
    "column_sums, behind a ReLU": lambda: bench_fused.of_column_sums((50, 16), "ReLU", "cpu", "reference"),
    "column_sums, behind a PReLU": lambda: bench_fused.of_column_sums((50, 16), "PReLU", "cpu", "reference"),
    "level_sums": lambda: bench_fused.of_level_sums(2, (20, 5), 16, "cpu", "reference"),
    "prelu": lambda: bench_fused.of_prelu((50, 16), "cpu", "reference"),
    "pixel_encoding": lambda: bench_fused.of_pixel_encoding(2, (20, 36), 2, 8, "cpu", "reference"),
    "anchor_encoding": lambda: bench_fused.of_anchor_encoding((50, 4), 16, "cpu", "reference"),
    "refine_boxes": lambda: bench_fused.of_refine_boxes((50, 4), "cpu", "reference"),
    **{
        f"activated_product{'_backward' * backward}, {activation}": lambda activation=activation, backward=backward: (
            bench_fused.of_activated_product((50, 8, 16), activation, backward, "cpu", "reference")
        )
        for activation in ("ReLU", "PReLU")
        for backward in (False, True)
    },
}
# Bytes of each pass: numbers, times the sizes in which they are read or written.
MOVED = {
    "stem": [2 * 3 * 13 * 18 * 4 + 2 * 4 * (2 * 10 * 12 * 16 + 2 * 7 * 9 * 4 + 4 * 5 * 4)],
    "frozen_norm": [240 * 2 * 3, 240 * 2 * 7],
    "frozen_norm, of the shortcut, too": [240 * 2 * 3, 240 * 2 * 7],
    "add_norm": [224 * (3 * 4 + 2 * 2), 224 * (6 * 4 + 4 * 2)],
    "add_norm, with position": [224 * (4 * 4 + 3 * 2), 224 * (7 * 4 + 6 * 2)],
    "column_sums": [800 * 2],
    "column_sums, behind a ReLU": [800 * 2 * 3],
    "column_sums, behind a PReLU": [800 * 2 * 3],
    "level_sums": [800 * 2],
    "prelu": [800 * 2 * 2],
    "pixel_encoding": [2 * (3 * 5 + 2 * 3) * 8 * 4],
    "anchor_encoding": [200 * 4 * 17, 200 * 4 * (17 + 18)],
    "refine_boxes": [200 * (2 + 2 * 4), 200 * (2 * 2 + 6 * 4)],
    "activated_product, ReLU": [2 * (50 * 8 + 16 * 8 + 800)],
    "activated_product, PReLU": [2 * (50 * 8 + 16 * 8 + 2 * 800)],
    "activated_product_backward, ReLU": [2 * (50 * 8 + 16 * 8 + 2 * 800)],
    "activated_product_backward, PReLU": [2 * (50 * 8 + 16 * 8 + 2 * 800)],
}


@pytest.mark.parametrize("name", SMALL)
def test_contestants_agree(name):
    torch.manual_seed(0)
    contest = SMALL[name]()
    weighting = [torch.randn_like(result) for result in bench_fused.results(contest.functions["ours"])]
    found, expected = (
        bench_fused.results(f) + list(bench_fused.gradients(f, contest.leaves, weighting) if contest.leaves else ())
        for f in contest.functions.values()
    )
    if name.startswith("frozen_norm"):
        # torch rounds after every kernel, which near zero decides what of the gradients passes the ReLU.
        torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=5e-2)
        assert all(torch.equal(grad == 0, found[0] == 0) for grad in found[1:])
        assert all(torch.equal(grad == 0, expected[0] == 0) for grad in expected[1:])
    else:
        *found, last = found
        torch.testing.assert_close(found, expected[:-1])
        # torch rounds the products that it adds up to a slope's gradient.
        torch.testing.assert_close(last, expected[-1], **({"rtol": 1e-3, "atol": 0} if name.endswith("PReLU") else {}))


@pytest.mark.parametrize("name", SMALL)
def test_every_pass_is_recorded(name, monkeypatch):
    monkeypatch.setattr(ceilings, "gpu_seconds", lambda function: function() is not None and 0.5)
    recorded = {}
    contest = SMALL[name]()
    bench_fused.compete(lambda title, *given, **counted: recorded.update({title: (given, counted)}), name, contest, 1e4)
    passes = ["forward", "forward and backward"][: len(MOVED[name])]
    assert list(recorded) == [f"{name}, {which}" for which in passes]
    for ((seconds,), counted), moved in zip(recorded.values(), MOVED[name], strict=True):
        of_products = name.startswith("activated_product")
        assert seconds == {"ours": 0.5, "two steps" if of_products else "torch": 0.5}
        rate = {"operations_per_second": 2 * 50 * 8 * 16 / 0.5} if of_products else {}
        assert counted == {"bytes": moved, "share_of_copy": moved / 0.5 / 1e4, "detail": True} | rate


def test_every_op_competes_at_the_sizes_of_training():
    kinds = {name.partition(" ")[0].strip(",") for name in bench_fused.CONTESTS}
    encodings = {"pixel_encoding", "anchor_encoding", "refine_boxes"}
    products = {"activated_product", "activated_product_backward"}
    norms = {"stem", "frozen_norm", "add_norm", "column_sums", "level_sums", "prelu"}
    assert kinds == norms | encodings | products
    assert len(bench_fused.CONTESTS) == 39
