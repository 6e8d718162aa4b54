"""What a FLUX checkpoint is, and a transformer that runs it without ComfyUI."""
