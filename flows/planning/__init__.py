"""What a run would take, simulated over the graph."""
