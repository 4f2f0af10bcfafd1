"""What the site changes in the sources: the home page, links to the repository, docstrings."""

import logging
import os.path
import re
from pathlib import Path

from griffe import Extension, Function, Parameter, ParameterKind, Parameters

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# The relative path of a link or of an image, in Markdown or HTML.
LINK = re.compile(
    r"""(?:(?<=\]\()|(?<=src="))(?P<path>(?!\w+:|#|/)[^)#\s"]+)(?P<anchor>#[^)\s"]*)?(?=[)"])"""
)
BADGES = re.compile(r"^\[!\[.*\n", re.MULTILINE)
log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown, page, config, files):
    """Takes the home page from the README, and points links that leave docs/ to the repository."""
    source = Path(page.file.abs_src_path)
    if page.file.src_uri == "index.md":
        source = ROOT / "README.md"
        markdown = BADGES.sub("", source.read_text(encoding="utf-8"))
        page.meta["hide"] = ["navigation"]
        page.edit_url = f"{config.repo_url}/edit/main/README.md"

    def replace(link):
        target = Path(os.path.normpath(source.parent / link["path"]))
        anchor = link["anchor"] or ""
        if target.is_relative_to(DOCS) and target.suffix:
            return os.path.relpath(target, Path(page.file.abs_src_path).parent) + anchor
        if not target.exists():
            log.warning("%s: the link %s leads nowhere", page.file.src_uri, link["path"])
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor}"

    return LINK.sub(replace, markdown)


class Docstrings(Extension):
    """Makes griffe read "Example:" as a section, and fields of linen modules as parameters."""

    def on_object(self, *, obj, **kwargs):
        """Renames the section to the name that griffe knows."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )

    def on_class(self, *, cls, **kwargs):
        """Gives a linen module, a dataclass in all but the decorator, its `__init__`."""
        bases = {str(base).rpartition(".")[2] for base in cls.bases}
        if not bases & {"Module", "ResidualBlock"} or "__init__" in cls.members:
            return
        fields = [
            Parameter(
                name,
                annotation=member.annotation,
                kind=ParameterKind.keyword_only,
                default=member.value,
            )
            for name, member in cls.members.items()
            if member.is_attribute
            and member.annotation
            and not str(member.annotation).startswith("ClassVar")
        ]
        if fields:
            first = Parameter("self", kind=ParameterKind.positional_or_keyword)
            cls.set_member("__init__", Function("__init__", parameters=Parameters(first, *fields)))
