"""What a failed probe leaves: the experiment to run again, and the memory as it was found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from experiments.results import write_json
from sim.errors import ProbeError


def store_failure(folder: Path, run_id: str, manifest: dict[str, Any], error: ProbeError) -> Path:
    """Write `<run_id>.failed/` into the folder of results; it says where.

    `replay.yaml` is the experiment of this point alone, which fails again at the same step, as runs are equal to
    the bit; `failure.json` has the message and every live sequence with its block table; `ledger.npz` the
    identity of the last write to every slot of each tier, -1 where there was none, and the identities that each
    sequence is to have.
    """
    import numpy as np
    from ruamel.yaml import YAML

    place = folder / f"{run_id}.failed"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    written = manifest["written"]
    config = written | {"name": f"{written['name']}-replay", "replications": manifest["replication"] + 1}
    with (place / "replay.yaml").open("w", encoding="utf-8") as file:
        file.write(f"# kvsim run this file: {' '.join(str(error).split())}\n")
        YAML().dump(config, file)
    evidence = error.evidence or {"arrays": {}}
    arrays = evidence.pop("arrays")
    write_json(place / "failure.json", {"message": str(error), "code": manifest["code"], **evidence})
    np.savez_compressed(place / "ledger.npz", **arrays)
    return place
