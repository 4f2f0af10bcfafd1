"""Plans for TPUs and GPUs: arithmetic without a compiler, and compiled programs if there is one."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import types

import jax
import pytest
from jax.experimental import topologies
from jaxlib import xla_client

from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.data.sources.known_sizes import KNOWN_SIZES, training_size
from resnet_jax.data.sources.opening import open_split
from resnet_jax.distributed.accelerators import ACCELERATORS
from resnet_jax.distributed.device_memory import memory_fraction
from resnet_jax.doctor.reasons import explain
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.planning import aot, gpu
from resnet_jax.planning.aot import CompiledStep
from resnet_jax.planning.plan import floors, largest_batch, make_plan, plan_table
from resnet_jax.planning.topology import parse_topology
from resnet_jax.planning.tpu import memory_shortage, tpu_devices
from resnet_jax.planning.traffic import Traffic, count_traffic
from tests import speed

GIB = 2**30
IMAGENET = c.Data(name="tfds:imagenet2012", image_size=224, crop="random_resized")


def recipe(**fields):
    return c.Config(
        model=c.Model(name="resnet50"), data=IMAGENET, train=c.Train(batch_size=1024, **fields)
    )


def compiler(limit=16 * GIB, image=24 * 2**20):
    """Compiles to programs with `image` bytes per image, and with round numbers for their work."""

    def make(topology, source):
        def compile_step(config):
            batch = config.train.batch_size // topology.devices
            if (memory := image * batch) > limit:
                return CompiledStep(False, memory, limit, compile_seconds=1.0)
            traffic = Traffic(160_000_000 * batch, launches=1161)
            if topology.chips > 1:
                traffic += Traffic(all_reduced=100_000_000, all_reduces=2)
            return CompiledStep(True, memory, limit, 24e9 * batch, traffic, compile_seconds=1.0)

        return compile_step

    return make


class TestTopologies:
    @pytest.mark.parametrize(
        ("name", "chips", "hosts", "devices"),
        [
            *[("v5e:1x1", 1, 1, 1), ("v5e:2x4", 8, 1, 8), ("v5e:4x4", 16, 4, 16)],
            *[("v5e:16x16", 256, 64, 256), ("v3:2x2", 4, 1, 8), ("v3:4x4", 16, 4, 32)],
            *[("v4:2x2x1", 4, 1, 4), ("v4:2x2x2", 8, 2, 8)],
            *[("h100:8", 8, 1, 8), ("h100:2x8", 16, 2, 16), ("t4:1", 1, 1, 1)],
        ],
    )
    def test_chips_and_hosts(self, name, chips, hosts, devices):
        found = parse_topology(name)
        assert (found.chips, found.hosts, found.devices) == (chips, hosts, devices)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            *[("v9:2x2", "v2, v3, v4, v5e, v5p, v6e"), ("", "v5e:4x4"), ("v5e", "v5e:AxB")],
            *[("v5e:2x2x1", "v5e:AxB"), ("v4:2x2", "v4:AxBxC"), ("v5e:0x2", "v5e:AxB")],
            *[("v5e:2x2 ", "v5e:AxB"), ("v5e:32x32", "256")],
            *[("h1000:8", "h100, h100-pcie"), ("h100", "h100:8 or h100:2x8")],
            *[("h100:0", "h100:GPUS"), ("h100:2x2x2", "h100:HOSTSxGPUS"), ("t4:64", "at most 16")],
        ],
    )
    def test_invalid_names(self, name, said):
        with pytest.raises(ConfigError, match="--topology=") as error:
            parse_topology(name)
        assert said in str(error.value)

    def test_links_of_small_slices(self):
        # Two neighbors at a corner of 2x2, four inside of larger ones, none alone.
        links = [parse_topology(f"v5e:{shape}").links for shape in ("1x1", "2x2", "2x4", "4x4")]
        assert links == [0, 100e9, 150e9, 200e9]

    @pytest.mark.parametrize(
        ("name", "gbits", "seconds"),
        [
            # 1 GB: twice 7/8 of it over NVLink, or over PCIe; or twice a half over the network,
            # at 8 x 400 Gbit/s, at 8 x 200, at 100 for the whole host, or at the given rate.
            *[("h100:1", 0, 0), ("h100:8", 0, 1.75 / 450), ("h100-pcie:8", 0, 1.75 / 64)],
            *[("h100:2x8", 0, 1.75 / 450), ("a100-40:2x8", 0, 1.75 / 300)],
            *[("l4:2x4", 0, 1 / 12.5), ("h100:2x8", 100, 1 / 12.5), ("t4:4x1", 10, 1.5 / 1.25)],
        ],
    )
    def test_all_reduce_of_gpus(self, name, gbits, seconds):
        assert parse_topology(name, gbits).all_reduce_seconds(1e9) == pytest.approx(seconds)

    def test_every_gpu_can_be_described_to_the_compiler(self):
        names = [each.name for each in ACCELERATORS.values() if each.platform == "gpu"]
        assert len(names) > 20
        for name in names:
            text = gpu.target_config(parse_topology(f"{name}:1"))
            assert f"device_memory_size: {ACCELERATORS[name].memory}\n" in text


class TestMemoryOfGpus:
    """JAX allocates a fraction of a card, and a program has to fit into that."""

    @pytest.fixture(autouse=True)
    def shell(self, monkeypatch):
        monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
        monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
        self.monkeypatch = monkeypatch

    def test_three_quarters(self):
        assert gpu.memory_pool(parse_topology("h100:8")) == int(0.75 * 84_942_979_072)

    @pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
    def test_environment_variable(self, name):
        self.monkeypatch.setenv(name, "0.5")
        assert gpu.memory_pool(parse_topology("h100:8")) == 84_942_979_072 // 2

    @pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
    def test_as_jax_reads_it(self, name):
        self.monkeypatch.setenv(name, "0.5")
        options = xla_client.generate_pjrt_gpu_plugin_options()
        assert options["memory_fraction"] == memory_fraction()

    def test_jax_does_not_start_with_both_names(self):
        self.monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
        self.monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
        with pytest.raises(ValueError, match="specified together") as error:
            xla_client.generate_pjrt_gpu_plugin_options()
        assert explain(error.value).endswith("are both set: unset the second")
        with pytest.raises(ConfigError, match=r"XLA_PYTHON_CLIENT_MEM_FRACTION=0\.6.*unset"):
            gpu.memory_pool(parse_topology("h100:8"))

    @pytest.mark.parametrize("value", ["most", "0", "1.5"])
    def test_invalid_fraction(self, value):
        self.monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
        with pytest.raises(ConfigError, match=f"XLA_CLIENT_MEM_FRACTION={value}: must be"):
            gpu.memory_pool(parse_topology("h100:8"))


class TestTraffic:
    PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%body (arg: (s32[], f32[256])) -> (s32[], f32[256]) {
  %arg = (s32[], f32[256]{0}) parameter(0)
  %a = f32[256]{0} get-tuple-element(%arg), index=1
  %b = f32[256]{0} fusion(%a), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[256]{0}) tuple(%i, %b)
}

%small (arg: f32[4]) -> f32[4] {
  %arg = f32[4]{0} parameter(0)
  ROOT %b = f32[4]{0} negate(%arg)
}

ENTRY %main (x: f32[256], y: bf16[128]) -> f32[256] {
  %x = f32[256]{0:T(256)} parameter(0)
  %y = bf16[128]{0} parameter(1)
  %start = (bf16[128]{0:S(1)}, bf16[128]{0}, u32[]) copy-start(%y)
  %fast = bf16[128]{0:S(1)} copy-done(%start)
  %z = f32[256]{0:S(1)} fusion(%x, %fast), kind=kLoop, calls=%fused
  %loop = (s32[], f32[256]{0}) while(%tuple), condition=%small, body=%body
  %tiny = f32[4]{0} while(%four), condition=%small, body=%small
  %sum = (f32[256]{0:S(1)}, f32[4]{0:S(1)}) all-reduce(%z, %w), replica_groups={}
  ROOT %r = f32[256]{0:S(1)} get-tuple-element(%sum), index=0
}
"""

    def test_counts_what_crosses_the_bus(self):
        # y once (256), x once (1024); the loops 2048 and 32 a time; the all-reduce is in VMEM.
        once = count_traffic(self.PROGRAM)
        assert once == Traffic(256 + 1024 + 2048 + 32, all_reduced=1040, all_reduces=1, launches=5)

    def test_every_fast_memory_is_one(self):
        # On a v4 chip it is number 3; number 0 is HBM.
        v4 = self.PROGRAM.replace("S(1)", "S(3)")
        assert count_traffic(v4) == count_traffic(self.PROGRAM)
        slow = count_traffic(self.PROGRAM.replace("S(1)", "S(0)"))
        assert slow.memory > count_traffic(self.PROGRAM).memory

    def test_only_the_largest_loop_runs_often(self):
        once = count_traffic(self.PROGRAM).memory
        assert count_traffic(self.PROGRAM, trips=4).memory == once + 3 * 2048

    def test_a_trip_count_in_the_text_wins(self):
        line = "body=%body\n"
        counted = line.replace("\n", ', backend_config={"known_trip_count":{"n":"3"}}\n')
        program = self.PROGRAM.replace(line, counted)
        once = count_traffic(self.PROGRAM).memory
        assert count_traffic(program, trips=4).memory == once + 2 * 2048 + 3 * 32


class TestTrafficOfGpus:
    """Operations that only programs for GPUs have."""

    PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_gather (p0: u8[1000,64], p1: s32[4]) -> f32[4,64] {
  %p0 = u8[1000,64]{1,0} parameter(0)
  %p1 = s32[4]{0} parameter(1)
  %rows = u8[4,64]{1,0} gather(%p0, %p1), offset_dims={1}
  ROOT %c = f32[4,64]{1,0} convert(%rows)
}

%fused_update (q0: f32[100,64], q1: f32[1,64], q2: s32[]) -> f32[100,64] {
  %q0 = f32[100,64]{1,0} parameter(0)
  %q1 = f32[1,64]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %u = f32[100,64]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

%part (arg: f32[64]) -> f32[64] {
  %arg = f32[64]{0} parameter(0)
  ROOT %b = f32[64]{0} negate(%arg)
}

%rest (arg: f32[64]) -> f32[64] {
  %arg = f32[64]{0} parameter(0)
  ROOT %b = f32[64]{0} bitcast(%arg)
}

ENTRY %main (data: u8[1000,64], index: s32[4]) -> f32[4,64] {
  %data = u8[1000,64]{1,0} parameter(0)
  %index = s32[4]{0} parameter(1)
  %images = f32[4,64]{1,0} fusion(%data, %index), kind=kLoop, calls=%fused_gather
  %conv = (f32[4,64]{1,0}, u8[1048576]{0}) custom-call(%images, %images), custom_call_target="c"
  %out = f32[4,64]{1,0} get-tuple-element(%conv), index=0
  %history = f32[100,64]{1,0} fusion(%old, %row, %place), kind=kLoop, calls=%fused_update
  %graph = f32[64]{0} call(%mean), to_apply=%part
  %either = f32[64]{0} conditional(%p, %a, %b), branch_computations={%part, %rest}
  %reduced = f32[64]{0} all-reduce-start(%graph), to_apply=%add
  %done = f32[64]{0} all-reduce-done(%reduced)
  ROOT %c = f32[4,64]{1,0} copy(%out)
}
"""

    def test_counts(self):
        found = count_traffic(self.PROGRAM)
        gather = 4 * 64 + 4 * 4 + 4 * 64 * 4  # rows that are read, indices, result
        conv = 3 * 4 * 64 * 4  # without its scratch memory
        update = 64 * 4  # the other rows stay where they are
        branch, summed, copy = 2 * 64 * 4, 2 * 64 * 4, 2 * 4 * 64 * 4
        assert found.memory == gather + conv + update + branch + branch + summed + copy
        assert (found.all_reduced, found.all_reduces) == (256, 1)
        assert found.launches == 7


class TestShortage:
    def test_new_and_old_message(self):
        new = "RESOURCE_EXHAUSTED: for HLO temporaries (224.77G) exceeds available HBM (15.75G)."
        old = "RESOURCE_EXHAUSTED: Used 512.5M of 15.75G hbm. Exceeded by 1.0G."
        assert memory_shortage(new) == (round(224.77 * GIB), round(15.75 * GIB))
        assert memory_shortage(old) == (round(512.5 * 2**20), round(15.75 * GIB))
        assert memory_shortage("RESOURCE_EXHAUSTED: no figures") == (0, 0)


def test_floors():
    work = CompiledStep(True, flops=197e12, traffic=Traffic(819_000_000, 100_000_000))
    seconds = floors(work, parse_topology("v5e:4x4"))
    assert seconds["compute"] == pytest.approx(1)
    assert seconds["memory"] == pytest.approx(1e-3)
    assert seconds["interconnect"] == pytest.approx(2 * 1e8 * 15 / 16 / 200e9)
    assert floors(work, parse_topology("v5e:1x1"))["interconnect"] == 0
    # Two devices share a v3 chip, so its step has the work of both.
    assert floors(work, parse_topology("v3:2x2"))["compute"] == pytest.approx(2 * 197 / 123)


class TestLargestBatch:
    @pytest.mark.parametrize("limit", [8, 9, 40, 64, 100, 500, 700, 1024, 5000])
    @pytest.mark.parametrize("start", [1, 128, 1000])
    def test_is_within_an_eighth(self, limit, start):
        tried = []

        def attempt(batch):
            tried.append(batch)
            return CompiledStep(batch <= limit, batch + 1, limit)

        found = largest_batch(attempt, start, unit=8, limit=100_000)
        assert found <= limit < found + max(8, found * 2 / 7) + 8
        assert found % 8 == 0
        assert found in tried
        assert len(tried) == len(set(tried)) <= 12

    def test_nothing_fits(self):
        assert largest_batch(lambda batch: CompiledStep(False), 64, unit=8, limit=1000) == 8

    def test_stops_at_the_limit(self):
        found = largest_batch(lambda batch: CompiledStep(True, 1, GIB), 8, 8, limit=100)
        assert found == 96


class TestPlan:
    def test_figures(self):
        plan = make_plan(recipe(epochs=90.0), "v5e:2x2", compiler=compiler())
        memory = 160e6 * 256 / 819e9  # longer than 24e9 * 256 / 197e12
        assert plan["batch_per_chip"] == 256
        assert plan["batch_size"] == 1024
        assert plan["fits"] is True
        assert plan["hbm_needed"] == 256 * 24 * 2**20
        assert plan["bound_by"] == "memory"
        assert plan["floor_seconds"]["memory"] == pytest.approx(memory)
        assert plan["images_per_second"] == pytest.approx(1024 / memory)
        assert plan["images_per_second_per_chip"] == pytest.approx(256 / memory)
        assert plan["cores_per_host"] == pytest.approx(1024 / memory / 1200)
        assert plan["steps"] == round(90 * 1_281_167 / 1024)
        assert plan["hours"] == pytest.approx(plan["steps"] * memory / 3600)

    def test_every_key_is_there_and_is_json(self):
        fits = make_plan(recipe(), "v5e:2x2", compiler=compiler())
        fails = make_plan(recipe(), "v5e:2x2", batch_per_chip=4096, compiler=compiler())
        assert fits.keys() == fails.keys()
        assert json.loads(json.dumps(fails)) == fails
        assert [name for name, value in fits.items() if value is None] == []
        assert fails["fits"] is False
        assert fails["hbm_needed"] > fails["hbm"]
        assert fails["images_per_second"] is fails["hours"] is None
        assert "does not fit" in plan_table(fails)
        assert "bounds, not predictions" in plan_table(fits)
        assert "6.00 of 16.00" in plan_table(fits)
        for plan in (fits, fails):
            assert max(map(len, plan_table(plan).splitlines())) <= 80

    def test_two_devices_a_chip(self):
        plan = make_plan(recipe(), "v3:2x2", batch_per_chip=64, compiler=compiler())
        assert plan["hbm_needed"] == 64 * 24 * 2**20
        assert plan["flops"] == 64 * 24e9

    def test_gpus(self):
        plan = make_plan(recipe(epochs=90.0), "h100:2x8", compiler=compiler())
        assert (plan["platform"], plan["chips"], plan["hosts"]) == ("gpu", 16, 2)
        assert plan["batch_per_chip"] == 64
        assert plan["kernels"] == 1161
        assert plan["floor_seconds"]["memory"] == pytest.approx(160e6 * 64 / 3352e9)
        assert plan["floor_seconds"]["interconnect"] == pytest.approx(0.1 * 1.75 / 450)
        table = plan_table(plan)
        assert "GPUs, hosts" in table
        assert "kernels per step" in table
        assert "chip" not in table
        assert max(map(len, table.splitlines())) <= 80
        tpus = make_plan(recipe(epochs=90.0), "v5e:2x2", compiler=compiler())
        assert plan.keys() == tpus.keys()
        assert "kernels" not in plan_table(tpus)

    def test_finds_a_batch(self):
        plan = make_plan(recipe(), "v5e:2x2", find_batch=True, compiler=compiler())
        assert plan["fits"]
        assert 600 <= plan["batch_per_chip"] <= 682  # of 16 GiB / 24 MiB
        fits = [each["fits"] for each in plan["tried"]]  # by size
        assert fits == sorted(fits, reverse=True)
        assert len(plan["tried"]) <= 6

    @pytest.mark.parametrize(
        ("config", "options", "said"),
        [
            (recipe(), {"batch_per_chip": -8}, "--batch_per_chip=-8"),
            (recipe(accumulate=3), {"batch_per_chip": 8}, "multiple of 3"),
            (
                recipe(),
                {"topology": "v5e:4x3"},
                "train.batch_size = 1024: must be a multiple of 12",
            ),
            (recipe(), {"images": -1}, "--images=-1"),
            (recipe(), {"images_per_core": -1.0}, "--images_per_core=-1"),
            (recipe(), {"topology": "h100:8", "network_gbits": -1.0}, "--network_gbits=-1"),
            (recipe(), {"topology": "h100:3"}, "train.batch_size = 1024: must be a multiple of 3"),
            (recipe(steps_per_call=2), {}, "train.steps_per_call = 2: needs a dataset"),
            (c.Config(model=c.Model(num_classes=5)), {}, "model.num_classes = 5"),
        ],
    )
    def test_mistakes(self, config, options, said):
        with pytest.raises((ConfigError, DataError), match=said):
            make_plan(config, **{"topology": "v5e:2x2", **options}, compiler=compiler())


class TestDataSets:
    def test_known_by_name(self):
        source = training_size(c.Data(name="tfds:imagenet2012:5.1.0"))
        assert (len(source), source.num_classes, source.channels) == (1_281_167, 1000, 3)

    def test_flags_win(self):
        source = training_size(c.Data(name="tfds:cifar10"), images=10)
        assert (len(source), source.num_classes) == (10, 10)
        unknown = training_size(c.Data(name="tfds:mine"), images=10, classes=3)
        assert (len(unknown), unknown.num_classes, unknown.channels) == (10, 3, 3)

    @pytest.mark.parametrize(
        ("split", "images"),
        [("train[:90%]", 45_000), ("train[90%:]", 5_000), ("train[:1%]+train[-1%:]", 1_000)],
    )
    def test_parts_of_a_known_set(self, split, images, tmp_path):
        data = c.Data(name="tfds:cifar10", train_split=split, data_dir=str(tmp_path))
        assert len(training_size(data)) == images

    @pytest.mark.parametrize("split", ["test[:50%]", "train+test", "train[:1000]"])
    def test_parts_that_are_not_known(self, split, tmp_path):
        data = c.Data(name="tfds:cifar10", train_split=split, data_dir=str(tmp_path))
        with pytest.raises(DataError, match="give --images"):
            training_size(data)

    def test_known_parts_are_those_of_the_data(self):
        """Rounded alike: digits have 1,437 training images."""
        for split in ("train[:50%]", "train[33%:66%]", "train[:1%]"):
            data = c.Data(name="digits", train_split=split)
            assert len(training_size(data)) == len(open_split(data, split))

    def test_part_of_a_prepared_set(self):
        assert len(training_size(c.Data(name="digits", train_split="train[:50%]"))) == 718

    def test_unknown(self, tmp_path):
        with pytest.raises(DataError, match="--images and --num_classes") as error:
            training_size(c.Data(name="tfds:mine", data_dir=str(tmp_path)))
        assert all(name in str(error.value) for name in KNOWN_SIZES)
        assert "\n" not in str(error.value)


def test_a_long_compilation_says_that_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(aot, "_REPORT_SECONDS", 0.01)
    with aot._progress("compiling a step"):
        time.sleep(0.2)
    first, *still, last = capsys.readouterr().err.splitlines()
    assert first == "compiling a step"
    assert set(still) == {"still compiling after 0 s"}
    assert last == "compiled in 0 s"


class TestStep:
    """The compiled step is that of the target platform."""

    @pytest.mark.parametrize("steps_per_call", [1, 2])
    def test_lowers_what_training_takes(self, steps_per_call):
        config = c.Config(
            model=c.Model(name="resnet8_cifar"),
            augment=c.Augment(flip_alternates=True),
            train=c.Train(batch_size=4, steps_per_call=steps_per_call),
        )
        lowered = aot.lower_step(config, jax.devices()[:2], training_size(config.data))
        (_, *rest), _ = lowered.args_info
        batch = {name: info.shape for name, info in rest[-1].items()}
        if steps_per_call == 1:
            images, labels = (2, 2, 32, 32, 1), (2, 2)
            assert batch == {"images": images, "labels": labels, "mirrored": labels}
        else:
            assert rest[0]["images"].shape == (1437, 32, 32, 1)
            assert batch == {"indices": (2, 2, 1), "mirrored": (2, 2, 1)}


class TestCommand:
    def run(self, capsys, *arguments):
        code = parser.main(["plan", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    @pytest.fixture
    def stub(self, monkeypatch):
        monkeypatch.setattr(
            "resnet_jax.planning.plan.make_plan.__kwdefaults__",
            {
                **make_plan.__kwdefaults__,
                "compiler": compiler(),
            },
        )

    def test_one_json_object(self, stub, capsys):
        code, out, _ = self.run(capsys, "--json", "--config.train.epochs=3", "--topology=v4:2x2x1")
        assert code == 0
        assert json.loads(out)["chips"] == 4
        assert json.loads(out)["epochs"] == pytest.approx(3, rel=0.05)

    def test_exit_code_if_it_does_not_fit(self, stub, capsys):
        code, out, _ = self.run(capsys, "--batch_per_chip=4096")
        assert code == 0
        assert "does not fit" in out

    @pytest.mark.parametrize(
        "arguments",
        [
            *[["--topology=v9:2x2"], ["--batch_per_chip=-1"], ["--config.data.name=tfds:nothing"]],
            *[["--config.model.nmae=x"], ["--what=1"], ["--config=nowhere.py"]],
        ],
    )
    def test_mistakes_take_one_line(self, stub, capsys, arguments):
        code, out, err = self.run(capsys, *arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1

    def test_without_libtpu(self, monkeypatch, capsys):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        code, _, err = self.run(capsys)
        assert code == 2
        assert "pip install 'jax[tpu]'" in err

    def test_without_the_cuda_plugin(self, monkeypatch, capsys):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        code, _, err = self.run(capsys, "--topology=h100:8")
        assert code == 2
        assert "pip install 'jax[cuda12]'" in err
        assert err.count("\n") == 1

    def test_the_cuda_plugin_refuses(self, monkeypatch, capsys):
        def refuse(*arguments, **options):
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: sm_70 is\nunknown")

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(topologies, "get_topology_desc", refuse)
        code, _, err = self.run(capsys, "--topology=v100:8")
        assert code == 2
        assert "--topology=v100:8: JAX's CUDA plugin cannot compile for this card" in err
        assert err.count("\n") == 1

    def test_the_compiler_fails(self, monkeypatch, capsys):
        """With an error other than a lack of memory."""

        class Lowered:
            def compile(self, options):
                raise jax.errors.JaxRuntimeError("INTERNAL: no\nkernel")

        monkeypatch.setattr(aot.gpu, "gpu_devices", lambda topology: [None] * 8)
        monkeypatch.setattr(aot, "lower_step", lambda *arguments: Lowered())
        code, _, err = self.run(capsys, "--topology=h100:8")
        assert code == 2
        assert "the compiler fails on this training step: INTERNAL: no kernel" in err

    @pytest.mark.parametrize(
        ("message", "said"),
        [
            ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "in use by"),
            ("ABORTED: The TPU is already in use by process with pid 7.", "in use by"),
            ("INVALID_ARGUMENT: not divisible by\n2x2x1", "libtpu has no such slice"),
        ],
    )
    def test_libtpu_refuses(self, monkeypatch, capsys, message, said):
        def refuse(*arguments, **options):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(topologies, "get_topology_desc", refuse)
        code, _, err = self.run(capsys)
        assert code == 2
        assert said in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "chips_per_host"),
    [
        ("v5e:1x1", [1, 1, 1]),  # Colab's
        ("v5e:2x2", [2, 2, 1]),
        ("v6e:2x4", [2, 4, 1]),
        ("v5p:1x1x1", [1, 1, 1]),
        ("v5e:4x4", None),
        ("v4:2x2x2", None),
    ],
)
def test_libtpu_is_told_the_chips_of_a_single_host(monkeypatch, name, chips_per_host):
    given = []

    def describe(topology, platform, **options):
        given.append(options)
        return types.SimpleNamespace(devices=())

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    tpu_devices(parse_topology(name))
    assert given[0].get("chips_per_host_bounds") == chips_per_host


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("topology", "chips"), [("v5e:1x1", 1), ("v5e:2x2", 4), ("v5e:4x4", 16)])
def test_compiles_for_a_tpu(topology, chips):
    """In a separate process, because libtpu serves one at a time."""
    command = [sys.executable, "-m", "resnet_jax", "plan", f"--topology={topology}", "--json"]
    command += ["--config.model.name=resnet8_cifar", "--batch_per_chip=8"]
    environment = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    result = subprocess.run(
        command,
        env=environment,
        timeout=speed.seconds(500),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["fits"]
    assert plan["chips"] == chips
    # Gradients, statistics and metrics: 4 bytes for each of at least a million parameters.
    reduced = 4.9e6
    assert plan["all_reduce_bytes"] == (pytest.approx(reduced, rel=0.02) if chips > 1 else 0)
    # Images through 4 bytes a pixel and channel at the very least, and all weights once.
    assert reduced < plan["hbm_bytes"] < 1e9
    assert 1e9 < plan["flops"] < 1e10
