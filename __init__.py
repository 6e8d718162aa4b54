"""Flux Poke: record, see, cut, repair and retrain the MLP neurons of FLUX.

The same folder is the Python package `flux_poke` and a ComfyUI custom-node pack. Importing it costs nothing: the nodes are
imported when ComfyUI asks for them.
"""

__version__ = "0.1.0"

#: ComfyUI loads what is drawn on nodes from here (web/*.js), and the help pages of the nodes (web/docs).
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; the extension with all nodes."""
    from .nodes import FluxPokeExtension

    return FluxPokeExtension()
