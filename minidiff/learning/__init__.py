"""How a model learns: the run and its state, steps, processes, Muon."""
