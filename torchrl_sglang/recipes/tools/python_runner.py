"""Run the program on stdin within limits: ``python -I -S python_runner.py <CPU seconds> <bytes of memory>``.

This file imports only the standard library, so a program starts in milliseconds and can't import the trainer's code.
"""

import resource
import sys


def main() -> None:
    """Set the limits, then run the program."""
    code = sys.stdin.read()
    cpu_s, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),  # no file may grow; the output is a pipe
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # root is exempt
    ):
        resource.setrlimit(limit, (value, value))
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
