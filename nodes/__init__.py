"""The ComfyUI side: every node is declarations and one call.

The glue to ComfyUI is in `host.py`, `watching.py`, `loading.py` and `computing.py`.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .atlas import ShowNeurons
from .calibrate import Calibrate
from .chance import QueueLimit, RandomInt, RandomSize
from .checking import checking
from .choose import ChooseModel, OnOff
from .compare import Compare
from .plans import LoadPlan, PlanByBudget, PlanByCount, PlanByThreshold
from .poking import FindNeurons, LoadNeurons, PokeBlocks, PokeNeurons
from .previews import AnimateBlockPreviews, DecodeBlockPreviews
from .prompts import Counter, Prompts
from .pruned import LoadPrunedCheckpoint, LoadPrunedFlux, LoadPrunedLora, SavePrunedFlux
from .record import (
    Record,
    RecordAtlas,
    RecordBlockStates,
    RecordInternals,
    RecordLensRows,
    RecordOptions,
    RecordTrajectories,
)
from .recordings import InternalsReport, LoadRecording
from .retrain import LoadReplacedFlux, RetrainLayers
from .sweep import Sweep
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
            RecordAtlas,
            Calibrate,
            LoadRecording,
            InternalsReport,
            ShowNeurons,
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
            OnOff,
            TapBlocks,
            DecodeBlockPreviews,
            AnimateBlockPreviews,
            Compare,
            FindNeurons,
            LoadNeurons,
            PokeNeurons,
            PokeBlocks,
            Sweep,
            FluxTimer,
            Prompts,
            Counter,
            RandomInt,
            RandomSize,
            QueueLimit,
        ]
        return [checking(node) for node in nodes]
