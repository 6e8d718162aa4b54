"""Recording what a FLUX does while it draws, and showing it."""
