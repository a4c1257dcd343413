"""The program: the console script `jaxrft`, and python -m jaxrft."""

import signal
import sys

from jaxrft.host import signals


def main() -> int:
    """Runs the command line of the process; returns its exit code."""
    signals.open_descriptors()
    signals.leave_early()
    from jaxrft import cli  # not before a Ctrl-C is understood

    try:
        return cli.main()
    except KeyboardInterrupt:  # a second Ctrl-C, while what the first one stopped is being saved
        signals.leave(signal.SIGINT)
        return 128 + signal.SIGINT  # another thread ends the process at this moment
    finally:
        signals.leave_to_kernel()


if __name__ == "__main__":
    sys.exit(main())
