"""The command line, one file a command. Imported alone it imports next to nothing.

So Ctrl-C is answered from the first moment, while typer and PyTorch are still on their
way.
"""

import atexit
import signal
import sys

INTERRUPTED = 130  # 128 and SIGINT's number, as shells count


def main() -> None:
    """Run a command; a bad input is one line on stderr and exit status 2."""
    interruption = Interruption()
    try:
        from minidiff.cli.app import run

        code, line = run(sys.argv[1:])
    except BaseException as error:
        if not (interruption.came or isinstance(error, KeyboardInterrupt)):
            raise
        code, line = INTERRUPTED, ""
    finally:
        interruption.end()
    if interruption.came or code == INTERRUPTED:
        code, line = INTERRUPTED, "interrupted"
    if line:
        from minidiff.interface.terminal import tell

        tell(f"minidiff: {line}")
    sys.exit(code)


class Interruption:
    """Ctrl-C as KeyboardInterrupt until ``end``; then it is ignored, for all is done.

    A library may swallow the error, so it comes again each second.
    """

    def __init__(self) -> None:
        self.came = False
        self.before = signal.getsignal(signal.SIGINT)
        self.again = hasattr(signal, "setitimer")  # not on Windows
        if self.before is signal.default_int_handler:  # else Ctrl-C is not for us
            signal.signal(signal.SIGINT, self)
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def __call__(self, number: int, frame: object) -> None:
        self.came = True
        if self.again:
            signal.signal(signal.SIGALRM, self)
            signal.setitimer(signal.ITIMER_REAL, 1)
        raise KeyboardInterrupt

    def end(self) -> None:
        """Leave Ctrl-C to whoever had it before."""
        if self.came and self.again:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, self.before)
