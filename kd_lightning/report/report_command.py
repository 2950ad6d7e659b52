"""``kd-lightning-report``: make the report again from the records on the disk, and over several pipelines."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_lightning.durable_files import write_atomically
from kd_lightning.report.facts import RECORD, read_facts
from kd_lightning.report.html import render_many, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``kd-lightning-report``."""
    parser = argparse.ArgumentParser(
        prog="kd-lightning-report",
        description="Write report.html into each pipeline's folder, from its report.json; nothing is computed again.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="of a pipeline, such as mlruns/stages/pipeline-0123456789ab, or one that holds several of them",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="of the page over several pipelines (%(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        folders = [found for folder in given.folders for found in _pipelines(folder)]
        for folder in folders:
            print(write_report(folder))
        if len(folders) > 1:
            write_atomically(given.output.resolve(), render_many([read_facts(folder) for folder in folders]).encode())
            print(given.output)
    except (ValueError, OSError) as error:
        sys.exit(f"kd-lightning-report: {error}")


def _pipelines(folder: Path) -> list[Path]:
    """Return the pipelines' folders in a folder, the oldest first; itself where it is one."""
    if (folder / RECORD).is_file():
        return [folder]
    found = sorted(folder.glob(f"**/pipeline-*/{RECORD}"), key=lambda file: file.stat().st_mtime)
    if not found:
        read_facts(folder)  # says what was expected
    return [file.parent for file in found]


if __name__ == "__main__":
    main()
