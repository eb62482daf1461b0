"""Training on many GPUs on paper: the page has what is printed, and the simulator does what its formulas say."""

import math
import subprocess
import sys

import numpy as np
import pytest
import scale
import scale_work
from all_reduce import H100S, INSTANT, Links, all_reduce
from scale_simulator import Loader, Saving, Stragglers, Work, exchanged, opening, simulate, undisturbed
from scale_work import AT_ONCE, CAPTURED, CAUSES, COUNTS, EAGER, all_at_the_end, best, efficiency, trained, work_of
from training_events import Play

NO_STRAGGLERS, NO_LOADING = Stragglers(0.0, 0.0, 0.0), Loader(median=0.0)
MODELS = tuple(COUNTS)
SMALL = Work(np.array([0.011, 0.016, 0.02]), 0.023, 0.002, (1e6, 25e6, 7e6), 4e5, batches=2, images=3)


@pytest.fixture(scope="module")
def page(root):
    return (root / "docs" / "scale.md").read_text()


def test_the_page_has_the_tables_that_are_printed(page, capsys):
    assert scale.written(page) == page
    scale.run([])
    for block in capsys.readouterr().out.strip().split("\n\n"):
        assert f"\n{block}\n<!-- end -->" in page


def test_a_table_without_a_place_is_named(page):
    with pytest.raises(ValueError, match="the table limits needs one place in the page: <!-- scale: limits -->"):
        scale.written(page.replace("<!-- scale: limits -->", ""))
    with pytest.raises(ValueError, match="the table limits"):
        scale.written(page + "<!-- scale: limits -->\n<!-- end -->")


def test_what_cannot_be_written_is_told_in_a_line(root, tmp_path):
    wrong = tmp_path / "page.md"
    wrong.write_text("no place for tables")
    told = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "scale.py"), str(wrong)], capture_output=True, text=True
    )
    assert told.returncode == 1 and told.stderr.count("\n") == 1 and "the table assumptions needs" in told.stderr
    assert wrong.read_text() == "no place for tables"
    for arguments in (["--help-me"], ["one.md", "two.md"]):
        with pytest.raises(ValueError, match=r"name one page, such as docs/scale\.md"):
            scale.run(arguments)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("processes", "images", "mode"), [(1, 16, CAPTURED), (8, 2, EAGER), (64, 32, CAPTURED)])
def test_with_nothing_to_wait_for_a_step_is_its_own_work(model, processes, images, mode):
    """Exactly; and with links of a cluster exactly the closed formula."""
    work = work_of(model, images, mode)
    found = simulate(work, processes, INSTANT, NO_STRAGGLERS, NO_LOADING, steps=7)
    assert found == (work.whole, work.whole, 0, 0, 0, 0)
    found = simulate(work, processes, H100S, NO_STRAGGLERS, NO_LOADING, steps=7)
    assert found.communication == undisturbed(work, processes, H100S) - work.whole
    assert found.stragglers == found.data == found.saving == 0


def test_the_closed_formula_by_hand():
    """The second bucket waits for the first, the third for nobody; the update for the third."""
    took = [all_reduce(size, 64) for size in SMALL.buckets]
    close = SMALL._replace(ready=np.array([0.011, 0.011, 0.02]))
    assert 0.011 + took[0] + took[1] < 0.02
    first_two = close._replace(buckets=close.buckets[:2])
    assert exchanged(close.ready, first_two, 64, H100S) == pytest.approx(0.011 + took[0] + took[1])
    begin = all_reduce(4, 64) + all_reduce(4e5, 64)
    assert opening(SMALL, 64, H100S) == pytest.approx(begin)
    assert undisturbed(close, 64, H100S) == pytest.approx(begin + max(0.02 + took[2] + 0.002, 0.023))
    # A step that the host holds up hides what is exchanged meanwhile.
    assert undisturbed(close._replace(whole=0.05), 64, H100S) == pytest.approx(begin + 0.05)


@pytest.mark.parametrize(
    ("stragglers", "loader", "saving"),
    [
        (NO_STRAGGLERS, NO_LOADING, Saving()),
        (Stragglers(0.1, 0.2, 0.03), Loader(2, 2, 1e-3, 0.5), Saving(0.05, 4)),
        (Stragglers(0.1, 0.2, 0.03), Loader(3, 2, 8e-3, 0.9), Saving(0.05, 4)),
        (Stragglers(0.3, 0.0, 0.0), Loader(1, 1, 4e-3, 0.5), Saving(0.0, 3)),
    ],
    ids=["undisturbed", "disturbed", "bound by data", "one worker"],
)
@pytest.mark.parametrize("processes", [1, 3, 8])
def test_it_is_what_its_events_are_one_by_one(stragglers, loader, saving, processes):
    warm, steps = 4, 12
    found = simulate(SMALL, processes, H100S, stragglers, loader, saving, steps=steps, warm=warm)
    ended = Play(SMALL, processes, H100S, stragglers, loader, warm + steps).run(saving, warm)
    assert len(ended) == warm + steps
    assert found.step == pytest.approx((ended[-1] - ended[warm - 1]) / steps, rel=1e-12)
    assert found.step == sum(found[1:])


def expected_slowest(spread: float, processes: int) -> float:
    """Of so many log-normal numbers: the integral of the largest one's density, by the trapezoidal rule."""
    z = np.linspace(-10, 10, 20001)
    below = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z])
    density = processes * below ** (processes - 1) * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float((density * np.exp(spread * z)).sum() * (z[1] - z[0]))


@pytest.mark.parametrize("processes", [1, 2, 8, 64, 512])
@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_the_slowest_process_is_as_slow_as_order_statistics_say(processes, spread):
    assert expected_slowest(spread, 1) == pytest.approx(math.exp(spread**2 / 2), rel=1e-9)
    found = simulate(SMALL, processes, INSTANT, Stragglers(spread, 0.0, 0.0), NO_LOADING, steps=1000, warm=0)
    # Bucket by bucket the slowest decides, so the step is the slowest's: 1000 of them, to four standard errors.
    slow = expected_slowest(spread, processes)
    deviation = math.sqrt(expected_slowest(2 * spread, processes) - slow**2)
    assert found.step / SMALL.whole == pytest.approx(slow, abs=4 * deviation / math.sqrt(1000))


def test_pauses_come_as_often_as_they_should():
    """Somebody of 64 pauses in 1 - 0.99^64 of the steps, and then nobody goes on."""
    found = simulate(SMALL, 64, INSTANT, Stragglers(0.0, 0.01, 0.5), NO_LOADING, steps=4000, warm=0)
    share = 1 - 0.99**64
    error = 4 * math.sqrt(share * (1 - share) / 4000)
    assert found.stragglers / 0.5 == pytest.approx(share, abs=error)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loader", [NO_LOADING, Loader(2, 2, 4e-3, 0.5)], ids=["", "bound by data"])
def test_more_stragglers_never_speed_it_up(seed, loader):
    def step(spread, rare, pause):
        return simulate(SMALL, 64, H100S, Stragglers(spread, rare, pause), loader, steps=100, seed=seed).step

    rarer = [step(0.02, rare, 0.02) for rare in (0, 1e-4, 1e-2, 0.5, 1)]
    longer = [step(0.02, 0.01, pause) for pause in (0, 1e-3, 0.1, 2)]
    wider = [step(spread, 0.01, 0.02) for spread in (0, 0.01, 0.05, 0.3)]
    for series in (rarer, longer, wider):
        assert series == sorted(series)
    # Saving takes what it says, unless others wait meanwhile anyway.
    saved = simulate(SMALL, 64, H100S, NO_STRAGGLERS, NO_LOADING, Saving(0.3, 10), steps=100)
    assert saved.saving == pytest.approx(0.03)


@pytest.mark.parametrize(("workers", "batches", "images"), [(1, 1, 4), (3, 1, 2), (4, 2, 3), (2, 8, 1)])
def test_what_is_bound_by_data_runs_at_its_workers_rate(workers, batches, images):
    work = SMALL._replace(batches=batches, images=images)
    loader = Loader(workers, 2, median=0.1, spread=0.0)
    steps = 24 * workers
    found = simulate(work, 8, H100S, NO_STRAGGLERS, loader, steps=steps, warm=20 * workers)
    assert found.step == pytest.approx(images * batches * 0.1 / workers, rel=1e-9)
    assert found.data == pytest.approx(found.step - undisturbed(work, 8, H100S), rel=1e-9)
    # Workers keep up with a step that takes longer than they do, but for batches of it that they do not hold.
    slow = work._replace(whole=images * batches * 0.1 / workers * 1.01)
    keeping_up = simulate(slow, 8, INSTANT, NO_STRAGGLERS, loader, steps=steps, warm=20 * workers)
    missing = max(0, -(-(batches - 2 * workers) // workers))
    assert keeping_up.data == pytest.approx(missing * images * 0.1, abs=1e-9)


def test_a_seed_is_a_result():
    one, same, other = (simulate(SMALL, 8, steps=50, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_what_is_lost_and_what_is_left_are_all_of_it():
    found, lost = trained("dino-r50", 256, 64, EAGER)
    assert tuple(lost) == CAUSES
    assert efficiency(lost) == pytest.approx(best("dino-r50") * 256 / 64 / found.step, rel=1e-12)
    assert min(lost.values()) >= 0 and lost["launches"] == max(lost.values())


def test_a_host_that_is_slow_decides_and_one_that_is_fast_does_not():
    counts = COUNTS["dn-detr-r50"]["steps"]["2"]
    kernels = [counts["forward"][1] + each[1] for each in counts["whole"]]
    slow = work_of("dn-detr-r50", 2, 1e-2)
    assert slow.ready / 1e-2 == pytest.approx(kernels, rel=1e-12)
    assert slow.whole == pytest.approx(1e-2 * (kernels[-1] + counts["after"][1]))
    captured = work_of("dn-detr-r50", 2, CAPTURED)
    assert captured.whole == pytest.approx(captured.ready[-1] + captured.update)
    assert (captured.ready < slow.ready).all() and work_of("dn-detr-r50", 2, 1e-9).whole == captured.whole
    # Two batches of 16: the first one's gradients are only added up.
    one, two = (work_of("dn-detr-r50", images, CAPTURED) for images in (AT_ONCE, 2 * AT_ONCE))
    assert (two.batches, two.images) == (2, AT_ONCE)
    assert np.diff(two.ready) == pytest.approx(np.diff(one.ready)) and two.whole < 2 * one.whole
    with pytest.raises(ValueError, match="3 images a process: give one of 1, 2, 4, 8, 16, or a multiple of 16"):
        work_of("dn-detr-r50", 3, CAPTURED)


def test_options_save_what_their_bytes_take():
    """With slow links half of the bytes are half of the time; with instant ones casts only cost."""
    plain, half = (work_of("dino-r50", 1, CAPTURED, half=half) for half in (False, True))
    slow = Links(nvlink=1e8, network=1e8, protocols=INSTANT.protocols)
    sent = sum(COUNTS["dino-r50"]["buckets"])
    assert undisturbed(plain, 8, slow) - undisturbed(half, 8, slow) == pytest.approx(
        0.5 * 2 * 7 / 8 * sent / 1e8, rel=1e-2
    )
    assert undisturbed(half, 8, INSTANT) > undisturbed(plain, 8, INSTANT)
    view = work_of("dino-r50", 1, CAPTURED, view=True)
    copies = sum(COUNTS["dino-r50"]["copying"]) * scale_work.SLOWER
    assert plain.whole - view.whole == pytest.approx(copies)
    late = all_at_the_end("dino-r50", 1, 8, slow) - all_at_the_end("dino-r50", 1, 1, slow)
    assert late == pytest.approx((2 * 7 / 8 * sent + 7 / 4 * 4) / 1e8)
    assert all_at_the_end("dino-r50", 1, 1, slow) > COUNTS["dino-r50"]["alone"]["1"] * scale_work.SLOWER
    quiet = work_of("dino-r50", 1, CAPTURED, buffers=False)
    saved = undisturbed(plain, 64, H100S) - undisturbed(quiet, 64, H100S)
    assert saved == pytest.approx(all_reduce(COUNTS["dino-r50"]["buffers"], 64))
