"""The ComfyUI side: every node is declarations and one call.

The glue to ComfyUI is in `host.py`, `watching.py`, `loading.py` and `computing.py`.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .choose import ChooseModel
from .compare import Compare
from .hidden_states import RecordHiddenStates
from .plans import LoadPlan, PlanByBudget, PlanByCount, PlanByThreshold
from .prompts import Counter, Prompts
from .pruned import LoadPrunedCheckpoint, LoadPrunedFlux, LoadPrunedLora, SavePrunedFlux
from .record import InternalsReport, RecordInternals
from .retrain import LoadReplacedFlux, RetrainLayers
from .see import AnimateBlockPreviews, DecodeBlockPreviews, TapBlocks
from .tiny import LoadTinyFlux


class FluxPokeExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadTinyFlux,
            RecordInternals,
            InternalsReport,
            RecordHiddenStates,
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
            Prompts,
            Counter,
        ]
