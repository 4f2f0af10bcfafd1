"""Renders the page of a report and writes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from resnet_jax import files
from resnet_jax.errors import ConfigError
from resnet_jax.outputs import check_output, output_errors
from resnet_jax.report.elements import Section
from resnet_jax.report.palette import DARK, LIGHT, css_variables
from resnet_jax.report.predictions import HeldOutData
from resnet_jax.report.runs import Run, read_run
from resnet_jax.report.sections import comparison_sections, single_run_sections
from resnet_jax.terminal import visible


def write_report(
    workdirs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    images: Sequence[str | Path] = (),
    data: str = "",
    data_dir: str = "",
    force: bool = False,
) -> Path:
    """Writes one self-contained HTML file about a run or several, and its figures beside it.

    Args:
      workdirs: Folders of the runs.
      output: The HTML file. Default: report.html in the run's folder, or in the current folder
        for several runs. Figures go into a folder of the same name without ".html".
      images: Image files for the saliency maps. Default: held-out images of
        different classes.
      data: Held-out images, as in `data.name`. Default: those of each run, if this user trained it.
      data_dir: Where TFDS keeps its datasets; needs `data`.
      force: Replace existing files.

    Raises:
      ConfigError: A folder is not a workdir, or the output exists or cannot be written.
    """
    runs = _with_titles([read_run(workdir) for workdir in workdirs])
    output = Path(output or (runs[0].workdir if len(runs) == 1 else Path()) / "report.html")
    if output.suffix != ".html":
        raise ConfigError(f"--output={output}: must end in .html")
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}; make it first")
    if data_dir and not data:
        raise ConfigError(f"--data_dir={data_dir}: needs --data")
    with output_errors(output, f"--output={output}"):
        check_output(output, force, f"--output={output}")
    folder = output.with_suffix("")
    if os.path.lexists(folder):  # fail before the sections take minutes
        with output_errors(folder, f"--output={output}: {folder}"):
            files.check_folder(folder)
    held_out = HeldOutData(data, data_dir)
    if len(runs) == 1:
        sections = single_run_sections(runs[0], images, held_out)
    else:
        sections = comparison_sections(runs, held_out)
    _write(output, _render(runs, sections), sections, force)
    return output


def _with_titles(runs: list[Run]) -> list[Run]:
    """Replaces titles that occur twice by paths."""
    titles = [run.title for run in runs]
    unique = [run.workdir if titles.count(run.title) > 1 else run.title for run in runs]
    return [dataclasses.replace(run, title=visible(title)) for run, title in zip(runs, unique)]


def _render(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    import jinja2

    text = (resources.files("resnet_jax.report") / "template.html").read_text(encoding="utf-8")
    # Names of classes, files and folders are untrusted: autoescape keeps them from being markup.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    config = runs[0].config
    kind, _, place = config.data.name.partition(":")
    data = f"{kind}:{Path(place).name}" if place else kind
    if len(runs) == 1:
        title = f"{runs[0].title}: {config.model.name} on {data}"
        lead = "A network trained with resnet_jax."
    else:
        title, lead = f"{len(runs)} runs on {data}", "A comparison of runs."
    return environment.from_string(text).render(
        title=title,
        lead=lead,
        sections=sections,
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
    )


def _shown(value: Any) -> Any:
    """Text without bidirectional codes; markup, which is our own, as it is."""
    return value if hasattr(value, "__html__") else visible(value, keep="\n")


def _write(output: Path, page: str, sections: Sequence[Section], force: bool) -> None:
    """Writes figures first and the page last, by a rename, so that an existing page is complete.

    A workdir may be a stranger's: a symbolic link is replaced where it stands for a file, and
    refused where it stands for the folder.
    """
    flag, folder = f"--output={output}", output.with_suffix("")
    pictures = {
        folder / f"{picture.name}.png": picture.png
        for section in sections
        for picture in section.pictures
    }
    with output_errors(folder, f"{flag}: {folder}"):
        files.make_folder(folder)
    with output_errors(folder, flag):
        for path in pictures:
            check_output(path, force, f"{flag}: {path}")
        for path, png in pictures.items():
            files.atomic_write(path, png)
        files.atomic_write(output, page)
