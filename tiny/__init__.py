"""The tiny FLUX that ships: small enough to be recorded, cut and retrained on a CPU in a minute."""
