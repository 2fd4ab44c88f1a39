"""From the words on the command line to an exit code."""

from __future__ import annotations

import errno
import sys

from assay.cli.app import app
from assay.cli.printing import printable
from assay.cli.process import (
    is_in_a_group,
    is_out_of_memory,
    require_place,
    settle,
    silence,
    speaks,
)


def main() -> None:
    """Run the command: one clear line and exit code 2 for bad input, 1 for a failure, 130 when it
    was stopped.
    """
    settle()
    from assay.errors import AssayError, StoppedError

    message: object = ""
    try:
        require_place()
        if is_in_a_group():
            from assay.studies import runner

            runner.join()
        code = app(sys.argv[1:] or ["--help"], prog_name="assay", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if code == StoppedError.exit_code:
            message = "stopped; no file is left half-written: run the same command again"
    except AssayError as error:
        message, code = error, error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message, code = f"out of memory: {error}", 1
    except BrokenPipeError:
        silence()
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        silence()
        message, code = f"the output cannot be written: {error.strerror}", 1
    except Exception as error:
        # Wrong usage; the classes live in another package from one version of typer to the next.
        if not hasattr(error, "format_message"):
            raise
        message, code = f"{error.format_message()} (see assay --help)", 2
    text = printable(" ".join(str(message).split()))
    if text and speaks():
        print("assay:", text, file=sys.stderr)
    sys.exit(code or 0)
