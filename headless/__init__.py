"""ComfyUI without its page: queue graphs on a running server, or start one."""
