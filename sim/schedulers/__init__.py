"""Schedulers: who runs in the next step. Importing the package registers the built-in ones."""

from sim.schedulers.aisimulate import AISimulate
from sim.schedulers.base import Scheduler, scheduler
from sim.schedulers.lightllm import LightLLM
from sim.schedulers.mlfq import MultiLevelFeedback
from sim.schedulers.nano_vllm import NanoVLLM
from sim.schedulers.orca import Orca
from sim.schedulers.orders import order
from sim.schedulers.ranking import Ranking
from sim.schedulers.sarathi import Sarathi
from sim.schedulers.sglang import SGLang
from sim.schedulers.static import Static
from sim.schedulers.trtllm import TensorRTLLM
from sim.schedulers.victims import victim
from sim.schedulers.vidur import Vidur
from sim.schedulers.vllm_v0 import VllmV0
from sim.schedulers.vllm_v1 import VllmV1
from sim.schedulers.vtc import VirtualTokenCounter

__all__ = [
    "AISimulate",
    "LightLLM",
    "MultiLevelFeedback",
    "NanoVLLM",
    "Orca",
    "Ranking",
    "SGLang",
    "Sarathi",
    "Scheduler",
    "Static",
    "TensorRTLLM",
    "Vidur",
    "VirtualTokenCounter",
    "VllmV0",
    "VllmV1",
    "order",
    "scheduler",
    "victim",
]
