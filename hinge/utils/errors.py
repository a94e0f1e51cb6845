"""Errors that a user can cause. The command line prints each as one sentence and exits with code 2."""

import signal
from numbers import Integral


class HingeError(Exception):
    """An error that the user can correct; the message is one sentence with the file or key."""


class ConfigError(HingeError):
    """A configuration key, value or command-line argument that cannot be used."""


class DataError(HingeError):
    """A slide, image, panel, feature or result file that is missing, damaged or does not fit."""


class WeightsError(HingeError):
    """Weights that are missing, damaged, or of another model than the requested one."""


class Interrupted(HingeError):
    """The user stopped a command (Ctrl-C or a signal); the same command resumes it.

    Parameters
    ----------
    message
        What was stopped, and where.
    signal_number
        Number of the signal; the exit code is 128 plus this number.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGINT):
        super().__init__(message)
        self.signal_number = int(signal_number)


def sentence(error: BaseException) -> str:
    """Return the message of an error as one line, with its type unless the error is a HingeError."""
    text = " ".join(str(error).split())
    return text if isinstance(error, HingeError) else f"{type(error).__name__}: {text}"


def one_line(error: BaseException, most: int = 160) -> str:
    """Return the first line of an exception's message, or the name of its class if it has no message."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= most else text[: most - 3] + "..."


def require_whole_number(name: str, value: object, low: int, high: int) -> None:
    """Check that an argument is a whole number within a range.

    Raises
    ------
    ConfigError
        It is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ConfigError(f"{name} takes a whole number from {low} to {high}, not {value!r}")
