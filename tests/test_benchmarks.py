"""The benchmarks run, each at its smallest size."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from resnet_jax.models.registry import model_info
from tests import speed

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
# Each prints a JSON line at its end; {photos} is a folder of JPEGs.
SMALLEST = {
    "cpu": ["--cases=resnet20-inference-128", "--networks=ours,flax", "--rounds=1"],
    "decode": ["{photos}", "--rounds=1"],
    "dispatch": ["--batch=16", "--steps=300", "--per_call=25"],
    "folded": ["--model=resnet8_cifar", "--batch=8", "--side=16", "--rounds=1"],
    "input": ["{photos}", "--seconds=0.1", "--rounds=1"],
    "loop": ["--config=configs/digits.py", "--steps=10", "--rounds=1"],
    "predict": ["{photos}", "--network=resnet20", "--images=8", "--batch_size=4", "--rounds=1"],
    "startup": ["--rounds=1", "--model=resnet8_cifar", "--config.log.tensorboard=false"],
}


def run(name, *arguments, limit=600, **variables):
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        timeout=speed.seconds(limit),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_imports():
    """Every benchmark finds what it imports, also those that need a TPU's compiler to run."""
    code = f"import importlib; [importlib.import_module(name) for name in {BENCHMARKS}]"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), "benchmarks"])}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).resize((500, 400)).save(folder / f"{seed}.jpg")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_runs(name, photos):
    arguments = [each.format(photos=photos) for each in SMALLEST[name]]
    assert json.loads(run(name, *arguments)[-1])


@pytest.mark.slow
def test_augment():
    [line] = run("augment", "--batch=2", "--side=16", "--cases=trivial")
    assert line.startswith("trivial: ")


def test_gpu_benchmark_runs_on_a_cpu(tmp_path):
    arguments = ["--depth=8", "--side=8", "--batches=2", "--rounds=1", "--seconds=0.05"]
    arguments += ["--modes=inference", "--networks=ours,folded,torch-freezing", "--breakdown"]
    lines = run("gpu", *arguments, f"--records={tmp_path / 'records'}", XLA_FLAGS="")
    records = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    assert [record["network"] for record in records] == ["ours", "folded"]  # depth 8 is ours alone
    for record in records:
        assert min(record["images_per_second"], record["pipelined_images_per_second"]) > 0
        assert record["step_ms"]["p50"] <= record["step_ms"]["p99"]
        assert record["count"]["convolution"] >= 9
        assert sum(record["count"].values()) == record["kernels"]
    assert lines[2].split()[:4] == ["inference", "8", "2", "ours"]


@pytest.mark.slow
def test_gpu_benchmark_trains_and_survives_failures():
    arguments = ["--depth=20", "--side=8", "--batches=2", "--rounds=1", "--seconds=0.05"]
    arguments += ["--modes=train", "--networks=ours,trainer,flax,torch", "--records=-"]
    lines = run("gpu", *arguments, XLA_FLAGS="")
    records = [json.loads(line) for line in lines if line.startswith("{")]
    measured = [record["network"] for record in records]
    assert measured[:3] == ["ours", "trainer", "flax"]
    if importlib.util.find_spec("torch") is None:
        assert "failed: train torch, depth 20, batch 2: torch is not installed" in lines


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_gpu_benchmark_drops_what_does_not_fit(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "WAVE_CASES", 8)
    options = argparse.Namespace(rounds=2, seconds=1.0, breakdown=True, batches=None)
    left, rows, waves = 480.0, list(gpu.PLAN), []
    while rows:
        wave, rows = gpu.next_wave(rows, left, 1.0, options)
        left -= gpu.seconds_of(wave, 1.0, options) if wave else 0
        waves += [wave] if wave else []
    assert left >= 0
    # What matters most is first and whole; memory limits what is compiled at the same time.
    assert waves[0][0] == gpu.PLAN[0]
    cases = [[case for row in wave for case in row.cases()] for wave in waves]
    assert max(sum(map(gpu.gigabytes, wave)) for wave in cases) <= gpu.WAVE_MEMORY
    # Each case is measured or said to be dropped.
    dropped = capsys.readouterr().out.splitlines()
    count = sum(len(line.split(":")[1].split(", depth")[0].split(", ")) for line in dropped)
    assert sum(map(len, cases)) + count == sum(len(row.networks) for row in gpu.PLAN)
    assert all(line.startswith("dropped, no time left: ") for line in dropped)


def test_gpu_benchmark_with_no_time_measures_nothing(gpu, capsys):
    options = argparse.Namespace(rounds=1, seconds=1.0, breakdown=False, batches=None)
    assert gpu.next_wave([gpu.PLAN[0], gpu.PLAN[2]], 1.0, 1.0, options) == ([], [gpu.PLAN[2]])
    line = "dropped, no time left: train ours, torch, flax, depth 50, batch 256\n"
    assert capsys.readouterr().out == line


# Two steps as an H100 runs them: command buffers start most kernels, and XLA names these after
# instructions, with the dot of a number as _. cuDNN's kernels have names of their own.
TRACE = """
planes {{
  name: "/host:CPU"
  lines {{ name: "python" events {{ metadata_id: 1 duration_ps: 9000000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "step" }} }} }}
planes {{
  name: "/device:GPU:0"
  lines {{ name: "Stream #20(Compute)" {kernels} }}
  lines {{ name: "XLA Modules" events {{ metadata_id: 1 duration_ps: 8000000000 }} }}
  {names}
  stat_metadata {{ key: 7 value {{ id: 7 name: "hlo_op" }} }}
}}
"""
RAN = [  # name, instruction, start and duration in microseconds, kind
    ("input_reduce_fusion_1", "command_buffer_9", 0, 500, "reduction"),
    ("loop_add_fusion", "command_buffer_9", 500, 1000, "elementwise"),
    (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_nhwckrsc_nhwc",
        "cudnn-conv.3",
        1600,
        2000,
        "convolution",
    ),
    ("nvjet_sm90_tst_128x256", "cudnn-conv-bias-activation.1", 3600, 400, "convolution"),
    ("_ZN17cutlass__5x_cudnn6Kernel", "cudnn-conv-bw-filter.2", 4000, 300, "kernel gradient"),
    ("sm90_xmma_dgrad_implicit_gemm_indexed", "command_buffer_9", 4300, 200, "input gradient"),
    ("input_scatter_fusion", "command_buffer_9", 4500, 700, "pool"),
    ("gemm_fusion_dot_2", "gemm_fusion_dot.2", 5200, 100, "GEMM"),
    ("input_transpose_fusion_4", "input_transpose_fusion.4", 5300, 100, "copy"),
    ("MemcpyD2D", "", 5500, 100, "copy"),
]
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_transpose.4 (param_0: f32[3,3,3,16]) -> bf16[16,3,3,3] {
  %param_0 = f32[3,3,3,16]{3,2,1,0} parameter(0)
  %convert.39 = bf16[3,3,3,16]{3,2,1,0} convert(%param_0)
  ROOT %transpose.2.1 = bf16[16,3,3,3]{3,2,1,0} transpose(%convert.39), dimensions={3,0,1,2}
}

ENTRY %main (images: bf16[8,8,8,3]) -> bf16[8] {
  %input_transpose_fusion.4 = bf16[16,3,3,3]{3,2,1,0} fusion(%kernel), kind=kInput, calls=%fused_transpose.4
  %cudnn-conv-bias-activation.1 = (bf16[8]{0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$convBiasActivationForward"
  %cudnn-conv-bw-filter.2 = (bf16[8]{0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$convBackwardFilter"
}
"""  # noqa: E501


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kernels")


# Of a class that jaxlib 0.12 makes when it is first used; an error there would end the process.
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_kernels_by_kind(kernels):
    events, names = "", ""
    for index, (name, operation, start, duration, _) in enumerate(RAN, 1):
        stat = f'stats {{ metadata_id: 7 str_value: "{operation}" }}' if operation else ""
        times = f"offset_ps: {start * 10**6} duration_ps: {duration * 10**6}"
        events += f"events {{ metadata_id: {index} {times} {stat} }}\n"
        names += f'event_metadata {{ key: {index} value {{ id: {index} name: "{name}" }} }}\n'
    text = TRACE.format(kernels=events, names=names)
    found = kernels.kernels_of(jax.profiler.ProfileData.from_text_proto(text))
    programs = kernels.program_kinds(PROGRAM)
    assert [kernels.kind_of(kernel, programs) for kernel in found] == [kind for *_, kind in RAN]

    result = kernels.breakdown(found, 2, programs)
    assert result["kernels"] == 5
    assert result["kernel_ms"] == pytest.approx(2.7)  # in a step
    assert result["gaps_ms"] == pytest.approx(0.1)
    assert result["ms"]["convolution"] == pytest.approx(1.2)
    assert result["count"]["copy"] == 1
    assert list(result["longest"])[:2] == ["cudnn-conv.3", "loop_add_fusion"]


def test_kernels_of_pytorch_by_kind(kernels, tmp_path):
    names = {
        "triton_poi_fused__to_copy_convolution_0": "elementwise",
        "triton_poi_fused_max_pool2d_with_indices_backward_3": "pool",
        "triton_red_fused__native_batch_norm_legit_functional_1": "reduction",
        "triton_tem_fused_convolution_7": "convolution",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN": "GEMM",
        "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32": "kernel gradient",
        "void at::native::multi_tensor_apply_kernel<...>": "elementwise",
        "void cudnn::ops::nchwToNhwcKernel<...>": "copy",
    }
    events = [
        {"cat": "kernel", "name": name, "ts": 10 * i, "dur": 5} for i, name in enumerate(names)
    ]
    events += [
        {"cat": "gpu_user_annotation", "name": "## Call CompiledFxGraph", "ts": 0, "dur": 99}
    ]
    file = tmp_path / "torch.json"
    file.write_text(json.dumps({"traceEvents": events}))
    found = kernels.read_torch(file)
    assert {kernel.name: kernels.kind_of(kernel, {}) for kernel in found} == names
    result = kernels.breakdown(found, 1)
    assert result["kernel_ms"] == pytest.approx(8 * 5e-3)
    assert result["gaps_ms"] == pytest.approx(7 * 5e-3)


@pytest.mark.slow
def test_checkpoint():
    arguments = ["--cases=resnet8_cifar-ema", "--batch_sizes=8", "--side=8"]
    record = json.loads(run("checkpoint", *arguments, "--steps=2", "--rounds=1")[-1])
    assert record["benchmark"] == "checkpoint"
    parameters = model_info("resnet8_cifar").parameters
    # Parameters, momentum, average and statistics in float32, and files of Orbax.
    assert 0.9 < record["megabytes"] / (3 * parameters * 4 / 1e6) < 1.5
    assert 0 < record["save"] < record["sealed"]
    assert record["step"] <= record["gap_without"]
    assert min(record["verify"], record["restore"]) > 0
