"""The command line: `hinge`, and `python -m hinge.cli` for launchers."""


def main() -> None:
    """Entry point; Ctrl-C during the imports ends the process without a traceback."""
    import signal

    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hinge.cli.app import main

    signal.signal(signal.SIGINT, on_interrupt)
    main()
