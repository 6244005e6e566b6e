"""Looks a machine, a data set or a run over, and says in words what is wrong.

python -m minidiff.doctor                                        this machine
python -m minidiff.doctor data=folder data.path=DIR              data, as train.py would read them
python -m minidiff.doctor run=runs/RUN                           a run
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from minidiff.doctor import Finding, environment
from minidiff.errors import InputError, MinidiffError
from minidiff.redact import redact


def main(arguments: Sequence[str]) -> int:
    """Prints the findings; returns 0 if all are good, else the exit code of their kind (6, 3 or 4)."""
    try:
        code, findings = examine(arguments)
        bad = 0
        for finding in findings:
            print(redact(f"{'ok     ' if finding.good else 'PROBLEM'}  {finding.text}"), flush=True)
            bad += not finding.good
    except MinidiffError as error:
        print(redact(str(error)), file=sys.stderr)
        return error.exit_code
    print(f"{bad} problem(s)" if bad else "nothing is wrong")
    return code if bad else 0


def examine(arguments: Sequence[str]) -> tuple[int, Iterator[Finding]]:
    """Returns the exit code for problems, and the findings, for what the arguments name."""
    if strange := [x for x in arguments if "=" not in x]:
        raise InputError("MD-DOC-001", f"{strange[0]} is not KEY=VALUE.{__doc__.partition(chr(10))[2]}")
    runs = [x.removeprefix("run=") for x in arguments if x.startswith("run=")]
    if runs and len(arguments) > 1:
        raise InputError("MD-DOC-001", f"run= stands alone; data are looked over by themselves.{__doc__}")
    if runs:
        from minidiff.doctor import run

        return 4, run.examine(runs[0])
    if arguments:
        from minidiff.config import compose
        from minidiff.doctor import data

        return 3, data.examine(compose("train", arguments), Path("doctor_data.png"))
    return 6, environment.examine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
