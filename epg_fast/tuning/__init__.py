"""`epg-fast tune`: makes a plan by measuring on this machine; nothing else in the package measures.

    command     the table, the plan's file           calls job, candidates and tuner
    job         what is to be tuned
    candidates  which backends and ways to run there are, and which cannot run here
    tuner       which candidate is tried against which, and who wins: no network, no process; asks a journal
    answers     the journal, which asks the bench for what it does not know yet
    worker      the bench: a process that does the work, with a time limit, and may crash (`epg_fast.child`)
    workloads   what is checked and timed: sampling and training as they will run, of a few blocks or all

PyTorch's own `register_custom_op_autotuning` chooses while it compiles, in every process for itself, one custom
operator at a time. It checks no result, survives no crash, sees neither the backward pass nor the whole job, and ranks
may differ.
"""

from epg_fast.tuning.command import ensure_plan, tune

__all__ = ["ensure_plan", "tune"]
