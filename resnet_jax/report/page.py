"""A report's page: one HTML file that holds all sections, and their pictures beside it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from resnet_jax import files
from resnet_jax.errors import ConfigError
from resnet_jax.inference.writers import check_output, explained
from resnet_jax.report.predictions import HeldOut
from resnet_jax.report.runs import Run, read_run
from resnet_jax.report.sections import Section, one_run, several_runs
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
    """Writes one self-contained HTML file about runs, and its pictures beside it.

    One run is looked at from all sides; several are laid over each other, as the paper compares
    plain and residual networks.

    Args:
      workdirs: Folders of the runs.
      output: The HTML file; None: "report.html" in the run's folder, or in the current one for
        several runs. Pictures go into a folder of the same name without ".html".
      images: Image files to explain, instead of the first held-out ones.
      data: Held-out images, as in `data.name`; "": what each run was evaluated on, if this user
        trained it.
      data_dir: Where TFDS keeps its data sets; goes with `data`.
      force: Replace what is there.

    Returns:
      The file.

    Raises:
      ConfigError: A folder is no workdir, or the output is there already or cannot be written.

    Example:
      >>> write_report(["nowhere"])
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: nowhere is not a workdir: it has no config.json
    """
    runs = _with_titles([read_run(workdir) for workdir in workdirs])
    output = Path(output or (runs[0].workdir if len(runs) == 1 else Path()) / "report.html")
    if output.suffix != ".html":
        raise ConfigError(f"--output={output}: must end in .html")
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}; make it first")
    if data_dir and not data:
        raise ConfigError(f"--data_dir={data_dir}: goes with --data")
    with explained(output, f"--output={output}"):
        check_output(output, force, f"--output={output}")
    folder = output.with_suffix("")
    if os.path.lexists(folder):  # before the minutes that the sections take
        with explained(folder, f"--output={output}: {folder}"):
            files.check_folder(folder)
    held_out = HeldOut(data, data_dir)
    if len(runs) == 1:
        sections = one_run(runs[0], images, held_out)
    else:
        sections = several_runs(runs, held_out)
    _write(output, _render(runs, sections), sections, force)
    return output


def _with_titles(runs: list[Run]) -> list[Run]:
    """Runs whose folders share a name are called by their paths."""
    titles = [run.title for run in runs]
    return [
        dataclasses.replace(
            run, title=visible(run.workdir if titles.count(run.title) > 1 else run.title)
        )
        for run in runs
    ]


def _render(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    import jinja2

    text = (resources.files("resnet_jax.report") / "template.html").read_text(encoding="utf-8")
    # Names of classes, files and folders are data: autoescape keeps them from being markup.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value, keep="\n"),  # no bidirectional codes on the page
    )
    data = runs[0].config.data
    one = f"{runs[0].title}: {runs[0].config.model.name} on {data.name}"
    title = one if len(runs) == 1 else f"{len(runs)} runs on {data.name}"
    lead = "A network trained with resnet_jax." if len(runs) == 1 else "Runs beside each other."
    return environment.from_string(text).render(title=title, lead=lead, sections=sections)


def _write(output: Path, page: str, sections: Sequence[Section], force: bool) -> None:
    """The pictures first, the page last and at once: a page that is there is whole.

    Runs may be a stranger's: links in the place of files are replaced, one in the place of the
    folder is refused, and neither is followed.
    """
    flag, folder = f"--output={output}", output.with_suffix("")
    pictures = {
        folder / f"{picture.name}.png": picture.png
        for section in sections
        for picture in section.pictures
    }
    with explained(folder, f"{flag}: {folder}"):
        files.make_folder(folder)
    with explained(folder, flag):
        for path in pictures:
            check_output(path, force, f"{flag}: {path}")
        for path, png in pictures.items():
            files.atomic_write(path, png)
        files.atomic_write(output, page)
