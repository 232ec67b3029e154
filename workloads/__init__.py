"""Workloads: where requests come from. Importing the package registers the built-in ones."""

from workloads.arrivals import ArrivalProcess, arrivals
from workloads.csv_traces import Azure, BurstGpt, Csv, Vidur
from workloads.json_traces import Bailian, JsonLines, Mooncake
from workloads.lengths import LengthSampler, lengths
from workloads.recorded_lengths import Alpaca, Empirical, ShareGpt
from workloads.streams import Streams
from workloads.traces import TraceFormat, TraceRows, trace_format
from workloads.workload import Sampling, Synthetic, Trace, Workload, workload

__all__ = [
    "Alpaca", "ArrivalProcess", "Azure", "Bailian", "BurstGpt", "Csv", "Empirical", "JsonLines",
    "LengthSampler", "Mooncake", "Sampling", "ShareGpt", "Streams", "Synthetic", "Trace", "TraceFormat",
    "TraceRows", "Vidur", "Workload", "arrivals", "lengths", "trace_format", "workload",
]  # fmt: skip
