"""What a run would take, simulated over the graph."""

SECONDS = 60  # to measure, unless asked for more or less
LAST = 8  # of them that the last measurement may take: after the others none begins
