"""Where every node stands in the menu, and by which words it is found."""

from __future__ import annotations

RECORD, PLAN, LOAD, RETRAIN, SEE, POKE, TOOLS = (
    f"flux-poke/{part}" for part in ("Record", "Plan", "Load & save", "Retrain", "See", "Poke", "Tools")
)

_NEURONS = ("neuron", "neurons", "firing", "activation", "MLP", "interpret", "interpretability", "internals")
_STATES = ("hidden states", "activation", "interpret", "calibration data")
_PRUNE = ("prune", "pruning", "compress", "shrink", "smaller model", "less VRAM", "memory", "sparsity")
_LOADER = ("load model", "unet", "diffusion model")
_LAYERS = ("retrain", "train", "finetune", "distill", "recover", "repair")
_BLOCKS = ("block", "layer", "interpret", "interpretability", "logit lens", "intermediate", "x0 preview", "visualize")
_CONCEPT = ("concept", "erase", "unlearn", "steer", "steering", "ablation", "feature")
_ATLAS = ("atlas", "strongest", "top activations", "feature visualization", "max activating")
_CHANCE = ("random", "seed")

#: By name of a node's class: its category, and words that people search for.
FOUND: dict[str, tuple[str, tuple[str, ...]]] = {
    "LoadTinyFlux": (LOAD, (*_LOADER, "digits", "example", "demo", "test model")),
    "Record": (RECORD, (*_NEURONS, "calibrate", "statistics", "hook")),
    "RecordOptions": (RECORD, _NEURONS),
    "RecordInternals": (RECORD, (*_NEURONS, "count", "statistics", "hook")),
    "RecordBlockStates": (RECORD, _STATES),
    "RecordTrajectories": (RECORD, (*_STATES, "velocity", "distill")),
    "RecordLensRows": (RECORD, (*_STATES, "tuned lens", "logit lens")),
    "RecordAtlas": (RECORD, (*_NEURONS, *_ATLAS)),
    "Calibrate": (RECORD, (*_NEURONS, *_PRUNE, "calibrate", "calibration")),
    "LoadRecording": (RECORD, _NEURONS),
    "InternalsReport": (SEE, (*_NEURONS, "dead neurons", "histogram", "statistics", "chart")),
    "PlanByCount": (PLAN, (*_PRUNE, "neuron", "cut")),
    "PlanByThreshold": (PLAN, (*_PRUNE, "neuron", "firing", "cut", "dead neurons")),
    "PlanByBudget": (PLAN, (*_PRUNE, "neuron", "cut", "gigabytes", "fit", "low rank")),
    "LoadPlan": (PLAN, _PRUNE),
    "LoadPrunedFlux": (LOAD, (*_PRUNE, *_LOADER, "repair")),
    "SavePrunedFlux": (LOAD, (*_PRUNE, "save model", "export", "fp8", "repair")),
    "LoadPrunedCheckpoint": (LOAD, (*_PRUNE, *_LOADER)),
    "LoadPrunedLora": (LOAD, ("LoRA", "prune", "pruned")),
    "RetrainLayers": (RETRAIN, _LAYERS),
    "LoadReplacedFlux": (RETRAIN, (*_LAYERS, *_LOADER, "replace")),
    "ChooseModel": (LOAD, ("switch", "select", "model", "compare")),
    "OnOff": (TOOLS, ("switch", "toggle", "gate", "bypass", "mute", "boolean", "run once")),
    "TapBlocks": (SEE, _BLOCKS),
    "DecodeBlockPreviews": (SEE, (*_BLOCKS, "sheet", "grid")),
    "AnimateBlockPreviews": (SEE, (*_BLOCKS, "video", "gif", "film")),
    "Compare": (SEE, ("difference", "PSNR", "SSIM", "MSE", "metric", "heat map", "before after")),
    "ShowNeurons": (SEE, (*_NEURONS, *_ATLAS)),
    "FindNeurons": (POKE, (*_NEURONS, *_CONCEPT, "difference of means")),
    "LoadNeurons": (POKE, (*_NEURONS, *_CONCEPT)),
    "PokeNeurons": (POKE, (*_NEURONS, *_CONCEPT, "turn off", "boost", "intervention", "patching")),
    "PokeBlocks": (POKE, (*_BLOCKS, "ablation", "skip layer", "skip block", "scale block")),
    "Sweep": (POKE, (*_BLOCKS, *_CONCEPT, "XY plot", "grid", "ablation", "sampler", "skip layer")),
    "FluxTimer": (TOOLS, ("scheduler", "sigmas", "shift", "timesteps", "schedule")),
    "Prompts": (TOOLS, ("text file", "prompt list", "wildcard", "random line", "batch")),
    "Counter": (TOOLS, ("count", "index", "increment", "number")),
    "RandomInt": (TOOLS, (*_CHANCE, "number", "integer")),
    "RandomSize": (TOOLS, (*_CHANCE, "resolution", "width", "height", "aspect ratio")),
    "QueueLimit": (TOOLS, ("stop", "auto queue", "batch", "limit")),
}
