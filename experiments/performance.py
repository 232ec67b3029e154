"""The performance of one run: from plain settings to a stored folder, in whatever process."""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A run to do, in plain data that any process can be sent. `manifest` is what is known beforehand."""

    run_id: str
    folder: str
    settings: dict[str, Any]
    replication: int
    plugins: list[str]
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run has no result; `mistake` if the user is to change something."""

    message: str
    mistake: bool
    details: str = field(compare=False)


def perform(job: Job, progress: Progress | None = None) -> Failure | None:
    """Run a job and store it; the reason if it fails."""
    from sim.errors import ProbeError, Stalled, UserError

    try:
        _perform(job, progress)
    except (BrokenPipeError, ConnectionError):
        raise  # nobody waits for the result any more
    except UserError as error:
        return Failure(str(error), True, traceback.format_exc())
    except ProbeError as error:
        from experiments.failures import store_failure

        left = store_failure(Path(job.folder), job.run_id, job.manifest, error)
        return Failure(f"{error}\n  to look into it: {left}", False, traceback.format_exc())
    except Stalled as error:
        return Failure(str(error), False, traceback.format_exc())
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        cause = error.__cause__ or error  # SimPy raises anew what a process raised
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if frame.filename in job.plugins:  # the user's own code
                place = f"{frame.filename}:{frame.lineno}: {frame.name}"
                return Failure(f"{place} raises {told}", True, traceback.format_exc())
        return Failure(told, False, traceback.format_exc())
    return None


def _perform(job: Job, progress: Progress | None) -> None:
    import numpy
    import numpy.ma
    import numpy.random  # numpy imports these late, and imports are no part of a run's time
    import pyarrow
    import simpy

    from experiments import plugins
    from experiments.build import capacity_told, run
    from experiments.experiment import Experiment
    from experiments.recording import Recording
    from experiments.results import run_folder, write_json

    plugins.load_all(map(Path, job.plugins))
    experiment = Experiment(**job.settings)
    wall, cpu = time.perf_counter(), time.process_time()
    with run_folder(Path(job.folder), job.run_id) as folder:
        recording = Recording(folder)
        try:
            figures, probe_cpu = run(experiment, job.replication, recording.write, progress)
        finally:
            recording.close()
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu - probe_cpu}
        write_json(folder / "summary.json", {**figures, **spent})
        versions = {"python": platform.python_version(), "numpy": numpy.__version__}
        versions |= {"simpy": simpy.__version__, "pyarrow": pyarrow.__version__}
        reproducible = not (isinstance(experiment.probe, dict) and experiment.probe.get("calibrate"))
        told = {
            "reproducible": reproducible,
            "capacity": capacity_told(experiment),
            "versions": versions,
            "platform": sys.platform,
        }
        write_json(folder / "manifest.json", {**job.manifest, **told, **spent, "probe_cpu_s": probe_cpu})
