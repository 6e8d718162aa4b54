"""Recording what a FLUX does while it draws: neurons, rows, states, trajectories."""
