"""The commands of machines with several copies, or of several that answer as one, inside lifeline.py: it ends all when
one is lost, and lets running requests end.

lifeline.py runs without this project. It is copied as a file, not imported.
"""

from __future__ import annotations

from pathlib import Path

from tasks.deployment.arguments import COPIES_PORT, LIFELINE_PORT, MODEL, PORT, vllm_command
from tasks.deployment.sizing import Plan

LIFELINE = Path(__file__).with_name("lifeline.py")


def group_size(plan: Plan) -> int:
    """The number of machines that answer as one."""
    return plan.pipeline if plan.grouped else plan.machines


def machine_command(plan: Plan, leader: str, rank: str, first: str) -> list[str]:
    """vLLM's command on one machine. leader, rank: values or variables; rank 0 is the leader.

    first: the number of the first copy on this machine, or a variable, if the machines hold whole copies.
    """
    if plan.grouped:
        return vllm_command(*_group_arguments(leader, rank))
    return vllm_command(*_copies_arguments(plan, leader, rank, first))


def server_command(plan: Plan) -> list[str]:
    """vLLM's command on a machine that answers for itself; inside lifeline.py if it has several copies, for whose
    answers vLLM does not wait when it is told to end."""
    if plan.grouped or plan.copies == 1:
        return vllm_command()
    return _wrapped("127.0.0.1", "0", 1, f"--metrics={PORT}", "--host=127.0.0.1", command=vllm_command())


def in_group(plan: Plan, leader: str, rank: str, command: list[str]) -> list[str]:
    """The command inside lifeline.py."""
    # vLLM does not wait for the answers of several copies itself
    waits = [f"--metrics={PORT}"] if rank == "0" and not plan.grouped else []
    return _wrapped(leader, rank, group_size(plan), *waits, command=command)


def group_commands(plan: Plan, leader: str) -> list[str]:
    """The command lines of all machines; empty if each machine answers for itself. leader: a value or a variable."""
    ranks = [(str(rank), str(rank * plan.copies)) for rank in range(group_size(plan))] if plan.joined else []
    return [" ".join(in_group(plan, leader, rank, machine_command(plan, leader, rank, first))) for rank, first in ranks]


def ray_command(plan: Plan) -> str:
    """The command line on a Ray cluster, which starts the processes of all machines."""
    if plan.grouped:
        return " ".join(vllm_command("--nnodes=1", "--distributed-executor-backend=ray"))
    copies = ("--data-parallel-backend=ray", f"--data-parallel-size={plan.copies * plan.machines}")
    return " ".join(vllm_command(*copies, f"--data-parallel-size-local={plan.copies}", *_experts(plan)))


def _wrapped(leader: str, rank: str, size: int, *further: str, command: list[str]) -> list[str]:
    options = (f"--leader={leader}", f"--port={LIFELINE_PORT}", f"--rank={rank}", f"--size={size}", *further)
    return ["python3", f"{MODEL}/serve/{LIFELINE.name}", *options, "--", *command]


def _group_arguments(leader: str, rank: str) -> list[str]:
    """For one of several machines that share a copy."""
    return [f"--node-rank={rank}", f"--master-addr={leader}", *(["--headless"] if rank != "0" else [])]


def _copies_arguments(plan: Plan, leader: str, rank: str, first: str) -> list[str]:
    """For one of several machines with whole copies (data parallelism)."""
    return [
        f"--data-parallel-size={plan.copies * plan.machines}",
        f"--data-parallel-size-local={plan.copies}",
        f"--data-parallel-address={leader}",
        f"--data-parallel-rpc-port={COPIES_PORT}",
        *_experts(plan),
        *([f"--data-parallel-start-rank={first}", "--headless"] if rank != "0" else []),
    ]


def _experts(plan: Plan) -> list[str]:
    """Spread them over the machines too: with one copy on each, the settings for one machine do not say so."""
    return ["--enable-expert-parallel"] if plan.experts else []
