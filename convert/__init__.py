"""Between the layouts that a FLUX is kept in: ComfyUI's, diffusers', GGUF and orbax."""
