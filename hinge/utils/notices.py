"""Notices that are printed once in a process, however often what they tell of is read."""

import logging

_told: set[tuple[str, str]] = set()


def tell_once(logger: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Log a message unless this process has logged it before."""
    if (logger.name, message) not in _told:
        _told.add((logger.name, message))
        logger.log(level, "%s", message)
