"""Errors a user can cause. The command line turns each into one sentence and exit code 2."""

import signal
from numbers import Integral


class HingeError(Exception):
    """Something the user can put right; the message is one sentence that says what and where."""


class ConfigError(HingeError):
    """A configuration key, value or command-line argument that cannot be used."""


class DataError(HingeError):
    """A slide, image, panel, feature or result file that is missing, damaged or does not fit."""


class WeightsError(HingeError):
    """Weights that are missing, damaged, or of another model than the one asked for."""


class Interrupted(HingeError):
    """The user stopped it (Ctrl-C or a signal) at a place from which the same command goes on.

    Parameters
    ----------
    message
        What was stopped, and where.
    signal_number
        Of the signal; the command line exits with 128 more.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT):
        super().__init__(message)
        self.signal_number = int(signal_number)


def one_line(error: BaseException, most: int = 160) -> str:
    """The first line of what a library says, for the end of a sentence; its kind where it says nothing."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= most else text[: most - 3] + "..."


def require_whole_number(name: str, value: object, low: int, high: int) -> None:
    """Check that an argument is a whole number within a range.

    Raises
    ------
    ConfigError
        It is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} takes a whole number from {low} to {high}, not {value!r}")
