"""The front door: `fedicom <verb>`. Wiring only; a room is imported when its verb is called."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
from collections.abc import Sequence

from common.cli import run_verb
from common.errors import FedicomError
from common.printable import printable

_VERBS = {
    "simulate": ("simulations.cli", "simulate_verb", "a whole federation on this machine"),
    "rehearse": (
        "simulations.rehearsal_cli",
        "rehearse_verb",
        "a deployed federation of real processes on this machine",
    ),
    "hospitals": ("simulations.cli", "hospitals_verb", "make virtual hospitals: phantoms, or public data as DICOM"),
    "recipe": ("common.recipe_cli", "recipe_verb", "look at a recipe before it runs, sign it, verify it"),
    "predict": ("common.cli", "predict_verb", "run an exported model over a DICOM folder"),
    "data": ("client.data_cli", "data_verb", "index, inspect and check a hospital's images"),
    "privacy": ("simulations.privacy_cli", "privacy_verb", "test the privacy mechanism; attack its models"),
    "audit": ("common.audit_cli", "audit_verb", "check the signed logs of a run, report on them, trace a model"),
    "provision": ("server.provision_cli", "provision_verb", "make keys, certificates and kits for a federation"),
    "server": ("server.cli", "server_verb", "coordinate a federation: start, run, status, stop, resume, conclude"),
    "site": ("client.cli", "site_verb", "a hospital's node: review, approve, start, status"),
    "version": ("common.cli", "version_verb", "print the version"),
}


_SCARCE = {
    errno.ENOSPC: "free space on the disk that the output goes to, and on that of the folder",
    errno.EDQUOT: "free space on the disk that the output goes to, and on that of the folder",
    errno.EMFILE: "let this process have more files open (`ulimit -n`)",
    errno.ENFILE: "close programs: this machine has too many files open",
}
"""What the rooms do not tell, for it is no file of theirs, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 1 it failed with a message, 2 the request was wrong."""
    # At its end Python looks through torch's million objects for rubbish, which takes two seconds.
    atexit.register(gc.freeze)
    words = list(sys.argv[1:] if argv is None else argv)
    does = "Federated learning on DICOM images: the model travels, the images stay."
    try:
        code = run_verb("fedicom", _VERBS, words, does)
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
        return code
    except FedicomError as error:
        # Some errors quote what others wrote.
        lines = map(printable, str(error).split("\n"))
        print("fedicom:", "\n".join(lines), file=sys.stderr)  # noqa: T201
        return error.exit_code
    except PermissionError as error:
        # Without the path, which may name a patient: where one may be shown, the room that knows has told it.
        why = f"{error.strerror}; check the owner and mode of the folders, or run this as the user that they belong to"
        print("fedicom:", why, file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:
        # The reader of our output, `head` for example, has seen enough.
        _write_no_more()
        return 0
    except OSError as error:
        if error.errno not in _SCARCE:
            raise
        _write_no_more()  # what is still to be written would fail again at the end
        print(f"fedicom: {error.strerror}; {_SCARCE[error.errno]}, and run again", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("fedicom: stopped by you", file=sys.stderr)  # noqa: T201
        return 130


def _write_no_more() -> None:
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
