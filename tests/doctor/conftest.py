"""Machines that are made of a few files."""

import pytest

from resnet_jax.doctor.machine import Machine


@pytest.fixture
def machine(tmp_path):
    """Makes one of files, by path and text, and of environment variables."""

    def machine(files=(), **environ):
        for path, text in dict(files).items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return Machine(tmp_path, environ)

    return machine
