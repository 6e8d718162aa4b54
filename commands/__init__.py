"""The commands of `flux-poke`, by theme: thin functions; the work is in the library, which they load only when they run."""
