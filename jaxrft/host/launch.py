"""Runs a module of this package in a fresh process that executes no file of the current directory.

    python -P jaxrft/launch.py MODULE ARGUMENTS

Imports only the standard library.
"""

import importlib.util
import os
import runpy
import sys

_FILE = os.path.abspath(__file__)


def command(module: str, *arguments: str) -> list[str]:
    """Returns the command line that runs `module` of this very copy of the package.

    `python -m` would put the current directory in front of the standard library, so that a json.py
    there is executed. Under -P neither the current directory nor the folder of this file is
    searched. The package itself is loaded from the folder of this file, because the running process
    may have found it through the current directory alone.
    """
    return [sys.executable, "-P", _FILE, module, *arguments]


def main(arguments: list[str]) -> None:
    """Loads the package from the folder above this file and runs one of its modules as
    `__main__`.
    """
    package = os.path.join(os.path.dirname(os.path.dirname(_FILE)), "__init__.py")
    spec = importlib.util.spec_from_file_location("jaxrft", package)
    assert spec is not None and spec.loader is not None
    sys.modules["jaxrft"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["jaxrft"])
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
