"""Whatever the bytes, flags and JSON of a stranger: our own error, or a result that is whole.

Each property has two sizes: a few examples, the same ones every time, in every run of the tests;
and thousands of new ones with `pytest -m faults tests/test_fuzz.py`.
"""

import functools
import io
import json
import struct
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.data import decode
from resnet_jax.data.decode import jpeg, reading
from resnet_jax.errors import ConfigError, DataError, ResNetJaxError, WeightsError
from resnet_jax.export.hub import last_evaluation
from resnet_jax.inference.images import ImageFile, read_pixels
from resnet_jax.report.runs import read_run
from resnet_jax.training.metrics import _Sums
from resnet_jax.weights import source
from resnet_jax.weights.convert import from_torch
from resnet_jax.weights.files import read_state_dict
from resnet_jax.weights.pretrained import read_description
from resnet_jax.workdirs import checkpoint, checksums, description, workdir
from resnet_jax.workdirs.records import split_at
from tests.hostile.names import NAMES
from tests.hostile.workdirs import RECORDS

FEW, MANY = 100, 4000
SIZES = pytest.mark.parametrize(
    "examples", [FEW, pytest.param(MANY, marks=pytest.mark.faults)], ids=["few", "many"]
)


def for_all(examples, holds, *inputs):
    """Tries a property; the few examples are the same in every run."""
    few = examples <= FEW
    options = {"max_examples": examples, "derandomize": few, "database": None, "deadline": None}
    settings(**options, suppress_health_check=list(HealthCheck))(given(*inputs)(holds))()


@st.composite
def mutated(draw, files):
    """A whole file with a few bytes written over, put in or left out, or its end cut off."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        # Headers come first, and are where a byte does most.
        most = draw(st.sampled_from([min(80, len(data)), len(data)]))
        at = draw(st.integers(0, most))
        new = draw(st.binary(max_size=4))
        left_out = draw(st.sampled_from([len(new), len(new), len(new), 0, 2, 1000]))
        data[at : at + left_out] = new
    return bytes(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 2**63, 2**70, 10**6, 0, float("inf"), float("nan"), 5e-324])
    | st.sampled_from(["\0", "\ud800", "x" * 250, "9" * 5000])
    | st.floats()
    | st.text(max_size=8),
    lambda each: (
        st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def changed(draw, template):
    """A JSON object of which one value, at whatever depth, is something else or gone."""
    result = json.loads(json.dumps(template))
    part = result
    while True:
        key = draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or not part[key] or draw(st.booleans()):
            break
        part = part[key]
    if draw(st.integers(0, 5)):
        part[key] = draw(JSON)
    else:
        del part[key]
    return result


# Images.


def encoded(kind, mode="RGB", **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
IMAGES = [
    encoded("JPEG"),
    encoded("JPEG", "L"),
    encoded("JPEG", "CMYK"),
    encoded("JPEG", progressive=True, exif=TURNED),
    encoded("JPEG", restart_marker_blocks=1),
    encoded("PNG"),
    encoded("PNG", "P", transparency=b"\0\7"),
    encoded("PNG", "LA"),
    encoded("PNG", "I;16"),
    encoded("GIF", "P"),
    encoded("WEBP", "RGBA", exif=TURNED),
    encoded("WEBP", lossless=True),
    encoded("TIFF", "RGB", compression="tiff_lzw"),
    encoded("BMP"),
    encoded("PPM"),
    encoded("JPEG2000"),
]
CROPS = [
    c.Data(crop="random_resized", image_size=8),
    c.Data(crop="scale_jitter", image_size=8, jitter_sides=(9, 12)),
    c.Data(crop="center", image_size=8),
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged tags; errors would hide paths
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
@SIZES
def test_images(examples, decoder, monkeypatch):
    monkeypatch.setattr(
        reading, "MAX_PIXELS", 1_000_000
    )  # for time; what is larger, is in its tests
    if decoder == "pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)

    def holds(data, channels, crop, seed):
        rng = np.random.default_rng(seed)
        calls = {
            (8, 8): [
                lambda: decode.train_crop(data, crop, channels, rng),
                lambda: decode.eval_crop(data, c.Data(eval_resize=10, eval_size=8), channels),
            ],
            None: [
                lambda: decode.decode(data, channels),
                lambda: read_pixels(ImageFile("x", data=data), channels),
                lambda: read_pixels(decode.open_image(io.BytesIO(data)), channels),
            ],
        }
        for shape, each in calls.items():
            for call in each:
                try:
                    pixels = call()
                except DataError as error:
                    assert "\n" not in str(error)  # noqa: PT017
                    continue
                assert pixels.dtype == np.uint8
                assert pixels.shape[2:] == (channels,)
                assert pixels.shape[:2] == (shape or pixels.shape[:2])

    files = mutated(IMAGES) | st.binary(max_size=60)
    for_all(
        examples, holds, files, st.sampled_from([1, 3]), st.sampled_from(CROPS), st.integers(0, 9)
    )


# Weight files.

ARRAYS = {
    "conv1.weight": np.ones((2, 3, 1, 1), np.float32),
    "fc.bias": np.zeros(3, np.float16),
    "n": np.array(3),
}
SIDES = st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**45, 2**62, 2**64]), max_size=5)
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "X"]
OFFSETS = st.lists(st.sampled_from([0, 4, 8, 12, -1, 2**63]), max_size=3)


def npz(write=np.savez):
    file = io.BytesIO()
    write(file, **ARRAYS)
    return file.getvalue()


@st.composite
def safetensors(draw):
    """Headers of the right form with any numbers in them."""
    tensor = st.fixed_dictionaries(
        {"dtype": st.sampled_from(DTYPES), "shape": SIDES, "data_offsets": OFFSETS}
    )
    names = st.text(max_size=5) | st.sampled_from(["\0", "x" * 10**4])
    header = json.dumps(draw(st.dictionaries(names, tensor, max_size=3))).encode()
    length = draw(st.sampled_from([len(header), len(header), 0, len(header) + 9, 2**64 - 1]))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=16))


@st.composite
def archives(draw):
    """Archives whose members are arrays of any shape and type, by their headers."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # of one name twice
        for _ in range(draw(st.integers(1, 3))):
            header = {
                "descr": draw(st.sampled_from(["<f4", "|O", "|V0", "<U9", "<M8[s]", "f4,f4", 5])),
                "fortran_order": draw(st.sampled_from([False, True, None])),
                "shape": draw(st.sampled_from([(), (2,), (2, 1), (True,)]) | SIDES.map(tuple)),
            }
            text = f"{header!r}\n".encode()
            version = draw(st.sampled_from([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\0"]))
            length = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
            member = b"\x93NUMPY" + version + length + text + bytes(draw(st.integers(0, 9)))
            name = draw(st.sampled_from(["a.npy", "../../a.npy", "/a.npy", "a", "", "a/", "b.npy"]))
            kind = draw(st.sampled_from([0, 0, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
            archive.writestr(zipfile.ZipInfo(name or "x"), member, kind)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:numpy")
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@SIZES
def test_weight_files(examples, suffix, tmp_path):
    path = tmp_path / "files" / f"w{suffix}"
    path.parent.mkdir()

    def holds(data):
        path.write_bytes(data)
        try:
            found = read_state_dict(path)
        except WeightsError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            return
        assert all(isinstance(array, np.ndarray) for array in found.values())
        assert not any(array.dtype.hasobject for array in found.values())
        assert sum(array.nbytes for array in found.values()) <= len(data)

    if suffix == ".npz":
        files = mutated([npz(), npz(np.savez_compressed)]) | archives()
    else:
        files = mutated([save(ARRAYS)]) | safetensors()
    for_all(examples, holds, files | st.binary(max_size=60))
    assert [each.name for each in tmp_path.rglob("*")] == ["files", path.name]


@functools.cache
def tiny():
    model = rj.create_model("resnet20", stage_sizes=(1,), stage_widths=(16,), num_classes=3)
    shapes = rj.weights.convert.variable_shapes(model)
    variables = {name: {} for name in ("params", "batch_stats")}
    for (collection, *modules, leaf), shape in shapes.items():
        part = functools.reduce(
            lambda part, key: part.setdefault(key, {}), modules, variables[collection]
        )
        part[leaf] = np.zeros(shape, np.float32)
    return model, rj.to_torch(model, variables)


VALUES = st.sampled_from(
    [
        *(np.zeros(shape, np.float32) for shape in [(), (0,), (3,), (3, 0), (16, 0, 3, 3)]),
        *(np.zeros(shape, np.float32) for shape in [(16, 7, 3, 3), (16, 2**40, 0, 3), (2**40, 0)]),
        *(np.int32(3), np.array(["x"]), None, "x", [[1], [2, 3]], {}, {"a.b": np.zeros(3)}),
        *(np.broadcast_to(np.float32(1), shape) for shape in [(2**40, 64), (16, 2**30, 3, 3)]),
        *(np.zeros(3, kind) for kind in ("c8", "?", "O", "M8[s]", "f4,i4", "f2", "f8")),
        functools.reduce(lambda each, _: [each] * 99, range(9), [1.0]),
    ]
)


@SIZES
def test_state_dicts(examples):
    model, whole = tiny()
    names = st.sampled_from([*whole, "fc.weight", "conv1.weight", "model", "a." * 3000 + "b", ""])

    def holds(changes, prefix, reset_head):
        state_dict = {f"{prefix}{name}": x for name, x in {**whole, **changes}.items()}
        try:
            variables = from_torch(model, state_dict, reset_head=reset_head)
        except WeightsError:
            return
        assert variables["params"]["head"]["kernel"].shape[1] == 3

    # from_torch traces the model, which takes longer than all else here.
    examples //= 4
    changes = st.dictionaries(names | st.integers() | st.text(), VALUES, max_size=2)
    for_all(examples, holds, changes, st.sampled_from(["", "module.", "a." * 3000]), st.booleans())


PUBLISHED = {
    "architecture": "resnet20",
    "num_classes": 2,
    "model_args": {"drop_rate": 0.1, "output_stride": 32, "in_chans": 1},
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "label_names": ["a", "b"],
    },
}


@SIZES
def test_published_configurations(examples, tmp_path):
    def holds(found):
        (tmp_path / "config.json").write_text(json.dumps(found))
        try:
            labels = read_description(tmp_path).class_names
        except WeightsError:
            return
        assert isinstance(labels, tuple)

    for_all(examples, holds, changed(PUBLISHED) | JSON)


# Configurations.

FIELDS = sorted(c.to_flat(c.Config()))
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
NUMBERS = ["nan", "1e999", "5e-324", "-1", "1" * 5000, str(2**70), str(10**6), "8193"]
WORDS = st.sampled_from(["None", "(1,", "()", "[1, 'a']", "true", "x" * 250, *NUMBERS])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
@SIZES
def test_flags(examples):
    field = st.sampled_from(["", "workdir", "config.model", *(f"config.{name}" for name in FIELDS)])
    flag = st.builds("--{}{}{}".format, field, st.sampled_from(["=", "=", "", "."]), TEXTS | WORDS)

    def holds(arguments):
        try:
            config, folder = parser.parse_train_flags(arguments)
            c.check(config)
        except ConfigError as error:
            assert str(error)  # noqa: PT017
            return
        assert c.from_json(c.to_json(config)) == config
        assert folder.name

    for_all(examples, holds, st.lists(flag | TEXTS, max_size=3))


COMMANDS = [
    *(["summary", "resnet20", f"--{flag}"] for flag in ("image_size", "num_classes", "channels")),
    *(["plan", f"--{flag}"] for flag in ("batch_per_chip", "images", "num_classes", "topology")),
    *(["plan", f"--{flag}"] for flag in ("images_per_core", "network_gbits")),
    *(["predict", "none.npz", "a.png", f"--{flag}"] for flag in ("top", "batch_size", "model")),
    *(["predict", "none.npz", "a.png", f"--{flag}"] for flag in ("image_size", "crop_fraction")),
    *(["evaluate", "none.npz", f"--{flag}"] for flag in ("scales", "batch_size", "max_corrupt")),
]


@SIZES
def test_flags_of_commands(examples, monkeypatch, capsys):
    def planned(*_):
        raise ConfigError("planned")  # all flags are good: what follows compiles

    monkeypatch.setattr("resnet_jax.planning.plan.training_size", planned)

    def holds(command, value):
        *words, flag = command
        code = parser.main([*words, f"{flag}={value}"])
        errors = capsys.readouterr().err
        told = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert (code, len(told)) in ((0, 0), (2, 1)), errors
        assert len(errors) < 5000

    for_all(examples // 4, holds, st.sampled_from(COMMANDS), TEXTS | WORDS)


STATE = {
    "step": 3,
    "params": {"head": {"bias": np.zeros(2)}},
    "batch_stats": {"stem": np.zeros(1)},
    "ema": None,
}
RECORD = {"step": 1, "split": "train", "loss": 1.0, "top1": 0.5, "images_per_second": 1.0}
PROGRESS = {"metrics": {"top1": 0.5}, "records": {"steps": 2, "totals": {"loss": 1.0}}}


@SIZES
def test_workdirs(examples, tmp_path, monkeypatch):
    stored = json.loads(c.to_json(c.Config()))
    state = tmp_path / "checkpoints" / "3"
    state.mkdir(parents=True)
    monkeypatch.setattr(checkpoint.Checkpoints, "read_whole", lambda self, best: STATE)
    store = checkpoint.Checkpoints(tmp_path, read_only=True)
    calls = [
        lambda: checkpoint.load_variables(tmp_path),
        lambda: source.open_network(tmp_path),
        lambda: workdir.open_workdir(tmp_path, c.Config(), {"train": "x"}),
        lambda: c.check(c.from_json((tmp_path / "config.json").read_text())),
        lambda: [record["loss"] * record["top1"] for record in read_run(tmp_path).training],
        lambda: last_evaluation(SimpleNamespace(source=tmp_path, step=1, ema=False, config=None)),
        lambda: description.read_class_names(tmp_path),
        lambda: split_at(tmp_path / "metrics.jsonl", 1),
        lambda: _Sums.of(store.records()),
        lambda: store.best,
    ]

    def holds(config, classes, data, record, progress, sums):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "classes.json").write_text(json.dumps(classes))
        (tmp_path / "data.json").write_text(json.dumps(data))
        line = record if isinstance(record, bytes) else json.dumps(record).encode()
        (tmp_path / "metrics.jsonl").write_bytes(line + b"\n")
        (state / "progress.json").write_text(json.dumps(progress))
        (state / checksums.NAME).write_text(sums)
        assert isinstance(checksums.damage(state), str)
        for call in calls:
            try:
                call()
            except ResNetJaxError as error:
                assert str(error)  # noqa: PT017

    for_all(
        examples // 4,
        holds,
        changed(stored) | JSON,
        JSON | st.lists(st.sampled_from(NAMES)),
        JSON,
        changed(RECORD) | JSON | mutated([*RECORDS.values(), json.dumps(RECORD).encode()]),
        changed(PROGRESS) | JSON,
        TEXTS.map(lambda text: f"{'0' * 64}  ../../{text.encode(errors='replace').decode()}\n"),
    )
    store.close()
