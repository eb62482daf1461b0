import math
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from callers import every_caller

from dndetr.ops import _backend
from dndetr.ops._attention import self_test_error
from dndetr.ops._backend import Backend, choose


@pytest.fixture
def op(fresh_backends, monkeypatch):
    """Registers backends of an op named ``probe`` for one test."""
    for name in ("DNDETR_BACKEND", "DNDETR_BACKEND_PROBE"):
        monkeypatch.delenv(name, raising=False)
    yield lambda *backends: _backend.register("probe", *backends)
    _backend._backends.pop("probe", None)


def backend(name="cpp", devices=("cpu",), obstacle=None, error=0.0):
    def self_test(device_type):
        if isinstance(error, Exception):
            raise error
        return error

    return Backend(name, devices, lambda device_type: obstacle, self_test, tolerance=1e-3)


def test_auto_takes_the_first_that_works(op):
    op(backend("cuda", obstacle="no compiler"), backend("cpp"))
    name, reason = choose("probe")
    assert name == "cpp"
    assert "cuda: no compiler" in reason


def test_auto_keeps_to_the_devices_of_a_backend(op):
    op(backend("triton", devices=("cuda",)))
    assert choose("probe", device_type="cpu")[0] == "reference"
    assert choose("probe", device_type="cuda")[0] == "triton"
    # An explicit request asks the obstacle only: Triton's interpreter runs on CPU tensors.
    assert choose("probe", "triton", "cpu")[0] == "triton"


def test_explicit_request_that_cannot_run_raises_with_the_reason(op):
    op(backend("cpp", obstacle="no compiler"))
    assert choose("probe")[0] == "reference"
    with pytest.raises(RuntimeError, match="no compiler"):
        choose("probe", "cpp")


def test_unknown_backend_names_the_known_ones(op):
    op(backend("cpp"))
    with pytest.raises(ValueError, match="auto, reference, cpp"):
        choose("probe", "triton")


def test_environment(op, monkeypatch):
    op(backend("cpp"))
    monkeypatch.setenv("DNDETR_BACKEND", "reference")
    assert choose("probe") == ("reference", "asked for by DNDETR_BACKEND")
    _backend.forget()
    monkeypatch.setenv("DNDETR_BACKEND_PROBE", "cpp")
    assert choose("probe") == ("cpp", "asked for by DNDETR_BACKEND_PROBE")
    assert choose("probe", "reference") == ("reference", "asked for by the backend argument")


def test_environment_for_all_ops_binds_those_that_have_the_backend(op, monkeypatch):
    op(backend("cpp"))
    monkeypatch.setenv("DNDETR_BACKEND", "triton")
    assert choose("probe")[0] == "cpp"
    _backend.forget()
    monkeypatch.setenv("DNDETR_BACKEND", "quick")
    with pytest.raises(ValueError, match="DNDETR_BACKEND"):
        choose("probe")


@pytest.mark.parametrize("error", [0.1, float("nan"), RuntimeError("no kernel image")], ids=str)
def test_a_backend_that_disagrees_is_left_with_one_warning(op, error):
    op(backend("cpp", error=error))
    with pytest.warns(UserWarning, match="probe cannot use its cpp backend"):
        assert choose("probe")[0] == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("probe")[0] == "reference"
    with pytest.raises(RuntimeError, match="self-test"):
        choose("probe", "cpp")


def test_self_test_runs_once(op):
    runs = []
    op(Backend("cpp", ("cpu",), lambda device_type: None, lambda device_type: runs.append(1) or 0.0, 0.0))
    for _ in range(3):
        choose("probe")
    choose("probe", "cpp")
    assert len(runs) == 1


def test_self_test_sees_real_tensors_under_a_fake_mode(op):
    op(Backend("cpp", ("cpu",), lambda device_type: None, lambda device_type: torch.zeros(1).item(), 0.0))
    with torch._subclasses.FakeTensorMode():
        assert choose("probe")[0] == "cpp"


def test_self_test_in_a_recomputed_block_differentiates(op):
    def self_test(device_type):
        with torch.enable_grad():
            x = torch.ones(2, requires_grad=True)
            return (torch.autograd.grad((x * x).sum(), x)[0] - 2).abs().max()

    def block(x):
        assert choose("probe")[0] == "cpp"
        return x.exp().square()

    op(Backend("cpp", ("cpu",), lambda device_type: None, self_test, 0.0))
    x = torch.zeros(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("warn_only", [False, True])
def test_self_test_may_do_what_is_not_deterministic(op, warn_only):
    modes = []

    def self_test(device_type):
        modes.append(torch.get_deterministic_debug_mode())
        return 0.0

    op(Backend("cpp", ("cpu",), lambda device_type: None, self_test, 0.0))
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert choose("probe")[0] == "cpp" and modes == [0]
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


@every_caller
def test_what_runs_does_not_depend_on_what_the_caller_has_set(fresh_backends, caller):
    usual = {op: choose(op) for op in _backend.operations()}
    _backend.forget()
    before, state = torch.get_default_dtype(), torch.get_rng_state()
    with caller():
        assert {op: choose(op) for op in _backend.operations()} == usual
    assert torch.get_default_dtype() == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "within",
    [
        lambda function: torch.func.vmap(lambda x: x + function())(torch.zeros(2)),
        lambda function: torch.func.grad(lambda x: x * function())(torch.ones(())),
        lambda function: torch.jit.trace(lambda x: x + function(), torch.zeros(2)),
    ],
    ids=["vmap", "grad", "jit-trace"],
)
def test_self_test_is_no_part_of_a_transform(op, within):
    def self_test(device_type):
        return torch.zeros(1).add_(0).item()

    op(Backend("cpp", ("cpu",), lambda device_type: None, self_test, 0.0))
    within(lambda: len(choose("probe")[0]))
    assert choose("probe")[0] == "cpp"


def test_self_tests_in_threads_leave_the_default_dtype_alone(fresh_backends):
    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=choose, args=(op,)) for op in _backend.operations()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_choice_is_a_constant_under_compile_and_the_reference_under_export(op):
    op(backend("cpp"))

    class Chosen(torch.nn.Module):
        def forward(self, x):
            name, _ = choose("probe")
            return x + 1 if name == "cpp" else x - 1

    assert torch.compile(Chosen(), fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1
    for strict in (False, True):
        assert torch.export.export(Chosen(), (torch.zeros(1),), strict=strict).module()(torch.zeros(1)).item() == -1


def test_missing_extension_is_explained(monkeypatch):
    def absent():
        raise ImportError("no module")

    monkeypatch.setattr(_backend, "compiled", absent)
    monkeypatch.setattr(_backend, "build_info", lambda: {"built": False, "reason": "no C++ compiler was found"})
    assert "no C++ compiler" in _backend.extension_obstacle("assign")
    monkeypatch.setattr(_backend, "build_info", dict)
    assert "pip install -e ." in _backend.extension_obstacle("assign")


@pytest.mark.parametrize(
    ("arch", "runs", "fails"),
    [
        ("8.0", ["8.0", "8.6", "8.9"], ["7.5", "9.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0"]),
        ("9.0a", ["9.0"], ["10.0"]),
        ("10.0f", ["10.0", "10.3"], ["12.0"]),
        ("12.0+PTX", ["12.0", "12.1", "13.0"], ["10.0"]),
    ],
)
def test_which_gpus_run_what_was_compiled(arch, runs, fails):
    for gpu in (*runs, *fails):
        assert _backend._runs(arch, tuple(map(int, gpu.split(".")))) == (gpu in runs), gpu


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: bool(x.sum() > 0),
    ],
    ids=["item", "tolist", "nonzero", "mask", "cpu", "bool"],
)
def test_the_fake_gpu_rejects_what_waits_for_it(fake_cuda, waits):
    x = torch.ones(1, device="cuda")
    assert (x[None, 0:1] + x[..., None])[0].shape == (1,)
    assert torch.ones(1).to("cuda", torch.float16).device == (~(x > 0)).device
    x[0] = 2
    with pytest.raises(Exception, match=r"waits for the device|to the host|data-dependent|_local_scalar_dense"):
        waits(x)


def test_an_error_is_what_rounding_does_not_explain():
    exact = torch.linspace(-2, 3, 101, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert _backend.error_beyond_rounding([exact.to(dtype)], [exact]) < 1e-12
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        found = [exact.float(), (exact * (1 + 2 * error)).to(dtype)]
        assert error / 2 < _backend.error_beyond_rounding(found, [exact, exact]) < 2.5 * error


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_of_what_is_no_number_is_none(place):
    found = [torch.ones(3, dtype=torch.bfloat16) for _ in range(2)]
    found[place][1] = float("nan")
    error = _backend.error_beyond_rounding(found, [torch.ones(3, dtype=torch.float64)] * 2)
    assert error != error


def test_the_largest_error_is_found_and_no_nan_gets_lost():
    inf, nan, half = float("inf"), float("nan"), torch.bfloat16
    assert _backend.largest_error([torch.tensor([1.0, inf, -inf])], [torch.tensor([1.25, inf, -inf])]) == 0.25
    assert _backend.largest_error([torch.tensor([inf])], [torch.tensor([1.0])]) == inf
    zeros, ones = torch.zeros(2), torch.ones(2)
    for found in ([torch.tensor([0, nan]), zeros], [zeros, torch.tensor([nan, 0])]):
        assert math.isnan(_backend.largest_error(found, [zeros, zeros]))
    assert _backend.worst([1.0, 3.0, 2.0]) == 3 and math.isnan(_backend.worst([1.0, nan, 2.0]))
    assert math.isnan(self_test_error((ones, torch.tensor([nan, 1])), (ones, ones), half))
    assert self_test_error((1.04 * ones,), (ones,), half) == 0 < self_test_error((1.2 * ones,), (ones,), half)
