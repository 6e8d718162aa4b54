"""Neurons of a concept: found by comparing recordings, turned down or up while the model draws, saved as a LoRA."""
