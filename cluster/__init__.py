"""The same work on many machines, on Ray (`flux-poke[cluster]`); one machine is the same code.

What is done is in the rooms above; here is who does it, and what becomes of it where a worker, a machine or the cluster is
lost. Nothing above knows Ray.
"""
