"""From recordings to a smaller FLUX: scores, plans, repair, surgery on state dicts, pruned checkpoints, LoRA conversion."""
