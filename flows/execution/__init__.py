"""One stage of the graph, run anywhere: in a thread here or by a worker of a cluster."""
