"""The ComfyUI side: every node is declarations and one call.

The glue to ComfyUI is in `host.py`, `watching.py`, `loading.py` and `computing.py`.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .calibrate import Calibrate
from .chance import QueueLimit, RandomInt, RandomSize
from .checking import checking
from .choose import ChooseModel
from .compare import Compare
from .plans import LoadPlan, PlanByBudget, PlanByCount, PlanByThreshold
from .previews import AnimateBlockPreviews, DecodeBlockPreviews
from .prompts import Counter, Prompts
from .pruned import LoadPrunedCheckpoint, LoadPrunedFlux, LoadPrunedLora, SavePrunedFlux
from .record import (
    Record,
    RecordBlockStates,
    RecordInternals,
    RecordLensRows,
    RecordOptions,
    RecordTrajectories,
)
from .recordings import InternalsReport, LoadRecording
from .retrain import LoadReplacedFlux, RetrainLayers
from .taps import TapBlocks
from .timer import FluxTimer
from .tiny import LoadTinyFlux


class FluxPokeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes: list[type[io.ComfyNode]] = [
            LoadTinyFlux,
            Record,
            RecordOptions,
            RecordInternals,
            RecordBlockStates,
            RecordTrajectories,
            RecordLensRows,
            Calibrate,
            LoadRecording,
            InternalsReport,
            PlanByCount,
            PlanByThreshold,
            PlanByBudget,
            LoadPlan,
            LoadPrunedFlux,
            SavePrunedFlux,
            LoadPrunedCheckpoint,
            LoadPrunedLora,
            RetrainLayers,
            LoadReplacedFlux,
            ChooseModel,
            TapBlocks,
            DecodeBlockPreviews,
            AnimateBlockPreviews,
            Compare,
            FluxTimer,
            Prompts,
            Counter,
            RandomInt,
            RandomSize,
            QueueLimit,
        ]
        return [checking(node) for node in nodes]
