"""``kd-lightning-sync``: ship what runs have left in their journals, from this machine or another."""

import argparse
import logging
import os
import sys
from collections import defaultdict
from pathlib import Path

from kd_lightning.tracking.calls import without_credentials
from kd_lightning.tracking.journal import close_if_dead, last_begin
from kd_lightning.tracking.shipper import Shipper, journals_below
from kd_lightning.tracking.shipping import Shipment
from kd_lightning.tracking.sqlite import create_database, sqlite_file
from kd_lightning.tracking.store import check_store, named_store


def main() -> None:
    """Entry point of ``kd-lightning-sync``."""
    parser = argparse.ArgumentParser(
        prog="kd-lightning-sync",
        description="Ship what runs have left in their journals to MLflow, and close those that were killed.",
    )
    parser.add_argument("path", nargs="?", type=Path, default=Path("mlruns"), help="with the journals; default: mlruns")
    parser.add_argument("--tracking-uri", help="the store; by default the one that each journal names")
    given = parser.parse_args()
    logging.basicConfig(format="kd-lightning-sync: %(message)s", stream=sys.stderr)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        whole = sync(given.path, given.tracking_uri)
    except (OSError, ValueError) as error:
        raise SystemExit(f"kd-lightning-sync: {error}") from None
    sys.exit(0 if whole else 1)


def sync(path: Path, tracking_uri: str | None = None) -> bool:
    """Ship all journals below a folder, say what was shipped, and tell whether the stores have all.

    Args:
        path: A run's folder, or one above it.
        tracking_uri: The store's address; by default the one that each journal names.

    Raises:
        ValueError: When there is no journal, or its store is not on this machine.
        OSError: When a store is away or damaged.
    """
    stores: dict[str, list[Path]] = defaultdict(list)
    folders = journals_below(path)
    if not folders:
        raise ValueError(f"expected journals of runs (journal.jsonl) below {path.absolute()}, found none")
    alive = without_store = 0
    for folder in folders:
        begin = last_begin(folder)
        if begin is None:
            continue
        if tracking_uri is None and begin.get("store") is None:
            without_store += 1
            continue
        alive += close_if_dead(folder)
        stores[tracking_uri or named_store(begin["store"], folder)].append(folder)
    whole = True
    for uri, of in stores.items():
        whole = _ship(uri, of) and whole
    if alive:
        print(f"{alive} runs are still under way")
    if without_store:
        print(f"{without_store} runs were logged to no store (logger=null): --tracking-uri says where they go")
    return whole


def _ship(uri: str, folders: list[Path]) -> bool:
    check_store(uri)
    file = sqlite_file(uri)
    if file is not None:
        create_database(file)
    waiting = [folder for folder in folders if Shipment(folder, uri).waiting()]
    shipper = Shipper(uri)
    for folder in waiting:
        shipper.add(folder)
    whole, missing = shipper.flush(), shipper.undelivered()
    print(f"{without_credentials(uri)}: {len(waiting)} of {len(folders)} runs had something to ship")
    if missing is not None:
        print(missing)
    return whole and missing is None


if __name__ == "__main__":
    main()
