"""Prepares TFDS datasets: TensorFlow downloads and writes them once, and reading does without."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resnet_jax.config.schema import DATA_PLACES
from resnet_jax.data.sources.base import field_error
from resnet_jax.data.sources.tfds_files import (
    find_prepared,
    import_tfds,
    is_known,
    missing_shards,
    open_prepared,
    prepare_digits,
    split_version,
    tfds_root,
)
from resnet_jax.errors import DataError, library_errors, one_line
from resnet_jax.files import atomic_write, new_folder

# ImageNet's license forbids TFDS to download these. TFDS itself asks for them only after minutes.
_ARCHIVES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
_DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOTDIR)
_LENGTH = struct.Struct("<Q")

_log = logging.getLogger(__name__)


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> None:
    """Makes a TFDS dataset ready for `open_source`; does nothing if it is.

    The digits are written directly. A copy in TFRecord files, as TFDS writes by default, is
    converted in its folder, without TensorFlow and without a download; the old files stay readable
    (ImageNet needs the same space again; you may delete them afterwards). An interrupted
    conversion continues where it stopped. Everything else is downloaded and written by TFDS's own
    builder, which needs TensorFlow.

    Args:
      name: "digits" or NAME[/CONFIG][:VERSION] of TFDS, with or without "tfds:".
      data_dir: Where TFDS keeps its datasets. Default: TFDS's own default.
      manual_dir: Folder of archives that you downloaded yourself, such as ImageNet's. Default:
        downloads/manual in the data folder.

    Raises:
      DataError: The name is unknown, TensorFlow or an archive is missing, the download failed, or
        the disk is full or not writable.

    Example:
      >>> import tempfile
      >>> from resnet_jax.data.sources import open_source
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     prepare("digits", folder)
      ...     open_source("digits", "test", folder).num_classes
      10
    """
    name = name.removeprefix("tfds:")
    if name == "digits":
        prepare_digits(data_dir)
        return
    if name.partition(":")[0] in DATA_PLACES:
        raise field_error("data.name", name, "image folders and lists are read as they are")
    base, _ = split_version(name)
    try:
        folder = find_prepared(name, data_dir)
    except DataError:
        if not is_known(base):
            raise
        _download(name, data_dir, manual_dir)
    else:
        _convert(name, folder)


def _download(name: str, data_dir: str, manual_dir: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise field_error(
            "data.name",
            f"tfds:{name}",
            "TFDS needs TensorFlow to prepare it (never to read it): pip install tensorflow-cpu",
        )
    root = tfds_root(data_dir)
    archives = str(manual_dir or root / "downloads" / "manual")
    _check_archives(name, archives)
    tfds = import_tfds()
    # A missing folder would be an error even for datasets that need no archives.
    settings = tfds.download.DownloadConfig(
        manual_dir=archives if os.path.isdir(archives) else None, try_download_gcs=False
    )
    with library_errors(lambda error: _preparing_error(name, str(root), error)):
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare(download_config=settings)


def _check_archives(name: str, folder: str) -> None:
    needed = _ARCHIVES.get(name.partition(":")[0].partition("/")[0], ())
    missing = [each for each in needed if not os.path.isfile(os.path.join(folder, each))]
    if missing:
        raise field_error(
            "manual_dir",
            folder,
            f"{' and '.join(missing)} must be there; download from "
            "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (needs an account)",
        )


def _preparing_error(name: str, root: str, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f" {error.filename}" if error.filename else ""
        return field_error("data.data_dir", root, f"cannot write{where} ({error.strerror})")
    if any(sign in str(error) for sign in ("disk space", os.strerror(errno.ENOSPC))):
        return field_error("data.data_dir", root, error)
    return field_error(
        "data.name",
        f"tfds:{name}",
        f"preparing failed, only finished downloads are kept ({type(error).__name__}: "
        f"{one_line(error)})",
    )


def _convert(name: str, folder: Any) -> None:
    """Adds ArrayRecord files to a prepared dataset that has only TFRecord files."""
    info = open_prepared(folder, f"tfds:{name}").info
    formats = {each.value for each in info.available_file_formats()}
    if "array_record" in formats:
        return
    if "tfrecord" not in formats:
        raise field_error(
            "data.name",
            f"tfds:{name}",
            f"{folder} holds {'/'.join(sorted(formats))}; only tfrecord can be converted",
        )
    if missing := missing_shards(info.splits.values()):
        raise field_error(
            "data.name",
            f"tfds:{name}",
            f"{folder} lacks {len(missing)} files, such as {missing[0]}",
        )
    try:
        for split in info.splits.values():
            _convert_split(split)
        # The description comes last: until then the dataset is still one of TFRecord files.
        info.add_alternative_file_format("array_record")
        atomic_write(folder / "dataset_info.json", info.as_json)
    except (OSError, RuntimeError) as error:  # riegeli raises the latter when the disk is full
        raise _preparing_error(name, str(folder), error) from error


def _convert_split(split: Any) -> None:
    template = split.filename_template
    shards = template.sharded_filepaths(split.num_shards)
    targets = template.replace(filetype_suffix="array_record").sharded_filepaths(split.num_shards)
    for shard, target, length in zip(shards, targets, split.shard_lengths):
        if target.exists():
            continue
        if Path(target).parent.resolve() != Path(template.data_dir).resolve():
            raise DataError(f"{target} lies outside of the dataset {template.data_dir}")
        with new_folder(template.data_dir) as stage:
            count = _convert_shard(shard, stage / target.name)
            if count != length:
                raise DataError(f"{shard} holds {count} examples, not {length}: it is damaged")
            os.replace(stage / target.name, target)
        _log.info("converted %s: %d examples", shard.name, count)


def _convert_shard(shard: Any, target: Any) -> int:
    """Copies the serialized examples as they are, and returns their number."""
    from array_record.python import array_record_module

    # As TFDS does: groups of one, so that an example is read without its neighbors.
    writer = array_record_module.ArrayRecordWriter(str(target), "group_size:1")
    count = 0
    try:
        for example in _read_tfrecord(shard):
            writer.write(example)
            count += 1
    finally:
        writer.close()
    return count


def _read_tfrecord(path: Any) -> Iterator[bytes]:
    """The records of a TFRecord file, each: length, its checksum (4 bytes), content, its checksum.

    The checksums (CRC-32C) are not compared, because Python's are too slow for 140 GB. Decoding
    finds damaged images.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        while (start := file.tell()) < end:
            header = file.read(12)
            length = _LENGTH.unpack_from(header)[0] if len(header) == 12 else end
            if start + 12 + length + 4 > end:
                raise DataError(f"{path} ends within an example: it is damaged")
            yield file.read(length)
            file.seek(4, os.SEEK_CUR)
