"""Images, and what lies where an image is expected."""

import io
import os
import struct
import zlib

from PIL import Image

from tests.hostile.corpus import case

PREDICT = "predict {run} {here}/bad.png {image}"
FEATURES = "features {run} {here}/bad.png {image} --output={here}/out.npz"
REPORT = "report {run} --images={here}/bad.png"
SKIPPED = {"codes": (1,)}


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width, height, extra=b""):
    """A grey PNG of zeros, with other chunks before its pixels."""
    packer = zlib.compressobj(9)
    rows = bytes(10 * (width + 1)) if height % 10 == 0 else bytes(width + 1)
    packed = [packer.compress(rows) for _ in range(height * (width + 1) // len(rows))]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", b"".join(packed) + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


def jpeg2000(width, height, tile):
    """162 bytes; the sizes in its header are all that is changed."""
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG2000", no_jp2=True))
    at = data.index(b"\xff\x51") + 6
    data[at : at + 32] = struct.pack(">8I", width, height, 0, 0, *tile, 0, 0)
    return bytes(data)


def gif(width, height):
    data = bytearray(encoded(Image.new("P", (16, 16)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def tiff(tile):
    """10 x 10 pixels in one tile of that side, packed with zlib."""
    packed = zlib.compress(bytes(4_000_000), 9)
    tags = {
        256: 10,
        257: 10,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: tile,
        323: tile,
        325: len(packed),
    }
    tags[324] = 8 + 2 + 12 * 10 + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed


def npy(header, version=(1, 0), values=b""):
    """A .npy file of any header, which NumPy reads as a Python literal."""
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + size + header.encode() + values


def channels_tiff(width, height, channels, following=0):
    """Ten bytes of pixels for as many as it says; the next directory may be itself."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: channels, 278: height}
    tags |= {279: 10, 284: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 18) + bytes(10) + directory


def put(places, data):
    (places.here / "bad.png").write_bytes(data)


@case(PREDICT, FEATURES, **SKIPPED)
def image_is_a_fifo(places):
    """Opening it would wait for a writer, and no signal would end that."""
    os.mkfifo(places.here / "bad.png")


@case(REPORT)
def image_of_a_report_is_a_fifo(places):
    os.mkfifo(places.here / "bad.png")


@case(PREDICT, **SKIPPED)
def image_is_a_device(places):
    (places.here / "bad.png").symlink_to("/dev/zero")


@case(PREDICT, **SKIPPED)
def image_is_sparse(places):
    put(places, b"")
    os.truncate(places.here / "bad.png", 10**11)


@case("predict {run} {here}", codes=(1,))
def images_in_a_folder_are_special(places):
    os.mkfifo(places.here / "a.jpg")
    (places.here / "b.jpg").symlink_to("b.jpg")
    (places.here / "c.jpg").symlink_to("/dev/zero")
    (places.here / "d.png").write_bytes(places.image.read_bytes())


@case("predict {run} {here}")
def links_double_with_each_folder(places):
    """2^30 ways lead to the last."""
    for level in range(30):
        (places.here / f"{level}").mkdir()
        for name in "ab":
            (places.here / f"{level}" / name).symlink_to(places.here / f"{level + 1}")
    (places.here / "30").mkdir()


@case("predict {run} {here}", codes=(0, 1))
def folders_a_thousand_deep(places):
    here = os.open(places.here, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (places.here / "d.png").write_bytes(places.image.read_bytes())


@case(PREDICT, **SKIPPED)
def jpeg2000_of_65025_tiles(places):
    put(places, jpeg2000(255, 255, (1, 1)))


@case(PREDICT, codes=(0, 1), slow=True)
def jpeg2000_of_190_million_pixels(places):
    put(places, jpeg2000(10_000, 19_000, (10_000, 19_000)))


@case(PREDICT, **SKIPPED)
def gif_of_190_million_pixels(places):
    put(places, gif(14_000, 13_600))


@case(PREDICT, codes=(1,))
def png_of_one_column(places):
    put(places, png(1, 30_000_000))


@case(PREDICT, codes=(0, 1), slow=True)
def png_of_60_texts(places):
    texts = [
        chunk(b"zTXt", b"%02d\0\0" % each + zlib.compress(bytes(1_000_000), 9))
        for each in range(60)
    ]
    put(places, png(8, 8, b"".join(texts)))


@case(PREDICT, **SKIPPED)
def tiff_of_a_tile_larger_than_memory(places):
    put(places, tiff(60_000))


@case(PREDICT, **SKIPPED)
def array_of_10_to_the_12_values(places):
    put(places, npy("{'descr': '|u1', 'fortran_order': True, 'shape': (1000000, 1000000, 1)}"))


@case(PREDICT, FEATURES, **SKIPPED)
def array_of_objects(places):
    """Their bytes are a pickle, which would be run."""
    pickled = b"cos\nsystem\n(S'touch owned'\ntR."
    put(places, npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}", values=pickled))


@case(PREDICT, **SKIPPED)
def array_with_code_in_its_header(places):
    put(places, npy("__import__('os').system('touch owned')", (3, 0)))


@case(PREDICT, **SKIPPED)
def array_with_a_header_nested_deeply(places):
    put(places, npy("(" * 9000))


@case(PREDICT, **SKIPPED)
def tiff_of_channels_larger_than_memory(places):
    put(places, channels_tiff(60_000, 60_000, 1000))


@case(PREDICT, **SKIPPED)
def tiff_of_channels_cut_short(places):
    put(places, channels_tiff(1000, 1000, 5))


@case(PREDICT, **SKIPPED)
def tiff_whose_directories_are_a_loop(places):
    put(places, channels_tiff(2, 1, 5, following=18))


@case(PREDICT, **SKIPPED)
def jpeg_of_thousands_of_scans(places):
    """Each of a few bytes, and all pixels."""
    data = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    size, first = data.index(b"\xff\xc2") + 5, data.index(b"\xff\xda")
    second = data.index(b"\xff", first + 12)
    head = data[:size] + struct.pack(">HH", 8000, 8000) + data[size + 4 : first]
    put(places, head + data[first:second] * 5000 + b"\xff\xd9")


def _data_set(places, spoil):
    """Ten classes of two images; `spoil` puts something in the place of one."""
    for label in map(str, range(10)):
        folder = places.here / "set" / "test" / label
        folder.mkdir(parents=True)
        for name in ("0.png", "1.png"):
            (folder / name).write_bytes(places.image.read_bytes())
    path = places.here / "set" / "test" / "3" / "0.png"
    path.unlink()
    spoil(path)


EVALUATE = "evaluate {run} --data=folder:{here}/set --split=test"


@case(EVALUATE, codes=(0,))
def data_set_with_a_fifo(places):
    _data_set(places, os.mkfifo)


@case(EVALUATE, EVALUATE + " --max_corrupt=0", codes=(0, 2))
def data_set_with_a_link_to_itself(places):
    _data_set(places, lambda path: path.symlink_to(path))


@case(EVALUATE, codes=(0,), slow=True)
def data_set_with_a_device(places):
    _data_set(places, lambda path: path.symlink_to("/dev/zero"))


@case(EVALUATE, codes=(0,))
def data_set_with_a_bomb(places):
    _data_set(places, lambda path: path.write_bytes(jpeg2000(255, 255, (1, 1))))


@case(
    "evaluate {run} --data=csv:{here}/zeros.csv --split=all",
    "evaluate {run} --data=jsonl:{here}/fifo.jsonl --split=all",
    "evaluate {run} --data=csv:{here}/rows.csv --split=all",
    "evaluate {run} --data=csv:{here}/one_line.csv --split=all",
)
def lists_that_never_end(places):
    """Or lists of such files."""
    places.copy_of_run()
    (places.here / "zeros.csv").symlink_to("/dev/zero")
    os.mkfifo(places.here / "fifo.jsonl")
    rows = "path,label\n/dev/zero,3\nfifo.jsonl,4\n\x1b[2J\u202e,3\n"
    (places.here / "rows.csv").write_text(rows)
    (places.here / "one_line.csv").write_bytes(b"path,label\n")
    os.truncate(places.here / "one_line.csv", 10**9)


@case(PREDICT, FEATURES, **SKIPPED)
def image_is_the_head_of_a_heic_photo(places):
    """Its brands are said to go on for 4 GB; pillow-heif may be there or not."""
    put(places, b"\xff\xff\xff\xffftypheic" + b"mif1" * 20)
