"""Deformable attention on a GPU."""

from functools import partial

import pytest
import torch
from deform_attn_checks import DTYPES, NAMES, TAKEN, as_close_as_the_reference, flat, grad_of, op

from dndetr.ops import ms_deform_attn, ms_deform_attn_fused


def on_gpu(arguments):
    return tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments)


def autograd(arguments, backend="cuda"):
    value, shapes, *points, valid = arguments
    inputs = [x.detach().requires_grad_() for x in (value, *points)]
    out = ms_deform_attn_fused(inputs[0], shapes, *inputs[1:], valid, backend=backend)
    grads = torch.autograd.grad(out, inputs, grad_of(out).to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_gpu_is_as_precise_as_the_reference(name, dtype):
    arguments = on_gpu(op.make_case(name, dtype))
    as_close_as_the_reference(autograd(arguments), arguments, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tiny", "train-tiny-encoder", "quarter-encoder"])
def test_gpu_repeats_itself_where_that_is_asked_for(deterministic, name, dtype):
    arguments = on_gpu(op.make_case(name, dtype))
    deterministic(True)
    first = autograd(arguments)
    deterministic(False)  # torch refuses grid_sample's gradients in that mode
    as_close_as_the_reference(first, arguments, dtype)
    deterministic(True)
    for _ in range(5):
        again = autograd(arguments)
        assert all(torch.equal(first[part], again[part]) for part in NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["decoder", "many-tiles"])
def test_gpu_graph_capture(name, dtype):
    value, shapes, reference_points, offsets, logits, valid = on_gpu(op.make_case(name, dtype))
    inputs = [x.requires_grad_() for x in (value, offsets, logits)]
    grad_out = torch.randn(*offsets.shape[:2], 256, device="cuda", dtype=dtype)

    def step():
        out = ms_deform_attn_fused(value, shapes, reference_points, offsets, logits, valid, backend="cuda")
        return out, *torch.autograd.grad(out, inputs, grad_out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [x.detach().clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().zero_()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.gpu
def test_gpu_never_waits_for_the_device():
    arguments = on_gpu(op.make_case("tiny"))
    autograd(arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        autograd(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_strides():
    value, shapes, *points, valid = on_gpu(op.make_case("width-32"))
    expected = autograd((value, shapes, *points, valid))["out"]
    for view in (value.transpose(1, 2).contiguous().transpose(1, 2), torch.cat((value[..., :1], value), -1)[..., 1:]):
        assert torch.equal(ms_deform_attn_fused(view, shapes, *points, valid, backend="cuda"), expected)


@pytest.mark.gpu
def test_gpu_locations_and_weights_and_compile():
    value, shapes, points, offsets, logits, _ = on_gpu(op.make_case("width-32"))
    locations, weights = op.sampling_locations(points, offsets, shapes), logits.softmax(-1).view(offsets.shape[:-1])
    expected = op.ms_deform_attn_reference(value, shapes, locations, weights)
    function = partial(ms_deform_attn, spatial_shapes=shapes, backend="cuda")
    for run_it in (function, torch.compile(function, fullgraph=True)):
        torch.testing.assert_close(run_it(value, locations=locations, weights=weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_opcheck():
    value, shapes, *points, valid = on_gpu(op.make_case("tiny"))
    inputs = [x.requires_grad_() for x in (value, *points)]
    torch.library.opcheck(torch.ops.dndetr.ms_deform_attn.default, (inputs[0], flat(shapes), *inputs[1:], valid))


@pytest.mark.gpu
def test_gpu_launch_errors_are_raised(extension):
    rows = ((0, 0), 2), ((0, 0), 1)
    problem = extension.DeformAttn((1, 1, 1, 32, 1, 2), [1, 1], (0, 0), [32, 32, 32], (0, 0), *rows, 0)
    with pytest.raises(RuntimeError, match="ms_deform_attn: CUDA says"):
        extension.ms_deform_attn_cuda(problem, (0, 0), (torch.cuda.device_count(), 0))
