"""Ground floor: what a FLUX checkpoint is, a transformer that runs it, and a tiny one to hold in the hand."""
