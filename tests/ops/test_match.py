import pytest
import torch

from dndetr.batch import Targets
from dndetr.ops import CostWeights, match
from dndetr.ops.match import Matches, match_in_rounds, match_reference
from dndetr.ops.match_cost import CASES, compiled_inputs, make_case


@pytest.mark.parametrize("name", CASES)
def test_both_directions_agree(name):
    logits, boxes, targets = make_case(name)
    matches = match(logits, boxes, targets, CostWeights())
    layers, batch, queries, _, counts, slots, _ = CASES[name]
    assert matches.query.shape == (layers, batch, 1, slots) and matches.query.dtype == torch.int32
    assert matches.target.shape == (layers, batch, queries) and matches.target.dtype == torch.int32
    assert matches.finite.all()
    for y in range(layers):
        for b in range(batch):
            found = {(q, t) for t, q in enumerate(matches.query[y, b, 0].tolist()) if q >= 0}
            assert found == {(q, t) for q, t in enumerate(matches.target[y, b].tolist()) if t >= 0}
            assert len(found) == min(counts[b], queries)


def test_every_set_is_matched_on_its_own():
    logits, boxes, targets = make_case("coco")
    matches = match(logits, boxes, targets, CostWeights(), sets=3)
    assert matches.query.shape == (6, 2, 3, 32)
    for s in range(3):
        part = slice(s * 100, s * 100 + 100)
        alone = match(logits[:, :, part], boxes[:, :, part], targets, CostWeights())
        shifted = torch.where(alone.query < 0, -1, alone.query + s * 100)
        assert torch.equal(matches.query[:, :, s : s + 1], shifted)
        assert torch.equal(matches.target[:, :, part], alone.target)


def test_more_targets_than_queries():
    logits, boxes, targets = make_case("bf16")
    matches = match(logits[:, :, :4], boxes[:, :, :4], targets, CostWeights())
    assert (matches.query[0, 1] >= 0).sum() == 4 and (matches.target[0, 1] >= 0).all()


def test_padding_does_not_change_the_matches():
    logits, boxes, targets = make_case("uneven")
    grow = torch.nn.functional.pad
    wider = Targets(grow(targets.labels, (0, 24)), grow(targets.boxes, (0, 0, 0, 24)), targets.counts)
    narrow, wide = match(logits, boxes, targets, CostWeights()), match(logits, boxes, wider, CostWeights())
    assert torch.equal(narrow.target, wide.target)
    assert torch.equal(narrow.query, wide.query[..., :8]) and (wide.query[..., 8:] == -1).all()


def test_a_broken_prediction_is_flagged_and_matched_last():
    logits, boxes, targets = make_case("uneven")
    broken = match(logits, boxes, targets, CostWeights()).query[1, 0, 0, 2]
    boxes[1, 0, broken] = float("nan")
    matches = match(logits, boxes, targets, CostWeights())
    assert matches.finite.logical_not().nonzero().tolist() == [[1, 0]]
    assert matches.target[1, 0, broken] == -1
    assert (matches.query[1, 0, 0] >= 0).all()


def test_indivisible_sets_are_an_error():
    logits, boxes, targets = make_case("tiny")
    with pytest.raises(ValueError, match="5 queries do not divide into 2"):
        match(logits, boxes, targets, CostWeights(), sets=2)


@pytest.mark.parametrize(("most", "queries"), [(32, 300), (32, 33), (32, 61), (128, 300), (299, 300)])
@pytest.mark.parametrize("counts", [(7, 8), (0, 3), (0, 0), (1, 8)])
def test_rounds_lose_nothing(most, queries, counts):
    """A matching in parts is that of all, to the query, also where the best queries are all in the last part."""
    logits, boxes, targets = make_case("coco")
    logits, boxes = logits.double()[:, :, :queries], boxes.double()[:, :, :queries]
    logits[:, 1] += torch.linspace(-3, 3, queries, dtype=torch.float64)[:, None]
    targets = Targets(targets.labels[:, :8], targets.boxes[:, :8].double(), torch.tensor(counts, dtype=torch.int32))

    def at_once(logits, boxes, sets):
        assert logits.shape[2] // sets <= most
        return match(logits, boxes, targets, CostWeights(), sets)

    given, expected = match_in_rounds(logits, boxes, 8, at_once, most), match(logits, boxes, targets, CostWeights())
    for name, there, here in zip(Matches._fields, given, expected, strict=True):
        assert torch.equal(there, here), name
        assert there.dtype == here.dtype


@pytest.mark.parametrize("broken", [3, 299])
def test_rounds_see_a_broken_prediction(broken):
    logits, boxes, targets = make_case("coco")
    targets = Targets(targets.labels[:, :8], targets.boxes[:, :8], targets.counts.clamp(max=8))
    boxes[2, 1, broken] = float("nan")
    matches = match_in_rounds(logits, boxes, 8, lambda x, y, sets: match(x, y, targets, sets=sets), 77)
    assert matches.finite.logical_not().nonzero().tolist() == [[2, 1]]
    assert matches.target[2, 1, broken] == -1 and (matches.query[2, 1, 0, : targets.counts[1]] >= 0).all()


def test_compiles_without_a_graph_break():
    logits, boxes, targets = make_case("uneven")
    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    for given, expected in zip(compiled(logits, boxes, targets), match(logits, boxes, targets), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("sets", [1, 3])
def test_nothing_is_asked_of_the_device(fake_cuda, sets):
    logits, boxes = torch.empty(6, 2, 300, 91, device="cuda"), torch.empty(6, 2, 300, 4, device="cuda")
    targets = Targets(
        torch.empty(2, 32, dtype=torch.int64, device="cuda"),
        torch.empty(2, 32, 4, device="cuda"),
        torch.empty(2, dtype=torch.int32, device="cuda"),
    )
    matches = match(logits, boxes, targets, CostWeights(), sets)
    assert [tuple(x.shape) for x in matches] == [(6, 2, sets, 32), (6, 2, 300), (6, 2)]
    assert all(x.device.type == "cuda" and x.fake_mode is fake_cuda for x in matches)


def test_any_number_of_queries_is_matched_on_a_gpu(fake_cuda):
    """All tokens of an encoder: more than a kernel takes at once."""
    logits, boxes = torch.empty(1, 2, 22223, 1, device="cuda"), torch.empty(1, 2, 22223, 4, device="cuda")
    targets = Targets(
        torch.empty(2, 64, dtype=torch.int64, device="cuda"),
        torch.empty(2, 64, 4, device="cuda"),
        torch.empty(2, dtype=torch.int32, device="cuda"),
    )
    matches = match(logits, boxes, targets, CostWeights())
    assert [tuple(x.shape) for x in matches] == [(1, 2, 1, 64), (1, 2, 22223), (1, 2)]
    assert [x.dtype for x in matches] == [torch.int32, torch.int32, torch.bool]


@pytest.mark.parametrize("simd", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("sets", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_compiled_is_cost_then_assign(extension, name, sets, simd):
    logits, boxes, targets = make_case(name)
    queries = logits.shape[2] // sets * sets
    logits, boxes = logits[:, :, :queries], boxes[:, :, :queries]
    for position in (0.0, 0.5, 0.3):
        weights = CostWeights(position=position)
        expected = match_reference(logits, boxes, targets, weights, sets, "reference")
        given = [torch.full_like(x, 77) for x in (expected.query, expected.target)]
        finite = torch.zeros(*expected.finite.shape, sets, dtype=torch.bool)
        inputs = (logits, boxes, targets.labels, targets.boxes, targets.counts, list(weights))
        with compiled_inputs(extension, *inputs) as compiled:
            extension.match(compiled, sets, tuple(x.data_ptr() for x in (*given, finite)), 1, simd)
        assert torch.equal(given[0], expected.query) and torch.equal(given[1], expected.target)
        assert finite.all()


def test_threads_do_not_change_the_answer(extension):
    draw = torch.Generator().manual_seed(4)
    logits, boxes = torch.randn(6, 4, 300, 20, generator=draw), torch.rand(6, 4, 300, 4, generator=draw)
    labels = torch.randint(20, (4, 64), generator=draw)
    targets = Targets(labels, torch.rand(4, 64, 4, generator=draw), torch.full((4,), 50, dtype=torch.int32))
    alone = match(logits, boxes, targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(match(logits, boxes, targets), alone, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_other_images_do_not_change_the_answer():
    logits, boxes, targets = make_case("uneven")
    logits = (logits * 2).round()
    boxes, coarse = (boxes * 4).round() / 4, (targets.boxes * 4).round() / 4  # full of ties
    together = match(logits, boxes, Targets(targets.labels, coarse, targets.counts))
    for b in (2, 0, 1):
        part = slice(b, b + 1)
        alone = match(
            logits[:, part], boxes[:, part], Targets(targets.labels[part], coarse[part], targets.counts[part])
        )
        assert torch.equal(together.target[:, part], alone.target)


def test_equal_predictions_go_to_the_lowest_queries():
    logits, boxes, targets = make_case("uneven")
    logits, boxes = logits[:, :, :1].expand(-1, -1, 37, -1), boxes[:, :, :1].expand(-1, -1, 37, -1)
    matches = match(logits, boxes, targets)
    for b, count in enumerate(targets.counts.tolist()):
        assert all(set(found[:count].tolist()) == set(range(count)) for found in matches.query[:, b, 0])


def test_opcheck(extension):
    logits, boxes, targets = make_case("uneven")
    inputs = (logits, boxes, targets.labels, targets.boxes, targets.counts, list(CostWeights()), 1, True)
    torch.library.opcheck(torch.ops.dndetr.match.default, inputs)


def test_backends_agree(extension):
    logits, boxes, targets = make_case("coco")
    for position in (0.0, 0.5, 1.0):
        weights = CostWeights(position=position)
        both = (match(logits, boxes, targets, weights, backend=name) for name in ("cpp", "reference"))
        for given, expected in zip(*both, strict=True):
            assert torch.equal(given, expected)


def test_a_score_counts_as_much_as_its_box_fits():
    """Of two queries the confident one is cheaper, until its score is that of its box."""
    logits, boxes = torch.tensor([[[[4.0], [1.0]]]]), torch.tensor([[[[0.3, 0.3, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2]]]])
    targets = Targets(torch.zeros(1, 1, dtype=torch.int64), boxes[0, :, 1:], torch.tensor([1], dtype=torch.int32))
    for position, query in ((0.0, 0), (0.5, 1)):
        assert match(logits, boxes, targets, CostWeights(2.0, 0.0, 0.0, 0.25, position)).query.item() == query
