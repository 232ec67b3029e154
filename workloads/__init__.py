"""Workloads: where requests come from. Importing the package registers the built-in ones."""

from workloads.arrivals import ArrivalProcess, arrivals
from workloads.csv_traces import Azure, BurstGpt, Csv, Vidur
from workloads.json_traces import Bailian, JsonLines, Mooncake
from workloads.lengths import LengthSampler, lengths
from workloads.recorded_lengths import Alpaca, Empirical, ShareGpt
from workloads.sampling import Sampling
from workloads.sessions import Agent, Conversation, Script, SessionKind, session
from workloads.shared_prefixes import FewShot, SystemPrompts
from workloads.streams import Streams
from workloads.synthetic import Synthetic
from workloads.trace_replay import Trace
from workloads.traces import TraceFormat, TraceRows, trace_format
from workloads.trees import Tree
from workloads.workload import Workload, workload

__all__ = [
    "Agent", "Alpaca", "ArrivalProcess", "Azure", "Bailian", "BurstGpt", "Conversation", "Csv", "Empirical",
    "FewShot", "JsonLines", "LengthSampler", "Mooncake", "Sampling", "Script", "SessionKind", "ShareGpt",
    "Streams", "Synthetic", "SystemPrompts", "Trace", "TraceFormat", "TraceRows", "Tree", "Vidur", "Workload",
    "arrivals", "lengths", "session", "trace_format", "workload",
]  # fmt: skip
