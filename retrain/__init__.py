"""Training what a cut left over against what the dense model did: layer by layer, or the whole model end to end."""
