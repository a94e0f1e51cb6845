"""This package's version, and the packages that only some commands need."""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from hinge.utils.errors import ConfigError

DISTRIBUTION = "hinge-histology"
VERSION = version(DISTRIBUTION)


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional dependency.

    Parameters
    ----------
    module
        Name of the module.
    extra
        Name of the extra of this distribution that installs it.
    purpose
        What needs it; the subject of the error.

    Raises
    ------
    ConfigError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f'{purpose} needs the package {package}: pip install "{DISTRIBUTION}[{extra}]"') from error
