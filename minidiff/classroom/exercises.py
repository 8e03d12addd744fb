"""Self-checks of the book's exercises, run in the reader's own kernel."""

import hashlib
from collections.abc import Callable


def check(test: Callable[[], None]) -> Callable[[], None]:
    """Run the check ``exercise_4_2`` at once and print how it went.

    A decorator: it returns the check, to be called again after another attempt.
    Nothing is raised, so that a notebook with an unfilled stub runs to its end.

    >>> @check
    ... def exercise_4_2():
    ...     assert 1 + 1 == 3, "one and one is two"
    Exercise 4.2: not yet (one and one is two)
    """
    title = test.__name__.replace("exercise_", "Exercise ").replace("_", ".")

    def run() -> None:
        try:
            test()
        except NotImplementedError:
            print(f"{title}: not yet (the stub is still empty)")
        except Exception as error:
            print(f"{title}: not yet ({str(error) or type(error).__name__})")
        else:
            print(f"{title}: passed")

    run()
    return run


def seal(answer: object) -> str:
    """Eight signs by which a check knows an answer that it does not hold.

    >>> seal(round(22 / 7, 2)) == seal(3.14), seal(3.14) == seal(3.15)
    (True, False)
    """
    return hashlib.sha256(str(answer).encode()).hexdigest()[:8]
