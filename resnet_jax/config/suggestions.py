"""Finds the fields that a misspelled or abbreviated flag of `train` may mean."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# What other programs call a field. Initials such as "lr" and parts of names need no entry.
_OTHER_NAMES = {
    "amp": "model.dtype",
    "arch": "model.name",
    "augmentation": "augment.trivial",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "classes": "model.num_classes",
    "cooldown": "schedule.final",
    "dataset": "data.name",
    "data_path": "data.name",
    "depth": "model.name",
    "ema": "train.ema_decay",
    "eval_every": "evaluate.every_epochs",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "gradient_clipping": "optimizer.clip_norm",
    "grad_clip": "optimizer.clip_norm",
    "img_size": "data.image_size",
    "input_size": "data.image_size",
    "log_every": "log.every_steps",
    "max_steps": "train.steps",
    "max_epochs": "train.epochs",
    "max_lr": "optimizer.learning_rate",
    "min_lr": "schedule.final",
    "net": "model.name",
    "network": "model.name",
    "num_epochs": "train.epochs",
    "num_steps": "train.steps",
    "num_workers": "data.workers",
    "opt": "optimizer.name",
    "pretrained": "checkpoint.init_from",
    "rate": "optimizer.learning_rate",
    "print_freq": "log.every_steps",
    "resolution": "data.image_size",
    "save_every": "checkpoint.every_steps",
    "scheduler": "schedule.name",
    "size": "data.image_size",
    "smoothing": "loss.label_smoothing",
    "test_split": "data.eval_split",
    "val_split": "data.eval_split",
    "warmup": "schedule.warmup_epochs",
    "weights": "checkpoint.init_from",
}
_MOST = 3


def likely_fields(name: str, fields: Collection[str]) -> list[str]:
    """The fields that a wrong name may mean, the most likely first; [] if none is similar.

    Args:
      name: Such as "optimizer.lr" or "epochs".
      fields: All fields as SECTION.NAME.

    Example:
      >>> likely_fields("trian.epochs", ["train.epochs", "train.steps", "evaluate.every_epochs"])
      ['train.epochs']
      >>> likely_fields("lr", ["optimizer.learning_rate", "optimizer.clip_norm"])
      ['optimizer.learning_rate']
    """
    section, _, last = name[:100].lower().replace("-", "_").rpartition(".")
    if f"{last}.name" in fields and not section:
        return [f"{last}.name"]
    sections = list(dict.fromkeys(each.partition(".")[0] for each in fields))
    near = _near_section(section, sections)

    def ranked(found: Collection[str]) -> list[str]:
        """Fields of the section that the name has, if there are any."""
        inside = [each for each in found if each.startswith(f"{near}.")] if near else []
        return (inside or [*found])[:_MOST]

    names = {each: each.partition(".")[2] for each in fields}
    if exact := [each for each in fields if names[each] == last]:
        return ranked(exact)
    if _OTHER_NAMES.get(last) in fields:
        return [_OTHER_NAMES[last]]
    if same := [each for each in fields if last and _initials(names[each]) == last]:
        return ranked(same)
    inside = [each for each in fields if near and each.startswith(f"{near}.")]
    for candidates in (inside, [*fields]):
        # The words of the name in any order, such as "decay" or "norm_clip".
        words = set(last.split("_"))
        if part := [each for each in candidates if words <= set(names[each].split("_"))]:
            return part[:_MOST]
        close = difflib.get_close_matches(last, [names[each] for each in candidates], n=1)
        if close:
            return [each for each in candidates if names[each] == close[0]][:_MOST]
    return []


def _near_section(section: str, sections: Collection[str]) -> str:
    """The section that a wrong name of one means, such as "optim"; "" if none is similar."""
    if started := [each for each in sections if section and each.startswith(section)]:
        return started[0]
    return next(iter(difflib.get_close_matches(section, sections, n=1)), "")


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_") if word) if "_" in name else ""
