"""What the site changes in the sources: links to the repository, and docstrings."""

import logging
import re
from pathlib import Path

from griffe import Extension, Function, Object, Parameter, ParameterKind, Parameters

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown, page, config, files):
    """Points relative links that leave docs/ to the files of the repository."""

    def replace(link):
        target = (Path(page.file.abs_src_path).parent / link["path"]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        if not target.exists():
            log.warning("%s: %s does not exist", page.file.src_uri, link["path"])
        kind = "tree" if target.is_dir() else "blob"
        path = target.relative_to(ROOT).as_posix()
        return f"{config.repo_url}/{kind}/main/{path}{link['anchor'] or ''}"

    return LINK.sub(replace, markdown)


class Docstrings(Extension):
    """Makes griffe read "Example:" as a section, and fields of linen modules as parameters."""

    def on_object(self, *, obj: Object, **kwargs) -> None:
        """Renames the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )

    def on_class(self, *, cls, **kwargs) -> None:
        """Gives a linen module, which is a dataclass in all but its decorator, its `__init__`."""
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
            if member.is_attribute and member.annotation and "ClassVar" not in str(member.annotation)
        ]
        if fields:
            first = Parameter("self", kind=ParameterKind.positional_or_keyword)
            cls.set_member("__init__", Function("__init__", parameters=Parameters(first, *fields)))
