"""Plans: which backend computes at each site of a network, and how the whole is run, on one device and for one job.

`epg-fast tune` makes a plan by measuring (`epg_fast.tuning`); everything else reads plans and never measures. `choose`
turns what a user asks for (`--ops`) into what runs. A plan is a JSON file with its evidence in it.
"""

from epg_fast.plans.choice import Chosen, Ops, choose, choose_together, parse_ops
from epg_fast.plans.plan import Case, Machine, Plan, Variant, plans_folder, read_plan, stored_plans
from epg_fast.plans.sites import PLAIN, SITES, site_choices

__all__ = [
    "PLAIN",
    "SITES",
    "Case",
    "Chosen",
    "Machine",
    "Ops",
    "Plan",
    "Variant",
    "choose",
    "choose_together",
    "parse_ops",
    "plans_folder",
    "read_plan",
    "site_choices",
    "stored_plans",
]
