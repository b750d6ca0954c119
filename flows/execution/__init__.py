"""Run one stage of the graph, in a thread or on a worker of a cluster."""
