"""Errors that a user can cause; any other exception is a bug of this package.

All of them are `ValueError`s, so code that does not know this package can catch them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator

from resnet_jax.packages import DISTRIBUTION, declared

# Exit codes of the command line: some images were skipped, a mistake of the user, another process
# is lost, training diverged, a signal stopped the run with everything saved.
SKIPPED, MISTAKE, LOST, DIVERGED, STOPPED = 1, 2, 69, 70, 75

# The end of messages about a run that could not continue.
RETRY = "fix this and run the same command again to resume"
# The end of messages about an unknown network, to which commands add their flag for it.
UNREGISTERED = "a network of your own needs rj.register_model first, as in a recipe's file"

NO_WINDOWS = (
    "Windows supports models and their weights only, not training and the commands; use Linux or "
    "macOS, or Linux inside Windows (WSL)"
)
_POSIX = ("fcntl", "grp", "pwd", "resource", "termios")  # modules that Windows does not have

_THIS = __name__.partition(".")[0]
# PyPI names of modules whose packages have other names.
_PACKAGES = {
    "absl": "absl-py",
    "attr": "attrs",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "google.auth": "google-auth",
    "google.cloud.storage": "google-cloud-storage",
    "google.protobuf": "protobuf",
    "orbax.checkpoint": "orbax-checkpoint",
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "sklearn": "scikit-learn",
    "tensorflow": "tensorflow-cpu",
    "tree": "dm-tree",
    "yaml": "pyyaml",
}


class ResNetJaxError(ValueError):
    """A mistake of the caller; the message is one line that says how to fix it."""


class ModelError(ResNetJaxError):
    """An unknown model or field, an invalid field value, or an unusable input shape."""


class WeightsError(ResNetJaxError):
    """A weight file or state dict that cannot be read or does not fit the model."""


class ConfigError(ResNetJaxError):
    """A field of a run's configuration, or a workdir, that cannot be used."""


class DataError(ResNetJaxError):
    """A dataset that is missing, incomplete, damaged or unsuitable."""


class DivergedError(ResNetJaxError):
    """Training has diverged: the loss is not finite."""


class ExportError(ResNetJaxError):
    """An export that fails, cannot be written, or disagrees with its source."""


class StoppedError(ResNetJaxError):
    """A signal stopped a run between two steps; the same command resumes it."""


class PeerError(ResNetJaxError):
    """Another process of the run is lost; the same command on all processes resumes the run."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """An error message about an unknown name, with the most similar known names.

    Args:
      kind: What the name stands for, as a noun: "model", "field of ResNet".
      name: The unknown name.
      known: All known names.

    Example:
      >>> unknown_name("model", "resnet21", ["plain34", "resnet32", "resnet20"])
      "unknown model 'resnet21'; did you mean 'resnet20' or 'resnet32'?"
    """
    known = sorted(known)
    shown = name if len(str(name)) <= 100 else f"{str(name)[:100]}..."

    def distance(each: str) -> tuple[float, int, str]:
        ratio = difflib.SequenceMatcher(None, each, str(shown)).ratio()
        in_place = sum(a == b for a, b in zip(str(shown), each, strict=False))
        return -ratio, -in_place, each

    close = sorted(difflib.get_close_matches(str(shown), known, n=10), key=distance)[:3]
    if close:
        return f"unknown {kind} {shown!r}; did you mean {' or '.join(map(repr, close))}?"
    listed = known if len(known) <= 30 else [*known[:10], "..."]
    return f"unknown {kind} {shown!r}; known: {', '.join(listed)}"


def one_line(text: object) -> str:
    """Joins the lines of an error or a message; an empty error becomes the name of its class.

    Example:
      >>> one_line(ValueError("no such file:\\n  a.txt")), one_line(EOFError())
      ('no such file: a.txt', 'EOFError')
    """
    return " ".join(str(text).split()) or type(text).__name__


def reason_of(error: Exception) -> str:
    """Why something failed, as one line to quote in another error.

    A library's error is quoted with its class, because messages such as "'state'" say little alone.

    Example:
      >>> reason_of(KeyError("state")), reason_of(EOFError()), reason_of(DataError("too short"))
      ("KeyError: 'state'", 'EOFError', 'too short')
    """
    first_line = str(error).strip().partition("\n")[0]
    first_line = first_line if len(first_line) <= 300 else f"{first_line[:300]}..."
    if isinstance(error, ResNetJaxError):
        return first_line
    name = type(error).__name__
    return f"{name}: {first_line}" if first_line else name


@contextlib.contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError in the block, such as a full disk, into a ConfigError that names the path.

    Example:
      >>> with write_errors("config.json"):  # doctest: +ELLIPSIS
      ...     raise OSError(28, "No space left on device")
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: config.json cannot be written (No space left on device); ...
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}); {RETRY}"
        ) from error


@contextlib.contextmanager
def importing(purpose: str, kind: type[ResNetJaxError]) -> Iterator[None]:
    """Turns a failed import in the block into one line that names the module at fault.

    Args:
      purpose: What needs the import, such as "--format=onnx".
      kind: Class of the error to raise.

    Example:
      >>> with importing("--format=onnx", ExportError):
      ...     import no_such_module
      Traceback (most recent call last):
      resnet_jax.errors.ExportError: --format=onnx needs no_such_module, which is not installed: \
pip install no-such-module
    """
    try:
        yield
    except ImportError as error:
        raise kind(import_failure(error, purpose)) from error


def check_system() -> None:
    """Exits with an error on Windows, where training and the commands do not run."""
    if sys.platform == "win32":
        print(f"error: {NO_WINDOWS}", file=sys.stderr)
        sys.exit(MISTAKE)


def import_failure(error: ImportError, purpose: str = "") -> str:
    """Explains which module cannot be imported and what to install, in one line.

    The module may be a dependency of the imported one. The message of a package that is installed
    but broken is quoted.

    Raises:
      ImportError: `error` itself, if it is about a module of resnet_jax, which is a bug.

    Example:
      >>> import_failure(ModuleNotFoundError("No module named 'PIL'", name="PIL"))
      "PIL is not installed: pip install pillow, or this package's extra 'train'"
      >>> import_failure(ImportError("libGL.so.1: cannot open shared object file", name="cv2"))
      'cv2 cannot be imported (libGL.so.1: cannot open shared object file)'
    """
    error = _first_failure(error)
    module = error.name or ""
    if module.partition(".")[0] == _THIS:
        raise error
    if sys.platform == "win32" and module in _POSIX:
        return NO_WINDOWS
    known = [name for name in _PACKAGES if f"{module}.".startswith(f"{name}.")]
    root = known[0] if known else module.partition(".")[0]
    is_missing = isinstance(error, ModuleNotFoundError) and module
    # Otherwise the package is installed, but it is damaged or of another version.
    if is_missing and (module == root or not is_installed(root)):
        package = _PACKAGES.get(root, root.replace("_", "-"))
        extra = _extra_with(package)
        fault = f"is not installed: pip install {package}"
        fault += f", or this package's extra {extra!r}" if extra else ""
    else:
        root = module or "a package"
        fault = f"cannot be imported ({one_line(error)})"
    return f"{purpose} needs {root}, which {fault}" if purpose else f"{root} {fault}"


def _first_failure(error: ImportError) -> ImportError:
    """The import that failed first.

    Libraries report "install X" also if X is installed and one of its dependencies is not.
    """
    cause = error.__cause__
    if cause is None and not error.__suppress_context__:
        cause = error.__context__
    return cause if not error.name and isinstance(cause, ImportError) else error


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _extra_with(package: str) -> str:
    """The smallest extra of this package that installs `package`; "" if none does."""
    extras: dict[str, set[str]] = {}  # an extra that includes another lists its packages too
    for each in declared(DISTRIBUTION):
        if each.extra:
            extras.setdefault(each.extra, set()).add(each.name)
    having = [name for name, packages in extras.items() if package.lower() in packages]
    return min(having, key=lambda name: len(extras[name]), default="")


@contextlib.contextmanager
def library_errors(explain: Callable[[Exception], ResNetJaxError]) -> Iterator[None]:
    """Turns any error of a library, for bad input, into the error that `explain` returns.

    This is for libraries whose errors have no common class. Keep the block to calls of the library:
    a bug of our own would be reported as bad input. Failed imports and a lack of memory are not
    caused by bad input and pass through, as do errors of ours.

    Example:
      >>> with library_errors(lambda error: DataError(f"not a number ({error})")):
      ...     float("x")
      Traceback (most recent call last):
      resnet_jax.errors.DataError: not a number (could not convert string to float: 'x')
    """
    try:
        yield
    except (ImportError, MemoryError, ResNetJaxError):
        raise
    except Exception as error:
        raise explain(error) from error
